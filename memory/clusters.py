"""A backend that attends to the clusters that matter, key by key, and lets the mean of each other one stand in for it.

``clusters``, ``clusters;share=0.02`` or ``clusters;error=0.05``. The share is that of the stored keys which a query
attends to one by one. By default it is 0.02, and beyond 65,536 keys it falls with the square root of their number. The
error is the mean relative error of the output, from which each KV head gets the share that it needs: the index tries
shares on some of the first queries that it is asked, and again when the memory has doubled.

Nothing is dropped: what is not attended to is estimated (``memory.clustering`` has the formulae), so that the error
falls with the share, and 1 is exact. Clusters are made for stretches of 8,192 tokens, once each, and never again; the
keys behind the last stretch, the outliers of each and the first tokens of documents are attended to by every query.
"""

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from memory.cluster_table import Asked, ClusterTable, coarse_groups
from memory.clustered import SEGMENT, Clusters, LearntClusters
from memory.clustering import assign, cluster
from memory.index import ExactIndex, Index, Starts
from memory.levels import Measured
from memory.softmax import attend, merge
from memory.vectors import VectorBlocks

NAME = "clusters"
DEFAULT_SHARE = 0.02
STEADY = 65_536  # keys up to which it holds; so many times more keys, the square root of it times more attended to
FEW = 4  # queries that attend to the same clusters: the query heads of a KV head, at one token
# Of more queries, those that are alike do, so many on the mean, and to a share so many times as large: measured on a
# shipped model's queries, their errors are then no larger than that of a query alone.
ALIKE, ALIKE_SHARE = 16, 2.5
# As many queries as a window has: more are alike. If they attend to more than this, dense attention costs so little
# more that they get it.
MANY, MANY_ALIKE, MANY_SHARE, DENSE_SHARE = 512, 64, 4, 0.06
LADDER = (0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32)  # shares that are tried
SAMPLED = 32  # queries that they are tried on
UNTRIED_SHARE = 0.05  # before there are so many


@dataclass(frozen=True)
class ClusterPlan:
    """A backend's name, taken apart.

    Attributes:
        share: of the stored keys, in (0, 1]; None for the default.
        error: wanted mean relative error; None to attend to the share.
    """

    share: float | None = None
    error: float | None = None

    def share_of(self, num_keys: int) -> float:
        """The share of so many keys; with an error wanted, the one before any was tried."""
        if self.error is not None:
            return UNTRIED_SHARE
        return self.share or DEFAULT_SHARE * min(1.0, (STEADY / max(1, num_keys)) ** 0.5)


def parse_clusters(name: str) -> ClusterPlan:
    """Take a name such as ``clusters;share=0.05`` or ``clusters;error=0.05`` apart.

    Raises:
        ValueError: it is no such name.
    """
    found = re.fullmatch(r"clusters(?:;(share|error)=(\d*\.?\d+))?", name.replace(" ", ""))
    number = float(found[2]) if found and found[2] else None
    if found is None or (number is not None and not 0.0 < number <= 1.0):
        raise ValueError(
            f"index {name!r} is not understood: write clusters, clusters;share=0.05 for a share of the keys, or "
            "clusters;error=0.05 for a relative error of the output, with a number above 0 and up to 1"
        )
    return ClusterPlan(error=number) if found[1] == "error" else ClusterPlan(share=number)


class ClusterIndex(Index):
    """Attention by clusters; see ``memory.index.Index`` for the methods.

    Args:
        name: as ``parse_clusters`` takes it.
        keys: the stored keys.
        values: the stored values.
        starts: says where documents start.

    Raises:
        ValueError: as ``parse_clusters``.
    """

    def __init__(self, name: str, keys: VectorBlocks, values: VectorBlocks, starts: Starts) -> None:
        self._name = name
        self._plan = parse_clusters(name)
        self._keys = keys
        self._values = values
        self._starts = starts
        self._exact = ExactIndex(keys, values)
        self._dtypes = keys.dtype, values.dtype
        self._parts: list[Clusters] = []  # of one or more stretches each
        self._coarse: Clusters | None = None  # of all stretches, or of the first of them
        self._table: ClusterTable | None = None
        self._tried: list[float] = []  # the share of each head, once shares were tried
        self._sample = torch.empty(keys.num_heads, 0, keys.head_dim)  # scaled queries, to try shares on
        self._tried_at = 0  # keys that there were then

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
            clusters = learnt.clusters.to(self._keys.device or torch.device("cpu"))
            try:
                clusters.check(self._keys.num_heads, self._keys.head_dim, len(self._keys))
                if learnt.coarse is not None:
                    learnt.coarse.check(self._keys.num_heads, self._keys.head_dim, clusters.counts.shape[1])
            except ValueError as error:
                raise ValueError(
                    f"{learnt.origin} is damaged or belongs to another memory: {error}; open the memory without it, "
                    "with Memory.open(path, index='exact')"
                ) from error
            self._coarse = None if learnt.coarse is None else learnt.coarse.to(clusters.order.device)
            clusters = clusters.like(self._dtypes)  # a file of format version 1 has them in float32
            whole = clusters.end == int(clusters.stretches[:, 1].sum())  # a mapped file stays mapped
            for part in [clusters] if whole else clusters.split():
                start = int(part.stretches[0, 0]) if len(part.stretches) else 0
                while self._end() < start:  # a document that was dropped has left some of a stretch
                    self._cluster(self._end(), min(start, self._end() + SEGMENT))
                self._parts.append(part)
        self.add(self._keys.take_range(0, 0, torch.float32))

    def learnt(self) -> LearntClusters | None:
        """The clusters, to be saved; None while there are none."""
        return LearntClusters(self._name, *self._joined()) if self._end() else None

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Exact top-k; shapes as in ``Index.search``."""
        return self._exact.search(queries, k)

    def attend(self, queries: Tensor, *, scale: float) -> tuple[Tensor, Tensor]:
        """Softmax attention over all of memory, most of it estimated; shapes as in ``Index.attend``."""
        if not self._end() or min(self._shares()) == 1.0:
            return self._exact.attend(queries, scale=scale)
        if self._table is None:
            self._table = ClusterTable(*self._joined(), self._keys, self._values)
        self._table.read_loose(self._keys, self._values)
        asked = queries.float() * scale
        if self._plan.error is not None and len(self._keys) >= 2 * self._tried_at:
            self._try_shares(asked, self._table)
        rows, shares = asked.shape[1], self._shares()
        if rows >= MANY and MANY_SHARE * sum(shares) / len(shares) > DENSE_SHARE:
            return self._exact.attend(queries, scale=scale)
        if rows <= FEW:
            output, lse = self._attend_together(slice(None), asked, self._table, torch.tensor(shares))
        else:
            found = [self._attend_alike(g, query, self._table, shares[g]) for g, query in enumerate(asked)]
            output, lse = (torch.stack(parts) for parts in zip(*found, strict=True))
        return output.to(queries.dtype), lse

    @property
    def attends_to_all(self) -> bool:
        """Every stored pair counts, if by its cluster's mean alone."""
        return True

    def nbytes(self) -> int:
        """Bytes of the clusters."""
        parts = self._parts + ([] if self._coarse is None else [self._coarse])
        tensors = [tensor for part in parts for tensor in vars(part).values()]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def describe(self) -> str:
        """The share of keys."""
        number = sum(part.counts.shape[1] for part in self._parts)
        shares = sorted({f"{share:.4g}" for share in self._shares()}, key=float)
        return f"{NAME}, {number:,} of them, attends to {', '.join(shares)} of keys"

    def _try_shares(self, queries: Tensor, table: ClusterTable) -> None:
        """Collect scaled queries (G, T, D), and with enough of them choose each head's share anew."""
        wanted = SAMPLED - self._sample.shape[1]
        step = max(1, queries.shape[1] // wanted) if wanted else 1
        self._sample = torch.cat([self._sample.to(queries.device), queries[:, ::step][:, :wanted]], dim=1)
        if self._sample.shape[1] < SAMPLED:
            return
        exact = self._exact.attend(self._sample, scale=1.0)[0]
        self._tried = [self._share_for(g, exact[g], table) for g in range(len(exact))]
        self._tried_at = len(self._keys)
        self._sample = self._sample[:, :0]

    def _share_for(self, head: int, exact: Tensor, table: ClusterTable) -> float:
        """The least share of the ladder with which the sampled queries get nearly these outputs (b, D)."""
        assert self._plan.error is not None
        for share in LADDER:
            own, shares = slice(head, head + 1), torch.tensor([share])
            rows = [self._attend_together(own, q, table, shares)[0] for q in self._sample[own].split(1, dim=1)]
            error = (torch.cat(rows, dim=1)[0] - exact).norm(dim=1) / exact.norm(dim=1).clamp(min=1e-12)
            if error.mean() <= self._plan.error:
                return share
        return 1.0

    def _shares(self) -> list[float]:
        """Of the keys, for each head."""
        return self._tried or [self._plan.share_of(len(self._keys))] * self._keys.num_heads

    def _end(self) -> int:
        return self._parts[-1].end if self._parts else 0

    def _cluster(self, start: int, stop: int) -> None:
        keys, values = (blocks.take_range(start, stop, torch.float32) for blocks in (self._keys, self._values))
        self._parts.append(cluster(keys, values, start, self._starts(start, stop) - start, self._dtypes))
        self._table = None

    def _joined(self) -> tuple[Clusters, Clusters | None]:
        """All clusters, and the coarse ones, made if they are not yet."""
        self._parts = [Clusters.join(self._parts)]
        self._coarse = coarse_groups(self._parts[0], self._coarse)
        return self._parts[0], self._coarse

    def _attend_alike(self, head: int, queries: Tensor, table: ClusterTable, share: float) -> tuple[Tensor, Tensor]:
        """As ``_attend_together``, of many queries (b, D) of one head: those that are alike at a time."""
        few = len(queries) < MANY  # of a window's queries a correction would take half as long as all else
        size, times = (ALIKE, ALIKE_SHARE) if few else (MANY_ALIKE, MANY_SHARE)
        together = self._attend_together if few else self._attend_uncorrected
        order, sizes = alike(queries, size)
        own, shares = slice(head, head + 1), torch.tensor([min(1.0, times * share)])
        parts = [together(own, some[None], table, shares) for some in queries[order].split(sizes)]
        output, lse = (torch.empty_like(one) for one in (queries, queries[:, 0]))
        output[order], lse[order] = (torch.cat(found, dim=1)[0] for found in zip(*parts, strict=True))
        if not few:
            always = [(keys[own], values[own]) for keys, values in table.always if keys.shape[1]]
            found = [(output[None], lse[None]), *(_dense(queries[None], *pair) for pair in always)]
            output, lse = (one[0] for one in merge(found))
        return output, lse

    def _attend_together(
        self, heads: slice, queries: Tensor, table: ClusterTable, shares: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Of scaled queries (g, b, D) float32 of some heads; those of a head attend to the same clusters.

        ``shares`` (g,) float32 are those of the keys. The clusters attended to correct the others. Output and
        log-sum-exp as from ``attend``.
        """
        asked, keys, values = self._ask(heads, queries, table, shares)
        places = torch.arange(asked.slots.shape[1], device=queries.device)
        logits = (queries @ keys.mT).masked_fill_(places >= asked.held[:, None, None], -torch.inf)
        measured = Measured(asked.estimate, asked.chosen, asked.of, logits)
        always = [(queries @ k[heads].mT, v[heads]) for k, v in table.always]
        weights = [asked.estimate.weights, logits] + [one for one, _ in always]
        if asked.coarse is not None:
            weights.append(asked.coarse.weights)
        top = torch.cat([one.amax(2, keepdim=True) for one in weights if one.shape[2]], dim=2).amax(2, keepdim=True)
        shares, attended, *others = ((one - top).exp_() for one in weights)
        total = torch.cat([one.sum(2, keepdim=True) for one in (shares, attended, *others)], dim=2)
        total = total.sum(2, keepdim=True)  # (g, b, 1)
        output = measured.outputs(queries, shares, attended, values, top)
        if asked.coarse is not None:
            output = output + asked.coarse.outputs(queries, others.pop())
        for share, (_, found) in zip(others, always, strict=True):
            output = output + share @ found
        return output / total, (top + total.log()).squeeze(2)

    def _attend_uncorrected(
        self, heads: slice, queries: Tensor, table: ClusterTable, shares: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The same of one head by the formulae alone, without what every query attends to."""
        asked, keys, values = self._ask(heads, queries, table, shares)
        levels = [asked.estimate] + ([] if asked.coarse is None else [asked.coarse])
        parts = [level.attend(queries) for level in levels]
        if keys.shape[1]:
            parts.append(_dense(queries, keys, values))
        return merge(parts)

    def _ask(self, heads: slice, queries: Tensor, table: ClusterTable, shares: Tensor) -> tuple[Asked, Tensor, Tensor]:
        """What these queries attend to, and the keys and values (g, m, D) of that."""
        asked = table.ask(heads, queries, (shares * len(self._keys)).to(queries.device))
        keys, values = (blocks.gather_heads(heads, asked.slots) for blocks in (self._keys, self._values))
        return asked, keys, values


def _dense(queries: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of scaled queries (1, b, D) to all these."""
    output, lse = attend(queries[None], keys[None], values[None], scale=1.0)
    return output[0], lse[0]


def alike(queries: Tensor, size: int) -> tuple[Tensor, list[int]]:
    """An order (b,) in which queries that are alike lie behind one another, and how many do, ``size`` on the mean."""
    of = assign(queries.detach().cpu(), max(1, len(queries) // size))
    return of.argsort(stable=True).to(queries.device), [n for n in torch.bincount(of).tolist() if n]
