"""A backend that attends to the clusters that matter, key by key, and lets the mean of each other one stand in for it.

``clusters[;share=0.02]``. The share is that of the stored keys which a query attends to one by one. Nothing
is dropped: what is not attended to is estimated (``memory.clustering`` has the formulae), so that the error falls with
the share, and 1 is exact. Clusters are made for stretches of 8,192 tokens, once each, and never again; the keys behind
the last stretch, and the outliers of each, are attended to by every query.
"""

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from memory.clustered import SEGMENT, Clusters, LearntClusters
from memory.clustering import CLUSTER, MOST_DRIFT, assign, cluster
from memory.index import ExactIndex, Index
from memory.vectors import VectorBlocks

NAME = "clusters"
DEFAULT_SHARE = 0.02
FEW = 4  # queries that attend to the same clusters: the query heads of a KV head, at one token
# Of more queries, those that are alike do, so many on the mean, and to a larger share: measured on a shipped model's
# queries, their errors are then no larger than that of a query alone.
ALIKE, ALIKE_SHARE = 16, 4


@dataclass(frozen=True)
class ClusterPlan:
    """A backend's name, taken apart.

    Attributes:
        share: of the stored keys, in (0, 1].
    """

    share: float


def parse_clusters(name: str) -> ClusterPlan:
    """Take a name such as ``clusters;share=0.05`` apart.

    Raises:
        ValueError: it is no such name.
    """
    found = re.fullmatch(r"clusters(?:;share=(\d*\.?\d+))?", name.replace(" ", ""))
    share = float(found[1] or DEFAULT_SHARE) if found else 0.0
    if not 0.0 < share <= 1.0:
        raise ValueError(f"index {name!r} is not understood: write clusters, or clusters;share=0.05 with a share of "
                         "the keys above 0 and up to 1")  # fmt: skip
    return ClusterPlan(share)


class ClusterIndex(Index):
    """Attention by clusters; see ``memory.index.Index`` for the methods.

    Args:
        name: as ``parse_clusters`` takes it.
        keys: the stored keys.
        values: the stored values.

    Raises:
        ValueError: as ``parse_clusters``.
    """

    def __init__(self, name: str, keys: VectorBlocks, values: VectorBlocks) -> None:
        self._name = name
        self._plan = parse_clusters(name)
        self._keys = keys
        self._values = values
        self._exact = ExactIndex(keys, values)
        self._parts: list[Clusters] = []
        self._table: _Table | None = None

    def add(self, keys: Tensor) -> None:
        """Cluster each stretch of ``SEGMENT`` slots that is full now."""
        while len(self._keys) - self._end() >= SEGMENT:
            self._cluster(self._end(), self._end() + SEGMENT)

    def fill(self, learnt: LearntClusters | None) -> None:
        """Take in all that is stored; what is clustered already stays as it is.

        Raises:
            ValueError: ``learnt`` is damaged, or of other keys; its origin is named.
        """
        if learnt is not None:
            try:
                learnt.clusters.check(self._keys.num_heads, self._keys.head_dim, len(self._keys))
            except ValueError as error:
                raise ValueError(
                    f"{learnt.origin} is damaged or belongs to another memory: {error}; open the memory without it, "
                    "with Memory.open(path, index='exact')"
                ) from error
            for part in learnt.clusters.to(self._keys.device or torch.device("cpu")).split():
                start = int(part.stretches[0, 0])
                while self._end() < start:  # a document that was dropped has left some of a stretch
                    self._cluster(self._end(), min(start, self._end() + SEGMENT))
                self._parts.append(part)
        self.add(self._keys.take_range(0, 0, torch.float32))

    def learnt(self) -> LearntClusters | None:
        """The clusters, to be saved; None while there are none."""
        return LearntClusters(self._name, Clusters.join(self._parts)) if self._parts else None

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Exact top-k; shapes as in ``Index.search``."""
        return self._exact.search(queries, k)

    def attend(self, queries: Tensor, *, scale: float) -> tuple[Tensor, Tensor]:
        """Softmax attention over all of memory, most of it estimated; shapes as in ``Index.attend``."""
        if not self._parts or self._plan.share == 1.0:
            return self._exact.attend(queries, scale=scale)
        if self._table is None:
            self._table = _Table(Clusters.join(self._parts), self._keys, self._values)
        asked = queries.float() * scale
        if asked.shape[1] <= FEW:
            found = [self._attend_head(g, query, self._table, 1) for g, query in enumerate(asked)]
        else:
            found = [self._attend_alike(g, query, self._table) for g, query in enumerate(asked)]
        output, lse = (torch.stack(parts) for parts in zip(*found, strict=True))
        return output.to(queries.dtype), lse

    @property
    def attends_to_all(self) -> bool:
        """Every stored pair counts, if by its cluster's mean alone."""
        return True

    def nbytes(self) -> int:
        """Bytes of the clusters and of the outliers' copies."""
        tensors = [tensor for part in self._parts for tensor in vars(part).values()]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def describe(self) -> str:
        """The share of keys."""
        number = sum(part.counts.shape[1] for part in self._parts)
        return f"{NAME}, {number:,} of them, {self._plan.share:.1%} of keys"

    def _end(self) -> int:
        return self._parts[-1].end if self._parts else 0

    def _cluster(self, start: int, stop: int) -> None:
        keys, values = (blocks.take_range(start, stop, torch.float32) for blocks in (self._keys, self._values))
        self._parts.append(cluster(keys, values, start))
        self._table = None

    def _attend_alike(self, head: int, queries: Tensor, table: "_Table") -> tuple[Tensor, Tensor]:
        """As ``_attend_head``, of many queries (b, D): those that are alike at a time."""
        order, sizes = alike(queries, ALIKE)
        parts = [self._attend_head(head, some, table, ALIKE_SHARE) for some in queries[order].split(sizes)]
        output, lse = (torch.empty_like(one) for one in (queries, queries[:, 0]))
        output[order], lse[order] = (torch.cat(found) for found in zip(*parts, strict=True))
        return output, lse

    def _attend_head(self, head: int, queries: Tensor, table: "_Table", times: int) -> tuple[Tensor, Tensor]:
        """Of scaled queries (b, D) float32 that attend to the same clusters, and to so many times the share of keys."""
        weights, pull = table.estimate(head, queries)  # (b, L), (b, 1)
        chosen = table.choose(head, weights, times * self._plan.share * len(self._keys))
        slots = table.slots(head, chosen)
        pairs = [(table.outlier_keys[head], table.outlier_values[head])]
        loose = (blocks.pieces(table.end, len(self._keys), torch.float32) for blocks in (self._keys, self._values))
        pairs += [(keys[head], values[head]) for keys, values in zip(*loose, strict=True)]
        gathered = (blocks.gather_head(head, slots, torch.float32) for blocks in (self._keys, self._values))
        pairs.append(tuple(gathered))

        weights[:, chosen] = -torch.inf
        logits = [queries @ keys.T for keys, _ in pairs]
        lse = torch.cat([weights, *logits], dim=1).logsumexp(1, keepdim=True)  # (b, 1)
        shares = weights.sub_(lse).exp_()
        output = shares @ table.mean_values[head]
        drift = shares.mul_(torch.minimum(table.spreads[head], pull)).sum(1, keepdim=True)
        output += drift * (queries @ table.slope[head])
        for logit, (_, values) in zip(logits, pairs, strict=True):
            output += logit.sub_(lse).exp_() @ values
        return output, lse.squeeze(1)


def alike(queries: Tensor, size: int) -> tuple[Tensor, list[int]]:
    """An order (b,) in which queries that are alike lie behind one another, and how many do, ``size`` on the mean."""
    of = assign(queries.cpu(), max(1, len(queries) // size))
    return of.argsort(stable=True).to(queries.device), [n for n in torch.bincount(of).tolist() if n]


class _Table:
    """All clusters of one layer as attention needs them.

    Attributes:
        end: past the last clustered slot.
        mean_values: (G, L, D).
        spreads: (G, L).
        slope: (G, D, D).
        outlier_keys: (G, O, D) float32.
        outlier_values: likewise.
    """

    def __init__(self, clusters: Clusters, keys: VectorBlocks, values: VectorBlocks) -> None:
        self.end = clusters.end
        self.mean_values, self.spreads = clusters.mean_values, clusters.spreads
        self._mean_keys = clusters.mean_keys
        sums = clusters.covariances.sum(1)  # (G, D, D)
        trace = sums.diagonal(dim1=1, dim2=2).sum(1).clamp(min=1e-12)[:, None, None]
        self._covariance, self.slope = sums / trace, clusters.slopes.sum(1) / trace
        self._counts = clusters.counts.long()
        # log 0 = -inf: an empty cluster weighs nothing.
        self._log_counts = clusters.counts.float().log()
        # A key is worth reading for what its cluster weighs, and for how much its own weight may differ.
        self._bonus = (self.spreads.clamp(min=1e-12).log() / 2 - self._log_counts).nan_to_num(neginf=0.0, posinf=0.0)
        self._slots, self._firsts, outliers = _lay_out(clusters)
        self.outlier_keys = keys.gather(outliers, torch.float32)
        self.outlier_values = values.gather(outliers, torch.float32)

    def estimate(self, head: int, queries: Tensor) -> tuple[Tensor, Tensor]:
        """What the clusters of a head weigh for scaled queries (b, D): log-weights (b, L), and the most spread (b, 1)
        whose drift of values is believed."""
        half = ((queries @ self._covariance[head]) * queries).sum(1, keepdim=True).clamp(min=1e-12) / 2
        weights = torch.addmm(self._log_counts[head], queries, self._mean_keys[head].T)
        weights += (half * self.spreads[head]).clamp_(max=MOST_DRIFT)
        return weights, MOST_DRIFT / half

    def choose(self, head: int, weights: Tensor, budget: float) -> Tensor:
        """The clusters, ascending, that queries of one head, with these log-weights (b, L), attend to key by key."""
        ranks = weights + self._bonus[head]
        if len(ranks) > 1:  # what matters to any of them: weights as shares of each query's own
            ranks = (ranks - weights.logsumexp(1, keepdim=True)).logsumexp(0, keepdim=True)
        most = min(ranks.shape[1], max(1, int(2 * budget / CLUSTER)))
        best = ranks[0].topk(most).indices
        within = self._counts[head, best].cumsum(0) <= budget
        return best[: max(1, int(within.sum()))].sort().values

    def slots(self, head: int, chosen: Tensor) -> Tensor:
        """The slots of the keys of these clusters, ascending."""
        counts, firsts = self._counts[head, chosen], self._firsts[head, chosen]
        starts = counts.cumsum(0) - counts
        places = torch.arange(int(counts.sum()), device=chosen.device)
        return self._slots[head, places + (firsts - starts).repeat_interleave(counts)].sort().values


def _lay_out(clusters: Clusters) -> tuple[Tensor, Tensor, Tensor]:
    """Slots (G, M) int64 stretch after stretch, the place in them of each cluster's first (G, L), outliers (G, O)."""
    starts, lengths, outliers, numbers = clusters.stretches.unbind(1)
    device = clusters.order.device
    slots = clusters.order.long() + starts.repeat_interleave(lengths).to(device)
    # Counted over clusters alone, then the outliers that lie before.
    firsts = clusters.counts.long().cumsum(1) - clusters.counts
    firsts += outliers.cumsum(0).repeat_interleave(numbers).to(device)
    places = torch.arange(int(lengths.sum())) - (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
    outlying = (places < outliers.repeat_interleave(lengths)).to(device)
    return slots, firsts, slots[:, outlying]
