"""What a long text costs by each method: attention FLOPs, bytes that are kept, and time, measured at small sizes."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fot.compare.catalogue import MEMORY, PASSAGES, WHOLE, WINDOW, Method
from fot.compare.methods import SINKS, Setting, opened
from fot.compare.readers import PASSAGE, Progress, greedy
from fot.compare.readers import PASSAGES as COUNT
from fot.evaluation.costs import memory_bytes_per_token
from fot.families import key_value_shape

# Bytes of a number in a cache of 4 bits: half a byte, and a scale and a shift in float32 for each group of 64.
INT4_BYTES = 0.5 + 8 / 64


@dataclass(frozen=True)
class Shape:
    """What costs follow from.

    Attributes:
        layers: of the model.
        heads: of queries.
        key_value_heads: of keys.
        head_dim: size of a head.
        number_bytes: of a number in the cache.
        memory: its resolved ``MemoryConfig``.
    """

    layers: int
    heads: int
    key_value_heads: int
    head_dim: int
    number_bytes: int
    memory: Any

    @classmethod
    def of(cls, model: Any) -> "Shape":
        """Of a ``FoTForCausalLM``."""
        key_value_heads, head_dim = key_value_shape(model)
        config = model.config
        return cls(config.num_hidden_layers, config.num_attention_heads, key_value_heads, head_dim,
                   model.dtype.itemsize, model.memory_config)  # fmt: skip

    def pair_flops(self, layers: int) -> int:
        """Of one query with one key, in so many layers: a multiplication and an addition each for score and value."""
        return 4 * self.heads * self.head_dim * layers


@dataclass(frozen=True)
class Cost:
    """What a text of so many tokens costs; None where it depends on the text or the index.

    Attributes:
        read_flops: of attention, to read the text.
        token_flops: of attention, to write one token after it.
        kept_bytes: of the text.
        read_seconds: extrapolated; None: not measured.
        token_seconds: likewise.
    """

    read_flops: float | None
    token_flops: float | None
    kept_bytes: float | None
    read_seconds: float | None = None
    token_seconds: float | None = None


def cost(method: Method, shape: Shape, tokens: int, setting: Setting) -> Cost:
    """FLOPs and bytes of a method, by its formula."""
    if method.attends == WHOLE:
        number = {"cache-fp8": 1, "cache-int4": INT4_BYTES}.get(method.name, shape.number_bytes)
        pairs = tokens * (tokens + 1) / 2
        flops = shape.pair_flops(shape.layers)
        return Cost(flops * pairs, flops * (tokens + 1), _cache_bytes(shape, tokens, number))
    if method.attends == WINDOW:
        sinks = SINKS if method.name == "streaming" else 0
        most = setting.window + sinks
        flops = shape.pair_flops(shape.layers)
        kept = _cache_bytes(shape, most + sinks / 2, shape.number_bytes)  # room is made at once; see SinkLayer
        return Cost(flops * _windowed(tokens, most), flops * min(tokens + 1, most), kept)
    if method.attends == MEMORY:
        return _memory_cost(method, shape, tokens)
    assert method.attends == PASSAGES
    return Cost(0, shape.pair_flops(shape.layers) * min(tokens, PASSAGE * COUNT), None)


def _memory_cost(method: Method, shape: Shape, tokens: int) -> Cost:
    config = shape.memory
    window, new = config.window, config.window - config.overlap
    windows = max(1, -(-(tokens - config.overlap) // new))
    local = windows * _windowed(min(tokens, window), window) * shape.pair_flops(max(config.layers) + 1)
    stored = 0.0 if config.isolated_windows else windows * min(tokens, window) * max(0, tokens - new) / 2
    remembered = shape.pair_flops(len(config.layers))
    stays = config.local_length(tokens)
    kept = memory_bytes_per_token(config, shape.key_value_heads, shape.head_dim) * (tokens - stays)
    kept += _cache_bytes(shape, stays, shape.number_bytes)
    if method.name != "memory":  # which of the stored pairs are read is the index's affair
        return Cost(None if stored else local, None, kept)
    written = remembered * tokens + shape.pair_flops(shape.layers - len(config.layers)) * stays
    return Cost(local + stored * remembered, written, kept)


def _windowed(tokens: int, most: int) -> float:
    """Pairs of queries and keys of a text in which each query sees at most so many keys."""
    full = min(tokens, most)
    return full * (full + 1) / 2 + max(0, tokens - most) * most


def _cache_bytes(shape: Shape, tokens: float, number: float) -> float:
    return tokens * shape.layers * 2 * shape.key_value_heads * shape.head_dim * number


@torch.no_grad()
def measure(
    method: Method,
    model: Any,
    sizes: Sequence[int],
    setting: Setting,
    written: int = 8,
    progress: Progress = lambda tokens: None,
) -> tuple[list[float], list[float]]:
    """Seconds to read random tokens of each size, and seconds a token that is written after them.

    Args:
        method: of the catalogue.
        model: a ``FoTForCausalLM`` with its tokenizer.
        sizes: in tokens.
        setting: what methods are set up for.
        written: tokens; the first, which may do more than the others, is not counted.
        progress: told of tokens.
    """
    generator, read, wrote = torch.Generator().manual_seed(0), [], []
    with opened(method.name, model, setting) as reader:
        for size in (min(sizes), *sizes):  # the first warms up
            ids = torch.randint(model.config.vocab_size, (size,), generator=generator).tolist()
            start = time.perf_counter()
            state = reader.read(ids[:-1], progress)
            done = time.perf_counter()
            first = greedy(reader, state, ids[-1:], 1)
            begin = time.perf_counter()
            greedy(reader, state, first, written - 1)
            read.append(done - start)
            wrote.append((time.perf_counter() - begin) / (written - 1))
    return read[1:], wrote[1:]


def extrapolate(sizes: Sequence[int], seconds: Sequence[float], tokens: int, powers: Sequence[int]) -> float:
    """Seconds at ``tokens`` by least squares of so many powers of the size, none with a weight below 0.

    Relative errors count, so that small sizes have their say.
    """
    left = list(powers)
    while True:
        matrix = np.array([[float(size) ** power / time for power in left]
                           for size, time in zip(sizes, seconds, strict=True)])  # fmt: skip
        scale = np.abs(matrix).max(0)
        weights = np.linalg.lstsq(matrix / scale, np.ones(len(sizes)), rcond=None)[0] / scale
        if weights.min() >= 0 or len(left) == 1:
            return float(sum(weight * float(tokens) ** power for weight, power in zip(weights, left, strict=True)))
        left.pop(int(weights.argmin()))


def read_powers(method: Method) -> tuple[int, ...]:
    """Powers of the text's length in the time that a method takes to read it."""
    return (1, 2) if method.attends in (WHOLE, MEMORY) else (1,)


def token_powers(method: Method) -> tuple[int, ...]:
    """Likewise, to write one token."""
    return (0, 1) if method.attends in (WHOLE, MEMORY) else (0,)
