"""The method written out slowly: one softmax over local and memory keys, nothing fused, nothing merged."""

from typing import Any

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb


def reference_logits(model: Any, windows: list[Tensor], past: list[Tensor] | None = None) -> Tensor:
    """Logits of the last window (1, T, V) after the earlier ones filled the memory.

    ``windows`` are (1, T) token ids; ``past`` are windows of another document, read before them.
    """
    memory: dict[int, list[tuple[Tensor, Tensor]]] = {layer: [] for layer in model.memory_config.layers}
    for window in [*(past or []), *windows]:
        hidden = _run(model, window, memory)
    return model.lm_head(hidden)


def _run(model: Any, ids: Tensor, memory: dict[int, list[tuple[Tensor, Tensor]]]) -> Tensor:
    decoder = model.model
    hidden = decoder.embed_tokens(ids)
    positions = torch.arange(ids.shape[1]).unsqueeze(0)
    rotary = decoder.rotary_emb(hidden, position_ids=positions)
    for number, layer in enumerate(decoder.layers):
        attention = layer.self_attn
        normed = layer.input_layernorm(hidden)
        q, k, v = (
            projection(normed).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        if hasattr(attention, "q_norm"):
            q, k = attention.q_norm(q), attention.k_norm(k)
        rotated_q, rotated_k = q, k
        if number not in memory or model.memory_config.mem_positionals:
            rotated_q, rotated_k = apply_rotary_pos_emb(q, k, *rotary)
        mixed = _attend(rotated_q, rotated_k, v, memory.get(number, []))
        if number in memory:
            memory[number].append((k, v))
        hidden = hidden + attention.o_proj(mixed.transpose(1, 2).flatten(2))
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return decoder.norm(hidden)


def _attend(q: Tensor, k: Tensor, v: Tensor, memory: list[tuple[Tensor, Tensor]]) -> Tensor:
    T, S = q.shape[2], k.shape[2]  # noqa: N806
    seen = torch.ones(T, S, dtype=torch.bool).tril(S - T)
    for old_k, old_v in memory:
        k, v = torch.cat([old_k, k], dim=2), torch.cat([old_v, v], dim=2)
        seen = torch.cat([torch.ones(T, old_k.shape[2], dtype=torch.bool), seen], dim=1)
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scores = (q @ k.mT) * q.shape[-1] ** -0.5
    return scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v
