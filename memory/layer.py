"""Keys, values and the index of one memory layer."""

import logging
import threading
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from memory.index import BackendChoice, Index, LearntIndex
from memory.vectors import VECTOR_DTYPES, VectorBlocks

if TYPE_CHECKING:
    from memory.store import Memory

logger = logging.getLogger(__name__)

# Threads may ask a memory that was just opened at once: one of them builds its index.
_BUILDING = threading.Lock()


class LayerMemory:
    """Keys, values and the index of one memory layer; get it as ``memory[layer]``.

    G is the number of KV heads, D the head size. Query heads that share a KV head lie along the query axis T.
    """

    def __init__(self, owner: "Memory") -> None:
        self._owner = owner
        self._keys = VectorBlocks(owner.num_key_value_heads, owner.head_dim, VECTOR_DTYPES[owner.key_dtype])
        self._values = VectorBlocks(owner.num_key_value_heads, owner.head_dim, VECTOR_DTYPES[owner.value_dtype])
        self._index: Index | None = None
        self._choice: BackendChoice | None = None
        # A layer that was read from disk gets its index when it is first asked: opening stays quick.
        self._lazy = False
        self._saved: LearntIndex | None = None

    def __len__(self) -> int:
        return len(self._keys)

    @property
    def device(self) -> torch.device:
        """Where the vectors lie."""
        return self._keys.device or torch.device("cpu")

    @property
    def backend(self) -> BackendChoice | None:
        """The backend in use and why; None while nothing is stored."""
        return self._choice

    def describe(self) -> str:
        """The index in use, in a few words."""
        if self._index is not None:
            return self._index.describe()
        return "empty" if self._choice is None else f"{self._choice.name}, built at the first search"

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k stored keys that have the largest inner product with each query, best first.

        Args:
            queries: (G, T, D) float, any device.
            k: number of hits, at least 1. If fewer keys are stored, all of them are returned.

        Returns:
            The inner products, (G, T, min(k, N)) float32, and the slots, the same shape in int64, on the device of
            ``queries``. If an approximate backend finds fewer keys, it pads with score -inf and slot -1.

        Raises:
            ValueError: k is below 1, or the queries do not have the shape of this memory's keys.
        """
        if k < 1:
            raise ValueError(f"k is {k}; ask for at least 1 hit")
        self._check_shape(queries, "queries")
        index = self._ready()
        if index is None:
            return queries.new_empty(*queries.shape[:2], 0).float(), queries.new_empty(*queries.shape[:2], 0).long()
        scores, slots = index.search(queries.to(self.device), min(k, len(self)))
        return scores.to(queries.device), slots.to(queries.device)

    def attend(self, queries: Tensor, *, scale: float) -> tuple[Tensor, Tensor]:
        """Softmax attention of the queries to this memory, with its log-sum-exp (for ``memory.softmax.merge``).

        Args:
            queries: (G, T, D) float, any device.
            scale: factor on inner products, normally ``head_dim**-0.5``.

        Returns:
            The output, (G, T, D) in the dtype and on the device of ``queries``, and the log-sum-exp, (G, T) float32. It
            is -inf if nothing is stored.
        """
        index = self._ready()
        if index is None:
            empty = torch.full(queries.shape[:2], -torch.inf, device=queries.device)
            return torch.zeros_like(queries), empty
        output, lse = index.attend(queries.to(self.device), scale=scale)
        return output.to(queries.device), lse.to(queries.device)

    def keys(self, slots: Tensor | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
        """Stored keys: all as (G, N, D), or those in ``slots`` (G, ...) as (G, ..., D)."""
        return self._vectors(self._keys, slots, dtype)

    def values(self, slots: Tensor | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
        """Stored values: all as (G, N, D), or those in ``slots`` (G, ...) as (G, ..., D).

        Raises:
            IndexError: A slot lies outside 0..N-1.
        """
        return self._vectors(self._values, slots, dtype)

    def _vectors(self, blocks: VectorBlocks, slots: Tensor | None, dtype: torch.dtype) -> Tensor:
        if slots is None:
            return blocks.take_range(0, len(blocks), dtype)
        bad = slots[(slots < 0) | (slots >= len(blocks))]
        if bad.numel():
            raise IndexError(f"slot {bad[0].item()} is outside 0..{len(blocks) - 1}, what this memory holds")
        return blocks.gather(slots.to(self.device), dtype)

    def _append(self, keys: Tensor, values: Tensor) -> None:
        self._keys.append(keys)
        self._values.append(values)
        choice = self._owner._choose(len(self), self.device)
        if self._lazy:
            self._choice = choice
        elif self._index is None or self._choice is None or choice.name != self._choice.name:
            self._build_index()
        else:
            self._index.add(keys)

    def _ready(self) -> Index | None:
        if self._lazy:
            with _BUILDING:
                if self._lazy:
                    self._build_index()
        return self._index

    def _build_index(self) -> None:
        self._index = self._choice = None
        if len(self):
            choice = self._owner._choose(len(self), self.device)
            self._index = self._owner._make_index(choice.name, self._keys, self._values, self._saved)
            self._choice = choice
            logger.info("memory backend %s: %s", choice.name, choice.reason)
        self._lazy, self._saved = False, None

    def _put_off(self, saved: LearntIndex | None) -> None:
        """Build the index, from what it learnt before, only when it is needed."""
        self._index = None
        self._choice = self._owner._choose(len(self), self.device) if len(self) else None
        self._lazy, self._saved = True, saved

    def _learnt(self) -> LearntIndex | None:
        """What the index learnt, or what it will be built from."""
        learnt = getattr(self._index, "learnt", None)  # FaissIndex has it
        return self._saved if learnt is None else learnt()

    def _reset(self) -> None:
        self._keys.reset()
        self._values.reset()
        self._index = self._choice = self._saved = None

    def _truncate(self, length: int) -> None:
        if len(self._keys) > length or len(self._values) > length:
            learnt = self._learnt()
            self._keys.truncate(length)
            self._values.truncate(length)
            known = learnt is not None and learnt.trained_on <= length
            self._rebuild(learnt.kept(torch.arange(length)) if known and learnt else None)

    def _keep(self, slots: Tensor, saved: LearntIndex | None = None) -> None:
        slots = slots.to(self.device)
        self._keys, self._values = self._keys.kept(slots), self._values.kept(slots)
        self._rebuild(saved)

    def _rebuild(self, saved: LearntIndex | None) -> None:
        if self._lazy or saved is not None:
            self._put_off(saved)
        else:
            self._build_index()

    def _check_shape(self, tensor: Tensor, what: str) -> None:
        heads, dim = self._owner.num_key_value_heads, self._owner.head_dim
        if tensor.ndim != 3 or tensor.shape[0] != heads or tensor.shape[2] != dim:
            raise ValueError(f"{what} have shape {tuple(tensor.shape)}; this memory takes ({heads}, tokens, {dim})")
