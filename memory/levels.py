"""One level of clusters: what each weighs for a query, and what stands in for those not looked into.

``memory.clustering`` has the formulae. They hold for clusters of keys and for clusters of those clusters alike: a
coarse cluster has its keys' count, mean key, mean value and spread, and a covariance and a slope of its level. All KV
heads are asked at once, for a large part of the time goes to starting small operations.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from memory.clustering import MOST_DRIFT

MOST_RISE = 80.0  # of a key's logit above its mean key's; float32 has no exponential of much more
FORMULAE_COUNT = 8  # as so many clusters, beside those looked into
MOST_CHANGE = 1.0  # of a log-weight, by those: what they say of others can be wrong, as of clusters of two topics
SLOPE_COUNTS = 3.0  # times as much as the clusters looked into, where values' drift is measured; 2 and 5 are as good
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
        _, logs, spreads = self.facts.unsqueeze(2).unbind()  # each (G, 1, L)
        variance = ((queries @ self.covariance) * queries).sum(2, keepdim=True).clamp(min=1e-12)  # (G, b, 1)
        means = queries @ self.mean_keys.mT  # (G, b, L)
        plain = means + logs
        weights = (variance / 2 * spreads).clamp_(max=MOST_DRIFT).add_(plain)
        # A cluster is worth a look for the largest logits that its keys may have, whatever it costs to read.
        ranks = means.addcmul_(DEVIATIONS * variance.sqrt(), spreads.sqrt())
        return Estimate(self, plain, weights, ranks, 2 * MOST_DRIFT / variance)


@dataclass
class Estimate:
    """What the clusters of a level are taken to be for scaled queries.

    Attributes:
        level: the clusters.
        plain: (G, b, L), their log-weights if all keys of each were at its mean; -inf for empty ones.
        weights: (G, b, L), their log-weights; -inf once they are looked into.
        ranks: (G, b, L), by which they are chosen; used up by the choice.
        pull: (G, b, 1), the most spread whose drift of values is believed.
    """

    level: Level
    plain: Tensor
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
        # What matters to any of them: as shares of each query's own. Passes over all queries are the dear part.
        ranks = self.ranks.sub_(total).amax(1).masked_fill_(counts == 0, -torch.inf)
        # Twice as many as hold the budget if all are alike: the best may be small.
        best = ranks.topk(min(ranks.shape[1], max(1, int(2 * float(budgets.max()) / size)))).indices
        within = counts.gather(1, best).cumsum(1) <= budgets.unsqueeze(1)
        within[:, 0] = True
        chosen = torch.zeros_like(counts, dtype=torch.bool).scatter_(1, best, within)
        self.weights += torch.zeros_like(counts).masked_fill_(chosen, -torch.inf).unsqueeze(1)
        return chosen & (counts > 0)

    def attend(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Attention to those not looked into, for the queries (G, b, D); ends the estimate.

        Returns:
            output (G, b, D), log-sum-exp (G, b); next to nothing, ``exp`` of which is 0, if all were looked into.
        """
        least = torch.finfo(torch.float32)
        top = self.weights.detach().amax(2, keepdim=True).clamp_(min=least.min / 2)  # cancels out, gradients too
        shares = self.weights.sub_(top).exp_()
        total = shares.sum(2, keepdim=True).clamp_(min=least.tiny)
        return self.outputs(queries, shares) / total, (top + total.log()).squeeze(2)

    def drifts(self) -> Tensor:
        """By how much of the slope the values of each move, (G, b, L)."""
        return torch.minimum(self.level.facts[2].unsqueeze(1), self.pull)

    def outputs(self, queries: Tensor, shares: Tensor) -> Tensor:
        """What stands in for those not looked into, (G, b, D), for their shares (G, b, L) of any scale."""
        drift = (self.drifts() * shares).sum(2, keepdim=True)
        return shares @ self.level.mean_values + drift * (queries @ self.level.slope)


class Measured:
    """Clusters of keys of which some were looked into, and what those say of the others.

    A cluster that was looked into shows by how much it weighs more than all its keys at their mean would. A rise that
    grows with the spread is fitted to these and changes the weights of the others, by ``MOST_CHANGE`` at most. It
    shows, too, how far its mean value was from the mean of its values under the softmax; this counts beside the slope.

    Args:
        estimate: of the clusters; its weights are replaced.
        opened: (G, L) bool, those looked into.
        of: (G, m) int64, the cluster of each of their keys.
        logits: (G, b, m) of these; -inf for what is no key.
    """

    def __init__(self, estimate: Estimate, opened: Tensor, of: Tensor, logits: Tensor) -> None:
        self._estimate = estimate
        self._of = of.unsqueeze(1).expand_as(logits)
        spreads, opened = estimate.level.facts[2].unsqueeze(1), opened.unsqueeze(1)  # (G, 1, L)
        self._plain = estimate.plain.clamp(min=torch.finfo(torch.float32).min)  # not -inf, from which nothing is taken
        above = (logits - self._plain.gather(2, self._of)).clamp(max=MOST_RISE).exp()
        self._rises = torch.zeros_like(estimate.plain).scatter_add(2, self._of, above)  # 0 but for opened ones
        known = spreads * opened
        products = self._rises.clamp(min=torch.finfo(torch.float32).tiny).log() * known
        slope = products.sum(2, keepdim=True) / known.square().sum(2, keepdim=True).clamp(min=1e-12)
        count = opened.sum(2, keepdim=True)
        self._trust = count / (count + FORMULAE_COUNT)
        # Of opened and of empty clusters the weights are -inf, and stay so.
        formula = (estimate.weights - self._plain).clamp(min=0.0)
        change = (self._trust * (slope * spreads - formula)).clamp_(-MOST_CHANGE, MOST_CHANGE)
        estimate.weights = estimate.weights + change

    def outputs(self, queries: Tensor, shares: Tensor, attended: Tensor, values: Tensor, top: Tensor) -> Tensor:
        """What all of them give, (G, b, D).

        Args:
            queries: (G, b, D), scaled.
            shares: (G, b, L), ``exp(weights - top)`` of those not looked into.
            attended: (G, b, m), ``exp(logits - top)`` of the keys.
            values: (G, m, D) of the keys.
            top: (G, b, 1).
        """
        level, drifts = self._estimate.level, self._estimate.drifts()
        drift = (drifts * shares).sum(2, keepdim=True)
        seen = self._rises * (self._plain - top).exp() * drifts  # what was looked into, as often as it drifts
        part = self._trust / (1 + SLOPE_COUNTS)
        gain = part * drift / (drifts * seen).sum(2, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        # Each key's value less its cluster's mean value, as parts of the products that are made anyway.
        attended = attended * (1 + gain * drifts.gather(2, self._of))
        found = attended @ values + (shares - gain * seen) @ level.mean_values
        return found + (1 - part) * drift * (queries @ level.slope)


def normed(covariances: Tensor, slopes: Tensor) -> tuple[Tensor, Tensor]:
    """A ``Level``'s covariance and slope from the sums (G, D, D) over all keys of the outer products of their distances
    from their means: with themselves, and with those of values."""
    trace = covariances.diagonal(dim1=1, dim2=2).sum(1).clamp(min=1e-12)[:, None, None]
    return covariances / trace, slopes / trace
