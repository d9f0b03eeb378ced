"""How each method of the catalogue makes a reader of a model."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import transformers
from transformers import DynamicCache, QuantizedCache
from transformers.utils import is_optimum_quanto_available

from fot.compare import frequencies, patterns, rope
from fot.compare.caches import cache_for
from fot.compare.readers import CachedReader, MemoryReader, PassageReader, Reader
from fot.compare.streaming import check_sizes
from fot.compare.tuned import Tuned, opened_tuned
from fot.compare.turned import Pattern, turned_by
from fot.evaluation.answers import without_memory
from fot.families import key_value_shape
from fot.model import attach_memory

# Tokens that a cache keeps from the start of a text, and SelfExtend's neighbours at most.
SINKS = 4
NEIGHBOURS = 1024
# NTK's alpha is 2 s - 1 at s times the trained length: it must be larger than s, and 1 at s = 1.
NTK_FACTOR = 2.0
# Numbers that share a scale in a 4-bit cache, at most: transformers' default.
LARGEST_GROUP = 64


@dataclass(frozen=True)
class Setting:
    """What methods are set up for.

    Attributes:
        longest: tokens of the longest text; methods that are set once are set for it.
        window: last tokens that ``window`` and ``streaming`` see.
        lambdas: LongRoPE's factors; None for YaRN's.
        ssmax: its s; None for 1 / ln L, which leaves the trained length as it was.
        tuned: tuned checkpoints by their names, which are methods, too.
    """

    longest: int
    window: int = 1020
    lambdas: tuple[float, ...] | None = None
    ssmax: float | None = None
    tuned: Mapping[str, Tuned] = field(default_factory=dict)

    def factor(self, model: Any) -> float:
        """By which the longest text is longer than the trained length; at least 1."""
        return max(1.0, self.longest / rope.trained_length(model))


Opened = Callable[[Any, Setting], Any]


@contextmanager
def opened(name: str, model: Any, setting: Setting) -> Iterator[Reader]:
    """A method's reader; the model is as before after the block.

    Args:
        name: of the catalogue, or of a tuned checkpoint.
        model: a ``FoTForCausalLM`` with its tokenizer.
        setting: what it is set up for.

    Raises:
        ValueError: the method cannot be had on this model or machine.
    """
    tuned = setting.tuned.get(name)
    with OPENERS[name](model, setting) if tuned is None else opened_tuned(tuned, model) as reader:
        yield reader


@contextmanager
def _plain(model: Any, setting: Setting) -> Iterator[Reader]:
    with without_memory(model) as plain:
        yield CachedReader(plain, DynamicCache)


@contextmanager
def _rotated(parameters: Callable[..., dict[str, Any]], model: Any, setting: Setting) -> Iterator[Reader]:
    with without_memory(model) as plain:
        rope.check_rotary(plain)
        with rope.rotated(plain, parameters(plain, setting.factor(plain))):
            yield CachedReader(plain, DynamicCache)


@contextmanager
def _longrope(model: Any, setting: Setting) -> Iterator[Reader]:
    with _rotated(partial(rope.longrope, lambdas=setting.lambdas), model, setting) as reader:
        yield reader


@contextmanager
def _turned(pattern: Callable[[Any, Setting], Pattern], model: Any, setting: Setting) -> Iterator[Reader]:
    with without_memory(model) as plain:
        rope.check_rotary(plain)
        chosen = pattern(plain, setting)
        with turned_by(plain, chosen):
            yield CachedReader(plain, lambda: cache_for(plain, chosen))


def _window(sinks: int, model: Any, setting: Setting) -> Pattern:
    check_sizes(model, sinks, setting.window)
    return patterns.Streaming(sinks, setting.window)


def _dynamic_ntk(model: Any, setting: Setting) -> Pattern:
    return patterns.dynamic_ntk(*rope.shape_of(model), NTK_FACTOR)


def _dynamic_yarn(model: Any, setting: Setting) -> Pattern:
    return patterns.dynamic_yarn(*rope.shape_of(model))


def self_extend(model: Any, setting: Setting) -> patterns.SelfExtend:
    """Neighbours W and the smallest group G with W + (N - W) / G within half the trained length L, N the longest text.

    The authors ask for between a half and two thirds of L.
    """
    half = rope.trained_length(model) // 2
    neighbours = min(NEIGHBOURS, half // 2)
    group = max(1, math.ceil((setting.longest - neighbours) / (half - neighbours)))
    return patterns.SelfExtend(neighbours, group)


def _log_n(model: Any, setting: Setting) -> Pattern:
    return patterns.Whole(scale=patterns.log_n(rope.trained_length(model)))


def _log_n_ntk(model: Any, setting: Setting) -> Pattern:
    dim, base, trained = rope.shape_of(model)
    found = frequencies.ntk(dim, base, ntk_alpha(setting.factor(model)))
    return patterns.Whole(lambda tokens: (found, 1.0), patterns.log_n(trained))


def _ssmax(model: Any, setting: Setting) -> Pattern:
    strength = 1 / math.log(rope.trained_length(model)) if setting.ssmax is None else setting.ssmax
    return patterns.Whole(scale=patterns.ssmax(strength))


def ntk_alpha(factor: float) -> float:
    """alpha of NTK-aware scaling for texts s times as long as the trained ones."""
    return NTK_FACTOR * factor - (NTK_FACTOR - 1)


def _ntk(model: Any, factor: float) -> dict[str, Any]:
    return rope.ntk_aware(model, ntk_alpha(factor))


@contextmanager
def _fp8(model: Any, setting: Setting) -> Iterator[Reader]:
    with without_memory(model) as plain:
        try:
            QuantizedCache("fp8", plain.config)
        except ValueError as error:  # that of older releases
            raise ValueError(f"transformers {transformers.__version__} has no 8-bit cache: upgrade it") from error
        yield CachedReader(plain, lambda: QuantizedCache("fp8", plain.config))


@contextmanager
def _int4(model: Any, setting: Setting) -> Iterator[Reader]:
    if not is_optimum_quanto_available():
        raise ValueError("a 4-bit cache needs optimum-quanto: pip install 'fot[quanto]'")
    with without_memory(model) as plain:
        group = math.gcd(LARGEST_GROUP, math.prod(key_value_shape(plain)))  # it must divide the keys of a token
        yield CachedReader(plain, lambda: QuantizedCache("quanto", plain.config, q_group_size=group))


@contextmanager
def _offloaded(model: Any, setting: Setting) -> Iterator[Reader]:
    if model.device.type == "cpu":
        raise ValueError("an offloaded cache needs a GPU: on a CPU there is nowhere else to keep it")
    with without_memory(model) as plain:
        yield CachedReader(plain, lambda: DynamicCache(offloading=True))


@contextmanager
def _memory(index: str, model: Any, setting: Setting) -> Iterator[Reader]:
    before = model.memory_config
    try:
        yield MemoryReader(attach_memory(model, replace(before, index=index)))
    finally:
        attach_memory(model, before)


@contextmanager
def _passages(model: Any, setting: Setting) -> Iterator[Reader]:
    with without_memory(model) as plain:
        yield PassageReader(CachedReader(plain, DynamicCache), model.tokenizer)


OPENERS: dict[str, Opened] = {
    "plain": _plain,
    "window": partial(_turned, partial(_window, 0)),
    "streaming": partial(_turned, partial(_window, SINKS)),
    "interpolation": partial(_rotated, rope.interpolation),
    "ntk": partial(_rotated, _ntk),
    "dynamic-ntk": partial(_turned, _dynamic_ntk),
    "ntk-by-parts": partial(_rotated, rope.ntk_by_parts),
    "yarn": partial(_rotated, rope.yarn),
    "dynamic-yarn": partial(_turned, _dynamic_yarn),
    "longrope": _longrope,
    "llama3": partial(_rotated, rope.llama3),
    "giraffe-power": partial(_rotated, rope.giraffe_power),
    "giraffe-truncated": partial(_rotated, rope.giraffe_truncated),
    "self-extend": partial(_turned, self_extend),
    "log-n": partial(_turned, _log_n),
    "log-n-ntk": partial(_turned, _log_n_ntk),
    "ssmax": partial(_turned, _ssmax),
    "drope": partial(_rotated, rope.no_positions),
    "cache-fp8": _fp8,
    "cache-int4": _int4,
    "cache-offloaded": _offloaded,
    "memory": partial(_memory, "exact"),
    "memory-ivf": partial(_memory, "IVF,Flat"),
    "memory-clusters": partial(_memory, "clusters"),
    "bm25": _passages,
}


def missing(names: Sequence[str], model: Any, setting: Setting) -> dict[str, str]:
    """Which of these methods cannot be had on this model or machine, and why."""
    found = {}
    for name in names:
        try:
            with opened(name, model, setting):
                pass
        except ValueError as error:
            found[name] = str(error)
    return found
