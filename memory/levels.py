"""One level of a KV head's clusters: what each weighs for a query, and what stands in for those not looked into.

``memory.clustering`` has the formulae. They hold for clusters of keys and for clusters of those clusters alike: a
coarse cluster has its keys' count, mean key, mean value and spread, and a covariance and a slope of its level.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from memory.clustering import MOST_DRIFT, assign

DEVIATIONS = 2.0  # of its keys' logits by which a cluster is ranked above its mean; 1 and 3 are as good


@dataclass(frozen=True)
class Level:
    """Clusters of one KV head.

    Attributes:
        mean_keys: (L, D) float32.
        mean_values: (L, D) float32.
        facts: (3, L) float32: keys of each; their log; their spread, the mean square distance from their mean.
        covariance: (D, D) of these distances, of trace 1.
        slope: (D, D), by which values move with them.
    """

    mean_keys: Tensor
    mean_values: Tensor
    facts: Tensor
    covariance: Tensor
    slope: Tensor

    @classmethod
    def of(cls, counts: Tensor, means: tuple[Tensor, Tensor], spreads: Tensor, sums: tuple[Tensor, Tensor]) -> "Level":
        """From counts (L,), mean keys and values (L, D), spreads (L,), and the sums (D, D) over all keys of the outer
        products of their distances from their means: with themselves, and with those of values."""
        trace = sums[0].diagonal().sum().clamp(min=1e-12)
        # log 0 = -inf: an empty cluster weighs nothing.
        facts = torch.stack([counts, counts.log(), spreads])
        return cls(*means, facts, sums[0] / trace, sums[1] / trace)

    @property
    def counts(self) -> Tensor:
        """(L,) float32, keys of each."""
        return self.facts[0]

    def estimate(self, queries: Tensor) -> "Estimate":
        """What they weigh for scaled queries (b, D)."""
        variance = ((queries @ self.covariance) * queries).sum(1, keepdim=True).clamp(min=1e-12)  # (b, 1)
        means = queries @ self.mean_keys.T  # (b, L)
        weights = (variance / 2 * self.facts[2]).clamp_(max=MOST_DRIFT).add_(means).add_(self.facts[1])
        # A cluster is worth a look for the largest logits that its keys may have, whatever it costs to read.
        ranks = torch.addcmul(means, DEVIATIONS * variance.sqrt(), self.facts[2].sqrt())
        return Estimate(self, weights, ranks, 2 * MOST_DRIFT / variance)

    def rows(self, places: Tensor) -> "Level":
        """Some of them, (l,) int64."""
        means = (self.mean_keys.index_select(0, places), self.mean_values.index_select(0, places))
        return Level(*means, self.facts.index_select(1, places), self.covariance, self.slope)

    def joined(self, of: Tensor, sums: tuple[Tensor, Tensor]) -> "Level":
        """Coarser clusters. ``of``: (L,) int64, the coarse cluster of each; ``sums`` as for ``of``, of this level."""
        number, n = int(of.max()) + 1, self.counts.unsqueeze(1)  # (L, 1)
        held = n.new_zeros(number, 1).index_add_(0, of, n)

        def mean(numbers: Tensor) -> Tensor:
            return n.new_zeros(number, numbers.shape[1]).index_add_(0, of, n * numbers) / held.clamp(min=1)

        mean_keys, mean_values = mean(self.mean_keys), mean(self.mean_values)
        k, v = self.mean_keys - mean_keys[of], self.mean_values - mean_values[of]
        spreads = mean(self.facts[2].unsqueeze(1) + k.square().sum(1, keepdim=True)).squeeze(1)
        sums = (sums[0] + (n * k).T @ k, sums[1] + (n * k).T @ v)
        return Level.of(held.squeeze(1), (mean_keys, mean_values), spreads, sums)


@dataclass
class Estimate:
    """What the clusters of a level are taken to be for scaled queries.

    Attributes:
        level: the clusters.
        weights: (b, L), their log-weights; -inf once they are looked into.
        ranks: (b, L), by which they are chosen.
        pull: (b, 1), the most spread whose drift of values is believed.
    """

    level: Level
    weights: Tensor
    ranks: Tensor
    pull: Tensor

    def look_into(self, budget: float, lse: Tensor, size: float) -> Tensor:
        """Choose clusters of so many keys, or one; they no longer count by weight.

        Args:
            budget: keys.
            lse: (b, 1), log-sum-exp of each query over everything, as far as it is known.
            size: keys in a cluster, on the mean.

        Returns:
            (c,) int64.
        """
        # What matters to any of them: as shares of each query's own.
        ranks = (self.ranks - lse).amax(0)
        # Twice as many as hold the budget if all are alike: the best may be small.
        best = ranks.topk(min(len(ranks), max(1, int(2 * budget / size)))).indices
        best = best[: max(1, int((self.level.counts[best].cumsum(0) <= budget).sum()))]
        self.weights[:, best] = -torch.inf
        return best

    def output(self, queries: Tensor, lse: Tensor) -> Tensor:
        """What stands in for those not looked into, (b, D), given the log-sum-exp over everything (b, 1)."""
        shares = (self.weights - lse).exp_()
        drift = (torch.minimum(self.level.facts[2], self.pull) * shares).sum(1, keepdim=True)
        return shares @ self.level.mean_values + drift * (queries @ self.level.slope)


def coarse_of(mean_keys: Tensor, size: int) -> Tensor:
    """The coarse cluster of each cluster, (L,) int64, of so many on the mean; ``mean_keys`` (L, D) float32."""
    return assign(mean_keys.cpu(), max(1, len(mean_keys) // size)).to(mean_keys.device)
