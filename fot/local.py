"""The local window: keys and values of the tokens that layers without memory see, and their way to the memory."""

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import Cache, DynamicCache

from fot.attention import local_weights, memory_attention, memory_discount, raised
from fot.config import MemoryConfig
from fot.recording import Recorder
from fot.rotary import Rotary, rotary_of
from fot.window_layer import WindowLayer
from memory import Memory

UNKNOWN_TOKEN = -1  # stored for inputs given as embeddings
LAST = torch.iinfo(torch.int64).max  # behind every position


class LocalCache(DynamicCache):
    """Keys and values of the local window of B rows, S slots each.

    Rows shorter than the others have padding in their first slots. Handed to a decoder as its ``CONTEXT``, it attends
    in the memory layers.

    Attributes:
        memories: for each row, the memories its memory layers read.
        mask: (B, S) bool, False at padding; None while no row has any.
        token_ids: (B, S) int64.
        positions: (B, S) int64, as the caller counts them.
        places: (B, S) int64, positions in the window: what keys are rotated by.
        base: (B, 1) int64, the caller's position less the place of each row's next token.
        counts: tokens of each row, padding not counted.
        sinks: of each row, first tokens that are in its memory already and stay here as attention sinks.
        moved: of each row, how many of its tokens are in its memory, sinks included.
        recorder: takes note of what memory layers attend to; None for nobody.
        is_last: whether the tokens that the layers run on are the last of their input: the next is chosen after them.
        ends_at: the layer whose keys and values are all that is wanted; above it nothing is computed. None: run all.
    """

    is_last = True
    ends_at: int | None = None

    def __init__(
        self,
        memories: Sequence[Sequence[Memory]],
        config: MemoryConfig,
        rotary: Rotary,
        recorder: Recorder | None = None,
    ) -> None:
        """
        Args:
            memories: for each row, the memories it reads.
            config: resolved.
            rotary: of the model.
            recorder: takes note of what is attended to.
        """
        super().__init__()
        self.layer_class_to_replicate = WindowLayer
        self.memories = memories
        self.config = config
        self.rotary = rotary
        self.recorder = recorder
        self.clear()

    @property
    def memory_layers(self) -> tuple[int, ...]:
        """Layers in which ``attend`` takes the place of the model's attention."""
        return self.config.layers

    def clear(self) -> None:
        """Forget the whole window."""
        self.layers: list[Any] = []
        self.mask: Tensor | None = None
        self.token_ids: Tensor | None = None
        self.positions: Tensor | None = None
        self.places: Tensor | None = None
        self.base: Tensor | None = None
        self.counts = [0] * len(self.memories)
        self.sinks = [0] * len(self.memories)
        self.moved = [0] * len(self.memories)

    def fork(self) -> "LocalCache":
        """The same window, to go on differently. Tensors are shared: nothing that a window sees is written to again."""
        other = copy.copy(self)
        other.__dict__.update(copied(self))
        other.layers = [copy.copy(layer) for layer in self.layers]
        other.recorder = None
        return other

    def extend(self, token_ids: Tensor, positions: Tensor, mask: Tensor | None) -> Tensor:
        """Take note of T new tokens before the layers run on them.

        Args:
            token_ids: (B, T) int64.
            positions: (B, T) int64; each row's grow from left to right.
            mask: (B, T) bool, False at padding; None if all are tokens.

        Returns:
            (B, T) positions in the window.
        """
        starts = positions if mask is None else positions.masked_fill(~mask, LAST)
        starts = starts.amin(1, keepdim=True)
        if self.token_ids is None or self.base is None or self.positions is None or self.places is None:
            self.token_ids, self.positions, self.base, self.mask = token_ids, positions, starts, mask
            self.places = places = (positions - starts).clamp(min=0)
        else:
            if any(count == kept for count, kept in zip(self.counts, self.sinks, strict=True)):
                # A row whose window was emptied starts a new one here, behind its sinks if it kept any.
                empty = torch.tensor(self.counts) == torch.tensor(self.sinks)
                here = self.places if self.mask is None else self.places.masked_fill(~self.mask, -1)
                begin = starts - (here.amax(1, keepdim=True) + 1)
                self.base = torch.where(empty.unsqueeze(1).to(starts.device), begin, self.base)
            if self.mask is not None or mask is not None:
                old = torch.ones_like(self.token_ids, dtype=torch.bool) if self.mask is None else self.mask
                new = torch.ones_like(token_ids, dtype=torch.bool) if mask is None else mask
                self.mask = torch.cat([old, new], dim=1)
            places = (positions - self.base).clamp(min=0)
            self.token_ids = torch.cat([self.token_ids, token_ids], dim=1)
            self.positions = torch.cat([self.positions, positions], dim=1)
            self.places = torch.cat([self.places, places], dim=1)
        added = [token_ids.shape[1]] * len(self.counts) if mask is None else mask.sum(1).tolist()
        self.counts = [count + new for count, new in zip(self.counts, added, strict=True)]
        return places

    def attend(
        self,
        layer: int,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        scale: float,
        learnt_sinks: Tensor | None = None,
    ) -> Tensor:
        """What a memory layer computes: local window and memory in one softmax.

        Args:
            layer: its index.
            queries: (B, H, T, D), rotated, of the newest T tokens.
            keys: (B, G, S, D), rotated, of the window, these tokens included.
            values: likewise.
            scale: factor on inner products.
            learnt_sinks: (H,), see ``fot.attention.with_sinks``.

        Returns:
            (B, H, T, D).

        Raises:
            WindowStored: this is the layer that it ends at.
        """
        return self._attend(layer, queries, keys, values, scale, learnt_sinks)[0]

    def attend_and_weigh(
        self,
        layer: int,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        scale: float,
        learnt_sinks: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As ``attend``, with the weights of the window's slots, (B, H, T, S).

        What they lack to 1 is the memory's, and the learnt sinks'.

        Raises:
            ValueError: the model has gates: what they take from the window is not known here.
        """
        if self.config.memory_gates is not None:
            raise ValueError("output_attentions is not known with memory_gates: call the model without it")
        output, lses = self._attend(layer, queries, keys, values, scale, learnt_sinks)
        first, mask = self.unstored()
        lse = torch.stack(lses).logsumexp(0)
        if len(lses) > 1:  # the local part was raised by what the memory weighs less
            lse = raised(lse, [-discount for discount in self._discounts()])
        return output, pad(local_weights(queries, keys[:, :, first:], mask, lse, scale=scale), (first, 0))

    def _attend(
        self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, scale: float, learnt_sinks: Tensor | None
    ) -> tuple[Tensor, list[Tensor]]:
        if layer == self.ends_at:
            if self.recorder is not None:
                self.recorder.note(layer, queries, [], self, scale)
            raise WindowStored
        first, mask = self.unstored()
        keys, values = keys[:, :, first:], values[:, :, first:]
        output, lses = memory_attention(
            queries,
            keys,
            values,
            mask,
            self.memories,
            layer,
            scale=scale,
            config=self.config,
            learnt_sinks=learnt_sinks,
        )
        if self.recorder is not None:
            self.recorder.note(layer, queries, lses, self, scale)
        return output, lses

    def unstored(self) -> tuple[int, Tensor | None]:
        """Which slots memory layers attend to here: sinks they find in the memory, with all else that has moved there.

        A large memory weighs less (``memory_discount``), and its sinks with it, unless they are among its newest
        tokens. But a sink must weigh what it did, or attention that found nothing would go elsewhere: what it lacks in
        the memory it gets here.

        Returns:
            the first slot, and for the slots from there on a mask (B, S - first): bool, as ``mask``, or float, added to
            the scores; None if all are attended to alike.
        """
        fewest, discounts = min(self.sinks, default=0), self._discounts()
        if any(discount for discount, count in zip(discounts, self.sinks, strict=True) if count):
            assert self.token_ids is not None
            bias = torch.zeros(self.token_ids.shape, device=self.token_ids.device)
            if self.mask is not None:
                bias = bias.masked_fill(~self.mask, -torch.inf)
            for row, (discount, count) in enumerate(zip(discounts, self.sinks, strict=True)):
                # The first of them lack weight in the memory; the others are among its newest tokens. In two steps, so
                # that no GPU is waited for.
                lack = min(count, max(0, self.moved[row] - self.config.newest_full_weight)) if discount else 0
                slots = None if self.mask is None else self.slots(row)
                bias[row, slice(lack, count) if slots is None else slots[lack:count]] = -math.inf
                if lack:
                    weight = math.log(-math.expm1(-discount))
                    bias[row, slice(lack) if slots is None else slots[:lack]] = weight
            return 0, bias
        if self.mask is None and fewest == max(self.sinks, default=0):
            return fewest, None
        assert self.token_ids is not None
        mask = torch.ones_like(self.token_ids, dtype=torch.bool) if self.mask is None else self.mask
        sinks = torch.tensor(self.sinks, device=mask.device).unsqueeze(1)
        return 0, mask & (mask.cumsum(1) > sinks)

    def _discounts(self) -> list[float]:
        return [memory_discount(row, self.config) for row in self.memories]

    def move(
        self,
        row: int,
        count: int,
        memory: Memory,
        *,
        skip: int = 0,
        document: str | None = None,
        spans: Sequence[tuple[int, int]] | None = None,
    ) -> None:
        """Append the oldest ``count`` tokens of a row that are not there yet, but the first ``skip``, to a memory.

        They stay here, too, until ``keep_slots`` forgets them.
        """
        assert self.token_ids is not None
        assert self.places is not None
        if self.recorder is not None:
            self.recorder.settle()
        self.moved[row] += count
        first = self.sinks[row]
        slots = self.slots(row)[first + skip : first + count]
        places, keys = self.places[row, slots], {}
        for layer in memory.layers:  # at position 0
            keys[layer] = self.rotary.back(layer, self._take(self.layers[layer].keys[row], slots), places)
        values = {layer: self._take(self.layers[layer].values[row], slots) for layer in memory.layers}
        memory.append(keys, values, self.token_ids[row, slots], document=document, spans=spans)

    def slots(self, row: int) -> Tensor:
        """Slots of a row's tokens, oldest first."""
        assert self.token_ids is not None
        if self.mask is None:
            return torch.arange(self.token_ids.shape[1], device=self.token_ids.device)
        # Not by the mask as an index, whose length a GPU would be asked for.
        return (~self.mask[row]).byte().argsort(stable=True)[: self.counts[row]]

    def keep_slots(self, kept: Sequence[Tensor], sinks: Sequence[int]) -> None:
        """Forget all other slots, whose content has moved, and close the gap behind the sinks.

        Without its first tokens a window has no attention sink: every later key was made with them in sight, and none
        can take their part (StreamingLLM, arXiv 2309.17453). So they stay in all layers that have no memory.

        Args:
            kept: for each row, slots of the tokens to keep, ascending.
            sinks: for each row, how many of those are its sinks.
        """
        if not any(len(slots) for slots in kept):
            self.clear()
            return
        assert self.token_ids is not None
        assert self.positions is not None
        assert self.places is not None
        assert self.base is not None
        width, device = max(len(slots) for slots in kept), self.token_ids.device
        where = torch.zeros(len(kept), width, dtype=torch.int64, device=device)
        mask = torch.zeros(len(kept), width, dtype=torch.bool, device=device)
        tail = torch.zeros_like(mask)
        for row, slots in enumerate(kept):
            start = width - len(slots)
            where[row, start:] = slots
            mask[row, start:] = True
            tail[row, start + sinks[row] :] = True
        self.counts, self.sinks = [len(slots) for slots in kept], list(sinks)
        self.mask = None if all(count == width for count in self.counts) else mask
        self.token_ids, self.positions = self.token_ids.gather(1, where), self.positions.gather(1, where)
        places = self.places.gather(1, where)
        begin = places.masked_fill(~tail, LAST).amin(1, keepdim=True)  # the oldest token behind the sinks
        behind = places.masked_fill(tail | ~mask, -1).amax(1, keepdim=True) + 1  # the first place behind them
        shift = (begin - behind).masked_fill(begin == LAST, 0)
        self.base = self.base + shift
        shift = torch.where(tail, shift, 0)
        self.places = places - shift
        for number, layer in enumerate(self.layers):
            layer.values = _pick_slots(layer.values, where)
            layer.keys = self.rotary.back(number, _pick_slots(layer.keys, where), shift)

    def drop_last(self, count: int) -> None:
        """Forget the last ``count`` slots, as if their tokens had never come.

        Raises:
            ValueError: some of those tokens have moved to the memory. Nothing has changed.
        """
        size = 0 if self.token_ids is None else self.token_ids.shape[1]
        left = max(0, size - count)
        counts = [left] * len(self.counts) if self.mask is None else self.mask[:, :left].sum(1).tolist()
        if count > size or any(one < kept for one, kept in zip(counts, self.sinks, strict=True)):
            raise ValueError(
                f"the last {count} tokens cannot be taken back: only {min(self.counts) - max(self.sinks)} are still in "
                "the local window, the others have moved to the memory; call activate_past_recording() of the cache "
                "before they are read, or read the text again"
            )
        if not left:
            self.clear()
            return
        self.counts = counts
        for name in ("token_ids", "positions", "places", "mask"):
            tensor = getattr(self, name)
            setattr(self, name, None if tensor is None else tensor[:, :left])
        for layer in self.layers:
            layer.keys, layer.values = layer.keys[:, :, :left], layer.values[:, :, :left]

    def select_rows(self, rows: Tensor) -> None:
        """Row i becomes what row ``rows[i]`` was (beam search); memories are the caller's."""
        super().reorder_cache(rows)
        for name in ("token_ids", "positions", "places", "base", "mask"):
            tensor = getattr(self, name)
            setattr(self, name, None if tensor is None else tensor[rows.to(tensor.device)])
        order = rows.tolist()
        for name in ("counts", "sinks", "moved"):
            numbers = getattr(self, name)
            setattr(self, name, [numbers[row] for row in order])

    @staticmethod
    def _take(vectors: Tensor, slots: Tensor) -> Tensor:
        return vectors[:, slots.to(vectors.device)].detach()  # (G, count, D)


def _pick_slots(vectors: Tensor, where: Tensor) -> Tensor:
    """(B, G, S, D), (B, S') -> (B, G, S', D)."""
    rows = torch.arange(len(where), device=vectors.device).unsqueeze(1)
    return vectors.transpose(1, 2)[rows, where.to(vectors.device)].transpose(1, 2)


class WindowStored(Exception):  # noqa: N818 - no error: all that was wanted of a decoder has been computed
    """Ends a decoder's forward at the layer whose keys and values were wanted."""


def local_window(model: Any, memories: Sequence[Sequence[Memory]], recorder: Recorder | None = None) -> LocalCache:
    """An empty local window of a ``FoTForCausalLM`` that reads these memories, for each row."""
    config = model.memory_config
    without = () if config.mem_positionals else config.layers
    return LocalCache(memories, config, rotary_of(model, without), recorder)


def copied(cache: Cache) -> dict[str, Any]:
    """Its attributes; lists and dictionaries are copied, what they hold is not."""
    return {name: copy.copy(value) if isinstance(value, list | dict) else value for name, value in vars(cache).items()}
