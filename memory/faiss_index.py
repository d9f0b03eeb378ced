"""A memory backend made of FAISS indexes, one per KV head, named by a factory string.

``[gpu:]FACTORY[;name=value,...]``: FACTORY is what ``faiss.index_factory`` takes (``Flat``, ``IVF1024,Flat``,
``IVF1024,SQ8``, ``IVF1024,PQ16``, ``HNSW32``), the names are FAISS's search parameters (``nprobe``, ``efSearch``).
``IVF`` without a number takes as many lists as suit the size, and more as the memory grows; ``IVF`` alone means
``IVF,Flat``. ``gpu:`` puts the indexes on a GPU. The metric is always the inner product with the stored keys.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from math import isqrt
from typing import Any

import numpy as np
import torch
from torch import Tensor

from memory.attend import NAIVE_SCORES
from memory.index import DEFAULT_TOP_K, ExactIndex, attend_hits
from memory.vectors import VectorBlocks

try:
    import faiss
except ImportError as error:
    raise ImportError("this index needs FAISS: pip install faiss-cpu, or use index='exact'") from error

TRIAL_DIMS = (64, 80, 96, 100, 128, 256)  # head sizes that a factory string is tried with while none is known
POINTS_PER_CENTROID = 39  # below this FAISS warns, and centroids are poor (its wiki, "Guidelines to choose an index")
TRAIN_POINTS = 64  # per centroid; 256, FAISS's own limit, takes four times as long for nothing measurable
REBUILD_GROWTH = 4  # train again when the memory is this many times larger: all rebuilds cost 4/3 of the last one
FIRST_LISTS_AT = 4096  # keys from which an ``IVF`` without a number is an inverted file
DEFAULT_NPROBE = 16
DEFAULT_EF_SEARCH = 128
DEFAULT_EF_CONSTRUCTION = 128
REACH = 0.1  # weight of a list's radius when lists are ranked, see _InvertedHead
FAR_KEYS = 256
HEAVY_LANDMARKS = 256
START_LANDMARKS = 16
FORBIDDEN = {
    "IDMap": "the memory numbers its keys itself; leave IDMap out",
    "NSG|NNDescent": "such a graph cannot grow; take HNSW32",
    "L2norm": "L2norm would rank by cosine; leave it out",
    r"^HNSW.*(SQ|PQ)": "a graph over compressed keys loses its way; take HNSW32 or IVF,SQ8",
    ",HNSW": "a graph over transformed keys breaks on inner products; let the string begin with HNSW",
}
RESCORED_NUMBERS = 1 << 24  # float32 numbers gathered at a time: 64 MiB

# Multiply-adds below which FAISS gets one thread. torch and FAISS wheels each bring an OpenMP runtime, whose threads
# spin for milliseconds after a call and so slow the other's next one: with 2 threads each on 2 cores, a torch matrix
# product of 10.9 ms takes 15.4 ms after a search, but 11.3 ms after one on a single thread. So a search on all threads
# must save more than that: from about 10 ms on (benchmarks/openmp_pools.py; 1.5e9 multiply-adds/s and thread).
ONE_THREAD_WORK = 1 << 24


@dataclass(frozen=True)
class _Plan:
    """A factory string, taken apart."""

    text: str
    gpu: bool
    description: str  # for faiss.index_factory; ``IVF`` may still lack its number
    settings: str  # for faiss.ParameterSpace

    @property
    def graph(self) -> bool:
        return self.description.startswith("HNSW")

    def named(self, num_keys: int) -> str:
        """The description with the number of lists for this many keys put in."""
        return re.sub(r"\bIVF(?![\d(])", f"IVF{_lists_for(num_keys)}", self.description)

    def keys_to_train(self) -> int:
        """Stored keys from which a trained index can be built without centroids that starve."""
        lists = re.search(r"\bIVF(\d*)", self.description)
        bits = re.search(r"(?:PQ|RQ|LSQ)\d+(?:x(\d+))?", self.description)
        least = POINTS_PER_CENTROID * max(
            int(lists[1]) if lists and lists[1] else 1, 1 << int(bits[1] or 8) if bits else 1
        )
        return max(least, FIRST_LISTS_AT if self.named(1) != self.description else 1)


def check_factory(factory: str, head_dim: int | None = None) -> None:
    """Raise if no index can be made from this string, before any key is stored.

    Args:
        factory: see the module's docstring.
        head_dim: D; None accepts a string that fits any usual one (``PQ25`` cannot split 64, but 100).

    Raises:
        ValueError: FAISS cannot build it for inner product, a parameter is unknown, or ``gpu:`` without a GPU.
    """
    plan = _parse(factory)
    problem = ""
    for dim in (head_dim,) if head_dim else TRIAL_DIMS:
        try:
            _try_out(plan, dim)
            break
        except RuntimeError as error:
            problem = problem or f"at head size {dim}: {_last_words(error)}"
    else:
        raise ValueError(
            f"index {factory!r} is nothing that FAISS can build for inner product ({problem}); use exact, auto, or a "
            "factory string such as Flat, IVF,Flat, IVF1024,SQ8, IVF1024,PQ16 or HNSW32"
        )
    for setting in filter(None, plan.settings.split(",")):
        _check_setting(plan, setting, dim)
    if plan.gpu:
        _check_gpu(plan)


class FaissIndex:
    """Top-k attention over one FAISS index per KV head; see ``memory.index.Index`` for the methods.

    A trained index (IVF, PQ, SQ) is built once enough keys are stored, from these, and again each time the memory has
    grown fourfold. Until then this backend is exact, and dense unless ``top_k`` is set. It holds the vectors a second
    time, in FAISS's form; scores are always inner products with the keys as stored.

    Args:
        factory: see the module's docstring.
        keys: the stored keys, read whenever an index is built.
        values: the stored values.
        top_k: pairs a query attends to; None means 128.

    Raises:
        ValueError: as ``check_factory``.
    """

    def __init__(self, factory: str, keys: VectorBlocks, values: VectorBlocks, top_k: int | None = None) -> None:
        check_factory(factory, keys.head_dim)
        self._plan = _parse(factory)
        self._keys = keys
        self._values = values
        self._top_k = top_k or DEFAULT_TOP_K
        self._exact = ExactIndex(keys, values, top_k)
        self._heads: list[_Head] | None = None
        self._trained_on = 0
        trained = _new_index(self._plan, keys.head_dim, FIRST_LISTS_AT).is_trained
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
        new = self._keys.slice(total - keys.shape[1], total, torch.float32)
        if not all(head.accepts(new[g]) for g, head in enumerate(self._heads)):
            self._build()
            return
        heads, self._heads = self._heads, None  # an interrupt half-way leaves nothing rather than unequal heads
        with _faiss_threads(new.numel() * 256):
            for g, head in enumerate(heads):
                head.add(new[g])
        self._heads = heads

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Top-k by the index, exact until it is built; shapes as in ``Index.search``."""
        if self._heads is None:
            return self._exact.search(queries, k)
        work = queries.shape[1] * sum(head.keys_per_query() for head in self._heads) * queries.shape[2]
        with _faiss_threads(work):
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

    def nbytes(self) -> int:
        """Bytes of the FAISS structures, by arithmetic: codes, ids, links and centroids, free room left out."""
        if self._heads is None:
            return 0
        prototype = _new_index(self._plan, self._keys.head_dim, self._trained_on)
        return len(self._heads) * _index_nbytes(prototype, len(self._keys))

    def describe(self) -> str:
        """The kind of index now in use."""
        if self._heads is None:
            return f"exact until {self._build_at:,} keys are stored, then {self._plan.text}"
        name = ("gpu:" if self._plan.gpu else "") + self._plan.named(self._trained_on)
        return f"{name}, top-{self._top_k}"

    def _build(self) -> None:
        total, heads = len(self._keys), self._keys.num_heads
        self._heads = None  # frees the old index before the new one takes its space
        sample = self._sample() if self._retrains else self._keys.slice(0, 1, torch.float32)
        with _faiss_threads():
            built = [_make_head(self._plan, total, sample[g]) for g in range(heads)]
            if self._plan.graph:
                largest = torch.stack([b.norm(dim=-1).amax(-1) for b in self._keys.blocks(torch.float32)]).amax(0)
                for head, norm in zip(built, largest.tolist(), strict=True):
                    head.make_room(norm)
            for block in self._keys.blocks(torch.float32):
                for g, head in enumerate(built):
                    head.add(block[g])
        self._heads, self._trained_on = built, total

    def _sample(self) -> Tensor:
        """(G, S, D) float32 stored keys to train with, the same for the same memory."""
        total = len(self._keys)
        wanted = max(TRAIN_POINTS * _lists_for(total), 2 * self._build_at, 1 << 14)
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


class _Head:
    """The index of one KV head, by FAISS's own add and search. Vectors are (n, D) float32 tensors."""

    def __init__(self, index: Any) -> None:
        self.index = index
        self.lossless = isinstance(index, faiss.IndexFlat)

    def accepts(self, keys: Tensor) -> bool:
        """Whether these keys can be added without a rebuild."""
        return True

    def make_room(self, largest_norm: float) -> None:
        """Prepare for keys of this norm."""

    def keys_per_query(self) -> int:
        """Keys compared with a query, roughly."""
        inverted = faiss.try_extract_index_ivf(self.index)
        return self.index.ntotal if inverted is None else 1 + self.index.ntotal * inverted.nprobe // inverted.nlist

    def add(self, keys: Tensor) -> None:
        self.index.add(_array(keys))

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        scores, slots = self.index.search(_array(queries), k)
        return torch.from_numpy(scores), torch.from_numpy(slots)


class _InvertedHead(_Head):
    """An inverted file whose lists are Euclidean clusters. Probed are those of largest ``q.c + 0.1 |q| r``, with c a
    list's mean and r its radius, or of largest ``q.x`` if that is more, x being one of the 256 keys farthest from
    their list's mean.

    FAISS by itself clusters directions under inner product, and loses keys that are long for their list. Share of the
    exact top-128's attention mass, 4 of 512 lists probed, 65,536 keys of a head of SmolLM2-135m (layers 8, 16, 24),
    then clustered keys of which 16 have ten times the usual norm:
    FAISS 0.958, 0.998, 0.975, 0.16; Euclidean clusters ranked by q.c 0.990, 0.998, 0.976, 0.38, and clusters of the
    augmented keys of ``_GraphHead`` likewise; with the radius 0.994, 0.998, 0.976, 0.92. A larger weight than 0.1
    hurts real keys. The far keys bring out more of the long ones (8,192 keys, 4 of 64 lists: from 0.87 to 1.00).
    """

    def __init__(self, index: Any, sample: Tensor) -> None:
        super().__init__(index)
        self.lossless = isinstance(index, faiss.IndexIVFFlat)
        # min_points: the caller sees to it that there are enough.
        clusters: Any = faiss.Kmeans(
            index.d, index.nlist, niter=10, seed=1, max_points_per_centroid=TRAIN_POINTS, min_points_per_centroid=1
        )
        clusters.train(_array(sample))
        index.quantizer.add(clusters.centroids)
        index.train(_array(sample))  # what encodes the residuals; the full quantizer is left as it is
        self._centroids = torch.from_numpy(clusters.centroids.copy())  # (L, D)
        self._radii = torch.full((index.nlist,), -torch.inf)  # an empty list is never probed
        self._far, self._far_lists, self._far_off = torch.empty(0, index.d), torch.empty(0).long(), torch.empty(0)

    def add(self, keys: Tensor) -> None:
        keys = keys.cpu()
        half_squares = self._centroids.square().sum(-1) / 2
        # In slices: (n, L) numbers of a whole block would be 256 MiB.
        nearest = torch.cat([(part @ self._centroids.T - half_squares).argmax(-1) for part in keys.split(2048)])
        distances = (keys - self._centroids[nearest]).norm(dim=-1)
        self._radii.scatter_reduce_(0, nearest, distances, "amax")
        far = torch.cat([self._far, keys]), torch.cat([self._far_lists, nearest]), torch.cat([self._far_off, distances])
        most = far[2].topk(min(FAR_KEYS, len(far[2]))).indices
        self._far, self._far_lists, self._far_off = (part[most] for part in far)
        vectors, lists = _array(keys), nearest.numpy()
        ids = np.arange(self.index.ntotal, self.index.ntotal + len(vectors))
        self.index.add_core(len(vectors), *map(faiss.swig_ptr, (vectors, ids, lists)))

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        queries = queries.cpu()
        found = [self._search(part, k) for part in queries.split(max(1, NAIVE_SCORES // self.index.nlist))]
        return torch.cat([scores for scores, _ in found]), torch.cat([slots for _, slots in found])

    def _search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        products = queries @ self._centroids.T  # (T, L)
        reach = REACH * queries.norm(dim=-1, keepdim=True) * self._radii
        rank = products + reach.nan_to_num(nan=-torch.inf)
        rank.scatter_reduce_(1, self._far_lists.expand(len(queries), -1), queries @ self._far.T, "amax")
        lists = rank.topk(min(self.index.nprobe, self.index.nlist)).indices
        near = products.gather(-1, lists)  # FAISS adds them to the products with residuals
        scores, slots = self.index.search_preassigned(_array(queries), k, lists.numpy(), near.numpy())
        return torch.from_numpy(scores), torch.from_numpy(slots)


class _GraphHead(_Head):
    """HNSW over keys with one more coordinate, ``sqrt(M^2 - |x|^2)``: the nearest has the largest inner product.

    The graph is Euclidean, but a query is far from all keys, and its walk from the top ends on a local best: the hits
    carry 0.77, 0.73, 0.57 of the mass of the exact top-128 on keys of SmolLM2-135m (16,384 of a head of layers 8, 16,
    24; efSearch 128), 0.29 if 8 keys have 10 times the usual norm. On the raw inner product, where few keys are ever
    linked to: 0.35, 0.67, 0.35 and 0.71. So walks start from the best *landmarks*, a sample of the keys and those of
    largest norm, compared with the query one by one: 0.997, 0.999, 0.999 and 1.00, in the same time.
    """

    def __init__(self, index: Any) -> None:
        super().__init__(index)
        self.lossless = False  # distances to far points are too coarse for scores
        self._bound = 0.0  # M
        self._stride = 1  # every so many-th key is a landmark
        self._slots = torch.empty(0, dtype=torch.int64)  # (L,) the landmarks
        self._landmarks = torch.empty(0, index.d)  # (L, D + 1)

    def accepts(self, keys: Tensor) -> bool:
        return bool(keys.norm(dim=-1).amax() <= self._bound)

    def make_room(self, largest_norm: float) -> None:
        # Four times what was seen, so that larger keys seldom force a rebuild; the recall is that of a tight bound.
        self._bound = 4.0 * largest_norm

    def keys_per_query(self) -> int:
        links = 2 * self.index.hnsw.nb_neighbors(0)  # half of them were seen before, each costs a cache miss or two
        return min(self.index.ntotal, self.index.hnsw.efSearch * links)

    def add(self, keys: Tensor) -> None:
        keys = keys.cpu()
        last = (self._bound**2 - keys.double().square().sum(-1, keepdim=True)).clamp(min=0).sqrt().float()
        keys = torch.cat([keys, last], dim=-1)
        self._pick_landmarks(keys)
        self.index.add(_array(keys))

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        queries = torch.nn.functional.pad(queries.cpu(), (0, 1))
        parts = queries.split(max(1, NAIVE_SCORES // len(self._slots)))
        found = [self._search(part, max(1, k)) for part in parts]
        return torch.cat([scores for scores, _ in found]), torch.cat([slots for _, slots in found])

    def _search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        products, starts = (queries @ self._landmarks.T).topk(min(START_LANDMARKS, len(self._slots)))
        distances = queries.square().sum(-1, keepdim=True) + self._bound**2 - 2 * products
        found = np.empty((len(queries), k), np.float32), np.empty((len(queries), k), np.int64)
        inputs = _array(queries), self._slots[starts].int().numpy(), _array(distances)
        search, asked = faiss.swig_ptr, self.index.hnsw.efSearch
        self.index.hnsw.efSearch = max(asked, k)
        try:  # the last argument: one walk from all starts together, not one a start
            self.index.search_level_0(
                len(queries), search(inputs[0]), k, *map(search, (*inputs[1:], *found)), starts.shape[1], 2
            )
        finally:
            self.index.hnsw.efSearch = asked
        return torch.from_numpy(found[0]), torch.from_numpy(found[1])

    def _pick_landmarks(self, keys: Tensor) -> None:
        first, total = self.index.ntotal, self.index.ntotal + len(keys)
        slots = torch.cat([self._slots, torch.arange(first, total)])
        keys = torch.cat([self._landmarks, keys])
        while total // self._stride > 4 * isqrt(total):
            self._stride *= 2
        keep = slots % self._stride == 0
        # The longer a key, the less is left for its last coordinate.
        keep[keys[:, -1].topk(min(HEAVY_LANDMARKS, len(keys)), largest=False).indices] = True
        self._slots, self._landmarks = slots[keep], keys[keep]


class _GpuHead(_Head):
    """Any index that FAISS has for a GPU, trained, filled and searched by CUDA tensors without a copy to the host."""

    def __init__(self, index: Any, sample: Tensor) -> None:
        # Makes FAISS take tensors. It changes FAISS for the whole process, so only where it is needed.
        from faiss.contrib.torch_utils import using_stream

        super().__init__(index)
        self.lossless = isinstance(index, faiss.IndexFlat | faiss.IndexIVFFlat)
        self._device = sample.device if sample.is_cuda else torch.device("cuda", torch.cuda.current_device())
        self._resources = _gpu_resources(self._device.index)
        self._using_stream = using_stream
        self.index = faiss.index_cpu_to_gpu(self._resources, self._device.index, index)
        if not self.index.is_trained:
            with self._using_stream(self._resources):
                self.index.train(self._place(sample))

    def keys_per_query(self) -> int:
        return 0  # no work for the threads of a CPU

    def add(self, keys: Tensor) -> None:
        with self._using_stream(self._resources):
            self.index.add(self._place(keys))

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        with self._using_stream(self._resources):
            scores, slots = self.index.search(self._place(queries), k)
        return scores, slots

    def _place(self, vectors: Tensor) -> Tensor:
        return vectors.detach().float().to(self._device).contiguous()


def _make_head(plan: _Plan, num_keys: int, sample: Tensor) -> _Head:
    index = _new_index(plan, sample.shape[-1], num_keys)
    if plan.gpu:
        return _GpuHead(index, sample)
    if plan.graph:
        return _GraphHead(index)
    # Exactly these: search_preassigned and add_core of their relatives (fast scan) corrupt memory or do other things.
    simple = type(index) in (faiss.IndexIVFFlat, faiss.IndexIVFScalarQuantizer, faiss.IndexIVFPQ)
    if simple and isinstance(_downcast(index.quantizer), faiss.IndexFlat):
        return _InvertedHead(index, sample)
    if not index.is_trained:
        index.train(_array(sample))
    return _Head(index)


def _new_index(plan: _Plan, dim: int, num_keys: int) -> Any:
    """An empty FAISS index for this many keys, its search parameters set; RuntimeError if FAISS cannot."""
    metric = faiss.METRIC_L2 if plan.graph else faiss.METRIC_INNER_PRODUCT
    index: Any = faiss.index_factory(dim + 1 if plan.graph else dim, plan.named(num_keys), metric)
    inverted = faiss.try_extract_index_ivf(index)
    if inverted is not None:
        inverted.nprobe = min(DEFAULT_NPROBE, inverted.nlist)
    if plan.graph:
        index.hnsw.efSearch, index.hnsw.efConstruction = DEFAULT_EF_SEARCH, DEFAULT_EF_CONSTRUCTION
    if hasattr(index, "pq"):  # FAISS's own 25 rounds over 65,536 keys take a minute a head
        index.pq.cp.niter, index.pq.cp.max_points_per_centroid = 10, TRAIN_POINTS
    if plan.settings:
        parameters: Any = faiss.ParameterSpace()
        parameters.set_index_parameters(index, plan.settings)
    return index


def _index_nbytes(index: Any, num_keys: int) -> int:
    index = _downcast(index)
    if isinstance(index, faiss.IndexPreTransform):
        return _index_nbytes(index.index, num_keys)
    if isinstance(index, faiss.IndexRefine):
        return _index_nbytes(index.base_index, num_keys) + _index_nbytes(index.refine_index, num_keys)
    if isinstance(index, faiss.IndexIVF):
        # An id is 8 bytes; the centroids are held by FAISS and by the head.
        return num_keys * (index.code_size + 8) + 2 * 4 * index.nlist * index.d
    if isinstance(index, faiss.IndexHNSW):
        graph: Any = index.hnsw
        upper = graph.nb_neighbors(1)
        links = graph.nb_neighbors(0) + upper / (upper - 1)  # one key in M reaches the next level
        return int(num_keys * (index.storage.sa_code_size() + 4 * links + 12))
    return int(num_keys * index.sa_code_size())


def _downcast(index: Any) -> Any:
    return faiss.downcast_index(index)


def _lists_for(num_keys: int) -> int:
    """A power of two of about 2..4 sqrt(N), so still sqrt(N) when the memory has grown fourfold."""
    return 1 << (max(1, min(4 * isqrt(num_keys), num_keys // POINTS_PER_CENTROID)).bit_length() - 1)


def _parse(factory: str) -> _Plan:
    text, _, settings = factory.replace(" ", "").partition(";")
    description = text.removeprefix("gpu:")
    if re.search(r"\bIVF\d*$", description):
        description += ",Flat"
    return _Plan(factory, text.startswith("gpu:"), description, settings)


def _try_out(plan: _Plan, dim: int) -> None:
    """RuntimeError unless the index can be built and filled step by step."""
    for pattern, reason in FORBIDDEN.items():
        if re.search(pattern, plan.description):
            raise RuntimeError(reason)
    index = _new_index(replace(plan, settings=""), dim, FIRST_LISTS_AT)
    if index.is_trained:
        for _ in range(2):
            index.add(np.ones((2, index.d), np.float32))


def _check_setting(plan: _Plan, setting: str, dim: int) -> None:
    try:
        if not re.fullmatch(r"\w+=0*[1-9]\d*", setting):
            raise RuntimeError("write name=number with a whole number above 0")
        _new_index(replace(plan, settings=setting), dim, FIRST_LISTS_AT)
    except RuntimeError as error:
        raise ValueError(
            f"parameter {setting!r} of index {plan.text!r} cannot be set ({_last_words(error)}); IVF takes nprobe, "
            "HNSW takes efSearch and efConstruction"
        ) from None


def _check_gpu(plan: _Plan) -> None:
    if plan.graph:
        raise ValueError(f"index {plan.text!r}: HNSW runs on a CPU alone; leave gpu: out or take gpu:IVF,Flat")
    if not hasattr(faiss, "StandardGpuResources") or faiss.get_num_gpus() == 0:
        raise ValueError(
            f"index {plan.text!r} needs a GPU that FAISS can use, and there is none: install fot[gpu] in place of "
            "faiss-cpu and run where a CUDA device is, or leave gpu: out"
        )


def _last_words(error: Exception) -> str:
    """What FAISS says, without where in its source."""
    return str(error).rsplit(": ", 1)[-1].strip()


@cache
def _gpu_resources(device: int) -> Any:
    # One per device and process: each sets gigabytes of scratch memory aside otherwise.
    resources = faiss.StandardGpuResources()
    resources.setTempMemory(256 << 20)
    return resources


def _array(vectors: Tensor) -> np.ndarray:
    return np.ascontiguousarray(vectors.detach().float().cpu().numpy())


@contextmanager
def _faiss_threads(work: int | None = None) -> Iterator[None]:
    """Give FAISS no more threads than torch has, and one for little work; see ONE_THREAD_WORK."""
    before = faiss.omp_get_max_threads()
    many = min(before, torch.get_num_threads())
    faiss.omp_set_num_threads(1 if work is not None and work < ONE_THREAD_WORK else many)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)  # where both share one runtime, this is torch's number too
