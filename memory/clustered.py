"""What is known of clustered keys: a backend attends with it, and a memory's folder keeps it."""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

SEGMENT = 8192  # tokens that are clustered together, once and for all


@dataclass(frozen=True)
class Clusters:
    """The clusters of one or more stretches of slots, of G KV heads; stretches lie behind one another in each tensor.

    Attributes:
        stretches: (S, 4) int64: first slot, slots, outliers, clusters.
        order: (G, M) int16, the slots of each stretch counted from its first: outliers, then cluster after cluster.
        counts: (G, L) int32, keys of each cluster.
        mean_keys: (G, L, D) float32.
        mean_values: (G, L, D) float32.
        spreads: (G, L) float32, mean square distance of a cluster's keys from their mean.
        covariances: (G, S, D, D) float32, sum over a stretch of the outer squares of these distances.
        slopes: (G, S, D, D) float32, likewise their outer products with the distances of values.
    """

    stretches: Tensor
    order: Tensor
    counts: Tensor
    mean_keys: Tensor
    mean_values: Tensor
    spreads: Tensor
    covariances: Tensor
    slopes: Tensor

    @classmethod
    def none(cls, num_heads: int, head_dim: int) -> "Clusters":
        """Clusters of nothing."""
        G, D = num_heads, head_dim  # noqa: N806
        none, vectors, squares = torch.empty(G, 0), torch.empty(G, 0, D), torch.empty(G, 0, D, D)
        stretches, order = torch.empty(0, 4, dtype=torch.int64), torch.empty(G, 0, dtype=torch.int16)
        return cls(stretches, order, none.int(), vectors, vectors, none, squares, squares)

    @classmethod
    def join(cls, parts: "list[Clusters]") -> "Clusters":
        """Those of all parts, in order."""
        if len(parts) == 1:
            return parts[0]
        joined = {f.name: torch.cat([getattr(p, f.name) for p in parts], dim=1) for f in fields(cls)[1:]}
        return cls(torch.cat([part.stretches for part in parts]), **joined)

    @property
    def end(self) -> int:
        """Past the last clustered slot."""
        return int(self.stretches[-1, :2].sum()) if len(self.stretches) else 0

    def split(self) -> "list[Clusters]":
        """One for each stretch."""
        _, slots, _, clusters = (column.tolist() for column in self.stretches.unbind(1))
        sizes = {"order": slots, "stretches": [1] * len(slots)}
        sizes |= dict.fromkeys(("covariances", "slopes"), [1] * len(slots))
        cut = {}
        for field in fields(self):
            tensor = getattr(self, field.name)
            cut[field.name] = tensor.split(sizes.get(field.name, clusters), dim=int(field.name != "stretches"))
        return [Clusters(**{name: pieces[s] for name, pieces in cut.items()}) for s in range(len(slots))]

    def to(self, device: torch.device) -> "Clusters":
        """The same with all but the stretches, which the CPU looks at, there."""
        return Clusters(self.stretches, *(getattr(self, field.name).to(device) for field in fields(self)[1:]))

    def moved(self, slots: Tensor) -> "Clusters":
        """The stretches that lie wholly in these slots, (M,) int64 ascending, counted by their places there."""
        kept = []
        for part in self.split():
            start, length = part.stretches[0, :2].tolist()
            first, stop = torch.searchsorted(slots, torch.tensor([start, start + length])).tolist()
            if stop - first == length:
                kept.append(replace(part, stretches=torch.tensor([[first, *part.stretches[0, 1:].tolist()]])))
        return Clusters.join(kept) if kept else Clusters.none(len(self.order), self.mean_keys.shape[-1])

    def check(self, num_heads: int, head_dim: int, num_keys: int) -> None:
        """Raise ValueError unless every number can be relied on: nothing outside the stored keys is looked up."""
        start, slots, outliers, clusters = self.stretches.unbind(1)
        ends = torch.cat([torch.zeros(1, dtype=torch.int64), start + slots])
        sound = bool((start >= ends[:-1]).all() and (ends <= num_keys).all() and (slots <= SEGMENT).all())
        sound = sound and bool((outliers >= 0).all() and (outliers <= slots).all() and (clusters >= 0).all())
        shapes = {"order": (int(slots.sum()),), "covariances": (len(slots), head_dim, head_dim)}
        shapes["slopes"] = shapes["covariances"]
        total = int(clusters.sum())
        shapes |= {"counts": (total,), "spreads": (total,)}
        shapes |= dict.fromkeys(("mean_keys", "mean_values"), (total, head_dim))
        if not sound or any(getattr(self, name).shape != (num_heads, *shape) for name, shape in shapes.items()):
            raise ValueError(f"its clusters do not fit {num_heads} KV heads of {num_keys:,} keys")
        of = torch.repeat_interleave(clusters)
        held = outliers.clone().expand(num_heads, -1).index_add(1, of, self.counts.cpu().long())
        inside = (self.order >= 0).all() and (self.order < slots.repeat_interleave(slots).to(self.order.device)).all()
        if not inside or (held != slots).any() or (self.counts < 0).any():
            raise ValueError("a cluster holds keys that are not its own")

    def problems(self) -> list[str]:
        """What is wrong with numbers that ``check`` does not look at, since they can only make attention wrong."""
        numbers = (self.mean_keys, self.mean_values, self.spreads, self.covariances, self.slopes)
        found = []
        if not all(tensor.isfinite().all() for tensor in numbers) or (self.spreads < 0).any():
            found.append("a mean or a spread is NaN, infinite or negative")
        for part in self.split():
            seen = part.order.long().sort(dim=1).values
            if not torch.equal(seen, torch.arange(seen.shape[1], device=seen.device).expand_as(seen)):
                found.append("a key is in two clusters")
                break
        return found


@dataclass(frozen=True)
class LearntClusters:
    """The clusters of one layer's keys, to be saved and to build the index again from.

    Attributes:
        name: of the backend.
        clusters: of the stored keys.
        origin: where they were read from, for errors.
    """

    name: str
    clusters: Clusters
    origin: str = "the saved index"

    @property
    def trained_on(self) -> int:
        """0: a stretch depends on no key outside it."""
        return 0

    @property
    def known(self) -> int:
        """Slots up to which it knows keys."""
        return self.clusters.end

    def kept(self, slots: Tensor) -> "LearntClusters":
        """The same for the keys in these slots alone, (M,) int64 ascending."""
        return replace(self, clusters=self.clusters.moved(slots))
