"""The method written out slowly: one softmax over local and memory keys, nothing fused, nothing merged."""

import math
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
    for number, layer in enumerate(decoder.layers):
        attention = layer.self_attn
        normed = layer.input_layernorm(hidden)
        q, k, v = _project(layer, normed)
        places = list(range(ids.shape[1]))
        rotated_q, rotated_k = _turn(model, number, q, places), _turn(model, number, k, places)
        mixed = _attend(rotated_q, rotated_k, v, memory.get(number, []))
        if number in memory:
            memory[number].append((_turn(model, number, k, [0] * k.shape[2]), v))
        hidden = hidden + attention.o_proj(mixed.transpose(1, 2).flatten(2))
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return decoder.norm(hidden)


def reference_stream(model: Any, ids: Tensor) -> Tensor:
    """Logits (1, T, V) of tokens fed one by one, past the window; (1, T) ids.

    What is local is the first ``attention_sinks`` tokens and the newest ones, at places 0, 1, ...; the rest has moved
    to the memory. Memory layers find the sinks there, too, and in the window only by what they lack there of their full
    weight, where a large memory weighs less.
    """
    config, decoder = model.memory_config, model.model
    kept: list[list[tuple[Tensor, Tensor]]] = [[] for _ in decoder.layers]  # by layer and token
    local: list[int] = []
    moved: list[int] = []
    hiddens = []
    for token in range(ids.shape[1]):
        if len(local) == config.window:
            newest = local[len(local) - config.overflow_keep :]
            moved += [other for other in local if other not in newest and other not in moved]
            local = [*(local[: config.attention_sinks] if config.overflow_keep else []), *newest]
        local.append(token)
        hidden = decoder.embed_tokens(ids[:, token : token + 1])
        for number, layer in enumerate(decoder.layers):
            q, k, v = _project(layer, layer.input_layernorm(hidden))
            kept[number].append((k, v))
            in_memory = moved if number in config.layers else []
            discount = math.log(max(1.0, len(in_memory) / (config.full_weight_tokens or math.inf)))
            places = [place for place, other in enumerate(local) if discount or other not in in_memory]
            lacking = math.log(1 - math.exp(-discount)) if discount else 0.0
            mixed = _attend(
                _turn(model, number, q, [len(local) - 1]),
                _turn(model, number, torch.cat([kept[number][local[place]][0] for place in places], dim=2), places),
                torch.cat([kept[number][local[place]][1] for place in places], dim=2),
                [kept[number][other] for other in in_memory],
                discount,
                torch.tensor([lacking if local[place] in in_memory else 0.0 for place in places]),
            )
            hidden = hidden + layer.self_attn.o_proj(mixed.transpose(1, 2).flatten(2))
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        hiddens.append(decoder.norm(hidden))
    return model.lm_head(torch.cat(hiddens, dim=1))


def _project(layer: Any, normed: Tensor) -> list[Tensor]:
    """Unrotated queries, keys and values (1, heads, T, D)."""
    attention = layer.self_attn
    q, k, v = (
        projection(normed).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    return [attention.q_norm(q), attention.k_norm(k), v] if hasattr(attention, "q_norm") else [q, k, v]


def _turn(model: Any, layer: int, vectors: Tensor, places: list[int]) -> Tensor:
    """Queries or keys (1, heads, T, D) turned by their places, where the layer does that."""
    config = model.memory_config
    if layer in config.layers and not config.mem_positionals:
        return vectors
    cos, sin = model.model.rotary_emb(vectors, position_ids=torch.tensor([places]))
    return apply_rotary_pos_emb(vectors, vectors, cos, sin)[0]


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    memory: list[tuple[Tensor, Tensor]],
    discount: float = 0.0,
    local_bias: Tensor | None = None,
) -> Tensor:
    T, S = q.shape[2], k.shape[2]  # noqa: N806
    bias = torch.zeros(S) if local_bias is None else local_bias
    seen = torch.ones(T, S, dtype=torch.bool).tril(S - T)
    N = sum(old_k.shape[2] for old_k, _ in memory)  # noqa: N806
    k = torch.cat([*(old_k for old_k, _ in memory), k], dim=2)
    v = torch.cat([*(old_v for _, old_v in memory), v], dim=2)
    seen = torch.cat([torch.ones(T, N, dtype=torch.bool), seen], dim=1)
    bias = torch.cat([torch.full((N,), -discount), bias])
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scores = (q @ k.mT) * q.shape[-1] ** -0.5 + bias
    return scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v
