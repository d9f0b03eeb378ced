"""The search for LongRoPE's factors, on a loss whose best factors are known."""

import math

import pytest

from fot.compare.search import GRID, LARGEST, Factors, first_factors, search_factors

FIRST = first_factors(8, 10_000.0, 4.0, 2048)
BEST = (1.0, 1.3, 2.2, 3.6)


def loss(factors: Factors) -> float:
    return sum(abs(one - best) for one, best in zip(factors, BEST, strict=True))


def test_it_begins_with_known_methods() -> None:
    interpolation, ntk, yarn = FIRST
    assert interpolation == pytest.approx((4, 4, 4, 4))
    assert ntk == pytest.approx((1, 4 ** (1 / 3), 4 ** (2 / 3), 4), rel=1e-4)
    assert yarn == pytest.approx((1, 1, 1.6, 4), rel=1e-4)
    assert search_factors(loss, FIRST, 4.0, rounds=0) == min(FIRST, key=loss)


@pytest.mark.parametrize("seed", range(3))
def test_it_finds_better_ones(seed: int) -> None:
    tried: list[Factors] = []

    def noted(factors: Factors) -> float:
        tried.append(factors)
        return loss(factors)

    found = search_factors(noted, FIRST, 4.0, rounds=20, seed=seed)
    assert loss(found) < min(map(loss, FIRST)) / 2
    assert loss(found) == min(map(loss, tried))
    assert len(tried) == len(set(tried)), "nothing is measured twice"
    for factors in tried[3:]:
        assert list(factors) == sorted(factors)
        assert factors[0] >= 1
        assert factors[-1] <= LARGEST * 4 + GRID
        assert all(math.isfinite(one) for one in factors)
