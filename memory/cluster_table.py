"""The clusters of one layer as attention reads them.

A large memory has two levels: its clusters are clustered by their mean keys, ``COARSE`` at a time, over groups of
stretches. A query ranks the coarse clusters and ranks clusters only in the best of them; the others stand in
themselves. So what a query costs hardly grows with the memory.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from memory.clustered import Clusters
from memory.clustering import assign
from memory.levels import Estimate, Level
from memory.vectors import VectorBlocks

COARSE = 64  # clusters in a coarse one, on the mean
GROUP = 16  # stretches whose clusters are clustered together, once there are so many more
SAMPLED = 16  # clusters for each coarse one that k-means looks at
COARSE_FROM = 4096  # clusters of a head; ranking fewer costs less than a second level saves
OPENED = 12.5  # keys whose clusters are ranked, for each key that is attended to


@dataclass(frozen=True)
class Asked:
    """What scaled queries attend to.

    Attributes:
        estimates: of what is not attended to key by key.
        slots: (G, m) int64 ascending, of the keys that are; rows of fewer end in some slot again and again.
        held: (G,) int64, so many of each row count.
    """

    estimates: list[Estimate]
    slots: Tensor
    held: Tensor


class ClusterTable:
    """All clusters of one layer as attention needs them.

    Args:
        clusters: of the layer.
        coarse: (G, L) int64, the coarse cluster of each; None for one level.
        keys: the stored keys.
        values: the stored values.

    Attributes:
        end: past the last clustered slot.
        always: keys and values, each (G, n, D) float32, that every query attends to: outliers, then what is not
            clustered yet.
    """

    def __init__(self, clusters: Clusters, coarse: Tensor | None, keys: VectorBlocks, values: VectorBlocks) -> None:
        self.end = clusters.end
        self._order = clusters.order
        starts, lengths, outliers, numbers = clusters.stretches.unbind(1)
        device = clusters.order.device
        # Where each one's keys begin in ``order``: counted over clusters alone, then the outliers that lie before.
        self._firsts = clusters.counts.long().cumsum(1) - clusters.counts
        self._firsts += outliers.cumsum(0).repeat_interleave(numbers).to(device)
        # The slot that these are counted from.
        self._starts = starts.repeat_interleave(numbers).to(device).expand_as(self._firsts)
        sums = clusters.covariances.sum(1), clusters.slopes.sum(1)
        means = clusters.mean_keys, clusters.mean_values
        self._level = Level.of(clusters.counts.float(), means, clusters.spreads, sums)
        self._size = max(1.0, float((lengths - outliers).sum()) / max(1, int(numbers.sum())))
        self._coarse: Level | None = None
        if coarse is not None:
            number = int(coarse.max()) + 1
            self._coarse = self._level.joined(coarse, number, sums)
            # Those of a coarse cluster behind one another, so that they are read in one go.
            order = coarse.argsort(dim=1, stable=True)
            self._level = self._level.rows(order, torch.ones_like(order, dtype=torch.bool))
            self._firsts, self._starts = self._firsts.gather(1, order), self._starts.gather(1, order)
            self._members = torch.stack([head.bincount(minlength=number) for head in coarse])
        places = torch.arange(int(lengths.sum())) - (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
        outlying = (places < outliers.repeat_interleave(lengths)).nonzero().flatten().to(device)
        slots = clusters.order[:, outlying].long() + starts.repeat_interleave(outliers).to(device)
        self.always = [(keys.gather(slots, torch.float32), values.gather(slots, torch.float32))]

    def read_loose(self, keys: VectorBlocks, values: VectorBlocks) -> None:
        """Take in what lies behind the clustered slots now."""
        loose = (blocks.pieces(self.end, len(blocks), torch.float32) for blocks in (keys, values))
        self.always[1:] = zip(*loose, strict=True)

    def ask(self, heads: slice, queries: Tensor, budgets: Tensor) -> Asked:
        """What scaled queries (g, b, D) of these heads attend to, key by key to about so many keys (g,) float32."""
        level, firsts, starts = self._level.of_heads(heads), self._firsts[heads], self._starts[heads]
        if self._coarse is None:
            estimate = level.estimate(queries)
            chosen = estimate.look_into(budgets, estimate.total(), self._size)
            return self._asked(heads, [estimate], chosen, firsts, starts)
        above = self._coarse.of_heads(heads).estimate(queries)
        total = above.total()
        sizes = self._members[heads]
        opened = above.look_into(OPENED * budgets, total, COARSE * self._size) > 0
        places, _, valid = ranges(sizes.cumsum(1) - sizes, sizes * opened)
        estimate = level.rows(places, valid).estimate(queries)
        chosen = estimate.look_into(budgets, total, self._size)
        return self._asked(heads, [above, estimate], chosen, firsts.gather(1, places), starts.gather(1, places))

    def _asked(self, heads: slice, estimates: list[Estimate], counts: Tensor, firsts: Tensor, starts: Tensor) -> Asked:
        """With the keys of clusters of so many chosen keys each, (g, L); see ``__init__`` for the other two."""
        rows, of, valid = ranges(firsts, counts)
        slots = self._order[heads].gather(1, rows) + starts.gather(1, of)
        return Asked(estimates, slots.masked_fill_(~valid, self.end - 1).sort().values, counts.sum(1))


def ranges(firsts: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``firsts[i] .. firsts[i] + lengths[i] - 1`` for each i, behind one another, of each row; all int64.

    Returns:
        The numbers (G, m); the i that each is of, (G, m); and which are valid, (G, m): rows of fewer end in zeros.
    """
    ends = lengths.cumsum(1)
    places = torch.arange(int(ends[:, -1].max()), device=ends.device).expand(len(ends), -1).contiguous()
    of = torch.searchsorted(ends, places, right=True).clamp_(max=ends.shape[1] - 1)
    valid = places < ends[:, -1:]
    numbers = places + (firsts - ends + lengths).gather(1, of)
    return numbers.masked_fill_(~valid, 0), of, valid


def coarse_groups(parts: list[Clusters], known: list[Tensor]) -> Tensor | None:
    """The coarse cluster of each cluster of some stretches, (G, L) int64; None if they are too few to need any.

    Args:
        parts: the clusters of each stretch.
        known: coarse clusters (G, l) of the first groups of ``GROUP`` stretches, each counted from 0; those of groups
            that are full are added.
    """
    if sum(part.counts.shape[1] for part in parts) < COARSE_FROM:
        return None
    groups = [parts[first : first + GROUP] for first in range(0, len(parts), GROUP)]
    found, full = list(known), len(parts) // GROUP
    for group in groups[len(found) :]:
        means = torch.cat([part.mean_keys for part in group], dim=1)
        number = max(1, means.shape[1] // COARSE)
        found.append(torch.stack([assign(head.cpu(), number, SAMPLED) for head in means]).to(means.device))
    known[:] = found[:full]
    bases = torch.tensor([0, *(int(group.max()) + 1 for group in found)]).cumsum(0)
    return torch.cat([group + base for group, base in zip(found, bases.tolist(), strict=False)], dim=1)
