"""New tokens of a call: ids or embeddings, which of them are padding, and their positions."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fot.cache import FoTCache
from fot.local import UNKNOWN_TOKEN


@dataclass(frozen=True)
class Inputs:
    """B rows of T new tokens.

    Attributes:
        ids: (B, T) int64; ``UNKNOWN_TOKEN`` throughout if embeddings were given.
        embeds: (B, T, hidden_size), or None.
        mask: (B, T) bool, False at padding; None if there is none.
        positions: (B, T) int64, as the caller counts them.
    """

    ids: Tensor
    embeds: Tensor | None
    mask: Tensor | None
    positions: Tensor

    @classmethod
    def make(
        cls,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: FoTCache,
    ) -> "Inputs":
        """From the arguments of ``forward``.

        Raises:
            ValueError: arguments that do not go together.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if input_ids is None:
            assert inputs_embeds is not None
            input_ids = torch.full(inputs_embeds.shape[:2], UNKNOWN_TOKEN, device=inputs_embeds.device)
        if input_ids.ndim != 2 or input_ids.numel() == 0:
            raise ValueError(
                f"the input has shape {tuple(input_ids.shape)}; it takes (rows, tokens), at least one each"
            )
        batch, length = input_ids.shape
        mask = None if attention_mask is None else _new_mask(attention_mask, batch, length, cache.seen)
        if position_ids is not None:
            positions = position_ids.expand(batch, length)
        else:
            ones = torch.ones_like(input_ids) if mask is None else mask.long()
            start = 0 if cache.next_positions is None else cache.next_positions
            positions = (ones.cumsum(1) - 1).clamp(min=0) + start
        return cls(input_ids, inputs_embeds, mask, positions)

    @property
    def batch_size(self) -> int:
        """B."""
        return self.ids.shape[0]

    @property
    def length(self) -> int:
        """T."""
        return self.ids.shape[1]

    def pick(self, rows: Tensor | slice, columns: Tensor | slice, mask: Tensor | None) -> "Inputs":
        """Some of the tokens, with another padding mask."""
        embeds = None if self.embeds is None else self.embeds[rows, columns]
        return Inputs(self.ids[rows, columns], embeds, mask, self.positions[rows, columns])

    def columns(self, part: slice) -> "Inputs":
        """Some columns of every row."""
        return self.pick(slice(None), part, None if self.mask is None else self.mask[:, part])

    def real_columns(self, row: int) -> Tensor:
        """Columns of a row that are not padding, ascending."""
        columns = torch.arange(self.length, device=self.ids.device)
        return columns if self.mask is None else columns[self.mask[row]]


def _new_mask(attention_mask: Tensor, batch: int, length: int, seen: int) -> Tensor | None:
    if attention_mask.ndim != 2 or attention_mask.shape[0] != batch:
        raise ValueError(f"attention_mask has shape {tuple(attention_mask.shape)}; it takes ({batch}, tokens)")
    if attention_mask.shape[1] not in (length, seen + length):
        raise ValueError(
            f"attention_mask covers {attention_mask.shape[1]} tokens; the input has {length}, after {seen} in the cache"
        )
    if length == 1:  # looking at it would wait for the device at every generated token
        return None
    mask = attention_mask[:, -length:].bool()
    return None if bool(mask.all()) else mask
