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


def reference_stream(model: Any, ids: Tensor, given: Any = None) -> Tensor:
    """Logits (1, T, V) of tokens fed one by one, past the window; (1, T) ids, and perhaps a memory of other texts.

    What is local is the first ``attention_sinks`` tokens and the newest ones, at places 0, 1, ...; the rest has moved
    to the memory. Memory layers find the sinks there, too, and in the window only by what they lack there of their full
    weight, where a large memory weighs less. The newest tokens of a large memory weigh no less.
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
            stored = _pairs(given, number) + [kept[number][other] for other in in_memory]
            full, newest = config.full_weight_tokens or math.inf, config.newest_full_weight
            weight = (full - newest) / (len(stored) - newest) if len(stored) > full else 1.0
            all_weights = [weight] * max(0, len(stored) - newest) + [1.0] * min(newest, len(stored))
            weights = dict(zip(in_memory, all_weights[len(stored) - len(in_memory) :], strict=True))
            places = [place for place, other in enumerate(local) if weights.get(other, 0.0) < 1]
            mixed = _attend(
                _turn(model, number, q, [len(local) - 1]),
                _turn(model, number, torch.cat([kept[number][local[place]][0] for place in places], dim=2), places),
                torch.cat([kept[number][local[place]][1] for place in places], dim=2),
                stored,
                [math.log(one) for one in all_weights],
                torch.tensor([math.log(1 - weights.get(local[place], 0.0)) for place in places]),
            )
            hidden = hidden + layer.self_attn.o_proj(mixed.transpose(1, 2).flatten(2))
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        hiddens.append(decoder.norm(hidden))
    return model.lm_head(torch.cat(hiddens, dim=1))


def _pairs(memory: Any, layer: int) -> list[tuple[Tensor, Tensor]]:
    """Keys and values (1, G, 1, D) of each token of a memory, if this layer has any."""
    if memory is None or layer not in memory.layers:
        return []
    keys, values = (vectors.unsqueeze(0).split(1, dim=2) for vectors in (memory[layer].keys(), memory[layer].values()))
    return list(zip(keys, values, strict=True))


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
    memory_bias: list[float] | None = None,
    local_bias: Tensor | None = None,
) -> Tensor:
    T, S = q.shape[2], k.shape[2]  # noqa: N806
    bias = torch.zeros(S) if local_bias is None else local_bias
    seen = torch.ones(T, S, dtype=torch.bool).tril(S - T)
    sizes = [old_k.shape[2] for old_k, _ in memory]
    biases = memory_bias or [0.0] * len(memory)
    k = torch.cat([*(old_k for old_k, _ in memory), k], dim=2)
    v = torch.cat([*(old_v for _, old_v in memory), v], dim=2)
    seen = torch.cat([torch.ones(T, sum(sizes), dtype=torch.bool), seen], dim=1)
    bias = torch.cat([*(torch.full((size,), one) for size, one in zip(sizes, biases, strict=True)), bias])
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scores = (q @ k.mT) * q.shape[-1] ** -0.5 + bias
    return scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v
