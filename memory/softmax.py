"""Softmax attention that can be taken in parts: each part returns its output and its log-sum-exp.

The output over the union of two key sets is the average of the two outputs, weighted by ``exp(lse)``
(``merge``). That is how memory keys and local keys share one softmax (arXiv 2307.03170, section 3.1) while
each part keeps the kernel that suits it, and how a memory of any length is attended to block by block.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from memory import kernels

# Scores of one naive step: 2**22 float32 numbers are 16 MiB, which stays in a CPU's outer cache.
NAIVE_SCORES = 1 << 22


def attend(
    queries: Tensor, keys: Tensor, values: Tensor, *, scale: float, causal: bool = False, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Softmax attention with its log-sum-exp, by a fused kernel where one can be used.

    Args:
        queries: (B, H, T, D) float.
        keys: (B, G, N, D), each for H / G query heads in a row; dtype and device of ``queries``.
        values: (B, G, N, D), likewise.
        scale: factor on inner products, normally ``head_dim**-0.5``.
        causal: query t sees keys 0..t; needs T == N and no ``mask``.
        mask: broadcastable to (B, H, T, N); bool, True where a query sees a key; or float, added to the scores.
            Each query must see a key.

    Returns:
        output (B, H, T, D) in the dtype of ``queries``, log-sum-exp (B, H, T) float32. Differentiable in
        queries, keys and values where autograd is on.
    """
    grad = torch.is_grad_enabled() and (queries.requires_grad or keys.requires_grad or values.requires_grad)
    # The backward pass takes a column more; see _FusedAttention.
    kernel = _fused_kernel(queries, queries.shape[-1] + grad, mask is not None, grad)
    if kernel is None:
        keys, values = kernels.repeated(queries, keys), kernels.repeated(queries, values)
        return _attend_naive(queries, keys, values, scale, causal, mask)
    bias = None if mask is None else _as_bias(mask, queries.dtype)
    if grad:
        return _FusedAttention.apply(queries, keys, values, bias, scale, causal, kernel)
    return kernels.run(kernel, queries, keys, values, scale=scale, causal=causal, bias=bias)


def merge(parts: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Attention over the union of disjoint key sets, from the attention over each.

    With ``o_i`` and ``l_i`` the output and log-sum-exp over set i, the result is
    ``sum_i exp(l_i - l) o_i`` with ``l = logsumexp_i l_i``: the same numbers as one softmax over everything.

    Args:
        parts: (output (..., T, D), log-sum-exp (..., T)) of each set; at least one.

    Returns:
        output in the dtype of the first part, log-sum-exp float32.
    """
    iterator = iter(parts)
    output, lse = next(iterator)
    dtype = output.dtype
    for other, other_lse in iterator:
        total = torch.logaddexp(lse, other_lse)
        # float32: the weights of many small parts would be lost in bfloat16 sums.
        weight, other_weight = (lse - total).exp(), (other_lse - total).exp()
        output = weight.unsqueeze(-1) * output.float() + other_weight.unsqueeze(-1) * other.float()
        lse = total
    return output.to(dtype), lse


class _FusedAttention(torch.autograd.Function):
    """A fused kernel with gradients of its log-sum-exp, too, for which the kernels have no input.

    With P the weights and g the gradient of the log-sum-exp, the scores' gradient is ``P (grad . v - delta + g)``,
    where the kernels take delta as ``grad . output``. A column more, in which grad is g, values are 0 and output is -1,
    makes ``delta - g`` of it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        bias: Tensor | None,
        scale: float,
        causal: bool,
        kernel: str,
    ) -> tuple[Tensor, Tensor]:
        output, lse = kernels.run(kernel, queries, keys, values, scale=scale, causal=causal, bias=bias)
        ctx.save_for_backward(queries, keys, values, bias, output, lse)
        ctx.settings = {"scale": scale, "causal": causal}
        ctx.kernel = kernel
        return output, lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        queries, keys, values, bias, output, lse = ctx.saved_tensors
        if ctx.needs_input_grad[3]:
            raise NotImplementedError("attention has no gradient for a mask that is added to the scores")
        size = queries.shape[-1]
        grad = torch.cat([grads[0], grads[1].unsqueeze(-1).to(grads[0].dtype)], -1)
        output = pad(output, (0, 1), value=-1.0)
        queries, keys, values = (pad(tensor, (0, 1)) for tensor in (queries, keys, values))
        found = kernels.backward(ctx.kernel, grad, queries, keys, values, output, lse, bias=bias, **ctx.settings)
        return *(tensor[..., :size] for tensor in found), None, None, None, None


def fused_backward_fits(queries: Tensor) -> bool:
    """Whether ``fused_backward`` can be used for tensors like this one, whatever the mask."""
    return all(_fused_kernel(queries, queries.shape[-1], masked, True) for masked in (False, True))


def fused_backward(
    grad: Tensor,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    output: Tensor,
    lse: Tensor,
    *,
    causal: bool,
    bias: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of softmax attention, or of one part of it, without a queries x keys tensor.

    Given the output and log-sum-exp of a merged softmax, these are the gradients through this part's keys and values,
    and this part's share of the queries' gradient.

    Args:
        grad: (B, H, T, D), of the merged output.
        queries: (B, H, T, D).
        keys: (B, G, N, D) of this part, each for H / G query heads in a row.
        values: (B, H, N, D), likewise.
        output: (B, H, T, D), merged.
        lse: (B, H, T) float32, merged.
        causal: as in ``attend``.
        bias: added to the scores, broadcastable to (B, H, T, N); None for nothing.
        scale: factor on inner products.

    Returns:
        gradients of queries, keys and values.
    """
    kernel = _fused_kernel(queries, queries.shape[-1], bias is not None, True)
    assert kernel is not None, "fused_backward_fits() comes first"
    return kernels.backward(kernel, grad, queries, keys, values, output, lse, scale=scale, causal=causal, bias=bias)


def _fused_kernel(queries: Tensor, head_dim: int, masked: bool, grad: bool) -> str | None:
    device = queries.device
    return kernels.choose(device.type, kernels.capability_of(device), queries.dtype, head_dim, masked, grad)


def _attend_naive(
    queries: Tensor, keys: Tensor, values: Tensor, scale: float, causal: bool, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    B, H, T, _ = queries.shape  # noqa: N806
    N = keys.shape[2]  # noqa: N806
    if causal:
        mask = torch.ones(T, N, dtype=torch.bool, device=queries.device).tril()
    mask = None if mask is None else mask.expand(B, H, T, N)
    rows = max(1, NAIVE_SCORES // max(1, B * H * N))
    outputs, lses = [], []
    for start in range(0, T, rows):
        # float32: bfloat16 logits would let rounding decide between near-equal keys.
        scores = scale * (queries[:, :, start : start + rows].float() @ keys.float().mT)  # (B, H, rows, N)
        if mask is not None:
            scores = scores + _as_bias(mask[:, :, start : start + rows], torch.float32)
        lse = scores.logsumexp(-1)
        outputs.append(((scores - lse.unsqueeze(-1)).exp() @ values.float()).to(queries.dtype))
        lses.append(lse)
    return torch.cat(outputs, dim=2), torch.cat(lses, dim=2)


def _as_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -torch.inf)
