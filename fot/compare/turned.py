"""Attention that turns queries and keys itself, so that a method can give a key one position for some queries and
another for others.

The model's own rotation is switched off, and its cache is handed keys as they are before it. transformers calls
``turned_attention`` by its ``AttentionInterface``; a hook on each attention module hands it the method and the cache.
Queries go in blocks of ``BLOCK`` positions, which begin at fixed ones: what a query sees depends on its position alone,
not on how many tokens are read at once. A ``SinkCache`` attends by itself, faster.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from fot.compare.rope import NONE, check_rotary, rotated
from fot.compare.sinks import BLOCK, SinkCache, Turner
from fot.compat import given_cache
from fot.families import attention_modules
from fot.implementation import set_attention
from fot.rotary import Rotary, rotary_of
from memory import attend, merge

NAME = "turned"  # of the attention implementation
GIVEN = "turned_by"  # keyword by which the hook hands over what is needed


@dataclass(frozen=True)
class Part:
    """Some keys as some queries of a block see them.

    Attributes:
        rows: the first query of the block that sees any of them; all later ones do.
        slots: the keys.
        queries: (rows seen,) int64, positions by which queries are turned.
        keys: (slots,) int64, positions by which keys are turned.
        seen: (rows seen, slots) bool; None: all.
        frequencies: (R / 2,) to turn by; None for the model's own.
        factor: on cosine and sine.
        scale: (rows seen,) on queries; None for 1.
    """

    rows: int
    slots: slice
    queries: Tensor
    keys: Tensor
    seen: Tensor | None
    frequencies: Tensor | None = None
    factor: float = 1.0
    scale: Tensor | None = None


class Pattern(Protocol):
    """What a method makes of positions.

    Attributes:
        sinks: first tokens that a cache keeps.
        window: last tokens that a query sees besides, itself among them; None: all, and the cache keeps all.
        origin: a position at which a block of queries begins.
    """

    @property
    def sinks(self) -> int: ...

    @property
    def window(self) -> int | None: ...

    @property
    def origin(self) -> int: ...

    def parts(self, queries: Tensor, keys: Tensor) -> Sequence[Part]:
        """Disjoint sets of keys that together are all that queries see; the first is seen by every query.

        Args:
            queries: (T,) int64 positions, consecutive, in one block.
            keys: (S,) int64 positions of the keys at hand, ascending, those of the queries the last.
        """


@contextmanager
def turned_by(model: Any, pattern: Pattern) -> Iterator[None]:
    """Within, a model attends by a pattern. Rows of a batch must be equally long.

    Args:
        model: plain, of a supported family.
        pattern: of the method.

    Raises:
        ValueError: positions that are not plain rotary ones.
    """
    check_rotary(model)
    rotary, before = rotary_of(model), model.config._attn_implementation
    hand_over = partial(_hand_over, pattern, rotary, Turner(rotary))
    hooks = [module.register_forward_pre_hook(hand_over, with_kwargs=True) for module in attention_modules(model)]
    try:
        with rotated(model, {"rope_type": NONE}):
            set_attention(model, NAME)
            yield
    finally:
        for hook in hooks:
            hook.remove()
        set_attention(model, before)


def _hand_over(
    pattern: Pattern, rotary: Rotary, turner: Turner, module: Any, args: Any, kwargs: dict[str, Any]
) -> tuple[Any, Any]:
    return args, kwargs | {GIVEN: (pattern, rotary, turner, given_cache(kwargs))}


def turned_attention(
    module: Any,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in every layer.

    Args:
        module: the attention module; ``layer_idx`` is its layer.
        queries: (B, H, T, D), not turned.
        keys: (B, G, S, D), not turned, those of all tokens so far; only the new ones with a ``SinkCache``.
        values: (B, G, S, D).
        attention_mask: not looked at: there is no padding.
        scaling: factor on inner products; None: D**-0.5.
        kwargs: ``GIVEN``.

    Returns:
        (B, T, H, D), and no weights.

    Raises:
        ValueError: a ``SinkCache`` of other sizes than the pattern's.
    """
    pattern, rotary, turner, cache = kwargs[GIVEN]
    length, seen, layer = queries.shape[2], keys.shape[2], module.layer_idx
    scale = queries.shape[-1] ** -0.5 if scaling is None else scaling
    if isinstance(cache, SinkCache):
        cache.check_sizes(pattern.sinks, pattern.window)
        found = cache.layers[layer].attend(layer, turner, queries, keys, values, scale)
        return found.transpose(1, 2).contiguous(), None
    places = torch.arange(seen, device=queries.device)
    outputs = []
    for first, last in blocks(seen - length, seen, pattern.origin):
        rows = slice(first - (seen - length), last - (seen - length))
        here = torch.arange(first, last, device=queries.device)
        asked, known, read = queries[:, :, rows], keys[:, :, :last], values[:, :, :last]
        parts = pattern.parts(here, places[:last])
        outputs.append(attend_parts(parts, asked, known, read, rotary, layer, scale))
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


def attend_parts(
    parts: Sequence[Part],
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    rotary: Rotary,
    layer: int,
    scale: float,
) -> Tensor:
    """One softmax over all parts: (B, H, T, D).

    Args:
        parts: of a pattern.
        queries: (B, H, T, D) of a block.
        keys: (B, G, S, D).
        values: (B, G, S, D).
        rotary: the model's own.
        layer: which.
        scale: factor on inner products.
    """
    output, lse = None, None
    for part in parts:
        asked = turn(queries[:, :, part.rows :], part.queries, part, rotary, layer)
        if part.scale is not None:
            asked = asked * part.scale.to(asked.dtype).unsqueeze(-1)
        known = turn(keys[:, :, part.slots], part.keys, part, rotary, layer)
        seen = None if part.seen is None else part.seen[None, None]
        found, found_lse = attend(asked, known, values[:, :, part.slots], scale=scale, mask=seen)
        if output is None or lse is None:
            output, lse = found, found_lse
        else:
            rest, rest_lse = merge([(output[:, :, part.rows :], lse[:, :, part.rows :]), (found, found_lse)])
            output = torch.cat([output[:, :, : part.rows], rest], dim=2)
            lse = torch.cat([lse[:, :, : part.rows], rest_lse], dim=2)
    assert output is not None, "a query sees itself"
    return output


def turn(vectors: Tensor, positions: Tensor, part: Part, rotary: Rotary, layer: int) -> Tensor:
    """Queries or keys (B, ., T, D) turned by positions (T,); as they are in layers that the model does not rotate."""
    own = rotary.frequencies[layer]
    if own is None:
        return vectors
    by = Rotary((own if part.frequencies is None else part.frequencies,), rotary.interleaved)
    turned = by.back(0, vectors, -positions)
    if part.factor == 1.0:
        return turned
    size = 2 * own.shape[0]
    return torch.cat([turned[..., :size] * part.factor, turned[..., size:]], dim=-1)


def block_end(position: int, origin: int) -> int:
    """Where the block of a position ends: one begins at ``origin``, and each has ``BLOCK`` positions."""
    return origin + ((position - origin) // BLOCK + 1) * BLOCK


def blocks(first: int, last: int, origin: int) -> Iterator[tuple[int, int]]:
    """Positions first..last-1 by blocks."""
    while first < last:
        stop = min(last, block_end(first, origin))
        yield first, stop
        first = stop


def no_mask(*args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> None:
    """What transformers calls for a mask.

    Raises:
        ValueError: there is padding.
    """
    if attention_mask is not None and not bool(attention_mask.all()):
        raise ValueError("this method reads no padding: give texts of one length, or one text at a time")


AttentionInterface.register(NAME, turned_attention)
AttentionMaskInterface.register(NAME, no_mask)
