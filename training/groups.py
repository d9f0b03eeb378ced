"""The rows that each row of a batch attends to, and the same by groups of rows that are computed together.

Rows that see equally many others form a group: their keys lie side by side in one tensor. Tensors of a group are moved
to the device once a batch, and memory layers take them from there. So no layer waits for the device, and none copies
the keys of all rows at once: a group is read in slices of at most ``PICKED_BYTES``.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

# Keys, or values, that are copied side by side for a slice of a group. Kernels hold a few times as much.
PICKED_BYTES = 1 << 27


@dataclass(frozen=True)
class Group:
    """Rows that see equally many others, M.

    Attributes:
        rows: (r,) int64.
        chosen: (r, M) int64, which of the C candidates each sees.
        copies: (r, M) float32, see ``Contexts.copies``; None: 1.
        hidden: (r, M, T) bool, True where a chosen row's token is padding; None if there is none.
        positives: (r, M) bool, True at rows of the same document; None if that is not known.
    """

    rows: Tensor
    chosen: Tensor
    copies: Tensor | None
    hidden: Tensor | None
    positives: Tensor | None

    def slices(self, count: int) -> Iterator["Group"]:
        """Groups of at most ``count`` rows, at least 1."""
        given = {name: tensor for name, tensor in vars(self).items() if tensor is not None}
        for start in range(0, len(self.rows), max(1, count)):
            yield replace(self, **{name: tensor[start : start + max(1, count)] for name, tensor in given.items()})

    def bias(self, queries: Tensor, full_weight_tokens: int, newest_full_weight: int) -> Tensor | None:
        """What is added to the scores over the chosen rows: (r, 1, 1, M * T), or None for nothing.

        Args:
            queries: (R, H, T, D), whose dtype it has.
            full_weight_tokens: see ``Contexts``.
            newest_full_weight: likewise.
        """
        if self.copies is None and self.hidden is None and not full_weight_tokens:
            return None
        bias = torch.zeros(*self.chosen.shape, queries.shape[2], device=queries.device)
        if self.copies is not None:
            bias += self.copies.log().unsqueeze(-1)
        if self.hidden is not None:
            bias.masked_fill_(self.hidden, -torch.inf)
        if full_weight_tokens:
            bias = bias - _discounts(bias.exp(), full_weight_tokens, newest_full_weight)
        return bias.flatten(1).to(queries.dtype)[:, None, None]


def _discounts(weights: Tensor, full: int, newest: int) -> Tensor:
    """By how much scores are lowered, as by ``fot.attention.memory_discount``.

    Args:
        weights: (r, M, T), how often a token counts; rows are the newest first, and tokens of a row the oldest.
        full: ``full_weight_tokens``.
        newest: ``newest_full_weight``.

    Returns:
        (r, M, T), 0 for the newest tokens.
    """
    total = weights.sum((1, 2), keepdim=True)
    discount = ((total - newest) / (full - newest)).clamp(min=1).log().expand_as(weights)
    backwards = weights.flip(2).flatten(1)
    newer = (backwards.cumsum(1) - backwards).view_as(weights).flip(2)
    return discount.masked_fill(newer < newest, 0.0)


@dataclass(frozen=True)
class Contexts:
    """Which rows each row of a batch attends to besides itself.

    Attributes:
        rows: for each of the R rows here, (M,) int64 indices among the C candidate rows, the newest first: the rows of
            this process, or those of all processes in the order of their ranks.
        padding: (C, T) bool, True where a candidate's token is padding; None if there is none.
        copies: for each of the R rows, (M,) float32: the chosen row counts as so many of itself, as in a memory that
            held it so often. That is ``log(copies)`` on its scores, and costs nothing. None: 1.
        full_weight_tokens: tokens, copies counted, from which on contexts weigh no more, as a memory does; 0: never.
        newest_full_weight: newest tokens, those of the first rows, that then keep their full weight.
        positives: for each of the R rows, how many of its chosen rows are of its own document: the first ones. None:
            that is not known.
        asked: (R, S) int64, the queries for which ``training.focus`` takes its loss; None: there is no such loss.
    """

    rows: Sequence[Tensor]
    padding: Tensor | None = None
    copies: Sequence[Tensor] | None = None
    full_weight_tokens: int = 0
    newest_full_weight: int = 0
    positives: Sequence[int] | None = None
    asked: Tensor | None = None

    def groups(self, device: torch.device) -> list[Group]:
        """All rows that see any others; on this device, made once."""
        if device not in self._groups:
            self._groups[device] = self._grouped(range(len(self.rows)), device)
        return self._groups[device]

    def mixed_groups(self, device: torch.device) -> list[Group]:
        """The rows that see both their own document and others; on this device, made once."""
        if device not in self._mixed_groups:
            self._mixed_groups[device] = self._grouped(self.mixed(), device)
        return self._mixed_groups[device]

    def mixed(self) -> list[int]:
        """Rows that see both their own document and others."""
        counts = self.positives or ()
        return [row for row, count in enumerate(counts) if 0 < count < len(self.rows[row])]

    @cached_property
    def _groups(self) -> dict[torch.device, list[Group]]:
        return {}

    @cached_property
    def _mixed_groups(self) -> dict[torch.device, list[Group]]:
        return {}

    def _grouped(self, rows: Iterable[int], device: torch.device) -> list[Group]:
        by_count: dict[int, list[int]] = {}
        for row in rows:
            if len(self.rows[row]):
                by_count.setdefault(len(self.rows[row]), []).append(row)
        return [self._group(group, count, device) for count, group in by_count.items()]

    def _group(self, rows: list[int], count: int, device: torch.device) -> Group:
        chosen = torch.stack([self.rows[row] for row in rows]).to(device)
        copies = hidden = positives = None
        if self.copies is not None:
            copies = torch.stack([self.copies[row] for row in rows]).to(device)
        if self.padding is not None:
            hidden = self.padding.to(device)[chosen]
        if self.positives is not None:
            own = torch.tensor([self.positives[row] for row in rows], device=device)
            positives = torch.arange(count, device=device) < own.unsqueeze(1)
        return Group(torch.tensor(rows, device=device), chosen, copies, hidden, positives)


def slices_of(contexts: Contexts, keys: Tensor) -> Iterator[Group]:
    """The groups in slices, so small that what ``pick`` copies for one of them stays below ``PICKED_BYTES``.

    Args:
        keys: (C, G, T, D).
    """
    for group in contexts.groups(keys.device):
        size = group.chosen.shape[1] * keys[0].numel() * keys.element_size()
        yield from group.slices(PICKED_BYTES // size)


def pick(candidates: Tensor, chosen: Tensor) -> Tensor:
    """(C, G, T, D), (r, M) -> (r, G, M * T, D)."""
    return candidates[chosen].transpose(1, 2).flatten(2, 3)


def fold(tensor: Tensor, heads: int) -> Tensor:
    """(r, H, T, D) -> (r, G, H / G * T, D): query heads of a KV head lie behind one another."""
    return tensor.reshape(len(tensor), heads, -1, tensor.shape[-1])
