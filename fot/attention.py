"""Memory attention: what a memory layer computes.

For a query q in a memory layer, with L the keys of its local window before it and M the keys in memory
(arXiv 2307.03170, section 3.1; one softmax, no gate)::

    output(q) = sum over i in L + M of  exp(s q'.k_i) v_i  /  sum over j in L + M of  exp(s q'.k_j)

computed as attention over L and attention over M, merged by their log-sum-exp (``memory.softmax.merge``). Local
queries and keys are rotated by their position in the window; the same rotated query meets unrotated memory keys,
which is to say keys at position 0 (LongLLaMA). With ``mem_positionals=False`` nothing is rotated in memory layers.
"""

import types
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from fot.cache import LocalCache
from fot.compat import given_cache
from fot.config import MemoryConfig
from memory import Memory, attend, merge


def make_memory_layer(attention: Any, config: MemoryConfig, key_scale: float) -> None:
    """Give a Hugging Face attention module access to the memory, in place. No parameter is added or renamed.

    ``key_scale`` is ``memory_key_scale`` of its model. Without a ``LocalCache`` the module computes what it computed
    before.
    """

    def forward(
        self: Any,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        local = given_cache(kwargs)
        if isinstance(local, LocalCache):
            return memory_attention(self, hidden_states, position_embeddings, local, config, key_scale), None
        return type(self).forward(
            self, hidden_states, position_embeddings=position_embeddings, attention_mask=attention_mask, **kwargs
        )

    bound = types.MethodType(forward, attention)
    if hasattr(attention, "_old_forward"):  # accelerate's device_map wraps forward and keeps the real one here
        attention._old_forward = bound
    else:
        attention.forward = bound


def memory_attention(
    module: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    local: LocalCache,
    config: MemoryConfig,
    key_scale: float,
) -> Tensor:
    """Attention of one memory layer: local window and memory in one softmax.

    Args:
        module: a Llama-shaped attention module.
        hidden_states: (B, T, hidden_size), normalised.
        position_embeddings: cosines and sines (B or 1, T, D) of the positions in the window.
        local: the window so far, and the memories of each row; takes the new keys and values.
        config: resolved.
        key_scale: factor on keys that go to the memory.

    Returns:
        (B, T, hidden_size).
    """
    queries = project_queries(module, hidden_states)  # (B, H, T, D)
    keys, values = project_keys_values(module, hidden_states)  # (B, G, T, D)
    layer = module.layer_idx
    local.stage(layer, scaled(keys, key_scale))
    if config.mem_positionals:
        queries, keys = rotate(queries, keys, position_embeddings)
    keys, values = local.update(keys, values, layer)  # (B, G, S, D)
    first, mask = local.unstored()
    parts = [attend_local(queries, keys[:, :, first:], values[:, :, first:], mask, scale=module.scaling)]
    if any(len(memory) for row in local.memories for memory in row):
        parts.append(attend_memory(queries, local.memories, layer, scale=module.scaling, config=config))
    if local.recorder is not None:
        local.recorder.note(layer, queries, [lse for _, lse in parts], local, module.scaling)
    output, _ = merge(parts)  # (B, H, T, D)
    return module.o_proj(output.transpose(1, 2).flatten(2))


def memory_key_scale(model: Any, config: MemoryConfig) -> float:
    """What turns an unrotated key into the key at position 0: the factor of rotary scalings such as YaRN and LongRoPE.

    They multiply rotated queries and keys alike. Without positions in memory layers nothing is multiplied there.
    """
    return float(getattr(model.model.rotary_emb, "attention_scaling", 1.0)) if config.mem_positionals else 1.0


def scaled(keys: Tensor, scale: float) -> Tensor:
    """Keys times a factor that is 1 for most models."""
    return keys if scale == 1.0 else keys * scale


def project_queries(module: Any, hidden_states: Tensor) -> Tensor:
    """Unrotated queries (B, H, T, D), normalised where the model does so (Qwen3)."""
    queries = module.q_proj(hidden_states).unflatten(-1, (-1, module.head_dim))
    return _normalised(module, "q_norm", queries).transpose(1, 2)


def project_keys_values(module: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    """Unrotated keys (B, G, T, D), normalised where the model does so (Qwen3), and values, likewise."""
    keys = module.k_proj(hidden_states).unflatten(-1, (-1, module.head_dim))
    values = module.v_proj(hidden_states).unflatten(-1, (-1, module.head_dim))
    return _normalised(module, "k_norm", keys).transpose(1, 2), values.transpose(1, 2)


def rotate(queries: Tensor, keys: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Queries (B, H, T, D) and keys (B, G, T, D) turned by their positions, in the dtypes they had."""
    turned = apply_rotary_pos_emb(queries, keys, *position_embeddings)
    return turned[0].to(queries.dtype), turned[1].to(keys.dtype)


def _normalised(module: Any, name: str, heads: Tensor) -> Tensor:
    # Under autocast projections come in bfloat16, and norms with float32 weights leave float32, as rotations do.
    return getattr(module, name)(heads).to(heads.dtype) if hasattr(module, name) else heads


def attend_local(
    queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, *, scale: float
) -> tuple[Tensor, Tensor]:
    """Causal attention within the window.

    Args:
        queries: (B, H, T, D), the last T tokens of the window.
        keys: (B, G, S, D), the whole window.
        values: likewise.
        mask: (B, S) bool, False at padding; None if there is none.
        scale: factor on inner products.

    Returns:
        output (B, H, T, D), log-sum-exp (B, H, T) float32.
    """
    T, S = queries.shape[2], keys.shape[2]  # noqa: N806
    group = queries.shape[1] // keys.shape[1]
    if group > 1:
        keys, values = keys.repeat_interleave(group, dim=1), values.repeat_interleave(group, dim=1)
    if mask is None and (T == 1 or T == S):
        return attend(queries, keys, values, scale=scale, causal=T > 1)
    position = torch.arange(S, device=queries.device)
    seen = position[None, :] <= position[S - T :, None]  # (T, S)
    if mask is not None:
        # Padding sees itself, so that its softmax is not empty: a NaN there would spread through masked values.
        itself = position[None, :] == position[S - T :, None]
        seen = (seen & mask[:, None, None, :]) | itself  # (B, 1, T, S)
    else:
        seen = seen[None, None]
    return attend(queries, keys, values, scale=scale, mask=seen)


def attend_memory(
    queries: Tensor, memories: Sequence[Sequence[Memory]], layer: int, *, scale: float, config: MemoryConfig
) -> tuple[Tensor, Tensor]:
    """Attention to the memories of each row.

    Args:
        queries: (B, H, T, D).
        memories: for each row, the memories it reads.
        layer: index of the memory layer.
        scale: factor on inner products.
        config: for ``mem_attention_grouping``.

    Returns:
        output (B, H, T, D), log-sum-exp (B, H, T) float32, -inf for a row whose memories are empty.
    """
    _, H, T, D = queries.shape  # noqa: N806
    chunk = T
    if config.mem_attention_grouping is not None:
        heads, rows = config.mem_attention_grouping
        chunk = max(1, heads * rows // H)
    outputs, lses = [], []
    for query, row in zip(queries, memories, strict=True):
        row_parts = []
        for part in query.split(chunk, dim=1):  # (H, t, D)
            folded = part.reshape(-1, D) if not row else _fold(part, row[0].num_key_value_heads)
            found = [memory[layer].attend(folded, scale=scale) for memory in row if len(memory)]
            output, lse = merge(found) if found else _nothing(folded)
            row_parts.append((output.reshape(H, -1, D), lse.reshape(H, -1)))
        outputs.append(torch.cat([output for output, _ in row_parts], dim=1))
        lses.append(torch.cat([lse for _, lse in row_parts], dim=1))
    return torch.stack(outputs), torch.stack(lses)


def _fold(queries: Tensor, num_key_value_heads: int) -> Tensor:
    """(H, t, D) -> (G, H / G * t, D): the query heads of a KV head lie behind one another and share its keys."""
    return queries.reshape(num_key_value_heads, -1, queries.shape[-1])


def _nothing(queries: Tensor) -> tuple[Tensor, Tensor]:
    return torch.zeros_like(queries), torch.full(queries.shape[:-1], -torch.inf, device=queries.device)
