"""StreamingLLM's cache, and attention to it: a text's first tokens and its last ones, at a cost that never grows.

Scores depend on differences of positions alone. So keys of the window are turned once, by their positions in the text,
and stay so. Only the few first tokens, whose distance from a query has an end, are turned anew for each query. The
pattern ``Streaming`` says the same, but turns all keys for each block of queries (``fot.compare.turned``).
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from fot.rotary import Rotary, turned_by_angles
from memory import attend, merge

# Queries that are read at once: each has a row in their mask.
BLOCK = 256


class Turner:
    """Turns vectors of any layer by positions.

    Args:
        rotary: the model's own, the same in all layers that are rotated.
    """

    def __init__(self, rotary: Rotary) -> None:
        self.rotary = rotary
        self.known: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}  # all layers ask for the same ones

    def __call__(self, layer: int, vectors: Tensor, positions: tuple[int, ...]) -> Tensor:
        """Queries or keys (B, ., T, D) turned by T positions; as they are in layers that the model does not rotate."""
        frequencies = self.rotary.frequencies[layer]
        if frequencies is None:
            return vectors
        if positions not in self.known:
            if len(self.known) >= 4:
                self.known.clear()
            # float64: of float32 a product is wrong by 0.004 at position 100,000. On the CPU: not every GPU has it.
            angle = torch.tensor(positions, dtype=torch.float64).unsqueeze(-1) * frequencies.cpu().double()
            cos, sin = (part.float().to(vectors.device) for part in (angle.cos(), angle.sin()))
            self.known[positions] = cos, sin
        return turned_by_angles(vectors, *self.known[positions], self.rotary.interleaved)


class SinkLayer(DynamicLayer):
    """Keys and values of one layer. There are no gradients for what is kept.

    Slots: the token at position p of the window is in slot p % W, and the first tokens, turned for the newest query,
    are in those from W on, so that a query at p sees slots 0..p and all of them in the end. Behind them are the keys of
    the first tokens as they came. All is in two tensors, whose rows transformers sorts for beams.

    Attributes:
        sinks: S, first tokens that are kept.
        window: W, last tokens that a query sees, itself among them.
        seen: tokens so far, those that are forgotten included.
    """

    is_croppable = False

    def __init__(self, sinks: int, window: int) -> None:
        super().__init__()
        self.sinks, self.window, self.seen = sinks, window, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make room, for good."""
        super().lazy_initialization(key_states, value_states)
        self.keys = _slots(key_states, self.window + 2 * self.sinks)
        self.values = _slots(value_states, self.window + self.sinks)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Count T tokens, (B, G, T, D) each, not turned, and hand them on: ``attend`` takes them in."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.seen += key_states.shape[-2]
        return key_states, value_states

    def get_seq_length(self) -> int:
        """Tokens so far."""
        return self.seen

    def reset(self) -> None:
        """Forget all."""
        super().reset()
        self.seen = 0

    def attend(self, layer: int, turn: Turner, queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        """Attention of the newest T tokens, which are taken in.

        Args:
            layer: which this is.
            turn: of the model.
            queries: (B, H, T, D), not turned.
            keys: (B, G, T, D), not turned, as they went through ``update``.
            values: (B, G, T, D).
            scale: factor on inner products.

        Returns:
            (B, H, T, D).
        """
        length = queries.shape[2]
        if length == 1:
            return self._one(layer, turn, self.seen - 1, queries, keys, values, scale)
        first = self.seen - length
        outputs = []
        for start in range(0, length, BLOCK):
            here = slice(start, start + BLOCK)
            block = queries[:, :, here], keys[:, :, here], values[:, :, here]
            outputs.append(self._block(layer, turn, first + start, *block, scale))
        return torch.cat(outputs, dim=2)

    def _one(
        self, layer: int, turn: Turner, place: int, queries: Tensor, keys: Tensor, values: Tensor, scale: float
    ) -> Tensor:
        """The token at a place of the text: one softmax over slots in any order."""
        outside = max(0, min(self.sinks, place - self.window + 1))
        self._keep_sinks(place, keys, values)
        self._keep(turn(layer, keys, (place,)), values, place)
        if outside:
            # As far before the query as they are before its place in the cache.
            start = place - min(place, self.sinks + self.window - 1)
            raw = self.keys[:, :, self.window + self.sinks :][:, :, :outside]
            turned = turn(layer, raw, tuple(range(start, start + outside)))
            self.keys[:, :, self.window : self.window + outside] = turned
        slots = min(place + 1, self.window + outside)
        # The query heads of a KV head lie along T, so that nothing is repeated for them.
        asked = turn(layer, queries, (place,)).reshape(*keys.shape[:2], -1, queries.shape[-1])
        found = scaled_dot_product_attention(asked, self.keys[:, :, :slots], self.values[:, :, :slots], scale=scale)
        return found.reshape(queries.shape)

    def _block(
        self, layer: int, turn: Turner, first: int, queries: Tensor, keys: Tensor, values: Tensor, scale: float
    ) -> Tensor:
        """Tokens from position ``first`` on, at most ``BLOCK``: the window, and what first tokens lie outside of it."""
        device, (window, sinks) = queries.device, (self.window, self.sinks)
        last = first + queries.shape[2] - 1
        own = tuple(range(first, last + 1))
        here, held = torch.arange(first, last + 1, device=device), min(first, window)
        # The newest position before ``first`` of each slot.
        slots = torch.arange(held, device=device)
        before = slots if first <= window else first - 1 - (first - 1 - slots) % window
        distance = here.unsqueeze(1) - torch.cat([before, here])
        turned = turn(layer, keys, own)
        output, lse = attend(
            turn(layer, queries, own),
            torch.cat([self.keys[:, :, :held], turned], dim=2),
            torch.cat([self.values[:, :, :held], values], dim=2),
            scale=scale,
            mask=((distance >= 0) & (distance < window))[None, None],
        )
        self._keep_sinks(first, keys, values)
        self._keep(turned, values, first)
        if sinks and last >= window:
            rows = max(0, window - first)
            places, seen = own[rows:], min(sinks, last - window + 1)
            asked = turn(layer, queries[:, :, rows:], tuple(min(place, sinks + window - 1) for place in places))
            known = turn(layer, self.keys[:, :, window + sinks :][:, :, :seen], tuple(range(seen)))
            outside = here[rows:].unsqueeze(1) - torch.arange(seen, device=device) >= window
            read = self.values[:, :, window : window + seen]
            far = attend(asked, known, read, scale=scale, mask=outside[None, None])
            rest, _ = merge([(output[:, :, rows:], lse[:, :, rows:]), far])
            output = torch.cat([output[:, :, :rows], rest], dim=2)
        return output

    def _keep_sinks(self, first: int, keys: Tensor, values: Tensor) -> None:
        """Take in those of the first tokens that are among these, as they are."""
        count = min(self.sinks - first, keys.shape[2])
        if count > 0:
            start = self.window + first
            self.values[:, :, start : start + count] = values[:, :, :count].detach()
            start += self.sinks
            self.keys[:, :, start : start + count] = keys[:, :, :count].detach()

    def _keep(self, turned: Tensor, values: Tensor, first: int) -> None:
        """Take in tokens from position ``first`` on, or their last ones, in place of those that leave the window."""
        count, stop = min(turned.shape[2], self.window), first + turned.shape[2]
        for kept, new in ((self.keys, turned), (self.values, values)):
            start, new = (stop - count) % self.window, new[:, :, -count:].detach()
            end = min(self.window, start + count)
            kept[:, :, start:end] = new[:, :, : end - start]
            kept[:, :, : start + count - end] = new[:, :, end - start :]


def _slots(vectors: Tensor, count: int) -> Tensor:
    return vectors.new_zeros(*vectors.shape[:2], count, vectors.shape[-1])


class SinkCache(Cache):
    """A cache of ``sinks + window`` tokens, however long the text, for a model that attends by ``Streaming``.

    Args:
        num_hidden_layers: of the model.
        sinks: see ``SinkLayer``.
        window: see ``SinkLayer``.
    """

    def __init__(self, num_hidden_layers: int, sinks: int, window: int) -> None:
        super().__init__(layers=[SinkLayer(sinks, window) for _ in range(num_hidden_layers)])
        self.sizes = sinks, window

    def check_sizes(self, sinks: int, window: int | None) -> None:
        """Raise ValueError if a model attends to other tokens than are kept here."""
        if self.sizes != (sinks, window):
            raise ValueError(f"a cache of {self.sizes[0]} sinks and a window of {self.sizes[1]}, where the model sees "
                             f"{sinks} and {window}: make the cache in the sizes of the block around it")  # fmt: skip
