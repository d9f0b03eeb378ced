"""The clusters of one layer as attention reads them.

A large memory has two levels: its clusters are clustered by their mean keys, ``COARSE`` at a time, over groups of
stretches. A query ranks the coarse clusters and ranks clusters only in the best of them; the others stand in
themselves. So what a query costs hardly grows with the memory. Coarse clusters are ``Clusters`` whose slots are the
numbers of clusters.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from memory.clustered import Clusters, unpacked
from memory.clustering import assign
from memory.levels import Estimate, Level, normed
from memory.vectors import VectorBlocks

COARSE = 64  # clusters in a coarse one, on the mean
GROUP = 16  # stretches whose clusters are clustered together, once there are so many more
SAMPLED = 16  # clusters for each coarse one that k-means looks at
COARSE_FROM = 4096  # clusters of a head; ranking fewer costs less than a second level saves
RANKED = 0.78  # clusters that are ranked, for each key that is attended to


@dataclass(frozen=True)
class Asked:
    """What scaled queries attend to.

    Attributes:
        estimate: of clusters of keys.
        coarse: of coarse clusters; None with one level.
        chosen: (G, L) bool, the clusters of keys that are attended to key by key.
        slots: (G, m) int64 ascending, of these keys; rows of fewer end in some slot again and again.
        of: (G, m) int64, the cluster of each.
        held: (G,) int64, so many of each row count.
    """

    estimate: Estimate
    coarse: Estimate | None
    chosen: Tensor
    slots: Tensor
    of: Tensor
    held: Tensor


class Tier:
    """Clusters as they are kept, and where the members of each are: keys, or the clusters of a coarse one.

    Args:
        clusters: of a layer; mapped ones stay where they are.
        keys: (G, M) int16, keys of each member; None if they are keys themselves.

    Attributes:
        size: keys of a cluster, on the mean.
    """

    def __init__(self, clusters: Clusters, keys: Tensor | None = None) -> None:
        self._clusters = clusters
        starts, _, outliers, numbers = clusters.stretches.unbind(1)
        device = clusters.order.device
        # Where each one's members begin in ``order``: counted over clusters alone, then the outliers that lie before.
        self._firsts = clusters.counts.long().cumsum(1) - clusters.counts
        self._firsts += outliers.cumsum(0).repeat_interleave(numbers).to(device)
        # The slot that these are counted from.
        self._starts = starts.repeat_interleave(numbers).to(device).expand_as(self._firsts)
        counts = clusters.counts.float() if keys is None else self._summed(keys)
        # log 0 = -inf: an empty cluster weighs nothing.
        self._facts = torch.stack([counts, counts.log(), clusters.spreads.float()])
        self._sums = normed(*clusters.sums())
        self.size = max(1.0, float(counts.mean()))

    def all(self) -> Level:
        """All of them."""
        keys, values = self._means(slice(None), None)
        return Level(keys, values, self._facts, *self._sums)

    def rows(self, heads: slice, places: Tensor, valid: Tensor) -> Level:
        """Some clusters of some heads, (g, l) int64; those not valid, (g, l) bool, become empty ones."""
        facts = self._facts[:, heads]
        flat = _flattened(places, facts.shape[2])
        facts = facts.flatten(1).index_select(1, flat).view(3, *places.shape)
        facts[:2].masked_fill_(~valid, 0.0)
        facts[1].masked_fill_(~valid, -torch.inf)
        keys, values = (mean.view(*places.shape, -1) for mean in self._means(heads, flat))
        return Level(keys, values, facts, *(one[heads] for one in self._sums))

    def members(self, heads: slice, chosen: Tensor, places: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """The members (g, m) int64 of the chosen clusters (g, l) bool of those in these places, or of all.

        And which of the l each is of, (g, m) int64; and which are valid, (g, m) bool: rows of fewer end in some that
        are not.
        """
        about = self._firsts[heads], self._starts[heads], self._clusters.counts[heads]
        firsts, starts, counts = about if places is None else (one.gather(1, places) for one in about)
        rows, of, valid = ranges(firsts, counts.long() * chosen)
        return self._clusters.order[heads].gather(1, rows) + starts.gather(1, of), of, valid

    def _means(self, heads: slice, flat: Tensor | None) -> list[Tensor]:
        """Mean keys and values (..., D) float32 of some heads; ``flat`` (n,) are places in all of them together."""
        c = self._clusters
        pairs = (c.mean_keys, c.key_scales), (c.mean_values, c.value_scales)
        if flat is None:
            return [unpacked(means[heads], scales[heads]) for means, scales in pairs]

        def picked(rows: Tensor) -> Tensor:
            return rows[heads].flatten(0, 1).index_select(0, flat)

        # Scales are 1 but for int8.
        return [unpacked(picked(m), picked(s) if m.dtype == torch.int8 else s) for m, s in pairs]

    def _summed(self, keys: Tensor) -> Tensor:
        """Keys of each cluster, (G, L) float32, where members have so many."""
        starts, lengths = self._clusters.stretches[:, :2].unbind(1)
        ordered = keys.long().gather(1, self._clusters.order + starts.repeat_interleave(lengths).to(keys.device))
        before = pad(ordered.cumsum(1), (1, 0))
        ends = self._firsts + self._clusters.counts
        return (before.gather(1, ends) - before.gather(1, self._firsts)).float()


class ClusterTable:
    """All clusters of one layer as attention needs them.

    Args:
        clusters: of the layer.
        coarse: clusters of these; None for one level.
        keys: the stored keys.
        values: the stored values.

    Attributes:
        end: past the last clustered slot.
        always: keys and values, each (G, n, D) float32, that every query attends to: outliers, then what is not
            clustered yet.
    """

    def __init__(self, clusters: Clusters, coarse: Clusters | None, keys: VectorBlocks, values: VectorBlocks) -> None:
        self.end = clusters.end
        self._fine = Tier(clusters)
        self._coarse = None if coarse is None else Tier(coarse, clusters.counts)
        self._top = (self._coarse or self._fine).all()
        starts, lengths, outliers, _ = clusters.stretches.unbind(1)
        device = clusters.order.device
        firsts = (lengths.cumsum(0) - lengths).repeat_interleave(outliers)
        places = torch.arange(len(firsts)) - (outliers.cumsum(0) - outliers).repeat_interleave(outliers)
        slots = clusters.order[:, (firsts + places).to(device)] + starts.repeat_interleave(outliers).to(device)
        everyone = slice(None)
        self.always = [(keys.gather_heads(everyone, slots), values.gather_heads(everyone, slots))]

    def read_loose(self, keys: VectorBlocks, values: VectorBlocks) -> None:
        """Take in what lies behind the clustered slots now."""
        loose = (blocks.pieces(self.end, len(blocks), torch.float32) for blocks in (keys, values))
        self.always[1:] = zip(*loose, strict=True)

    def ask(self, heads: slice, queries: Tensor, budgets: Tensor) -> Asked:
        """What scaled queries (g, b, D) of these heads attend to, key by key to about so many keys (g,) float32."""
        estimate = self._top.of_heads(heads).estimate(queries)
        coarse, places, total = None, None, estimate.total()
        if self._coarse is not None:
            coarse = estimate
            opened = coarse.look_into(RANKED * self._fine.size * budgets, total, self._coarse.size)
            places, _, valid = self._coarse.members(heads, opened)
            estimate = self._fine.rows(heads, places, valid).estimate(queries)
        chosen = estimate.look_into(budgets, total, self._fine.size)
        slots, of, valid = self._fine.members(heads, chosen, places)
        slots, order = slots.masked_fill_(~valid, self.end - 1).sort()
        return Asked(estimate, coarse, chosen, slots, of.gather(1, order), valid.sum(1))


def ranges(firsts: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``firsts[i] .. firsts[i] + lengths[i] - 1`` for each i, behind one another, of each row; all int64.

    Returns:
        The numbers (G, m); the i that each is of, (G, m); and which are valid, (G, m): rows of fewer end in some that
        are not, the numbers of which are ``firsts[0]``, of i = 0, so that they can be looked up like any others.
    """
    rows, count = lengths.shape
    sums = lengths.sum(1, keepdim=True)
    longest = int(sums.max())
    filled = torch.cat([lengths, longest - sums], dim=1).flatten()
    of = torch.repeat_interleave(filled, output_size=rows * longest).view(rows, longest)
    of -= (count + 1) * torch.arange(rows, device=of.device).unsqueeze(1)
    valid = of < count
    of.masked_fill_(~valid, 0)
    places = torch.arange(longest, device=of.device)
    numbers = torch.where(valid, places + (firsts - lengths.cumsum(1) + lengths).gather(1, of), firsts[:, :1])
    return numbers, of, valid


def coarse_groups(clusters: Clusters, known: Clusters | None) -> Clusters | None:
    """Clusters of clusters, of each ``GROUP`` stretches; None if they are too few to need any.

    In what is returned, a stretch is such a group, and slots are numbers of clusters.

    Args:
        clusters: of all stretches.
        known: of the same stretches, or of the first of them; groups that are as they were then are not made again.
    """
    if clusters.counts.shape[1] < COARSE_FROM:
        return None
    sizes = [int(part.sum()) for part in clusters.stretches[:, 3].split(GROUP)]
    held = [] if known is None else known.stretches[:, 1].tolist()
    same = next((g for g, pair in enumerate(zip(sizes, held, strict=False)) if pair[0] != pair[1]), len(held))
    if same == len(sizes) == len(held):
        return known
    parts, same = clusters.split(), min(same, len(sizes))
    groups = [] if known is None else [known.first(same)]
    for number in range(same, len(sizes)):
        group = Clusters.join(parts[number * GROUP : (number + 1) * GROUP])
        groups.append(_coarse(group, sum(sizes[:number])))
    return Clusters.join(groups)


def _coarse(group: Clusters, first: int) -> Clusters:
    """Clusters of some clusters, the first of which has this number."""
    heads, length = group.counts.shape
    n = group.counts.float().unsqueeze(2)
    keys, values = unpacked(group.mean_keys, group.key_scales), unpacked(group.mean_values, group.value_scales)
    number = max(1, length // COARSE)
    of = torch.stack([assign(head.cpu(), number, SAMPLED) for head in keys]).to(keys.device)
    flat = _flattened(of, number)

    def total(numbers: Tensor) -> Tensor:
        into = numbers.new_zeros(heads * number, numbers.shape[2])
        return into.index_add_(0, flat, (n * numbers).flatten(0, 1)).view(heads, number, -1)

    def spread_out(coarse: Tensor) -> Tensor:
        return coarse.flatten(0, 1).index_select(0, flat).view(heads, -1, coarse.shape[2])

    counts = total(torch.ones_like(n)).clamp_(min=1)
    mean_keys, mean_values = total(keys) / counts, total(values) / counts
    k, v = keys - spread_out(mean_keys), values - spread_out(mean_values)
    spreads = total(group.spreads.float().unsqueeze(2) + k.square().sum(2, keepdim=True)) / counts
    covariance, slope = group.sums()
    return Clusters.of(
        torch.tensor([[first, length, 0, number]]),
        of.argsort(dim=1, stable=True),
        torch.stack([head.bincount(minlength=number) for head in of]),
        (mean_keys, mean_values),
        spreads.squeeze(2),
        ((covariance + (n * k).mT @ k).unsqueeze(1), (slope + (n * k).mT @ v).unsqueeze(1)),
        (group.mean_keys.dtype, group.mean_values.dtype),
    )


def _flattened(places: Tensor, length: int) -> Tensor:
    """Places (G, l) in rows of so many as places in all rows behind one another, (G * l,)."""
    return (places + length * torch.arange(len(places), device=places.device).unsqueeze(1)).flatten()
