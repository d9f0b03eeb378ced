"""Methods whose positions change with the text or with the distance: patterns for ``fot.compare.turned``."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fot.compare import frequencies
from fot.compare.turned import Part, block_end

Scale = Callable[[Tensor], Tensor]


def near(queries: Tensor, keys: Tensor, window: int) -> Part:
    """The last ``window`` tokens of each query, itself among them, at their true distances.

    Positions count from the first of them, so that they stay small in a text without end.
    """
    first = int(torch.searchsorted(keys, max(0, int(queries[0]) - window + 1)))
    seen, origin = keys[first:], keys[first]
    distance = queries.unsqueeze(1) - seen
    return Part(0, slice(first, len(keys)), queries - origin, seen - origin, (distance >= 0) & (distance < window))


@dataclass(frozen=True)
class Streaming:
    """StreamingLLM (arXiv 2309.17453): the first few tokens and the last ones; with ``sinks=0`` a sliding window.

    Positions are places in a cache of ``sinks + window`` tokens, as if it were all of the text.
    """

    sinks: int
    window: int
    origin = 0

    def parts(self, queries: Tensor, keys: Tensor) -> Sequence[Part]:
        found, last = [near(queries, keys, self.window)], int(queries[-1])
        if self.sinks and last >= self.window:
            rows = max(0, self.window - int(queries[0]))
            far, sinks = queries[rows:], keys[: min(self.sinks, last - self.window + 1)]
            places = far.clamp(max=self.sinks + self.window - 1)
            outside = far.unsqueeze(1) - sinks >= self.window
            found.append(Part(rows, slice(0, len(sinks)), places, sinks, outside))
        return found


@dataclass(frozen=True)
class SelfExtend:
    """SelfExtend (arXiv 2401.01325): true distances within ``neighbours``, beyond them positions of groups.

    A query at p has p // G + W - W // G for a key at j // G, with W neighbours and groups of G.
    """

    neighbours: int
    group: int
    sinks = 0
    window = None
    origin = 0

    def parts(self, queries: Tensor, keys: Tensor) -> Sequence[Part]:
        found, last = [near(queries, keys, self.neighbours)], int(queries[-1])
        if last >= self.neighbours:
            rows = max(0, self.neighbours - int(queries[0]))
            far, before = queries[rows:], keys[: last - self.neighbours + 1]
            places = far // self.group + self.neighbours - self.neighbours // self.group
            outside = far.unsqueeze(1) - before >= self.neighbours
            found.append(Part(rows, slice(0, len(before)), places, before // self.group, outside))
        return found


@dataclass(frozen=True)
class Whole:
    """The whole text at true distances, with frequencies by its length, and queries scaled by their positions.

    Attributes:
        by_length: n -> frequencies for a text of n tokens and the factor on cosine and sine; None for the model's own.
            A block of queries takes n at its end: their keys are turned anew, whatever turned them for queries before.
        scale: positions (T,) -> factors on queries (T,); None for 1.
        origin: the trained length: up to there n is that.
    """

    by_length: Callable[[int], tuple[Tensor, float]] | None = None
    scale: Scale | None = None
    origin: int = 0
    sinks = 0
    window = None

    def parts(self, queries: Tensor, keys: Tensor) -> Sequence[Part]:
        first = int(queries[0])
        turned: tuple[Tensor | None, float] = (None, 1.0)
        if self.by_length is not None:
            turned = self.by_length(max(self.origin, block_end(first, self.origin)))
        scale = None if self.scale is None else self.scale(queries)
        causal = queries.unsqueeze(1) >= keys[first:]
        found = [Part(0, slice(first, len(keys)), queries, keys[first:], causal, *turned, scale)]
        if first:
            found.append(Part(0, slice(0, first), queries, keys[:first], None, *turned, scale))
        return found


def dynamic_ntk(dim: int, base: float, trained: int, factor: float) -> Whole:
    """Plain up to the trained length."""
    return Whole(lambda n: (frequencies.dynamic_ntk(dim, base, factor, n, trained), 1.0), origin=trained)


def dynamic_yarn(dim: int, base: float, trained: int) -> Whole:
    """YaRN with s = max(1, n / L) (arXiv 2309.00071, appendix B.3)."""

    def by_length(tokens: int) -> tuple[Tensor, float]:
        factor = max(1.0, tokens / trained)
        return frequencies.yarn(dim, base, factor, trained), frequencies.yarn_factor(factor)

    return Whole(by_length, origin=trained)


def log_n(trained: int) -> Scale:
    """max(1, ln i / ln L) for the i-th token, counted from 1 (Su 2021; Qwen's ``logn_list``)."""
    return lambda positions: ((positions + 1).float().log() / math.log(trained)).clamp(min=1)


def ssmax(strength: float) -> Scale:
    """s ln n for a query that sees n tokens (Scalable-Softmax, arXiv 2501.19399), whose s is learnt.

    With s = 1 / ln L, a model that was not trained for it is left as it was at the trained length.
    """
    return lambda positions: strength * (positions + 1).float().log()
