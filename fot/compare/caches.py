"""A cache that keeps a text's first tokens and its last ones, and so never grows."""

from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from fot.compare.turned import Pattern


class SinkLayer(DynamicLayer):
    """Keys and values of one layer, keys not turned.

    Attributes:
        seen: tokens so far, those that are forgotten included.
    """

    def __init__(self, sinks: int, window: int) -> None:
        """
        Args:
            sinks: first tokens that are kept.
            window: last tokens that a query sees, itself among them: ``window - 1`` are kept for it.
        """
        super().__init__()
        self.sinks, self.kept, self.seen = sinks, window - 1, 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take in T tokens: (B, G, T, D) each. Returns what is kept with all of these."""
        self.seen += key_states.shape[-2]
        keys, values = super().update(key_states, value_states)
        if keys.shape[-2] > self.sinks + self.kept:
            self.keys, self.values = self._rest(keys), self._rest(values)
        return keys, values

    def _rest(self, vectors: Tensor) -> Tensor:
        last = vectors.shape[-2] - self.kept
        return torch.cat([vectors[:, :, : self.sinks], vectors[:, :, last:]], dim=-2)

    def get_seq_length(self) -> int:
        """Tokens so far."""
        return self.seen


class SinkCache(Cache):
    """A cache of ``sinks + window - 1`` tokens between steps, however long the text.

    Args:
        num_hidden_layers: of the model.
        sinks: see ``SinkLayer``.
        window: see ``SinkLayer``.
    """

    def __init__(self, num_hidden_layers: int, sinks: int, window: int) -> None:
        super().__init__(layers=[SinkLayer(sinks, window) for _ in range(num_hidden_layers)])


def cache_for(model: Any, pattern: Pattern) -> Cache:
    """An empty cache for a model that attends by a pattern."""
    if pattern.window is None:
        return DynamicCache()
    return SinkCache(model.config.num_hidden_layers, pattern.sinks, pattern.window)


def cache_bytes(cache: Any) -> int:
    """Bytes of the keys and values that a cache of transformers holds."""
    held = [part for layer in cache.layers for part in (layer.keys, layer.values) if part is not None]
    quantised = [getattr(layer, name, None) for layer in cache.layers for name in QUANTISED]
    return sum(map(_bytes, [*held, *(part for part in quantised if part is not None)]))


# What transformers' quantised layers keep besides the newest tokens.
QUANTISED = ("_quantized_keys", "_quantized_values")


def _bytes(part: Any) -> int:
    if isinstance(part, tuple):  # HQQ: codes, and what else they need
        return sum(map(_bytes, part))
    if isinstance(part, dict):
        return sum(map(_bytes, part.values()))
    inner = [getattr(part, name) for name in ("_data", "_scale", "_shift") if hasattr(part, name)]  # quanto
    if inner:
        return sum(map(_bytes, inner))
    return part.numel() * part.element_size() if isinstance(part, Tensor) else 0
