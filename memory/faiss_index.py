"""A memory backend made of FAISS indexes, one per KV head, named by a factory string.

``[gpu:]FACTORY[;name=value,...]``: FACTORY is what ``faiss.index_factory`` takes (``Flat``, ``IVF1024,Flat``,
``IVF1024,SQ8``, ``IVF1024,PQ16``, ``HNSW32``), the names are FAISS's search parameters (``nprobe``, ``efSearch``).
``IVF`` without a number takes as many lists as suit the size, and more as the memory grows; ``IVF`` alone means
``IVF,Flat``. ``gpu:`` puts the indexes on a GPU. The metric is always the inner product with the stored keys.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from memory.faiss_factory import (
    FIRST_LISTS_AT,
    TRAIN_POINTS,
    check_factory,
    faiss,
    index_nbytes,
    lists_for,
    new_index,
    parse_factory,
)
from memory.faiss_heads import Head, InvertedHead, is_simple_inverted, make_head
from memory.index import DEFAULT_TOP_K, ExactIndex, Index, LearntIndex, attend_hits
from memory.vectors import VectorBlocks

REBUILD_GROWTH = 4  # train again when the memory is this many times larger: all rebuilds cost 4/3 of the last one
RESCORED_NUMBERS = 1 << 24  # float32 numbers gathered at a time: 64 MiB

# Multiply-adds below which FAISS gets one thread. torch and FAISS wheels each bring an OpenMP runtime, whose threads
# spin for milliseconds after a call and so slow the other's next one: with 2 threads each on 2 cores, a torch matrix
# product of 10.9 ms takes 15.4 ms after a search, but 11.3 ms after one on a single thread. So a search on all threads
# must save more than that: from about 10 ms on (benchmarks/openmp_pools.py; 2.9e9 multiply-adds/s and thread).
ONE_THREAD_WORK = 1 << 25


class FaissIndex(Index):
    """Top-k attention over one FAISS index per KV head; see ``memory.index.Index`` for the methods.

    A trained index (IVF, PQ, SQ) is built once enough keys are stored, from these, and again each time the memory has
    grown fourfold. Until then this backend is exact, and dense unless ``top_k`` is set. It holds a second copy of the
    keys in FAISS's form. Scores are always inner products with the keys as they are stored.

    Args:
        factory: see the module's docstring.
        keys: the stored keys, read whenever an index is built.
        values: the stored values.
        top_k: number of pairs that a query attends to; None means 128.

    Raises:
        ValueError: as ``check_factory``.
    """

    def __init__(self, factory: str, keys: VectorBlocks, values: VectorBlocks, top_k: int | None = None) -> None:
        check_factory(factory, keys.head_dim)
        self._plan = parse_factory(factory)
        self._keys = keys
        self._values = values
        self._top_k = top_k or DEFAULT_TOP_K
        self._exact = ExactIndex(keys, values, top_k)
        self._heads: list[Head] | None = None
        self._trained_on = 0
        trained = new_index(self._plan, keys.head_dim, FIRST_LISTS_AT).is_trained
        self._build_at = 1 if trained else self._plan.keys_to_train()
        self._retrains = not trained

    def add(self, keys: Tensor) -> None:
        """Take in (G, T, D) keys appended to the blocks just now; builds or rebuilds when it is time."""
        total = len(self._keys)
        if self._heads is None or (self._retrains and total >= REBUILD_GROWTH * self._trained_on):
            if total >= max(1, self._build_at):
                self._build()
            return
        # What is stored, not what came in: a bfloat16 or int8 memory must be searched by the keys it holds.
        new = self._keys.take_range(total - keys.shape[1], total, torch.float32)
        if not all(head.accepts(new[g]) for g, head in enumerate(self._heads)):
            self._build()
            return
        heads, self._heads = self._heads, None  # an interrupt half-way leaves nothing rather than unequal heads
        with faiss_threads(new.numel() * 256):
            for g, head in enumerate(heads):
                head.add(new[g])
        self._heads = heads

    def fill(self, learnt: LearntIndex | None) -> None:
        """Take in all that is stored, in a new index: by what an index of these keys learnt before, if that fits.

        Raises:
            ValueError: ``learnt`` is damaged, or of other keys; its origin is named.
        """
        total = len(self._keys)
        if learnt is not None and learnt.name == self._plan.text and total < REBUILD_GROWTH * learnt.trained_on:
            try:
                self._restore(learnt)
            except ValueError as error:
                raise ValueError(
                    f"{learnt.origin} is damaged or belongs to another memory: {error}; open the memory without it, "
                    "with Memory.open(path, index='exact')"
                ) from error
        elif total >= max(1, self._build_at):
            self._build()

    def learnt(self) -> LearntIndex | None:
        """What ``fill`` can build this index again from; None where it is built from the keys alone."""
        heads = [head for head in self._heads or () if isinstance(head, InvertedHead)]
        if not heads:
            return None
        centroids, lists, codec = (torch.stack(parts) for parts in zip(*(h.learnt() for h in heads), strict=True))
        return LearntIndex(self._plan.text, self._trained_on, centroids, lists, codec)

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Top-k by the index, exact until it is built; shapes as in ``Index.search``."""
        if self._heads is None:
            return self._exact.search(queries, k)
        work = queries.shape[1] * sum(head.keys_per_query() for head in self._heads) * queries.shape[2]
        with faiss_threads(work):
            found = [head.search(queries[g].float(), k) for g, head in enumerate(self._heads)]
        scores = torch.stack([scores for scores, _ in found]).to(queries.device)
        slots = torch.stack([slots for _, slots in found]).to(queries.device)
        if self._heads[0].lossless:
            return scores.masked_fill(slots < 0, -torch.inf), slots
        return self._rescore(queries, slots)

    def attend(self, queries: Tensor, *, scale: float) -> tuple[Tensor, Tensor]:
        """Softmax attention over the hits; shapes as in ``Index.attend``."""
        if self._heads is None:
            return self._exact.attend(queries, scale=scale)
        scores, slots = self.search(queries, min(self._top_k, len(self._keys)))
        return attend_hits(queries, scores, slots, self._values, scale=scale)

    @property
    def attends_to_all(self) -> bool:
        """Until the index is built, unless ``top_k`` is set."""
        return self._heads is None and self._exact.attends_to_all

    def nbytes(self) -> int:
        """Bytes of the FAISS structures, by arithmetic: codes, ids, links and centroids, free room left out."""
        if self._heads is None:
            return 0
        prototype = new_index(self._plan, self._keys.head_dim, self._trained_on)
        return len(self._heads) * index_nbytes(prototype, len(self._keys))

    def describe(self) -> str:
        """The kind of index now in use."""
        if self._heads is None:
            return f"exact until {self._build_at:,} keys are stored, then {self._plan.text}"
        name = ("gpu:" if self._plan.gpu else "") + self._plan.named(self._trained_on)
        return f"{name}, top-{self._top_k}"

    def _build(self) -> None:
        total, heads = len(self._keys), self._keys.num_heads
        self._heads = None  # frees the old index before the new one takes its space
        sample = self._sample() if self._retrains else self._keys.take_range(0, 1, torch.float32)
        with faiss_threads():
            built = [make_head(self._plan, total, sample[g]) for g in range(heads)]
            if self._plan.graph:
                largest = torch.stack([b.norm(dim=-1).amax(-1) for b in self._keys.blocks(torch.float32)]).amax(0)
                for head, norm in zip(built, largest.tolist(), strict=True):
                    head.make_room(norm)
            for block in self._keys.blocks(torch.float32):
                for g, head in enumerate(built):
                    head.add(block[g])
        self._heads, self._trained_on = built, total

    def _restore(self, learnt: LearntIndex) -> None:
        known, groups = learnt.lists.shape[1], self._keys.num_heads
        if known > len(self._keys) or not len(learnt.lists) == len(learnt.centroids) == len(learnt.codec) == groups:
            raise ValueError(f"it is for {len(learnt.lists)} KV heads and {known:,} keys; the memory holds "
                             f"{groups} and {len(self._keys):,}")  # fmt: skip
        empty = [new_index(self._plan, self._keys.head_dim, learnt.trained_on) for _ in range(groups)]
        if self._plan.gpu or not is_simple_inverted(empty[0]):
            raise ValueError(f"an index {self._plan.text} learns nothing that can be restored")
        heads = [InvertedHead.restored(index, learnt.centroids[g], learnt.codec[g]) for g, index in enumerate(empty)]
        start = 0
        with faiss_threads():
            for block in self._keys.blocks(torch.float32):
                lists = learnt.lists[:, start : start + block.shape[1]].long()
                old, new = block.split([lists.shape[1], block.shape[1] - lists.shape[1]], dim=1)
                for g, head in enumerate(heads):
                    head.put(old[g].cpu(), lists[g])
                    head.add(new[g])
                start += block.shape[1]
        self._heads, self._trained_on = list(heads), learnt.trained_on

    def _sample(self) -> Tensor:
        """(G, S, D) float32 stored keys to train with, the same for the same memory."""
        total = len(self._keys)
        wanted = max(TRAIN_POINTS * lists_for(total), 2 * self._build_at, 1 << 14)
        generator = torch.Generator().manual_seed(0)
        slots = torch.randperm(total, generator=generator)[:wanted].sort().values.to(self._keys.device)
        return self._keys.gather(slots.expand(self._keys.num_heads, -1), torch.float32)

    def _rescore(self, queries: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Sort hits by their inner products with the keys as stored; -1 scores -inf and goes last."""
        rows = max(1, RESCORED_NUMBERS // max(1, slots.shape[0] * slots.shape[2] * queries.shape[-1]))
        scores = []
        for start in range(0, slots.shape[1], rows):
            some = slots[:, start : start + rows]
            keys = self._keys.gather(some.clamp(min=0).to(self._keys.device), torch.float32)  # (G, rows, K, D)
            asked = queries[:, start : start + rows].float().to(keys.device).unsqueeze(-1)
            scores.append((keys @ asked).squeeze(-1).to(queries.device).masked_fill(some < 0, -torch.inf))
        ordered, order = torch.cat(scores, dim=1).sort(dim=-1, descending=True, stable=True)
        return ordered, slots.gather(-1, order)


@contextmanager
def faiss_threads(work: int | None = None) -> Iterator[None]:
    """Give FAISS no more threads than torch has, and one for little work; see ONE_THREAD_WORK."""
    before = faiss.omp_get_max_threads()
    many = min(before, torch.get_num_threads())
    faiss.omp_set_num_threads(1 if work is not None and work < ONE_THREAD_WORK else many)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)  # where both share one runtime, this is torch's number too
