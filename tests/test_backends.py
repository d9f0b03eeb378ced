"""Which backend a memory gets, and what a backend of the user's own must do."""

import torch
from torch import Tensor

from memory import ExactIndex, Index, Memory, VectorBlocks, choose_backend
from memory.faiss_index import FaissIndex

HEADS, DIM = 2, 8


class FiveMethods:
    """No more than ``CustomIndex`` asks for."""

    def __init__(self, keys: VectorBlocks, values: VectorBlocks) -> None:
        self.exact = ExactIndex(keys, values)

    def add(self, keys: Tensor) -> None:
        pass

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        return self.exact.search(queries, k)

    def attend(self, queries: Tensor, *, scale: float) -> tuple[Tensor, Tensor]:
        return self.exact.attend(queries, scale=scale)

    def nbytes(self) -> int:
        return 5

    def describe(self) -> str:
        return "five"


class Whole(FiveMethods, Index):
    """Says itself that it attends to everything."""

    @property
    def attends_to_all(self) -> bool:
        return True


def filled(**settings: object) -> Memory:
    store = Memory([1], HEADS, DIM, **settings)  # type: ignore[arg-type]
    torch.manual_seed(0)
    keys, values = torch.randn(2, HEADS, 30, DIM)
    store.append({1: keys}, {1: values}, range(30))
    return store


def test_auto_is_exact_below_262144_keys() -> None:
    """The crossover that docs/backends.md states, measured by benchmarks/memory_backends.py."""
    cpu = torch.device("cpu")
    assert choose_backend(262_143, cpu).name == "exact"
    assert choose_backend(262_144, cpu).name == "IVF,Flat"
    assert choose_backend(262_144, torch.device("cuda")).name == "exact"


def test_an_index_of_five_methods_is_enough() -> None:
    store, exact = filled(index=FiveMethods), filled(index="exact")
    queries = torch.randn(HEADS, 4, DIM)
    assert torch.equal(store[1].attend(queries, scale=0.3)[0], exact[1].attend(queries, scale=0.3)[0])
    assert torch.equal(store[1].search(queries, 3)[1], exact[1].search(queries, 3)[1])
    assert store[1].describe() == "five"
    assert store.nbytes()["index"] == 5
    assert not store[1].attends_to_all  # it did not say so
    store.truncate(20)  # asks what the index learnt
    assert len(store.clone()[1]) == 20


def test_an_index_may_say_that_it_attends_to_all() -> None:
    assert filled(index=Whole)[1].attends_to_all


def test_who_attends_to_all() -> None:
    """Not told from a name: an inverted file that is not built yet is exact, and dense unless ``top_k`` is set."""
    assert filled(index="exact")[1].attends_to_all
    assert not filled(index="exact", top_k=4)[1].attends_to_all
    assert filled(index="IVF4,Flat")[1].attends_to_all
    assert not filled(index="IVF4,Flat", top_k=4)[1].attends_to_all
    assert not filled(index="Flat")[1].attends_to_all  # built at once: attends to its hits
    assert not Memory([1], HEADS, DIM)[1].attends_to_all  # nothing there


def test_our_backends_are_whole() -> None:
    blocks = VectorBlocks(HEADS, DIM, torch.float32), VectorBlocks(HEADS, DIM, torch.float32)
    assert isinstance(ExactIndex(*blocks), Index)
    assert isinstance(FaissIndex("Flat", *blocks), Index)
    assert not isinstance(FiveMethods(*blocks), Index)
