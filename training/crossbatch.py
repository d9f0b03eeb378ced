"""Crossbatch: memory layers attend to other windows of the batch, differentiably (arXiv 2307.03170, section 3.2).

A batch is R windows, each a row. In a memory layer a row attends, in one softmax, causally to itself and fully to the
unrotated keys and values of the rows chosen for it: earlier windows of its own document (positives) and windows of
other documents (negatives). All other layers see their own window alone. That is what the layer does at inference
with those windows in its memory, except that gradients reach their keys and values.

    crossbatch = enable_crossbatch(model, config)
    crossbatch.contexts = choose_contexts(...)          # for this batch
    hidden = model.base_model(input_ids=rows, use_cache=False).last_hidden_state
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.hooks import RemovableHandle

from fot.attention import CONTEXT, PREFIX, with_sinks
from fot.config import MemoryConfig
from fot.families import attention_modules
from fot.implementation import set_attention
from fot.model import without_positions
from fot.rotary import Rotary, rotary_of
from memory import attend, merge
from memory.softmax import fused_backward, fused_backward_fits
from training.focus import focus_loss
from training.groups import Contexts, fold, pick, slices_of

Gather = Callable[[Tensor], Tensor]


@dataclass
class Crossbatch:
    """Switch between batches; made by ``enable_crossbatch``.

    Attributes:
        contexts: for the next forward pass and its backward pass; None: every window on its own. On several processes
            all have contexts, if only of none of their rows, or none has: whoever has them gathers.
        rotary: of the model; without positions in memory layers if they use none.
        gather: (R, G, T, D) of this process -> (C, G, T, D) of all, differentiably.
        attention_mass: if a list, memory layers append (layer, (R, M) share of attention that each chosen row got).
        focus: if a list, memory layers append the loss of ``training.focus`` where contexts ask for it.
        warned: it has been said that there are no negatives.
        modules: attention modules of the memory layers.
        hooks: handles of what hands this to the memory layers.
        before: the model's attention implementation before.
    """

    config: MemoryConfig
    rotary: Rotary
    before: str
    contexts: Contexts | None = None
    gather: Gather = field(default=lambda tensor: gather_from_all(tensor))
    attention_mass: list[tuple[int, list[Tensor]]] | None = None
    focus: list[Tensor] | None = None
    warned: bool = False
    modules: dict[int, Any] = field(default_factory=dict)
    hooks: list[RemovableHandle] = field(default_factory=list)

    @property
    def memory_layers(self) -> tuple[int, ...]:
        """Layers in which ``attend`` takes the place of the model's attention."""
        return self.config.layers

    def attend(
        self,
        layer: int,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        scale: float,
        learnt_sinks: Tensor | None = None,
    ) -> Tensor:
        """One memory layer's attention over the batch.

        Args:
            layer: its index.
            queries: (R, H, T, D), rotated; rows start at position 0.
            keys: (R, G, T, D), rotated.
            values: likewise.
            scale: factor on inner products.
            learnt_sinks: (H,), see ``fot.attention.with_sinks``.

        Returns:
            (R, H, T, D).
        """
        contexts = self.contexts
        if contexts is None:
            candidates = (keys[:0], values[:0])
            contexts = Contexts([torch.empty(0, dtype=torch.int64, device=keys.device)] * len(keys))
        else:
            full, newest = self.config.full_weight_tokens or 0, self.config.newest_full_weight
            if (contexts.full_weight_tokens, contexts.newest_full_weight) != (full, newest):  # once: groups are kept
                contexts = replace(contexts, full_weight_tokens=full, newest_full_weight=newest)
                self.contexts = contexts
            at_0 = self.rotary.back(layer, keys, torch.arange(keys.shape[2], device=keys.device))
            candidates = (self.gather(at_0), self.gather(values))
        if self.attention_mass is not None:
            mass = context_mass(queries, keys, candidates[0], contexts, scale=scale, learnt_sinks=learnt_sinks)
            self.attention_mass.append((layer, mass))
        if contexts.asked is not None:  # also where gradient checkpointing recomputes a layer, and nobody collects it
            found = focus_loss(queries, candidates[0], contexts, scale=scale)
            if found is not None and self.focus is not None:
                self.focus.append(found)
        return attend_batch(queries, keys, values, *candidates, contexts, scale=scale, learnt_sinks=learnt_sinks)

    @contextmanager
    def collecting(self) -> Iterator[list[Tensor]]:
        """The losses of ``training.focus`` of the memory layers that run within."""
        found: list[Tensor] = []
        self.focus = found
        try:
            yield found
        finally:
            self.focus = None


def enable_crossbatch(model: Any, config: MemoryConfig, kind: type[Crossbatch] = Crossbatch) -> Crossbatch:
    """Let the memory layers of a Hugging Face model see the windows chosen for each row, in place.

    Args:
        model: a causal language model of a supported family, with or without memory attached.
        config: resolved memory settings; ``mem_layers`` and ``mem_positionals`` matter.
        kind: of the switch.

    Returns:
        the switch. ``disable_crossbatch`` undoes it.
    """
    without = () if config.mem_positionals else config.layers
    crossbatch = kind(config, rotary_of(model, without), model.config._attn_implementation)
    if not crossbatch.before.startswith(PREFIX):
        set_attention(model, PREFIX + crossbatch.before)
    for number, attention in enumerate(attention_modules(model)):
        if number in config.layers:
            crossbatch.modules[number] = attention
            handle = attention.register_forward_pre_hook(partial(_hand_over, crossbatch), with_kwargs=True)
            crossbatch.hooks.append(handle)
            if not config.mem_positionals:
                crossbatch.hooks.append(attention.register_forward_pre_hook(without_positions, with_kwargs=True))
    return crossbatch


def disable_crossbatch(model: Any, crossbatch: Crossbatch) -> None:
    """Undo ``enable_crossbatch``."""
    for handle in crossbatch.hooks:
        handle.remove()
    set_attention(model, crossbatch.before)


def _hand_over(
    crossbatch: Crossbatch, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    return args, kwargs | {CONTEXT: crossbatch}


def attend_batch(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    context_keys: Tensor,
    context_values: Tensor,
    contexts: Contexts,
    *,
    scale: float,
    learnt_sinks: Tensor | None = None,
) -> Tensor:
    """Causal attention to the own window and full attention to the chosen rows, in one softmax.

    Keeps nothing of size queries x keys for the backward pass: a fused kernel, or recomputation where there is none.

    Args:
        queries: (R, H, T, D).
        keys: (R, G, T, D) rotated.
        values: (R, G, T, D).
        context_keys: (C, G, T, D) at position 0.
        context_values: (C, G, T, D).
        contexts: which of the C rows each of the R rows sees.
        scale: factor on inner products.
        learnt_sinks: (H,), see ``fot.attention.with_sinks``; None for none.

    Returns:
        (R, H, T, D), differentiable in all tensors.
    """
    tensors = (queries, keys, values, context_keys, context_values)
    if fused_backward_fits(queries):
        return _FusedCrossbatch.apply(*tensors, contexts, scale, learnt_sinks)
    if torch.is_grad_enabled():
        output = checkpoint(_attend_in_parts, *tensors, contexts, scale, learnt_sinks, use_reentrant=False)[0]
        # Rows of other processes may have been gathered, and their backward pass waits for this process's part.
        return _TakePart.apply(output, context_keys, context_values)
    return _attend_in_parts(*tensors, contexts, scale, learnt_sinks)[0]


def gather_from_all(tensor: Tensor) -> Tensor:
    """Rows of every process, in the order of ranks; gradients flow back to the process that a row came from."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return tensor
    return _GatherFromAll.apply(tensor)


def context_mass(
    queries: Tensor,
    keys: Tensor,
    context_keys: Tensor,
    contexts: Contexts,
    *,
    scale: float,
    learnt_sinks: Tensor | None = None,
) -> list[Tensor]:
    """Share of a row's attention that each of its chosen rows got, averaged over heads and queries; each counted once.

    Returns:
        for each row, (M,) float32; the rest of 1 stayed in the own window, or went to the learnt sinks.
    """
    with torch.no_grad():
        _, local_lse = with_sinks(*attend(queries, keys, keys, scale=scale, causal=True), learnt_sinks)
        shares = []
        for row, chosen in enumerate(contexts.rows):
            lses = [local_lse[row]]
            for other in chosen:
                one = context_keys[other][None]
                lses.append(attend(queries[row : row + 1], one, one, scale=scale)[1][0])
            shares.append(torch.stack(lses).softmax(0)[1:].flatten(1).mean(1))
        return shares


class _GatherFromAll(torch.autograd.Function):
    """(R, ...) of each process -> (processes * R, ...); the backward pass, too, takes all processes at once."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        gathered = tensor.new_empty(dist.get_world_size() * len(tensor), *tensor.shape[1:])
        dist.all_gather_into_tensor(gathered, tensor.contiguous())
        return gathered

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        grad, rows = grads[0].contiguous(), len(grads[0]) // dist.get_world_size()
        if dist.get_backend() == dist.Backend.GLOO:  # has no sum of which each process gets its part alone
            total = grad.clone()
            dist.all_reduce(total)
            return total[dist.get_rank() * rows :][:rows]
        mine = grad.new_empty(rows, *grad.shape[1:])
        dist.reduce_scatter_tensor(mine, grad)
        return mine


class _TakePart(torch.autograd.Function):
    """The output as it is, and a gradient of 0 for each candidate, which may have had no part in it."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, *candidates: Tensor) -> Tensor:
        ctx.candidates = [(tensor.shape, tensor.dtype, tensor.device) for tensor in candidates]
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        zeros = [torch.zeros((), dtype=dtype, device=device).expand(shape) for shape, dtype, device in ctx.candidates]
        return grads[0], *zeros


class _FusedCrossbatch(torch.autograd.Function):
    """``_attend_in_parts`` by fused kernels.

    The kernels' backward pass recomputes ``p = exp(s q.k - lse)`` from the log-sum-exp it is given. Given that of the
    merged softmax, and the merged output, it yields the gradients of one part of the joint softmax; so each part is
    done on its own, and the queries' gradients add up.
    """

    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        context_keys: Tensor,
        context_values: Tensor,
        contexts: Contexts,
        scale: float,
        learnt_sinks: Tensor | None,
    ) -> Tensor:
        tensors = (queries, keys, values, context_keys, context_values)
        with torch.no_grad():
            output, lse = _attend_in_parts(*tensors, contexts, scale, learnt_sinks)
        ctx.save_for_backward(*tensors, output, lse, learnt_sinks)
        ctx.contexts, ctx.scale = contexts, scale
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        queries, keys, values, context_keys, context_values, output, lse, learnt_sinks = ctx.saved_tensors
        scale = ctx.scale
        grad = grads[0].contiguous()
        heads = keys.shape[1]
        grad_q, grad_k, grad_v = fused_backward(
            grad, queries, keys, values, output, lse, causal=True, bias=None, scale=scale
        )
        grad_q = grad_q.float()
        # float32: many rows add to one candidate
        grad_ck, grad_cv = (torch.zeros_like(tensor, dtype=torch.float32) for tensor in (context_keys, context_values))
        for group in slices_of(ctx.contexts, context_keys):
            rows, chosen = group.rows, group.chosen
            part_q, part_k, part_v = fused_backward(
                fold(grad[rows], heads),
                fold(queries[rows], heads),
                pick(context_keys, chosen),
                pick(context_values, chosen),
                fold(output[rows], heads),
                lse[rows].reshape(len(rows), heads, -1),
                causal=False,
                bias=group.bias(queries, ctx.contexts.full_weight_tokens, ctx.contexts.newest_full_weight),
                scale=scale,
            )
            grad_q.index_add_(0, rows, part_q.reshape(len(rows), *queries.shape[1:]).float())
            for total, part in ((grad_ck, part_k), (grad_cv, part_v)):
                split = part.unflatten(2, (chosen.shape[1], -1)).transpose(1, 2)  # (r, M, G, T, D)
                total.index_add_(0, chosen.flatten(), split.flatten(0, 1).float())
        return (
            grad_q.to(queries.dtype),
            grad_k,
            grad_v,
            grad_ck.to(context_keys.dtype),
            grad_cv.to(context_values.dtype),
            None,
            None,
            None if learnt_sinks is None else _sinks_gradient(grad, output, lse, learnt_sinks),
        )


def _sinks_gradient(grad: Tensor, output: Tensor, lse: Tensor, learnt_sinks: Tensor) -> Tensor:
    """(H,): a sink is a part of the softmax whose value is zero, so its score's gradient is -p (grad . output)."""
    share = (learnt_sinks.float().unsqueeze(-1) - lse).exp()  # (R, H, T)
    return -(share * (grad.float() * output.float()).sum(-1)).sum((0, 2)).to(learnt_sinks.dtype)


def _attend_in_parts(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    context_keys: Tensor,
    context_values: Tensor,
    contexts: Contexts,
    scale: float,
    learnt_sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Output (R, H, T, D) and log-sum-exp (R, H, T) of the joint softmax."""
    heads = keys.shape[1]
    output, lse = with_sinks(*attend(queries, keys, values, scale=scale, causal=True), learnt_sinks)
    found = []
    for group in slices_of(contexts, context_keys):
        rows = group.rows
        picked = [pick(tensor, group.chosen) for tensor in (context_keys, context_values)]
        bias = group.bias(queries, contexts.full_weight_tokens, contexts.newest_full_weight)
        part = attend(fold(queries[rows], heads), *picked, scale=scale, mask=bias)
        there = (part[0].reshape(len(rows), *queries.shape[1:]), part[1].reshape(len(rows), *lse.shape[1:]))
        found.append((rows, *merge([(output[rows], lse[rows]), there])))
    if not found:
        return output, lse
    rows, outputs, lses = (torch.cat(parts) for parts in zip(*found, strict=True))
    return output.index_copy(0, rows, outputs), lse.index_copy(0, rows, lses)
