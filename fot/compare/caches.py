"""The cache that a pattern goes with, and what caches of transformers hold."""

from typing import Any

from torch import Tensor
from transformers import Cache, DynamicCache

from fot.compare.sinks import SinkCache
from fot.compare.turned import Pattern


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
