"""The clusters of one layer as attention reads them."""

import torch
from torch import Tensor

from memory.clustered import Clusters
from memory.clustering import CLUSTER, MOST_DRIFT
from memory.vectors import VectorBlocks

DEVIATIONS = 2.0  # of its keys' logits by which a cluster is ranked above its mean; 1 and 3 are as good


class ClusterTable:
    """All clusters of one layer as attention needs them.

    Attributes:
        end: past the last clustered slot.
        mean_values: (G, L, D).
        spreads: (G, L).
        slope: (G, D, D).
        always: keys and values, each (G, n, D) float32, that every query attends to: outliers, then what is not
            clustered yet.
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
        self._slots, self._firsts, outliers = _lay_out(clusters)
        self.always = [(keys.gather(outliers, torch.float32), values.gather(outliers, torch.float32))]

    def read_loose(self, keys: VectorBlocks, values: VectorBlocks) -> None:
        """Take in what lies behind the clustered slots now."""
        loose = (blocks.pieces(self.end, len(blocks), torch.float32) for blocks in (keys, values))
        self.always[1:] = zip(*loose, strict=True)

    def estimate(self, head: int, queries: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the clusters of a head weigh for scaled queries (b, D): log-weights (b, L); ranks (b, L), by which
        clusters are chosen; and the most spread (b, 1) whose drift of values is believed."""
        variance = ((queries @ self._covariance[head]) * queries).sum(1, keepdim=True).clamp(min=1e-12)
        drift = variance * self.spreads[head]  # (b, L), variance of the logits in each cluster
        means = queries @ self._mean_keys[head].T
        weights = means + self._log_counts[head] + (drift / 2).clamp(max=MOST_DRIFT)
        # A cluster is worth reading for the largest logits that its keys may have, whatever it costs to read.
        return weights, means + DEVIATIONS * drift.sqrt(), 2 * MOST_DRIFT / variance

    def choose(self, head: int, weights: Tensor, ranks: Tensor, budget: float) -> Tensor:
        """The clusters, ascending, that queries of one head attend to key by key: so many keys, or one cluster.

        Args:
            head: of the layer.
            weights: (b, L), of ``estimate``.
            ranks: (b, L), likewise.
            budget: keys.
        """
        if len(ranks) > 1:  # what matters to any of them: as shares of each query's own
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
