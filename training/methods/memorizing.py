"""Memorizing Transformers (arXiv 2203.08913), the closest ancestor of the Focused Transformer.

In a memory layer a query attends to its window in one softmax and to the k nearest keys in memory in another. A learnt
gate g = sigmoid(b) of each head adds the two, g V_m + (1 - g) V_c (section 3.2). The memory holds earlier windows of
the same document alone, and no gradient reaches its keys and values: the difference that crossbatch makes.

The paper normalises queries and keys. So do models such as Qwen3 on their own; those of others are taken as they are.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from fot.config import MemoryConfig
from fot.families import attention_modules
from training.crossbatch import Crossbatch
from training.groups import Contexts, fold, pick

GATE = "memory_gate"  # the parameter b of an attention module
# Gates in settings are not 0 or 1, whose logits are infinite.
LEAST = 1e-6


def add_gates(model: Any, config: MemoryConfig) -> None:
    """Give each memory layer's attention a parameter b, (H,), at 0: memory and window get half each."""
    for number, attention in enumerate(attention_modules(model)):
        if number in config.layers:
            device = next(attention.parameters()).device
            attention.register_parameter(
                GATE, nn.Parameter(torch.zeros(model.config.num_attention_heads, device=device))
            )


def settings_of(parameters: dict[str, Tensor], config: MemoryConfig) -> dict[str, Any]:
    """Memory settings with the gates of all memory layers; takes their parameters out."""
    found = {name: parameters.pop(name) for name in list(parameters) if name.rpartition(".")[2] == GATE}
    gates = []
    for layer in config.layers:
        (bias,) = (tensor for name, tensor in found.items() if f".{layer}." in name)
        gates.append(bias.float().sigmoid().clamp(LEAST, 1 - LEAST).tolist())
    return {"memory_gates": gates}


class Memorizing(Crossbatch):
    """The switch: what memory layers attend to is a memory, without gradients."""

    def attend(
        self,
        layer: int,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        scale: float,
        learnt_sinks: Tensor | None = None,
    ) -> Tensor:
        """As ``Crossbatch.attend``.

        Raises:
            ValueError: the model has learnt sinks.
        """
        if learnt_sinks is not None:
            raise ValueError("method memorizing has no place for learnt sinks: choose a model without")
        local = attend_window(queries, keys, values, scale)
        if self.contexts is None:
            return local
        at_0 = self.rotary.back(layer, keys.detach(), torch.arange(keys.shape[2], device=keys.device))
        memory = (self.gather(at_0), self.gather(values.detach()))
        assert self.config.top_k is not None, "the recipe was checked"
        gate = getattr(self.modules[layer], GATE)
        return add_memory(queries, local, *memory, self.contexts, gate, top_k=self.config.top_k, scale=scale)


def attend_window(queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """Causal attention to the own window.

    Args:
        queries: (R, H, T, D), rotated.
        keys: (R, G, T, D), rotated.
        values: (R, G, T, D).
        scale: factor on inner products.

    Returns:
        (R, H, T, D).
    """
    repeat = queries.shape[1] // keys.shape[1]
    keys, values = (tensor.repeat_interleave(repeat, dim=1) for tensor in (keys, values))
    return scaled_dot_product_attention(queries, keys, values, is_causal=True, scale=scale)


def add_memory(
    queries: Tensor,
    local: Tensor,
    memory_keys: Tensor,
    memory_values: Tensor,
    contexts: Contexts,
    gate: Tensor,
    *,
    top_k: int,
    scale: float,
) -> Tensor:
    """g V_m + (1 - g) V_c for rows that have a memory; for others the window's own.

    Args:
        queries: (R, H, T, D), rotated.
        local: (R, H, T, D), V_c.
        memory_keys: (C, G, T, D) at position 0, without gradients.
        memory_values: (C, G, T, D), likewise.
        contexts: which of the C rows are in the memory of each of the R rows.
        gate: (H,), b.
        top_k: keys that a query attends to.
        scale: factor on inner products.

    Returns:
        (R, H, T, D), differentiable in queries, local and gate.
    """
    share = gate.float().sigmoid().view(-1, 1, 1)
    output = local
    for group in contexts.groups(queries.device):
        rows = group.rows
        keys, values = pick(memory_keys, group.chosen), pick(memory_values, group.chosen)  # (r, G, M * T, D)
        scores = scale * (fold(queries[rows], keys.shape[1]).float() @ keys.float().mT)  # (r, G, H / G * T, M * T)
        if (bias := group.bias(queries, contexts.full_weight_tokens, 0)) is not None:
            scores = scores + bias
        best, where = scores.topk(min(top_k, scores.shape[-1]))
        weights = torch.zeros_like(scores).scatter(-1, where, best.softmax(-1))
        found = (weights @ values.float()).reshape(len(rows), *local.shape[1:])
        mixed = share * found + (1 - share) * local[rows].float()
        output = output.index_copy(0, rows, mixed.to(local.dtype))
    return output
