"""Attention in parts equals attention in one piece."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import memory.softmax
from memory import attend, merge
from memory.softmax import _attend_naive


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def one_softmax(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    scores = 0.4 * q.double() @ k.double().mT
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return (scores.softmax(-1) @ v.double()).float()


@given(st.lists(st.integers(1, 30), min_size=1, max_size=6), st.integers(1, 9), st.floats(0.1, 20))
@settings(max_examples=50, deadline=None)
def test_merge_of_parts_is_one_softmax(sizes: list[int], num_queries: int, spread: float) -> None:
    total = sum(sizes)
    q, k, v = random(1, 2, num_queries, 8, seed=1), spread * random(1, 2, total, 8, seed=2), random(1, 2, total, 8)
    bounds = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
    parts = [attend(q, k[:, :, a:b], v[:, :, a:b], scale=0.4) for a, b in pairwise(bounds)]
    output, lse = merge(parts)
    torch.testing.assert_close(output, one_softmax(q, k, v), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(lse, (0.4 * q @ k.mT).logsumexp(-1), atol=1e-4, rtol=1e-4)


def test_an_empty_part_weighs_nothing() -> None:
    q, k, v = (random(1, 1, 5, 8, seed=seed) for seed in range(3))
    full = attend(q, k, v, scale=0.4)
    nothing = torch.zeros_like(q), torch.full((1, 1, 5), -torch.inf)
    for parts in ((full, nothing), (nothing, full)):
        torch.testing.assert_close(merge(parts), full)


@pytest.mark.parametrize("kind", ["plain", "causal", "mask", "row mask"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_equals_naive(kind: str, dtype: torch.dtype) -> None:
    q, k, v = (random(2, 3, 33, 16, seed=seed, dtype=dtype) for seed in range(3))
    shape = {"mask": (33, 33), "row mask": (2, 1, 33, 33)}.get(kind)
    mask = None
    if shape:
        mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) > 0.5
        mask = (mask | torch.eye(33, dtype=torch.bool)).reshape((1,) * (4 - len(shape)) + shape)
    fused = attend(q, k, v, scale=0.4, causal=kind == "causal", mask=mask)
    naive = _attend_naive(q, k, v, 0.4, kind == "causal", mask)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2  # a bfloat16 result has 8 bits
    for a, b in zip(fused, naive, strict=True):
        torch.testing.assert_close(a.float(), b.float(), atol=tolerance, rtol=tolerance)


def test_naive_works_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = random(1, 2, 40, 8, seed=1), random(1, 2, 50, 8, seed=2), random(1, 2, 50, 8)
    whole = _attend_naive(q, k, v, 0.4, False, None)
    monkeypatch.setattr(memory.softmax, "NAIVE_SCORES", 300)
    torch.testing.assert_close(_attend_naive(q, k, v, 0.4, False, None), whole)


def test_gradients_of_a_merge_are_those_of_one_softmax() -> None:
    tensors = [random(1, 2, n, 8, seed=n).requires_grad_() for n in (7, 20, 20)]
    q, k, v = tensors
    parts = [attend(q, k[:, :, a:b], v[:, :, a:b], scale=0.4) for a, b in ((0, 6), (6, 20))]
    merged = torch.autograd.grad(merge(parts)[0].square().sum(), tensors)
    expected = torch.autograd.grad((0.4 * q @ k.mT).softmax(-1).matmul(v).square().sum(), tensors)
    torch.testing.assert_close(merged, expected, atol=1e-5, rtol=1e-4)
