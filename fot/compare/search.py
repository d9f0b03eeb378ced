"""LongRoPE's factors for a checkpoint: a small evolutionary search (arXiv 2402.13753, section 3.3).

The paper's search takes a population of 64 for 40 rounds. Ours starts from the factors of known methods, which it never
does worse than.
"""

import random
from collections.abc import Callable, Sequence

from fot.compare import frequencies

Factors = tuple[float, ...]

POPULATION = 16
ROUNDS = 8
# Chance of each factor to change, and the finest step between two, as in the paper.
MUTATION = 0.3
GRID = 0.01
# A factor is at most so many times the factor by which texts are longer.
LARGEST = 1.25


def first_factors(dim: int, base: float, factor: float, trained: int) -> list[Factors]:
    """The factors that position interpolation, NTK and YaRN amount to."""
    plain = frequencies.plain(dim, base)
    known = (plain / factor, frequencies.ntk(dim, base, factor), frequencies.yarn(dim, base, factor, trained))
    return [tuple((plain / one).tolist()) for one in known]


def search_factors(
    loss: Callable[[Factors], float],
    first: Sequence[Factors],
    factor: float,
    *,
    population: int = POPULATION,
    rounds: int = ROUNDS,
    seed: int = 0,
) -> Factors:
    """Factors with a low loss; they never fall from a frequency to the next lower one.

    Args:
        loss: of a model with these factors, on long text.
        first: where the search begins.
        factor: by which texts are longer than the trained length.
        population: sets of factors in each round; the best quarter goes on to the next.
        rounds: 0 for the best of ``first``.
        seed: draws changes.
    """
    rng, known = random.Random(seed), {}
    for one in first:
        known[one] = loss(one)
    for _ in range(rounds):
        best = sorted(known, key=known.__getitem__)[: max(2, population // 4)]
        for number in range(population):
            one, other = rng.choices(best, k=2)
            child = mutated(one, factor, rng) if number % 2 else crossed(one, other, rng)
            if child not in known:
                known[child] = loss(child)
    return min(known, key=known.__getitem__)


def mutated(factors: Factors, factor: float, rng: random.Random) -> Factors:
    """Some factors drawn anew between their neighbours, or up to the limits."""
    changed = list(factors)
    for place in range(len(changed)):
        if rng.random() < MUTATION:
            low = changed[place - 1] if place else 1.0
            high = changed[place + 1] if place + 1 < len(changed) else LARGEST * factor
            changed[place] = min(high, max(low, round(rng.uniform(low, high) / GRID) * GRID))
    return tuple(changed)


def crossed(one: Factors, other: Factors, rng: random.Random) -> Factors:
    """The factors of one up to a place, those of another after it, none lower than those before."""
    place = rng.randint(0, len(one))
    joint, found, least = one[:place] + other[place:], [], 1.0
    for factor in joint:
        least = max(least, factor)
        found.append(least)
    return tuple(found)
