"""What the tokens of a question attend to in a memory, head by head and passage by passage."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fot.local import local_window
from fot.retrieval.passages import Cut
from fot.windows import Inputs, fill_window
from memory import Memory
from memory.index import DEFAULT_TOP_K

# Scores of one step: 2**22 float32 numbers are 16 MiB, whatever the size of the memory.
STEP_NUMBERS = 1 << 22
BESIDE = 32  # rows of scores side by side


@dataclass(frozen=True)
class Queries:
    """Queries of one memory layer: (H, T, D), rotated as in the attention, and the factor on inner products."""

    queries: Tensor
    scale: float


class QueryRecorder:
    """Keeps the queries of some tokens of one forward pass; see ``fot.recording.Recorder``.

    Args:
        tokens: their places in the window.
    """

    def __init__(self, tokens: range) -> None:
        self._tokens = tokens
        self.found: dict[int, Queries] = {}

    def follow(self, cache: Any) -> None:
        """Each pass begins with a new cache; nothing is to be done."""

    def note(self, layer: int, queries: Tensor, lses: list[Tensor], local: Any, scale: float) -> None:
        """Called by the attention of each memory layer, with queries (1, H, T, D)."""
        self.found[layer] = Queries(queries[0, :, self._tokens.start : self._tokens.stop].detach().float(), scale)

    def settle(self) -> None:
        """Nothing is searched for here."""


@torch.no_grad()
def question_queries(model: Any, memory: Memory, ids: Sequence[int], tokens: range) -> dict[int, Queries]:
    """Layer -> queries of some tokens of a prompt that fits the local window, read with the memory."""
    recorder = QueryRecorder(tokens)
    given = torch.tensor([list(ids)], device=model.device)
    positions = torch.arange(given.shape[1], device=given.device).unsqueeze(0)
    # What the last memory layer attends to, and what is above it, tells nothing of its queries.
    fill_window(model, Inputs(given, None, None, positions), local_window(model, [[memory]], recorder))
    return recorder.found


def passage_masses(memory: Memory, layer: int, asked: Queries, passages: Cut) -> Tensor:
    """Share of a head's attention to memory that each passage receives, for each query.

    Args:
        memory: what is attended to.
        layer: index of the memory layer.
        asked: its queries.
        passages: P of them, which together hold every slot.

    Returns:
        (H, T, P) float32 on the CPU; the sum over P is 1. With a backend that retrieves, only what it retrieved
        counts.
    """
    heads, tokens, size = asked.queries.shape
    folded = asked.queries.reshape(memory.num_key_value_heads, -1, size)  # (G, H / G * T, D)
    of_slot = torch.from_numpy(np.repeat(np.arange(len(passages)), passages.stops - passages.starts))
    found = _every_slot if memory[layer].attends_to_all else _retrieved
    return found(memory, layer, folded, asked.scale, of_slot, len(passages)).reshape(heads, tokens, -1).cpu()


def _every_slot(memory: Memory, layer: int, queries: Tensor, scale: float, of_slot: Tensor, count: int) -> Tensor:
    """(G, R, P) by all stored keys, block by block, in a softmax whose maximum grows."""
    groups, rows, _ = queries.shape
    masses = queries.new_zeros(groups, count, rows)
    highest = queries.new_full((groups, 1, rows), -torch.inf)
    asked = (scale * queries).mT
    step = max(1, STEP_NUMBERS // (groups * rows))
    for start in range(0, len(memory), step):
        some = slice(start, start + step)
        # Slot by slot, so that a slot's row is added to its passage's: across rows it takes five times as long.
        logits = memory[layer].keys(some).to(queries.device) @ asked  # (G, n, R)
        above = torch.maximum(highest, _highest(logits))
        masses *= (highest - above).exp_()
        logits.sub_(above).exp_()
        of = of_slot[some].to(queries.device)
        for of_head, found in zip(masses, logits, strict=True):
            of_head.index_add_(0, of, found)
        highest = above
    return (masses / masses.sum(1, keepdim=True)).mT


def _highest(logits: Tensor) -> Tensor:
    """The largest of each column, (G, 1, R) of (G, n, R): rows side by side first, which takes a third of the time."""
    beside = logits.shape[1] - logits.shape[1] % BESIDE
    if beside:
        tops = logits[:, :beside].unflatten(1, (-1, BESIDE)).amax(1)
        logits = torch.cat([tops, logits[:, beside:]], dim=1)
    return logits.amax(1, keepdim=True)


def _retrieved(memory: Memory, layer: int, queries: Tensor, scale: float, of_slot: Tensor, count: int) -> Tensor:
    """(G, R, P) by the slots that the backend retrieves."""
    products, slots = memory[layer].search(queries, memory.top_k or DEFAULT_TOP_K)
    weights = (scale * products).softmax(-1).nan_to_num(0.0)  # (G, R, K); a query may find nothing
    masses = queries.new_zeros(*queries.shape[:2], count)
    return masses.scatter_add_(-1, of_slot[slots.clamp(min=0).cpu()].to(queries.device), weights)
