"""The clusters of one layer as attention reads them.

A large memory has two levels: its clusters are clustered by their mean keys, ``COARSE`` at a time, over groups of
stretches. A query ranks the coarse clusters and ranks clusters only in the best of them; the others stand in
themselves. So what a query costs hardly grows with the memory.
"""

import torch
from torch import Tensor

from memory.clustered import Clusters
from memory.levels import Estimate, Level, coarse_of
from memory.vectors import VectorBlocks

COARSE = 64  # clusters in a coarse one, on the mean
GROUP = 16  # stretches whose clusters are clustered together, once there are so many more
COARSE_FROM = 4096  # clusters of a head; ranking fewer costs less than a second level saves
OPENED = 12.5  # keys whose clusters are ranked, for each key that is attended to


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
        # Counted over clusters alone, then the outliers that lie before.
        firsts = clusters.counts.long().cumsum(1) - clusters.counts
        firsts += outliers.cumsum(0).repeat_interleave(numbers).to(device)
        starts_of = starts.repeat_interleave(numbers).to(device)
        sums = clusters.covariances.sum(1), clusters.slopes.sum(1)
        self._heads = []
        for g, own in enumerate(zip(*sums, strict=True)):
            means = (clusters.mean_keys[g], clusters.mean_values[g])
            level = Level.of(clusters.counts[g].float(), means, clusters.spreads[g], own)
            if coarse is None:
                self._heads.append(_Head(level, firsts[g], starts_of))
                continue
            # Those of a coarse cluster behind one another, so that they are read in one go.
            order, above = coarse[g].argsort(stable=True), level.joined(coarse[g], own)
            self._heads.append(_Head(level.rows(order), firsts[g, order], starts_of[order], above, coarse[g].bincount()))
        places = torch.arange(int(lengths.sum())) - (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
        outlying = (places < outliers.repeat_interleave(lengths)).nonzero().flatten().to(device)
        slots = clusters.order[:, outlying].long() + starts.repeat_interleave(outliers).to(device)
        self.always = [(keys.gather(slots, torch.float32), values.gather(slots, torch.float32))]

    def read_loose(self, keys: VectorBlocks, values: VectorBlocks) -> None:
        """Take in what lies behind the clustered slots now."""
        loose = (blocks.pieces(self.end, len(blocks), torch.float32) for blocks in (keys, values))
        self.always[1:] = zip(*loose, strict=True)

    def ask(self, head: int, queries: Tensor, budget: float) -> tuple[list[Estimate], Tensor]:
        """What scaled queries (b, D) of one head attend to.

        Returns:
            Estimates of what is not attended to key by key, and the slots of what is, (M,) int64 ascending: about
            ``budget`` keys.
        """
        of = self._heads[head]
        if of.above is None:
            estimate = of.level.estimate(queries)
            chosen = estimate.look_into(budget, estimate.weights.logsumexp(1, keepdim=True), of.size)
            return [estimate], self._slots(head, estimate.level.counts[chosen].long(), chosen)
        above = of.above.estimate(queries)
        lse = above.weights.logsumexp(1, keepdim=True)
        opened = of.members(above.look_into(OPENED * budget, lse, COARSE * of.size))
        estimate = of.level.rows(opened).estimate(queries)
        chosen = estimate.look_into(budget, lse, of.size)
        return [above, estimate], self._slots(head, estimate.level.counts[chosen].long(), opened[chosen])

    def _slots(self, head: int, counts: Tensor, places: Tensor) -> Tensor:
        """The slots of the keys of these clusters, of so many keys each, ascending."""
        of = self._heads[head]
        rows = ranges(of.firsts[places], counts)
        return (self._order[head].index_select(0, rows) + of.starts[places].repeat_interleave(counts)).sort().values


class _Head:
    """Clusters of one KV head, and those of these clusters.

    Attributes:
        level: the clusters, one coarse cluster after another.
        firsts: (L,) int64, where each one's keys begin in the layer's order.
        starts: (L,) int64, slot that these are counted from.
        above: the coarse clusters; None if there are none.
        size: keys in a cluster, on the mean.
    """

    def __init__(
        self, level: Level, firsts: Tensor, starts: Tensor, above: Level | None = None, sizes: Tensor | None = None
    ) -> None:
        self.level, self.firsts, self.starts, self.above = level, firsts, starts, above
        self.size = max(1.0, float(level.counts.mean()))
        if sizes is not None:
            self._sizes, self._places = sizes, sizes.cumsum(0) - sizes

    def members(self, coarse: Tensor) -> Tensor:
        """Places of the clusters in these coarse ones."""
        return ranges(self._places[coarse], self._sizes[coarse])


def ranges(firsts: Tensor, lengths: Tensor) -> Tensor:
    """``firsts[i] .. firsts[i] + lengths[i] - 1`` for each i, behind one another; all int64."""
    starts = lengths.cumsum(0) - lengths
    return torch.arange(int(lengths.sum()), device=firsts.device) + (firsts - starts).repeat_interleave(lengths)


def coarse_groups(parts: list[Clusters], known: list[Tensor]) -> Tensor | None:
    """The coarse cluster of each cluster of some stretches, (G, L) int64; None if they are too few to need any.

    Args:
        parts: the clusters of each stretch.
        known: coarse clusters (G, l) of the first groups of ``GROUP`` stretches, each counted from 0; those of groups
            that are full are added.
    """
    if sum(part.counts.shape[1] for part in parts) < COARSE_FROM:
        return None
    full = len(parts) // GROUP
    groups = [parts[i * GROUP : (i + 1) * GROUP] for i in range(-(-len(parts) // GROUP))]
    found = known[:full]
    for group in groups[len(found) :]:
        means = torch.cat([part.mean_keys for part in group], dim=1)
        found.append(torch.stack([coarse_of(head, COARSE) for head in means]))
    known[:] = found[:full]
    bases = torch.tensor([0, *(int(group.max()) + 1 for group in found)]).cumsum(0)
    return torch.cat([group + base for group, base in zip(found, bases.tolist(), strict=False)], dim=1)
