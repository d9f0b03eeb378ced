"""Which backend a memory gets, and what a backend of the user's own must do."""

import pytest
import torch
from torch import Tensor

from memory import ExactIndex, Index, Memory, VectorBlocks, backends, choose_backend
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


def test_auto_is_exact_below_32768_keys() -> None:
    """The crossover that docs/backends.md states, measured by benchmarks/memory_backends.py."""
    cpu = torch.device("cpu")
    assert choose_backend(32_767, cpu).name == "exact"
    assert choose_backend(32_768, cpu).name == "clusters"
    assert choose_backend(1 << 24, torch.device("cuda")).name == "exact"


def test_auto_with_a_top_k_is_exact_below_262144_keys() -> None:
    cpu = torch.device("cpu")
    assert choose_backend(262_143, cpu, 128).name == "exact"
    assert choose_backend(262_144, cpu, 128).name == "IVF,Flat"
    assert choose_backend(1 << 24, torch.device("cuda"), 128).name == "exact"


@pytest.mark.parametrize("top_k", [None, 7])
def test_an_auto_memory_passes_from_exact_to_another_backend(
    top_k: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "AUTO_EXACT_LIMIT", 8192)
    monkeypatch.setattr(backends, "AUTO_TOP_K_LIMIT", 9000)
    store = Memory([1], HEADS, DIM, top_k=top_k)
    keys, values = torch.randn(2, HEADS, 9000, DIM)
    names = []
    for start in range(0, 9000, 1800):
        part = slice(start, start + 1800)
        store.append({1: keys[:, part]}, {1: values[:, part]}, range(1800))
        assert store[1].backend is not None
        names.append(store[1].backend.name)
    assert names == ["exact"] * 4 + ["clusters" if top_k is None else "IVF,Flat"]
    queries = torch.randn(HEADS, 3, DIM)
    exact = Memory([1], HEADS, DIM, index="exact", top_k=top_k)
    exact.append({1: keys}, {1: values}, range(9000))
    if top_k is None:
        found, wanted = (one[1].attend(queries, scale=0.1)[0] for one in (store, exact))
        assert (found - wanted).norm() < 0.2 * wanted.norm()


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


def test_who_joins_queries() -> None:
    """With clusters, queries that are alike attend to the same ones; so rows of a batch are kept apart there."""
    assert not Memory([1], HEADS, DIM)[1].joins_queries  # nothing to attend to
    assert filled(index="exact")[1].joins_queries
    for settings in ({"index": "exact", "top_k": 4}, {"index": "clusters"}, {"index": "Flat"}, {"index": Whole}):
        assert not filled(**settings)[1].joins_queries


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
