"""Landmark attention (arXiv 2305.16300): a landmark token after every 50 tokens stands for them.

A query's own block and the landmarks of the blocks before share one softmax; the tokens of each of these blocks share
another, and count as much as it times the weight of their landmark. Landmarks themselves have no value (section 3.1).
Trained so, a model can be read with a few blocks alone: those whose landmarks score highest for a query in a head.

Read like this, the last ``TOP_K`` blocks are at their true distance; all before lie at one place in front of them, so
that no distance is longer than those that were trained (the authors' stingy positions).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache

from fot.compare.readers import CachedReader
from fot.compare.rope import NONE, check_rotary, rotated
from fot.compare.turned import no_mask
from fot.families import attention_modules
from fot.rotary import Rotary, rotary_of

BLOCK = 50  # tokens before a landmark
SPAN = BLOCK + 1
TOP_K = 5  # blocks that a query reads
NAME = "landmark_blocks"  # of the attention implementation
GIVEN = "landmark_rotary"  # keyword by which the hook hands over how keys are turned


def with_landmarks(ids: Sequence[int], offset: int, landmark: int) -> tuple[list[int], list[int]]:
    """A text's tokens with landmarks between them.

    Args:
        ids: token ids that go on.
        offset: places before them in their block.
        landmark: its id.

    Returns:
        the ids; for each of the text's tokens the place from which the next one is foretold: its own, or that of the
        landmark after it.
    """
    found, places = [], []
    for token in ids:
        found.append(token)
        if (offset + len(found)) % SPAN == BLOCK:
            found.append(landmark)
        places.append(len(found) - 1)
    return found, places


def grouped_weights(scores: Tensor, first: int) -> Tensor:
    """The grouped softmax.

    Args:
        scores: (..., T, S), of queries at places first..first + T - 1 and keys at 0..S - 1, every 51st a landmark.
        first: place of the first query.

    Returns:
        (..., T, S): rows sum to 1, landmarks and what follows have 0.
    """
    length, size = scores.shape[-2:]
    count = -(-size // SPAN)
    blocks = pad(scores, (0, count * SPAN - size), value=-torch.inf).unflatten(-1, (count, SPAN))
    inside, marks = blocks[..., :BLOCK], blocks[..., BLOCK]  # (..., T, N, 50), (..., T, N)
    places = torch.arange(first, first + length, device=scores.device)
    own, number = (places // SPAN).unsqueeze(-1), torch.arange(count, device=scores.device)
    past, here = number < own, number == own  # (T, N)
    index = own.unsqueeze(-1).expand(*scores.shape[:-1], 1, BLOCK)
    later = torch.arange(BLOCK, device=scores.device) > (places % SPAN).unsqueeze(-1)  # (T, 50)
    local = inside.gather(-2, index).squeeze(-2).masked_fill(later, -torch.inf)
    group = torch.cat([marks.masked_fill(~past, -torch.inf), local], dim=-1).softmax(-1)
    chosen, local = group.split([count, BLOCK], dim=-1)
    within = inside.masked_fill(~past.unsqueeze(-1), 0.0).softmax(-1)
    weights = chosen.unsqueeze(-1) * within + here.unsqueeze(-1) * local.unsqueeze(-2)
    return pad(weights, (0, 1)).flatten(-2)[..., :size]


def block_attention(
    module: Any,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in every layer: each query reads its own block and ``TOP_K`` of those before.

    Args:
        module: the attention module; ``layer_idx`` is its layer.
        queries: (B, H, T, D), not turned.
        keys: (B, G, S, D), not turned, those of the cache included.
        values: (B, G, S, D).
        attention_mask: not looked at: there is no padding.
        scaling: factor on inner products; None: D**-0.5.
        kwargs: ``GIVEN``.

    Returns:
        (B, T, H, D), and no weights.
    """
    rotary, layer, size = kwargs[GIVEN], module.layer_idx, keys.shape[2]
    scale = queries.shape[-1] ** -0.5 if scaling is None else scaling
    places = torch.arange(size, device=keys.device)
    far = rotary.back(layer, keys, -(places % SPAN))  # as if each block were the first
    outputs, first = [], size - queries.shape[2]
    start = first
    while start < size:
        block = start // SPAN
        stop, near = min(size, (block + 1) * SPAN), max(0, block - TOP_K) * SPAN
        # With the far blocks' place in front of it, the first near block is at ``SPAN``.
        shift = SPAN - near if near else 0
        asked = rotary.back(layer, queries[:, :, start - first : stop - first], -(places[start:stop] + shift))
        turned = rotary.back(layer, keys[:, :, near:stop], -(places[near:stop] + shift))
        known = torch.cat([far[:, :, :near], turned], dim=2)
        outputs.append(_read(asked, known, values[:, :, :stop], block, start, scale))
        start = stop
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


def _read(queries: Tensor, keys: Tensor, values: Tensor, block: int, start: int, scale: float) -> Tensor:
    """(B, H, t, D) of queries of one block from place ``start`` on, over all keys up to the last of them."""
    groups, length = keys.shape[1], queries.shape[2]
    asked = queries.unflatten(1, (groups, -1)).flatten(2, 3)  # (B, G, H / G * t, D)
    begin = block * SPAN
    own_keys, own_values = (tensor[:, :, begin : begin + BLOCK] for tensor in (keys, values))
    seen = torch.arange(begin, begin + own_keys.shape[2], device=keys.device) <= torch.arange(
        start, start + length, device=keys.device
    ).unsqueeze(-1)
    local = scale * (asked @ own_keys.mT)
    local = local.masked_fill(~seen.repeat(asked.shape[2] // length, 1), -torch.inf)
    if not block:
        return (local.softmax(-1) @ own_values).reshape(queries.shape)
    blocks = [tensor[:, :, :begin].unflatten(2, (block, SPAN)) for tensor in (keys, values)]
    best, where = (scale * (asked @ blocks[0][:, :, :, BLOCK].mT)).topk(min(TOP_K, block))  # (B, G, Q, K)
    index = where.flatten(2)[..., None, None].expand(-1, -1, -1, BLOCK, keys.shape[-1])
    found_keys, found_values = (
        tensor[:, :, :, :BLOCK].gather(2, index).unflatten(2, where.shape[2:]) for tensor in blocks
    )  # (B, G, Q, K, 50, D)
    within = (scale * (found_keys @ asked[:, :, :, None, :, None]).squeeze(-1)).softmax(-1)
    chosen, local = torch.cat([best, local], dim=-1).softmax(-1).split([best.shape[-1], local.shape[-1]], dim=-1)
    weights = (chosen.unsqueeze(-1) * within).flatten(3).unsqueeze(3)  # (B, G, Q, 1, K * 50)
    return ((weights @ found_values.flatten(3, 4)).squeeze(3) + local @ own_values).reshape(queries.shape)


@contextmanager
def reading_blocks(model: Any) -> Iterator[None]:
    """Within, a plain model reads by blocks.

    Raises:
        ValueError: positions that are not plain rotary ones.
    """
    check_rotary(model)
    rotary, before = rotary_of(model), model.config._attn_implementation
    hooks = [
        module.register_forward_pre_hook(partial(_hand_over, rotary), with_kwargs=True)
        for module in attention_modules(model)
    ]
    try:
        with rotated(model, {"rope_type": NONE}):
            model.set_attn_implementation(NAME)
            yield
    finally:
        for hook in hooks:
            hook.remove()
        model.set_attn_implementation(before)


def _hand_over(rotary: Rotary, module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
    return args, kwargs | {GIVEN: rotary}


@dataclass(frozen=True)
class LandmarkReader(CachedReader):
    """A plain model within ``reading_blocks``; its last token is the landmark."""

    new_cache: Callable[[], Any] = DynamicCache

    def feed(self, state: Any, ids: Sequence[int], keep: int) -> Tensor:
        return super().feed(state, ids, keep)[:, :-1]  # nobody writes a landmark

    def _hidden(self, cache: Any, ids: Sequence[int]) -> Tensor:
        """(len(ids), hidden_size) from which the token after each is foretold."""
        asked, places = with_landmarks(ids, cache.get_seq_length(), self.model.config.vocab_size - 1)
        return super()._hidden(cache, asked)[places]


AttentionInterface.register(NAME, block_attention)
AttentionMaskInterface.register(NAME, no_mask)
