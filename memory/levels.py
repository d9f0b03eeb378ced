"""One level of clusters: what each weighs for a query, and what stands in for those not looked into.

``memory.clustering`` has the formulae. They hold for clusters of keys and for clusters of those clusters alike: a
coarse cluster has its keys' count, mean key, mean value and spread, and a covariance and a slope of its level. All KV
heads are asked at once, for a large part of the time goes to starting small operations.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from memory.clustering import MOST_DRIFT

DEVIATIONS = 2.0  # of its keys' logits by which a cluster is ranked above its mean; 1 and 3 are as good


@dataclass(frozen=True)
class Level:
    """Clusters of G KV heads.

    Attributes:
        mean_keys: (G, L, D) float32.
        mean_values: (G, L, D) float32.
        facts: (3, G, L) float32: keys of each; their log; their spread, the mean square distance from their mean.
        covariance: (G, D, D) of these distances, of trace 1.
        slope: (G, D, D), by which values move with them.
    """

    mean_keys: Tensor
    mean_values: Tensor
    facts: Tensor
    covariance: Tensor
    slope: Tensor

    def of_heads(self, heads: slice) -> "Level":
        """The same of some KV heads."""
        means = self.mean_keys[heads], self.mean_values[heads]
        return Level(*means, self.facts[:, heads], self.covariance[heads], self.slope[heads])

    def estimate(self, queries: Tensor) -> "Estimate":
        """What they weigh for scaled queries (G, b, D)."""
        counts, logs, spreads = self.facts.unsqueeze(2).unbind()  # each (G, 1, L)
        variance = ((queries @ self.covariance) * queries).sum(2, keepdim=True).clamp(min=1e-12)  # (G, b, 1)
        means = queries @ self.mean_keys.mT  # (G, b, L)
        weights = (variance / 2 * spreads).clamp_(max=MOST_DRIFT).add_(means).add_(logs)
        # A cluster is worth a look for the largest logits that its keys may have, whatever it costs to read.
        ranks = torch.addcmul(means, DEVIATIONS * variance.sqrt(), spreads.sqrt())
        return Estimate(self, weights, ranks.masked_fill_(counts == 0, -torch.inf), 2 * MOST_DRIFT / variance)


@dataclass
class Estimate:
    """What the clusters of a level are taken to be for scaled queries.

    Attributes:
        level: the clusters.
        weights: (G, b, L), their log-weights; -inf once they are looked into.
        ranks: (G, b, L), by which they are chosen.
        pull: (G, b, 1), the most spread whose drift of values is believed.
    """

    level: Level
    weights: Tensor
    ranks: Tensor
    pull: Tensor

    def total(self) -> Tensor:
        """Log-sum-exp of the weights, (G, b, 1)."""
        top = self.weights.amax(2, keepdim=True)
        return top + (self.weights - top).exp_().sum(2, keepdim=True).log_()

    def look_into(self, budgets: Tensor, total: Tensor, size: float) -> Tensor:
        """Choose clusters of so many keys, or one, for all queries of a head; they no longer count by weight.

        Args:
            budgets: (G,) float32, keys.
            total: (G, b, 1), log-sum-exp of each query over everything, as far as it is known.
            size: keys in a cluster, on the mean.

        Returns:
            (G, L) bool, those chosen that are not empty.
        """
        counts = self.level.facts[0]
        # What matters to any of them: as shares of each query's own.
        ranks = (self.ranks - total).amax(1)
        # Twice as many as hold the budget if all are alike: the best may be small.
        best = ranks.topk(min(ranks.shape[1], max(1, int(2 * float(budgets.max()) / size)))).indices
        within = counts.gather(1, best).cumsum(1) <= budgets.unsqueeze(1)
        within[:, 0] = True
        chosen = torch.zeros_like(counts, dtype=torch.bool).scatter_(1, best, within)
        self.weights.masked_fill_(chosen.unsqueeze(1), -torch.inf)
        return chosen & (counts > 0)

    def outputs(self, queries: Tensor, shares: Tensor) -> Tensor:
        """What stands in for those not looked into, (G, b, D), for their shares (G, b, L) of any scale."""
        drift = (torch.minimum(self.level.facts[2].unsqueeze(1), self.pull) * shares).sum(2, keepdim=True)
        return shares @ self.level.mean_values + drift * (queries @ self.level.slope)


def normed(covariances: Tensor, slopes: Tensor) -> tuple[Tensor, Tensor]:
    """A ``Level``'s covariance and slope from the sums (G, D, D) over all keys of the outer products of their distances
    from their means: with themselves, and with those of values."""
    trace = covariances.diagonal(dim1=1, dim2=2).sum(1).clamp(min=1e-12)[:, None, None]
    return covariances / trace, slopes / trace
