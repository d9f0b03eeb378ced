"""Clusters of a stretch of stored keys, and what stands in for a cluster that a query does not attend to.

The keys of a cluster are taken to be normal about its mean, with one covariance for a whole layer's KV head (of trace
1) times the cluster's own spread; values are taken to move with keys by one linear map, the slope. So a cluster of n
keys needs its count, mean key, mean value and spread alone, and a query q (times the scale) gives it::

    weight   log n + q.mean_key + min(1, h)                        h = spread * q'Cq / 2
    value    mean_value + min(spread, 2 / q'Cq) * q'slope

The weight is the log-sum-exp of a normal distribution. It is capped, for the tail of a normal distribution promises
large keys that few real ones do not have. The value is the mean under the same softmax. So clusters are chosen; those
attended to then show what both should have been, and correct them for the others (``memory.levels.Measured``).
"""

import torch
from torch import Tensor

from memory.clustered import Clusters
from memory.faiss_module import faiss

# Keys in a cluster, on the mean; more of int8, beside which clusters weigh more.
CLUSTER, CLUSTER_INT8 = 16, 25
ROUNDS = 6  # of k-means
# Of each stretch, attended to by every query: attention sinks have tiny keys and tiny values, and would make the
# cluster that they are in stand in for far too much.
FAR_KEYS, SMALL_KEYS = 16, 8
MOST_STARTS = 256  # first tokens of documents
MOST_DRIFT = 1.0  # the cap


def cluster(
    keys: Tensor, values: Tensor, start: int, always: Tensor, dtypes: tuple[torch.dtype, torch.dtype]
) -> Clusters:
    """Cluster the keys of a stretch, the same way each time.

    Args:
        keys: (G, n, D) float32, n up to ``SEGMENT``.
        values: (G, n, D) float32.
        start: slot of the first.
        always: (m,) int64, places of keys that are attended to by every query, whatever they are: the first tokens
            of documents. Of more than ``MOST_STARTS``, so many evenly.
        dtypes: in which keys and values are stored.
    """
    if len(always) > MOST_STARTS:
        always = always[torch.arange(MOST_STARTS) * len(always) // MOST_STARTS]
    size = CLUSTER_INT8 if torch.int8 in dtypes else CLUSTER
    heads = [_cluster_head(k, v, always, size) for k, v in zip(keys.cpu(), values.cpu(), strict=True)]
    order, counts, mean_keys, mean_values, spreads, covariance, slope = (
        torch.stack(parts) for parts in zip(*heads, strict=True)
    )
    outliers = keys.shape[1] - int(counts[0].sum())
    stretches = torch.tensor([[start, keys.shape[1], outliers, counts.shape[1]]])
    sums = covariance.unsqueeze(1), slope.unsqueeze(1)
    return Clusters.of(stretches, order, counts, (mean_keys, mean_values), spreads, sums, dtypes).to(keys.device)


def _cluster_head(keys: Tensor, values: Tensor, always: Tensor, size: int) -> tuple[Tensor, ...]:
    """What ``Clusters`` holds for one head and stretch, keys and values (n, D); covariance and slope are (D, D)."""
    outlying = _outliers(keys, always)
    others = torch.ones(len(keys), dtype=torch.bool).index_fill_(0, outlying, False).nonzero().flatten()
    k, v = keys[others], values[others]
    number = max(1, len(k) // size)
    of = assign(k, number)
    counts = torch.bincount(of, minlength=number)
    divisor = counts.clamp(min=1).unsqueeze(1)
    mean_keys = torch.zeros(number, k.shape[1]).index_add_(0, of, k) / divisor
    mean_values = torch.zeros(number, v.shape[1]).index_add_(0, of, v) / divisor
    k, v = k - mean_keys[of], v - mean_values[of]
    spreads = torch.zeros(number).index_add_(0, of, k.square().sum(1)) / divisor.squeeze(1)
    order = torch.cat([outlying, others[of.argsort(stable=True)]])
    return order, counts, mean_keys, mean_values, spreads, k.T @ k, k.T @ v


def _outliers(keys: Tensor, always: Tensor) -> Tensor:
    """Places of the keys that no cluster can stand in for, ascending; as many for each KV head of a stretch."""
    others = torch.ones(len(keys), dtype=torch.bool).index_fill_(0, always, False).nonzero().flatten()
    rest = keys[others]
    far = (rest - keys.mean(0)).norm(dim=1).topk(min(FAR_KEYS, len(rest) // 4)).indices
    norms = rest.norm(dim=1).index_fill(0, far, torch.inf)
    small = norms.topk(min(SMALL_KEYS, len(rest) // 4), largest=False).indices
    return torch.cat([always, others[far], others[small]]).sort().values


def assign(keys: Tensor, number: int, most: int = 256) -> Tensor:
    """The cluster of each key, (n,) int64, by k-means of so many clusters.

    Args:
        keys: (n, D) float32.
        number: of clusters.
        most: keys for each cluster that k-means looks at.
    """
    if number == 1:
        return torch.zeros(len(keys), dtype=torch.int64)
    # FAISS would warn of too few keys a cluster.
    kmeans = faiss.Kmeans(
        keys.shape[1], number, niter=ROUNDS, seed=1, min_points_per_centroid=1, max_points_per_centroid=most
    )
    array = keys.contiguous().numpy()
    kmeans.train(array)
    return torch.from_numpy(kmeans.index.search(array, 1)[1].ravel())
