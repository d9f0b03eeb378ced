"""What is known of clustered keys: a backend attends with it, and a memory's folder keeps it."""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from memory.vectors import as_stored, packed

SEGMENT = 8192  # tokens that are clustered together, once and for all


@dataclass(frozen=True)
class Clusters:
    """The clusters of one or more stretches of slots, of G KV heads; stretches lie behind one another in each tensor.

    Vectors are kept as finely as what they stand for: those of int8 keys or values as int8, with a scale each.

    Attributes:
        stretches: (S, 4) int64: first slot, slots, outliers, clusters.
        order: (G, M) int16, the slots of each stretch counted from its first: outliers, then cluster after cluster.
        counts: (G, L) int16, keys of each cluster.
        mean_keys: (G, L, D) in the dtype of the keys; ``key_scales``: (G, L, 1) bfloat16, 1 but for int8.
        mean_values: (G, L, D) in the dtype of the values; ``value_scales``: likewise.
        spreads: (G, L), mean square distance of a cluster's keys from their mean; bfloat16 for int8 keys, else float32.
        covariances: (G, S, D, D), sum over a stretch of the outer squares of these distances; int8 for int8 keys, else
            float32. ``covariance_scales``: (G, S, D, 1) bfloat16.
        slopes: (G, S, D, D), likewise their outer products with the distances of values. ``slope_scales``: likewise.
    """

    stretches: Tensor
    order: Tensor
    counts: Tensor
    mean_keys: Tensor
    key_scales: Tensor
    mean_values: Tensor
    value_scales: Tensor
    spreads: Tensor
    covariances: Tensor
    covariance_scales: Tensor
    slopes: Tensor
    slope_scales: Tensor

    @classmethod
    def of(
        cls,
        stretches: Tensor,
        order: Tensor,
        counts: Tensor,
        means: tuple[Tensor, Tensor],
        spreads: Tensor,
        sums: tuple[Tensor, Tensor],
        dtypes: tuple[torch.dtype, torch.dtype],
    ) -> "Clusters":
        """From float32: mean keys and values, and covariances and slopes, of keys and values of these dtypes."""
        short = dtypes[0] == torch.int8
        vectors = [stored_as(mean, dtype) for mean, dtype in zip(means, dtypes, strict=True)]
        squares = [stored_as(one, torch.int8 if short else torch.float32) for one in sums]
        spreads = spreads.bfloat16() if short else spreads
        return cls(
            stretches, order.short(), counts.short(), *vectors[0], *vectors[1], spreads, *squares[0], *squares[1]
        )

    def like(self, dtypes: tuple[torch.dtype, torch.dtype]) -> "Clusters":
        """The same, kept as those of keys and values of these dtypes."""
        if (self.mean_keys.dtype, self.mean_values.dtype) == dtypes:
            return self
        pairs = (self.mean_keys, self.key_scales), (self.mean_values, self.value_scales)
        squares = (self.covariances, self.covariance_scales), (self.slopes, self.slope_scales)
        means, sums = ((unpacked(*two[0]), unpacked(*two[1])) for two in (pairs, squares))
        return Clusters.of(self.stretches, self.order, self.counts, means, self.spreads.float(), sums, dtypes)

    def sums(self) -> tuple[Tensor, Tensor]:
        """Covariances and slopes (G, D, D) float32, of all stretches together."""

        def total(squares: Tensor, scales: Tensor) -> Tensor:
            parts = zip(squares.split(64, dim=1), scales.split(64, dim=1), strict=True)
            return torch.stack([unpacked(*part).sum(1) for part in parts]).sum(0)

        return total(self.covariances, self.covariance_scales), total(self.slopes, self.slope_scales)

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
        sizes |= dict.fromkeys(("covariances", "covariance_scales", "slopes", "slope_scales"), [1] * len(slots))
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
        return Clusters.join(kept) if kept else self.first(0)

    def first(self, stretches: int) -> "Clusters":
        """Those of so many first stretches."""
        slots, clusters = self.stretches[:stretches, 1].sum(), self.stretches[:stretches, 3].sum()
        sizes = {"order": int(slots)} | dict.fromkeys(
            ("stretches", "covariances", "covariance_scales", "slopes", "slope_scales"), stretches
        )
        cut = {f.name: getattr(self, f.name) for f in fields(self)}
        return Clusters(**{n: t.narrow(int(n != "stretches"), 0, sizes.get(n, int(clusters))) for n, t in cut.items()})

    def check(self, num_heads: int, head_dim: int, num_keys: int) -> None:
        """Raise ValueError unless every number can be relied on: nothing outside the stored keys is looked up."""
        start, slots, outliers, clusters = self.stretches.unbind(1)
        ends = torch.cat([torch.zeros(1, dtype=torch.int64), start + slots])
        sound = bool((start >= ends[:-1]).all() and (ends <= num_keys).all() and (slots <= SEGMENT).all())
        sound = sound and bool((outliers >= 0).all() and (outliers <= slots).all() and (clusters >= 0).all())
        shapes: dict[str, tuple[int, ...]] = {"order": (int(slots.sum()),)}
        shapes |= dict.fromkeys(("covariances", "slopes"), (len(slots), head_dim, head_dim))
        shapes |= dict.fromkeys(("covariance_scales", "slope_scales"), (len(slots), head_dim, 1))
        total = int(clusters.sum())
        shapes |= {"counts": (total,), "spreads": (total,)}
        shapes |= dict.fromkeys(("mean_keys", "mean_values"), (total, head_dim))
        shapes |= dict.fromkeys(("key_scales", "value_scales"), (total, 1))
        if not sound or any(getattr(self, name).shape != (num_heads, *shape) for name, shape in shapes.items()):
            raise ValueError(f"its clusters do not fit {num_heads} KV heads of {num_keys:,} keys")
        of = torch.repeat_interleave(clusters)
        held = outliers.clone().expand(num_heads, -1).index_add(1, of, self.counts.cpu().long())
        inside = bool((self.order >= 0).all())
        if len(slots) and bool((slots == slots[0]).all()):  # as most often; nothing as long as ``order`` is made
            inside = inside and int(self.order.max()) < int(slots[0])
        else:
            inside = inside and bool((self.order < slots.repeat_interleave(slots).to(self.order.device)).all())
        if not inside or (held != slots).any() or (self.counts < 0).any():
            raise ValueError("a cluster holds keys that are not its own")

    def problems(self) -> list[str]:
        """What is wrong with numbers that ``check`` does not look at, since they can only make attention wrong."""
        found = []
        if not all(tensor.isfinite().all() for tensor in vars(self).values()) or (self.spreads < 0).any():
            found.append("a mean or a spread is NaN, infinite or negative")
        for part in self.split():
            seen = part.order.long().sort(dim=1).values
            if not torch.equal(seen, torch.arange(seen.shape[1], device=seen.device).expand_as(seen)):
                found.append("a key is in two clusters")
                break
        return found


def stored_as(vectors: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Vectors (..., D) float32 in this dtype, and scales (..., 1) bfloat16."""
    if dtype == torch.int8:
        return packed(vectors)
    return as_stored(vectors, dtype), torch.ones(*vectors.shape[:-1], 1, dtype=torch.bfloat16, device=vectors.device)


def unpacked(vectors: Tensor, scales: Tensor) -> Tensor:
    """What ``stored_as`` was given, float32."""
    return vectors.float().mul_(scales) if vectors.dtype == torch.int8 else vectors.float()


@dataclass(frozen=True)
class LearntClusters:
    """The clusters of one layer's keys, to be saved and to build the index again from.

    Attributes:
        name: of the backend.
        clusters: of the stored keys.
        coarse: of these clusters, see ``memory.cluster_table``; None if there are none.
        origin: where they were read from, for errors.
    """

    name: str
    clusters: Clusters
    coarse: Clusters | None = None
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
        moved = self.clusters.moved(slots)
        if self.coarse is None:
            return replace(self, clusters=moved)
        # Groups are counted from the first stretch: those before one that is lost are as they were.
        before, after = self.clusters.stretches, moved.stretches
        same = (before[: len(after)] == after).all(1) if len(after) <= len(before) else after.new_zeros(0)
        whole = int(after[: int(same.long().cumprod(0).sum()), 3].sum())
        ends = self.coarse.stretches[:, :2].sum(1)
        return replace(self, clusters=moved, coarse=self.coarse.first(int((ends <= whole).sum())))
