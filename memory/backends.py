"""Which index a memory layer gets, and how it is made."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from memory.clustered import LearntClusters
from memory.index import CustomIndex, ExactIndex, Index, Learnt, LearntIndex, Starts
from memory.vectors import VectorBlocks

# On a CPU, clusters pay from here on, and an index that finds the top-k from there on (benchmarks/memory_backends.py
# measures the crossovers; the second is later than for speed alone, since a top-k drops the tail).
AUTO_EXACT_LIMIT = 32_768
AUTO_TOP_K_LIMIT = 262_144

IndexFactory = Callable[[VectorBlocks, VectorBlocks], CustomIndex]


@dataclass(frozen=True)
class BackendChoice:
    """A backend by name (``exact`` or a FAISS factory string), and why it was taken."""

    name: str
    reason: str


def choose_backend(num_keys: int, device: torch.device, top_k: int | None = None) -> BackendChoice:
    """What ``index="auto"`` uses for a memory of ``num_keys`` tokens whose vectors lie on ``device``.

    Args:
        num_keys: stored.
        device: of the vectors.
        top_k: pairs that a query attends to, if that was asked for: clusters know no such number.
    """
    if device.type != "cpu":
        return BackendChoice("exact", f"on {device.type} dense attention outruns a search of the index")
    limit = AUTO_EXACT_LIMIT if top_k is None else AUTO_TOP_K_LIMIT
    if num_keys < limit:
        return BackendChoice("exact", f"{num_keys:,} keys are fewer than {limit:,}: exact and fast enough")
    if top_k is None:
        return BackendChoice("clusters", f"{num_keys:,} keys on a CPU: a share of them and means of the others suffice")
    return BackendChoice(
        "IVF,Flat", f"{num_keys:,} keys on a CPU: searching an inverted file is faster than reading all"
    )


def is_clusters(index: str) -> bool:
    """Whether this names the backend of ``memory.clusters``, with parameters or without."""
    return index.replace(" ", "").split(";")[0] == "clusters"


def drops_the_tail(index: str | IndexFactory, top_k: int | None) -> bool:
    """Whether such an index attends to its hits alone, as far as its name tells."""
    return top_k is not None or (isinstance(index, str) and index not in ("auto", "exact") and not is_clusters(index))


def check_index(index: str | IndexFactory, head_dim: int | None = None) -> None:
    """Raise ValueError if no backend can be made from this, so that a typo shows before hours of work.

    Args:
        index: as for ``Memory``.
        head_dim: D; None if it is not known yet.
    """
    if isinstance(index, str) and is_clusters(index):
        from memory.clusters import parse_clusters

        parse_clusters(index)
    elif isinstance(index, str) and index not in ("auto", "exact"):
        from memory.faiss_factory import check_factory

        check_factory(index, head_dim)


@dataclass(frozen=True)
class Backends:
    """Makes the indexes of one memory.

    Attributes:
        index: as for ``Memory``.
        top_k: pairs that a query attends to; None as for ``Memory``.
    """

    index: str | IndexFactory
    top_k: int | None

    def __post_init__(self) -> None:
        if self.top_k is not None and isinstance(self.index, str) and is_clusters(self.index):
            raise ValueError(
                f"top_k is {self.top_k}, but {self.index} attends to a share of the keys: leave top_k out and write "
                "clusters;share=0.05"
            )

    @property
    def name(self) -> str:
        """What a manifest can keep of ``index``: an index of the user's own is no name."""
        return self.index if isinstance(self.index, str) else "auto"

    def choose(self, num_keys: int, device: torch.device) -> BackendChoice:
        """The backend for so many keys that lie there."""
        if self.index == "auto":
            return choose_backend(num_keys, device, self.top_k)
        return BackendChoice(self.index if isinstance(self.index, str) else "custom", "asked for")

    def make(self, name: str, keys: VectorBlocks, values: VectorBlocks, learnt: Learnt | None, starts: Starts) -> Index:
        """An index of all that is stored.

        Args:
            name: as chosen.
            keys: stored.
            values: stored.
            learnt: what an index of these keys learnt before, if it is known.
            starts: says where documents start.
        """
        if not isinstance(self.index, str):
            custom = self.index(keys, values)
            custom.add(keys.take_range(0, len(keys), keys.dtype))
            return custom if isinstance(custom, Index) else _Adapted(custom)
        if name == "exact":
            return ExactIndex(keys, values, self.top_k)
        # faiss is loaded only where it is used
        if is_clusters(name):
            from memory.clusters import ClusterIndex

            clusters = ClusterIndex(name, keys, values, starts)
            clusters.fill(learnt if isinstance(learnt, LearntClusters) else None)
            return clusters
        from memory.faiss_index import FaissIndex

        index = FaissIndex(name, keys, values, self.top_k)
        index.fill(learnt if isinstance(learnt, LearntIndex) else None)
        return index


class _Adapted(Index):
    """An index of the user's own with the five methods it needs; the rest is as ``Index`` has it."""

    def __init__(self, custom: CustomIndex) -> None:
        self._custom = custom

    def add(self, keys: Tensor) -> None:
        self._custom.add(keys)

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        return self._custom.search(queries, k)

    def attend(self, queries: Tensor, *, scale: float) -> tuple[Tensor, Tensor]:
        return self._custom.attend(queries, scale=scale)

    def nbytes(self) -> int:
        return self._custom.nbytes()

    def describe(self) -> str:
        return self._custom.describe()
