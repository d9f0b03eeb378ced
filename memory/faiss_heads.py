"""FAISS indexes of single KV heads, each kind made to find the largest inner products."""

from functools import cache
from math import isqrt
from typing import Any

import numpy as np
import torch
from torch import Tensor

from memory.faiss_factory import TRAIN_POINTS, Plan, downcast, new_index
from memory.faiss_module import faiss
from memory.softmax import NAIVE_SCORES

REACH = 0.1  # weight of a list's radius when lists are ranked, see InvertedHead
FAR_KEYS = 256
HEAVY_LANDMARKS = 256
START_LANDMARKS = 16


class Head:
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
        self.index.add(as_array(keys))

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        scores, slots = self.index.search(as_array(queries), k)
        return torch.from_numpy(scores), torch.from_numpy(slots)


class InvertedHead(Head):
    """An inverted file whose lists are Euclidean clusters. Probed are those of largest ``q.c + 0.1 |q| r``, with c a
    list's mean and r its radius, or of largest ``q.x`` if that is more, x being one of the 256 keys farthest from
    their list's mean.

    FAISS by itself clusters directions under inner product, and loses keys that are long for their list. Share of the
    exact top-128's attention mass, 4 of 512 lists probed, 65,536 keys of a head of SmolLM2-135m (layers 8, 16, 24),
    then clustered keys of which 16 have ten times the usual norm:
    FAISS 0.958, 0.998, 0.975, 0.16; Euclidean clusters ranked by q.c 0.990, 0.998, 0.976, 0.38, and clusters of the
    augmented keys of ``GraphHead`` likewise; with the radius 0.994, 0.998, 0.976, 0.92. A larger weight than 0.1
    hurts real keys. The far keys bring out more of the long ones (8,192 keys, 4 of 64 lists: from 0.87 to 1.00).
    """

    def __init__(self, index: Any, centroids: Tensor) -> None:
        """``index``: ready to take keys, its quantizer holding the centroids (L, D) float32."""
        super().__init__(index)
        self.lossless = isinstance(index, faiss.IndexIVFFlat)
        self._centroids = centroids
        self._radii = torch.full((index.nlist,), -torch.inf)  # an empty list is never probed
        self._far, self._far_lists, self._far_off = torch.empty(0, index.d), torch.empty(0).long(), torch.empty(0)

    @classmethod
    def trained(cls, index: Any, sample: Tensor) -> "InvertedHead":
        """Learn the lists, and what encodes keys, from a sample (S, D)."""
        # min_points: the caller sees to it that there are enough.
        clusters: Any = faiss.Kmeans(
            index.d, index.nlist, niter=10, seed=1, max_points_per_centroid=TRAIN_POINTS, min_points_per_centroid=1
        )
        clusters.train(as_array(sample))
        index.quantizer.add(clusters.centroids)
        index.train(as_array(sample))  # what encodes the residuals; the full quantizer is left as it is
        return cls(index, torch.from_numpy(clusters.centroids.copy()))

    @classmethod
    def restored(cls, index: Any, centroids: Tensor, codec: Tensor) -> "InvertedHead":
        """The head that ``learnt`` gave these of, before any key.

        Raises:
            ValueError: they are not of this kind of index.
        """
        if tuple(centroids.shape) != (index.nlist, index.d):
            raise ValueError(f"centroids have shape {tuple(centroids.shape)}, the index takes {index.nlist, index.d}")
        if not (centroids.isfinite().all() and codec.isfinite().all()):
            raise ValueError("a centroid or a number of the code book is NaN or infinite")
        index.quantizer.add(as_array(centroids))
        if isinstance(index, faiss.IndexIVFScalarQuantizer):
            index.train(np.zeros((2, index.d), np.float32))  # gives its code book the size that it must have
        index.is_trained = True
        book = _code_book(index)
        size = 0 if book is None else book.size()
        if len(codec) != size:
            raise ValueError(f"the code book has {len(codec)} numbers, the index takes {size}")
        if book is not None and size:
            faiss.copy_array_to_vector(as_array(codec), book)
        return cls(index, centroids.clone())

    def learnt(self) -> tuple[Tensor, Tensor, Tensor]:
        """Centroids (L, D) float32, the list of each key (n,) int32, code book (C,) float32."""
        lists = torch.empty(self.index.ntotal, dtype=torch.int32)
        for number in range(self.index.nlist):
            size = self.index.invlists.list_size(number)
            if size:
                slots = faiss.rev_swig_ptr(self.index.invlists.get_ids(number), size)
                lists[torch.from_numpy(slots.copy())] = number
        book = _code_book(self.index)
        codec = np.empty(0, np.float32) if book is None else faiss.vector_to_array(book)
        return self._centroids, lists, torch.from_numpy(codec)

    def add(self, keys: Tensor) -> None:
        keys = keys.cpu()
        half_squares = self._centroids.square().sum(-1) / 2
        # In slices: (n, L) numbers of a whole block would be 256 MiB.
        nearest = torch.cat([(part @ self._centroids.T - half_squares).argmax(-1) for part in keys.split(2048)])
        self.put(keys, nearest)

    def put(self, keys: Tensor, nearest: Tensor) -> None:
        """Add keys (n, D) to the lists (n,) int64 of their nearest centroids.

        Raises:
            ValueError: a list that is not there; FAISS would write past its memory.
        """
        if len(nearest) and not 0 <= int(nearest.min()) <= int(nearest.max()) < self.index.nlist:
            raise ValueError(f"a key is in a list outside 0..{self.index.nlist - 1}")
        distances = (keys - self._centroids[nearest]).norm(dim=-1)
        self._radii.scatter_reduce_(0, nearest, distances, "amax")
        far = torch.cat([self._far, keys]), torch.cat([self._far_lists, nearest]), torch.cat([self._far_off, distances])
        most = far[2].topk(min(FAR_KEYS, len(far[2]))).indices
        self._far, self._far_lists, self._far_off = (part[most] for part in far)
        vectors, lists = as_array(keys), nearest.numpy()
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
        scores, slots = self.index.search_preassigned(as_array(queries), k, lists.numpy(), near.numpy())
        return torch.from_numpy(scores), torch.from_numpy(slots)


class GraphHead(Head):
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
        self.index.add(as_array(keys))

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        queries = torch.nn.functional.pad(queries.cpu(), (0, 1))
        parts = queries.split(max(1, NAIVE_SCORES // len(self._slots)))
        found = [self._search(part, max(1, k)) for part in parts]
        return torch.cat([scores for scores, _ in found]), torch.cat([slots for _, slots in found])

    def _search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        products, starts = (queries @ self._landmarks.T).topk(min(START_LANDMARKS, len(self._slots)))
        distances = queries.square().sum(-1, keepdim=True) + self._bound**2 - 2 * products
        found = np.empty((len(queries), k), np.float32), np.empty((len(queries), k), np.int64)
        inputs = as_array(queries), self._slots[starts].int().numpy(), as_array(distances)
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


class GpuHead(Head):
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


def make_head(plan: Plan, num_keys: int, sample: Tensor) -> Head:
    index = new_index(plan, sample.shape[-1], num_keys)
    if plan.gpu:
        return GpuHead(index, sample)
    if plan.graph:
        return GraphHead(index)
    if is_simple_inverted(index):
        return InvertedHead.trained(index, sample)
    if not index.is_trained:
        index.train(as_array(sample))
    return Head(index)


def is_simple_inverted(index: Any) -> bool:
    """Whether an index on the CPU is one for ``InvertedHead``."""
    # Exactly these: search_preassigned and add_core of their relatives (fast scan) corrupt memory or do other things.
    simple = type(index) in (faiss.IndexIVFFlat, faiss.IndexIVFScalarQuantizer, faiss.IndexIVFPQ)
    return simple and isinstance(downcast(index.quantizer), faiss.IndexFlat)


def _code_book(index: Any) -> Any:
    """FAISS's vector of the numbers by which this inverted file encodes keys; None if it keeps them whole."""
    if isinstance(index, faiss.IndexIVFScalarQuantizer):
        return index.sq.trained
    return index.pq.centroids if isinstance(index, faiss.IndexIVFPQ) else None


@cache
def _gpu_resources(device: int) -> Any:
    # One per device and process: each sets gigabytes of scratch memory aside otherwise.
    resources = faiss.StandardGpuResources()
    resources.setTempMemory(256 << 20)
    return resources


def as_array(vectors: Tensor) -> np.ndarray:
    return np.ascontiguousarray(vectors.detach().float().cpu().numpy())
