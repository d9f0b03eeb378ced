"""What a memory backend must do, and the exact backend.

A backend serves one memory layer: G KV heads, the query heads of a KV head folded into the query axis, so that
keys are neither expanded nor stored twice. The model calls ``attend``; ``search`` is how some backends do it, and
what inspection and tests use.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from memory.clustered import LearntClusters
from memory.softmax import NAIVE_SCORES, attend, merge
from memory.vectors import VectorBlocks

# Retrieved pairs of one query when a backend must cut off and the user named no number (the paper's k).
DEFAULT_TOP_K = 128


@dataclass(frozen=True)
class LearntIndex:
    """What an index of one layer learnt from its keys, so that it can be built again without learning.

    Attributes:
        name: its factory string.
        trained_on: keys that were stored when it learnt.
        centroids: (G, L, D) float32, of the lists of each KV head.
        lists: (G, n) int32, the list of each of the first n stored keys.
        codec: (G, C) float32, what encodes a key; C is 0 where keys are kept as they are.
        origin: where it was read from, for errors.
    """

    name: str
    trained_on: int
    centroids: Tensor
    lists: Tensor
    codec: Tensor
    origin: str = "the saved index"

    @property
    def known(self) -> int:
        """Slots that it knows."""
        return self.lists.shape[1]

    def kept(self, slots: Tensor) -> "LearntIndex":
        """The same for the keys in these slots alone, (M,) int64 ascending."""
        return replace(self, lists=self.lists[:, slots[slots < self.lists.shape[1]]])


Learnt = LearntIndex | LearntClusters

# (start, stop) -> slots of the first tokens of documents, of those in start..stop-1: (n,) int64 ascending.
Starts = Callable[[int, int], Tensor]


class CustomIndex(Protocol):
    """What an index of the user's own needs. It reads the keys and values of one layer from the blocks given to it."""

    def add(self, keys: Tensor) -> None:
        """Add (G, T, D) keys that were just appended to the blocks."""

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k stored keys that have the largest inner product with each query, best first.

        Args:
            queries: (G, T, D) float.
            k: at most the number of stored keys.

        Returns:
            The inner products with the stored keys, (G, T, k) float32, and the slots of these keys, (G, T, k) int64.
            If an approximate backend finds fewer keys, it pads with score -inf and slot -1.
        """

    def attend(self, queries: Tensor, *, scale: float) -> tuple[Tensor, Tensor]:
        """Softmax attention over the memory, or over the part of it that this backend retrieves.

        Returns:
            The output, (G, T, D) in the dtype of ``queries``, and the log-sum-exp, (G, T) float32.
        """

    def nbytes(self) -> int:
        """Bytes that this backend holds beyond the keys and values themselves."""

    def describe(self) -> str:
        """A short description of the index in use, for people."""


@runtime_checkable
class Index(CustomIndex, Protocol):
    """A backend over the keys and values of one memory layer: all that a memory asks of it."""

    @property
    def attends_to_all(self) -> bool:
        """Whether ``attend`` looks at every stored pair, not at retrieved ones alone."""
        return False

    @property
    def joins_queries(self) -> bool:
        """Whether ``attend`` costs less for queries together than one by one, and gives each what it gives it alone."""
        return False

    def learnt(self) -> Learnt | None:
        """What the index can be built again from without learning; None where it is built from the keys alone."""
        return None


def attend_hits(
    queries: Tensor, scores: Tensor, slots: Tensor, values: VectorBlocks, *, scale: float
) -> tuple[Tensor, Tensor]:
    """Softmax attention over retrieved pairs alone.

    Args:
        queries: (G, T, D), for their dtype.
        scores: (G, T, K) float32 inner products; -inf where fewer than K were found.
        slots: (G, T, K) int64; -1 there.
        values: the stored values.
        scale: factor on inner products.

    Returns:
        output (G, T, D) in the dtype of ``queries``, log-sum-exp (G, T) float32.
    """
    logits = scale * scores
    lse = logits.logsumexp(-1)
    # A query without any hit has lse -inf, which would make NaN of its weights.
    weights = (logits - lse.unsqueeze(-1)).exp().nan_to_num(0.0)  # (G, T, K)
    outputs = []
    rows = max(1, NAIVE_SCORES * 4 // max(1, slots.shape[0] * slots.shape[2] * queries.shape[-1]))
    for start in range(0, queries.shape[1], rows):
        found = values.gather(slots[:, start : start + rows].clamp(min=0), torch.float32)  # (G, rows, K, D)
        outputs.append((weights[:, start : start + rows].unsqueeze(-2) @ found).squeeze(-2))
    return torch.cat(outputs, dim=1).to(queries.dtype), lse


class ExactIndex(Index):
    """Dense attention over all of memory, block by block, or over the exact top-k if ``top_k`` is set.

    Runs on the device of the stored vectors. Holds nothing of its own, and never a score matrix of queries x memory.
    """

    def __init__(self, keys: VectorBlocks, values: VectorBlocks, top_k: int | None = None) -> None:
        self._keys = keys
        self._values = values
        self._top_k = top_k

    def add(self, keys: Tensor) -> None:
        """Nothing to note: the blocks are the index."""

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Exact top-k by inner product in float32; shapes as in ``Index.search``."""
        # float32: bfloat16 scores would let rounding decide between near-equal keys.
        queries = queries.float()
        best_scores = queries.new_empty(*queries.shape[:2], 0)
        best_slots = torch.empty(*queries.shape[:2], 0, dtype=torch.int64, device=queries.device)
        start = 0
        for keys in self._keys.blocks(torch.float32):
            scores, slots = _top_k_of_block(queries, keys, min(k, keys.shape[1]))
            best_scores = torch.cat([best_scores, scores], dim=-1)
            best_slots = torch.cat([best_slots, slots + start], dim=-1)
            best_scores, order = best_scores.topk(min(k, best_scores.shape[-1]), dim=-1)
            best_slots = best_slots.gather(-1, order)
            start += keys.shape[1]
        return best_scores, best_slots

    def attend(self, queries: Tensor, *, scale: float) -> tuple[Tensor, Tensor]:
        """Softmax attention over all of memory, or over the exact top-k; shapes as in ``Index.attend``."""
        if self._top_k is not None:
            scores, slots = self.search(queries, min(self._top_k, len(self._keys)))
            return attend_hits(queries, scores, slots, self._values, scale=scale)
        vectors = (blocks.blocks(queries.dtype, ordered=False) for blocks in (self._keys, self._values))
        pairs = zip(*vectors, strict=True)
        output, lse = merge(attend(queries[None], k[None], v[None], scale=scale) for k, v in pairs)
        return output[0], lse[0]

    @property
    def attends_to_all(self) -> bool:
        """Unless ``top_k`` is set."""
        return self._top_k is None

    @property
    def joins_queries(self) -> bool:
        """Unless ``top_k`` is set: keys are gone through once for all."""
        return self._top_k is None

    def nbytes(self) -> int:
        """0: the keys and values are counted by the store."""
        return 0

    def describe(self) -> str:
        """What this backend does, in a few words."""
        return "exact, dense" if self._top_k is None else f"exact, top-{self._top_k}"


def _top_k_of_block(queries: Tensor, keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    rows = max(1, 4 * NAIVE_SCORES // (keys.shape[0] * keys.shape[1]))
    found = [(queries[:, i : i + rows] @ keys.mT).topk(k, dim=-1) for i in range(0, queries.shape[1], rows)]
    return torch.cat([scores for scores, _ in found], dim=1), torch.cat([slots for _, slots in found], dim=1)
