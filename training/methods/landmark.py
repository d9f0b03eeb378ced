"""Landmark attention (arXiv 2305.16300) in training: landmarks among a sequence's tokens, and the grouped softmax.

``fot.compare.landmark`` has the formula, and reads what is trained so.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface

from fot.compare.landmark import SPAN, grouped_weights, with_landmarks
from fot.compare.turned import no_mask
from fot.config import MemoryConfig
from training.batches import IGNORED, Batch

NAME = "landmark"  # of the attention implementation
TRAINS = ("embed",)  # the landmark's embedding among them
# Queries whose weights over all keys are alive at once.
QUERIES = 4 * SPAN


def add_landmark(model: Any, config: MemoryConfig) -> None:
    """Give a model one token more, the landmark, whose embedding is the mean of the others."""
    with torch.no_grad():
        mean = model.get_input_embeddings().weight.mean(0)
        model.resize_token_embeddings(model.config.vocab_size + 1, mean_resizing=False)
        model.get_input_embeddings().weight[-1] = mean


def insert_landmarks(batch: Batch, model: Any) -> Batch:
    """A batch with landmarks in its rows. A landmark foretells what the token before it would; that one has no label.

    Args:
        batch: rows of whole sequences.
        model: whose last token is the landmark.
    """
    landmark = model.config.vocab_size - 1
    rows, device = batch.input_ids.shape[0], batch.input_ids.device
    places = with_landmarks(list(range(batch.input_ids.shape[1])), 0, -1)[0]
    source = torch.tensor([place if place >= 0 else places[number - 1] for number, place in enumerate(places)])
    marks = torch.tensor(places, device=device) < 0
    before = torch.cat([marks[1:], marks.new_zeros(1)])

    def spread(table: Tensor) -> Tensor:
        return table[:, source.to(device)]

    return replace(
        batch,
        input_ids=spread(batch.input_ids).masked_fill(marks.expand(rows, -1), landmark),
        labels=spread(batch.labels).masked_fill(before, IGNORED),
        weights=spread(batch.weights).masked_fill(before, 0.0),
        **{name: spread(getattr(batch, name)) for name in ("padding", "content", "position", "answers")},
    )


def landmark_attention(
    module: Any,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in every layer, over a whole sequence that begins with a block.

    Args:
        module: the attention module.
        queries: (B, H, T, D), rotated.
        keys: (B, G, T, D), rotated.
        values: (B, G, T, D).
        attention_mask: not looked at: padding only follows.
        scaling: factor on inner products; None: D**-0.5.
        kwargs: not looked at.

    Returns:
        (B, T, H, D), and no weights.
    """
    scale = queries.shape[-1] ** -0.5 if scaling is None else scaling
    repeat = queries.shape[1] // keys.shape[1]
    known, read = (tensor.repeat_interleave(repeat, dim=1) for tensor in (keys, values))

    def some(asked: Tensor, known: Tensor, read: Tensor, first: int) -> Tensor:
        weights = grouped_weights(scale * (asked.float() @ known.float().mT), first)
        return weights.to(read.dtype) @ read

    run: Callable[..., Tensor] = some
    if torch.is_grad_enabled():  # weights of all queries and layers at once would take gigabytes
        run = lambda *given: checkpoint(some, *given, use_reentrant=False)  # noqa: E731
    parts = []
    for first in range(0, queries.shape[2], QUERIES):
        stop = min(queries.shape[2], first + QUERIES)
        parts.append(run(queries[:, :, first:stop], known[:, :, :stop], read[:, :, :stop], first))
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, landmark_attention)
AttentionMaskInterface.register(NAME, no_mask)
