"""Memory attention: what a memory layer computes.

For a query q in a memory layer, with L the keys of its local window before it and M the keys in memory
(arXiv 2307.03170, section 3.1; one softmax, no gate)::

    output(q) = sum over i in L + M of  exp(s q'.k_i) v_i  /  sum over j in L + M of  exp(s q'.k_j)

computed as attention over L and attention over M, merged by their log-sum-exp (``memory.softmax.merge``). Where a
family has learnt sinks (GPT-OSS), the sum in the denominator has ``exp(sink)`` of the query's head besides. Local
queries and keys are rotated by their position in the window; the same rotated query meets memory keys at position 0
(LongLLaMA). With ``mem_positionals=False`` nothing is rotated in memory layers.

transformers calls this by its ``AttentionInterface``: a model with memory has the implementation ``fot_sdpa`` (over
``sdpa``; likewise for others), which is the one under it except in a memory layer that is handed a window or, in
training, contexts by the keyword ``CONTEXT``.
"""

import math
import sys
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fot.config import MemoryConfig
from memory import Memory, attend, merge

Attention = tuple[Tensor, Tensor]  # output and log-sum-exp
# Keyword of a decoder's forward that reaches the attention of every layer.
CONTEXT = "fot_context"
# Keyword by which transformers hands an attention function its layer's learnt sinks (GPT-OSS).
LEARNT_SINKS = "s_aux"
PREFIX = "fot_"
IMPLEMENTATIONS = ("sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention")


def attention_forward(
    under: str,
    module: Any,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """What transformers calls in every layer.

    Args:
        under: the implementation for all else, such as ``sdpa``.
        module: the attention module; ``layer_idx`` is its layer.
        queries: (B, H, T, D), rotated.
        keys: (B, G, S, D), rotated, those of the cache included.
        values: (B, G, S, D).
        attention_mask: of the implementation under this one.
        scaling: factor on inner products; None: D**-0.5.
        kwargs: ``CONTEXT``, ``LEARNT_SINKS`` (H,) and what else the implementation under this one takes.

    Returns:
        (B, T, H, D), and weights (B, H, T, S) if the implementation under this one gives any. A memory layer gives them
        over ``eager`` where ``output_attentions`` is asked for; see ``local_weights``.

    Raises:
        ValueError: weights are asked for while crossbatch trains.
    """
    context = kwargs.pop(CONTEXT, None)
    if context is not None and module.layer_idx in context.memory_layers:
        scale = queries.shape[-1] ** -0.5 if scaling is None else scaling
        # Under autocast projections come in bfloat16, but norms and rotations leave float32.
        queries, keys = queries.to(values.dtype), keys.to(values.dtype)
        learnt, weights = kwargs.get(LEARNT_SINKS), None
        if under == "eager" and kwargs.get("output_attentions"):
            if not hasattr(context, "attend_and_weigh"):
                raise ValueError("output_attentions is not known while crossbatch trains: call the model without it")
            output, weights = context.attend_and_weigh(module.layer_idx, queries, keys, values, scale, learnt)
        else:
            output = context.attend(module.layer_idx, queries, keys, values, scale, learnt)  # (B, H, T, D)
        return output.transpose(1, 2).contiguous(), weights
    plain = _implementation(under, module)
    return plain(module, queries, keys, values, attention_mask, scaling=scaling, **kwargs)


def _implementation(name: str, module: Any) -> Callable[..., tuple[Tensor, Tensor | None]]:
    if name == "eager":  # each family has its own
        return sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS[name]


def attention_mask_of(under: str, *args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    """What transformers calls for the mask of the layers without memory: that of the implementation under this one.

    Whether no token is padding is not looked up: fot hands on a mask only where some are, and a GPU would be waited for
    at every token.
    """
    if attention_mask is not None:
        kwargs["allow_is_causal_skip"] = False
    return ALL_MASK_ATTENTION_FUNCTIONS[under](*args, attention_mask=attention_mask, **kwargs)


for _name in IMPLEMENTATIONS:
    AttentionInterface.register(PREFIX + _name, partial(attention_forward, _name))
    AttentionMaskInterface.register(PREFIX + _name, partial(attention_mask_of, _name))


def memory_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    memories: Sequence[Sequence[Memory]],
    layer: int,
    *,
    scale: float,
    config: MemoryConfig,
    learnt_sinks: Tensor | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """Attention of one memory layer: local window and memory in one softmax.

    Args:
        queries: (B, H, T, D), rotated, the last T tokens of the window.
        keys: (B, G, S, D), rotated, what of the window is not in the memory.
        values: likewise.
        mask: (B, S) bool, False at padding, or float, added to the scores; None if there is none.
        memories: for each row, the memories it reads.
        layer: index of the memory layer.
        scale: factor on inner products.
        config: resolved.
        learnt_sinks: (H,), see ``with_sinks``; they belong to the local part. None for a family that has none.

    Returns:
        output (B, H, T, D); log-sum-exps (B, H, T) float32 of the local part, raised by ``memory_discount`` or set by
        ``gated``, and, if anything is stored, of the memory. What the newest tokens of a memory weigh more than the
        others counts as local.
    """
    parts = [with_sinks(*attend_local(queries, keys, values, mask, scale=scale), learnt_sinks)]
    if any(len(memory) for row in memories for memory in row):
        output, lse = parts[0]
        found = attend_memory(queries, memories, layer, scale=scale)
        discounts = [memory_discount(row, config) for row in memories]
        # Less for the memory is more for the window: so log-sum-exps of the memory stay those of its keys.
        if config.memory_gates is not None:
            lse = gated(lse, found[1], config.memory_gates[config.layers.index(layer)])
        elif any(discounts):
            lse = raised(lse, discounts)
            if config.newest_full_weight:
                newest, newest_lse = attend_newest(queries, memories, layer, config.newest_full_weight, scale=scale)
                lacking = [math.log(math.expm1(discount)) if discount else -math.inf for discount in discounts]
                output, lse = merge([(output, lse), (newest, raised(newest_lse, lacking))])
        parts = [(output, lse), found]
    output, _ = merge(parts)
    return output, [lse for _, lse in parts]


def memory_discount(memories: Sequence[Memory], config: MemoryConfig) -> float:
    """By how much the log-sum-exp of a row's memories is lowered, at least 0.

    A softmax over ever more keys gives ever less to each, so that many keys of no use drown a few, and the local window
    with them (the paper's distraction, arXiv 2307.03170, section 3.3). So n tokens weigh as much as F =
    ``full_weight_tokens``. The newest R = ``newest_full_weight`` of them keep their full weight (``attend_newest``);
    the others have the weight (F - R) / (n - R) each. A key in memory does not show how near it is, and ordinary text
    depends most on what is near.
    """
    total, full, newest = sum(map(len, memories)), config.full_weight_tokens, config.newest_full_weight
    if not full or total <= full:
        return 0.0
    return math.log((total - newest) / (full - newest))


def gated(lse: Tensor, memory_lse: Tensor, gates: Sequence[float]) -> Tensor:
    """The local log-sum-exps with which ``merge`` gives the memory a share g of each head, whatever its keys' scores.

    Memorizing Transformers (arXiv 2203.08913, section 3.2) add g V_m + (1 - g) V_c, of two softmaxes.

    Args:
        lse: (B, H, T), local.
        memory_lse: (B, H, T), -inf where nothing is in memory; the window then gets all.
        gates: g of each of the H heads.

    Returns:
        (B, H, T).

    Raises:
        ValueError: another number of heads.
    """
    if len(gates) != lse.shape[1]:
        raise ValueError(f"memory_gates has {len(gates)} numbers for a layer of {lse.shape[1]} heads: give one a head")
    return torch.where(memory_lse.isfinite(), memory_lse - _logits_of(tuple(gates), lse.device), lse)


@cache
def _logits_of(gates: tuple[float, ...], device: torch.device) -> Tensor:
    """(H, 1). Made once: bringing them to a GPU at every token would make it wait."""
    return torch.tensor(gates, device=device).logit().unsqueeze(-1)


def raised(lse: Tensor, discounts: Sequence[float]) -> Tensor:
    """Log-sum-exps (B, H, T) plus a number a row; a tensor of these would make a GPU wait for it at every token."""
    return torch.stack([row + discount for row, discount in zip(lse, discounts, strict=True)])


def attend_local(
    queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, *, scale: float
) -> tuple[Tensor, Tensor]:
    """Causal attention within the window.

    Args:
        queries: (B, H, T, D), the last T tokens of the window.
        keys: (B, G, S, D), the whole window.
        values: likewise.
        mask: (B, S) bool, False at padding, or float, added to the scores; None if there is none.
        scale: factor on inner products.

    Returns:
        output (B, H, T, D), log-sum-exp (B, H, T) float32.
    """
    T, S = queries.shape[2], keys.shape[2]  # noqa: N806
    if T == 1:  # all query heads of a KV head see the same: no copy of the window for each
        group = queries.shape[1] // keys.shape[1]
        seen = None if mask is None else _seen(1, S, mask, queries.device)
        output, lse = attend(queries.unflatten(1, (-1, group)).squeeze(3), keys, values, scale=scale, mask=seen)
        return output.flatten(1, 2).unsqueeze(2), lse.flatten(1, 2).unsqueeze(2)
    if mask is None and T == S:
        return attend(queries, keys, values, scale=scale, causal=True)
    return attend(queries, keys, values, scale=scale, mask=_seen(T, S, mask, queries.device))


def with_sinks(output: Tensor, lse: Tensor, learnt_sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """Attention in which each head has a learnt sink besides its keys: a score whose value is zero (GPT-OSS).

    Args:
        output: (B, H, T, D), without sinks.
        lse: (B, H, T) float32, likewise.
        learnt_sinks: (H,) scores, any float dtype; None: nothing changes.

    Returns:
        output in its own dtype, log-sum-exp float32. Differentiable in all three.
    """
    if learnt_sinks is None:
        return output, lse
    total = torch.logaddexp(lse, learnt_sinks.to(lse.device, lse.dtype).unsqueeze(-1))
    return (output.float() * (lse - total).exp().unsqueeze(-1)).to(output.dtype), total


def local_weights(queries: Tensor, keys: Tensor, mask: Tensor | None, lse: Tensor, *, scale: float) -> Tensor:
    """The weights of the window's keys in the softmax over window and memory: a row sums to what the memory leaves.

    Args:
        queries, keys, mask, scale: as for ``attend_local``.
        lse: (B, H, T), of the whole softmax.

    Returns:
        (B, H, T, S) in the dtype of ``queries``.
    """
    keys = keys.repeat_interleave(queries.shape[1] // keys.shape[1], dim=1)
    scores = scale * (queries.float() @ keys.float().mT) - lse.unsqueeze(-1)
    seen = _seen(queries.shape[2], keys.shape[2], mask, queries.device)
    scores = scores.masked_fill(~seen, -torch.inf) if seen.dtype == torch.bool else scores + seen
    return scores.exp().to(queries.dtype)


def _seen(T: int, S: int, mask: Tensor | None, device: torch.device) -> Tensor:  # noqa: N803
    """Which of S keys the last T queries of a window see: (B or 1, 1, T, S), bool or float as ``mask`` is.

    ``mask`` is as for ``attend_local``.
    """
    position = torch.arange(S, device=device)
    seen = position[None, :] <= position[S - T :, None]  # (T, S)
    if mask is None:
        return seen[None, None]
    # Padding sees itself, so that its softmax is not empty: a NaN there would spread through masked values.
    itself = position[None, :] == position[S - T :, None]
    if mask.dtype == torch.bool:
        return (seen & mask[:, None, None, :]) | itself
    return mask[:, None, None, :].masked_fill(~seen, -torch.inf).masked_fill(itself, 0.0)


def attend_memory(
    queries: Tensor, memories: Sequence[Sequence[Memory]], layer: int, *, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention to the memories of each row.

    Args:
        queries: (B, H, T, D).
        memories: for each row, the memories it reads.
        layer: index of the memory layer.
        scale: factor on inner products.

    Returns:
        output (B, H, T, D), log-sum-exp (B, H, T) float32, -inf for a row whose memories are empty.
    """
    found = [
        (rows, _ask(memory, rows, queries, partial(memory[layer].attend, scale=scale)))
        for memory, rows in _readers(memories, layer, queries.shape[2])
    ]
    return _by_row(queries, found)


def attend_newest(
    queries: Tensor, memories: Sequence[Sequence[Memory]], layer: int, count: int, *, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention to the newest tokens of the memories of each row, whatever their index is.

    Args:
        queries: (B, H, T, D).
        memories: for each row, the memories it reads; tokens of a later one are newer.
        layer: index of the memory layer.
        count: how many tokens, of all memories of a row together.
        scale: factor on inner products.

    Returns:
        as ``attend_memory``.
    """
    readers: dict[tuple[int, int], tuple[Memory, list[int]]] = {}
    for row, read in enumerate(memories):
        left = count
        for memory in reversed(read):
            taken = min(left, len(memory))
            if taken:
                readers.setdefault((id(memory), taken), (memory, []))[1].append(row)
            left -= taken
    found = [
        (rows, _ask(memory, rows, queries, partial(memory[layer].attend_newest, count=taken, scale=scale)))
        for (_, taken), (memory, rows) in readers.items()
    ]
    return _by_row(queries, found)


def _ask(
    memory: Memory, rows: Sequence[int], queries: Tensor, attention: Callable[[Tensor], Attention]
) -> list[Attention]:
    """What rows that read a memory together find in it: (G, H / G x T, D) and (G, H / G x T) each."""
    folded = torch.cat([_fold(queries[row], memory.num_key_value_heads) for row in rows], dim=1)
    output, lse = attention(folded)  # (G, rows x H / G x T, D)
    return list(zip(output.chunk(len(rows), 1), lse.chunk(len(rows), 1), strict=True))


def _by_row(queries: Tensor, found: Sequence[tuple[Sequence[int], list[Attention]]]) -> Attention:
    """What each row found in all memories: output (B, H, T, D), log-sum-exp (B, H, T)."""
    parts: list[list[Attention]] = [[] for _ in queries]
    for rows, answers in found:
        for row, answer in zip(rows, answers, strict=True):
            parts[row].append(answer)
    merged = [merge(own) if own else _nothing(query) for query, own in zip(queries, parts, strict=True)]
    outputs = [output.reshape(queries.shape[1:]) for output, _ in merged]
    return torch.stack(outputs), torch.stack([lse.reshape(queries.shape[1:3]) for _, lse in merged])


def _readers(memories: Sequence[Sequence[Memory]], layer: int, length: int) -> list[tuple[Memory, list[int]]]:
    """Each memory that is not empty, with rows that read it together, ``length`` tokens each.

    Rows of one token do, where the index goes through all keys: that takes longer than computing with them. Rows of
    many tokens keep a kernel busy by themselves.
    """
    readers: dict[tuple[int, int], tuple[Memory, list[int]]] = {}
    for row, read in enumerate(memories):
        for memory in read:
            if len(memory):
                together = length == 1 and memory[layer].joins_queries
                readers.setdefault((id(memory), -1 if together else row), (memory, []))[1].append(row)
    return list(readers.values())


def _fold(queries: Tensor, num_key_value_heads: int) -> Tensor:
    """(H, T, D) -> (G, H / G * T, D): the query heads of a KV head lie behind one another and share its keys."""
    return queries.reshape(num_key_value_heads, -1, queries.shape[-1])


def _nothing(queries: Tensor) -> tuple[Tensor, Tensor]:
    return torch.zeros_like(queries), torch.full(queries.shape[:-1], -torch.inf, device=queries.device)
