"""Attention to the newest tokens of a memory, in a store and in rows that read several."""

from typing import Any

import pytest
import torch

from fot.attention import attend_newest
from memory import Memory
from memory.vectors import VECTOR_DTYPES

HEADS, DIM = 2, 8


def vectors(count: int, seed: int) -> torch.Tensor:
    return torch.randn(HEADS, count, DIM, generator=torch.Generator().manual_seed(seed))


def append(memory: Memory, count: int, seed: int = 0, **source: Any) -> None:
    memory.append({4: vectors(count, seed)}, {4: vectors(count, seed + 1000)}, range(count), **source)


@pytest.mark.parametrize("dtype", VECTOR_DTYPES)
@pytest.mark.parametrize("index", ["exact", "IVF2,Flat"])
def test_the_newest_are_those_of_now(index: str, dtype: str) -> None:
    """Whatever was asked before: also as many as were there before a memory changed."""
    store = Memory([4], HEADS, DIM, index=index, top_k=2, key_dtype=dtype, value_dtype=dtype)
    queries = vectors(3, seed=5)

    def check(count: int) -> None:
        output, lse = store[4].attend_newest(queries, count=count, scale=0.3)
        logits = 0.3 * queries @ store[4].keys()[:, -count:].mT
        torch.testing.assert_close(output, logits.softmax(-1) @ store[4].values()[:, -count:], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(lse, logits.logsumexp(-1), atol=1e-5, rtol=1e-5)

    append(store, 30, document="a")
    check(20)
    check(30)
    append(store, 25, seed=1, document="b")
    check(20)
    store.truncate(40)
    check(20)
    append(store, 15, seed=2, document="c")
    check(20)
    store.drop_document("b")
    check(20)
    store.reset()
    append(store, 20, seed=3)
    check(20)


def test_the_newest_of_several_memories_are_those_of_one() -> None:
    """Rows that read one memory, its two halves, the later half alone, and nothing."""
    generator = torch.Generator().manual_seed(0)
    queries, keys, values = (torch.randn(shape, generator=generator) for shape in ((4, 4, 3, 8), *[(2, 25, 8)] * 2))
    whole, early, late = (Memory([1], 2, 8) for _ in range(3))
    for memory, part in ((whole, slice(25)), (early, slice(17)), (late, slice(17, 25))):
        memory.append({1: keys[:, part]}, {1: values[:, part]}, range(25)[part])
    rows = [[whole], [early, late], [late], []]
    output, lse = attend_newest(queries, rows, 1, 12, scale=0.3)
    for row, count in ((0, 12), (1, 12), (2, 8)):
        scores = 0.3 * queries[row] @ keys[:, -count:].repeat_interleave(2, 0).mT
        expected = scores.softmax(-1) @ values[:, -count:].repeat_interleave(2, 0)
        torch.testing.assert_close(output[row], expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(lse[row], scores.logsumexp(-1), atol=1e-5, rtol=1e-5)
    assert (lse[3] == -torch.inf).all()
