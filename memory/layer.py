"""Keys, values and the index of one memory layer, to be read."""

import torch
from torch import Tensor

from memory.backends import BackendChoice
from memory.checks import check_shape
from memory.indexed import IndexedLayer
from memory.softmax import attend
from memory.vectors import VectorBlocks


class LayerMemory:
    """Keys, values and the index of one memory layer; get it as ``memory[layer]``.

    G is the number of KV heads, D the head size. Query heads that share a KV head lie along the query axis T.
    """

    def __init__(self, layer: IndexedLayer) -> None:
        self._layer = layer

    def __len__(self) -> int:
        return len(self._layer)

    @property
    def device(self) -> torch.device:
        """Where the vectors lie."""
        return self._layer.content.device

    @property
    def backend(self) -> BackendChoice | None:
        """The backend in use and why; None while nothing is stored."""
        return self._layer.choice

    @property
    def attends_to_all(self) -> bool:
        """Whether ``attend`` looks at every stored pair, not at retrieved ones alone."""
        index = self._layer.ready()
        return index is not None and index.attends_to_all

    @property
    def joins_queries(self) -> bool:
        """Whether ``attend`` costs less for queries together than one by one, and gives each what it gives it alone."""
        index = self._layer.ready()
        return index is not None and index.joins_queries

    def describe(self) -> str:
        """The index in use, in a few words."""
        if self._layer.index is not None:
            return self._layer.index.describe()
        return "empty" if self.backend is None else f"{self.backend.name}, built at the first search"

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
        check_shape(self._layer.content, queries, "queries")
        index = self._layer.ready()
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
        index = self._layer.ready()
        if index is None:
            empty = torch.full(queries.shape[:2], -torch.inf, device=queries.device)
            return torch.zeros_like(queries), empty
        output, lse = index.attend(queries.to(self.device), scale=scale)
        return output.to(queries.device), lse.to(queries.device)

    def attend_newest(self, queries: Tensor, *, count: int, scale: float) -> tuple[Tensor, Tensor]:
        """Softmax attention to the last ``count`` stored pairs alone, every one of them, whatever the index.

        Args:
            queries: (G, T, D) float, any device.
            count: at least 1 and at most as many as are stored.
            scale: factor on inner products.

        Returns:
            As ``attend``.
        """
        keys, values = self._layer.newest(count, queries.dtype)
        output, lse = attend(queries.to(self.device)[None], keys[None], values[None], scale=scale)
        return output[0].to(queries.device), lse[0].to(queries.device)

    def keys(self, slots: Tensor | slice | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
        """Stored keys.

        Args:
            slots: a slice of neighbours, n of them, which may be read without a copy; or (G, ...) int64; None for all.
            dtype: of the result.

        Returns:
            (G, n, D), or (G, ..., D). Do not write to it.

        Raises:
            IndexError: A slot lies outside 0..N-1, or the slice has a step.
        """
        return self._vectors(self._layer.content.keys, slots, dtype)

    def values(self, slots: Tensor | slice | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
        """Stored values; see ``keys``."""
        return self._vectors(self._layer.content.values, slots, dtype)

    def _vectors(self, blocks: VectorBlocks, slots: Tensor | slice | None, dtype: torch.dtype) -> Tensor:
        if slots is None or isinstance(slots, slice):
            start, stop, step = (slots or slice(None)).indices(len(blocks))
            if step != 1:
                raise IndexError(f"a slice with step {step}: neighbouring slots are read together, so leave it out")
            return blocks.take_range(start, max(start, stop), dtype)
        bad = slots[(slots < 0) | (slots >= len(blocks))]
        if bad.numel():
            raise IndexError(f"slot {bad[0].item()} is outside 0..{len(blocks) - 1}, what this memory holds")
        return blocks.gather(slots.to(self.device), dtype)
