"""Fused attention kernels that return their log-sum-exp, and which of them takes what.

torch's public ``scaled_dot_product_attention`` returns no log-sum-exp; the operators behind it do, but leave to the
caller what the public function does for them: padding, and the choice of one that this device has.

| device | dtypes | kernel |
| --- | --- | --- |
| CPU | float32, bfloat16, float16 | flash for the CPU |
| CUDA 8.0 (Ampere) and newer, no mask, head size up to 256 | bfloat16, float16 | flash |
| CUDA 8.0 and newer, else | float32, bfloat16, float16 | memory-efficient |
| CUDA 5.0 to 7.5 | float32, float16 | memory-efficient |
| anything else | all | none: ``memory.softmax`` computes it in slices |

Each has a backward pass, which recomputes the scores from the log-sum-exp. Flash's takes head sizes above 192 only on
some GPUs, so there the memory-efficient one is chosen where gradients are wanted. Flash and its backward pass take
fewer KV heads than query heads; for the others keys and values are repeated.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

Attended = tuple[Tensor, Tensor]

HALF = (torch.bfloat16, torch.float16)
FLASH_MULTIPLE = 8  # of its head size, in elements
FLASH_LARGEST = 256
EFFICIENT_BYTES = 16  # its head size is a multiple of so many bytes
EFFICIENT_BIAS = 16  # rows of its bias begin at a multiple of so many elements
FLASH_LARGEST_GRAD = 192  # where the backward pass lacks shared memory for more
SMALL_SHARED_MEMORY = ((8, 6), (8, 7), (8, 9), (12, 0), (12, 1))
EFFICIENT_LSE = 32  # its log-sum-exp is padded to a multiple of so many queries
AMPERE = (8, 0)
OLDEST = (5, 0)


def choose(
    device: str, capability: tuple[int, int], dtype: torch.dtype, head_dim: int, masked: bool, grad: bool = False
) -> str | None:
    """The kernel for this, ``cpu``, ``flash`` or ``efficient``; None if there is none.

    Args:
        device: type of the device, such as ``cuda``.
        capability: of a CUDA device, (major, minor).
        dtype: of queries, keys and values.
        head_dim: D.
        masked: whether there is a mask besides a causal one.
        grad: whether the backward pass is wanted, too.
    """
    if device == "cpu":
        return "cpu" if dtype in (torch.float32, *HALF) else None
    if device != "cuda" or capability < OLDEST or dtype not in (torch.float32, *HALF):
        return None
    if capability < AMPERE:
        return None if dtype == torch.bfloat16 else "efficient"
    largest = FLASH_LARGEST_GRAD if grad and capability in SMALL_SHARED_MEMORY else FLASH_LARGEST
    if dtype in HALF and not masked and head_dim <= largest:
        return "flash"
    return "efficient"


def capability_of(device: torch.device) -> tuple[int, int]:
    """(major, minor) of a CUDA device; (0, 0) of another."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" and torch.version.cuda else (0, 0)


def run(
    kernel: str, queries: Tensor, keys: Tensor, values: Tensor, *, scale: float, causal: bool, bias: Tensor | None
) -> Attended:
    """Attention by one kernel.

    Args:
        kernel: as ``choose`` names it.
        queries: (B, H, T, D).
        keys: (B, G, N, D), each for H / G query heads in a row.
        values: likewise.
        scale: factor on inner products.
        causal: query t sees keys 0..t.
        bias: added to the scores, broadcastable to (B, H, T, N), in the dtype of ``queries``; None for nothing.

    Returns:
        output (B, H, T, D), log-sum-exp (B, H, T) float32.
    """
    if kernel != "flash":
        keys, values = repeated(queries, keys), repeated(queries, values)
    return _FORWARD[kernel](queries, keys, values, scale, causal, bias)


def backward(
    kernel: str,
    grad: Tensor,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    output: Tensor,
    lse: Tensor,
    *,
    scale: float,
    causal: bool,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values by one kernel.

    Args:
        kernel: as ``choose`` names it with ``grad``.
        grad: (B, H, T, D), of the output.
        queries, keys, values, scale, causal, bias: as for ``run``.
        output: (B, H, T, D). With the log-sum-exp of a softmax over more keys than these, and its output, the
            gradients are this part's of that softmax.
        lse: (B, H, T) float32.
    """
    heads = keys.shape[1]
    if kernel != "flash":
        keys, values = repeated(queries, keys), repeated(queries, values)
    tensors = (grad, queries, keys, values, output, lse.contiguous())
    grad_q, grad_k, grad_v = _BACKWARD[kernel](*tensors, scale, causal, bias)
    if grad_k.shape[1] != heads:
        grad_k, grad_v = (tensor.unflatten(1, (heads, -1)).sum(2) for tensor in (grad_k, grad_v))
    return grad_q, grad_k, grad_v


def repeated(queries: Tensor, keys: Tensor) -> Tensor:
    """Keys or values with as many heads as there are query heads: (B, G, N, D) -> (B, H, N, D)."""
    group = queries.shape[1] // keys.shape[1]
    return keys if group == 1 else keys.repeat_interleave(group, dim=1)


def _cpu(queries: Tensor, keys: Tensor, values: Tensor, scale: float, causal: bool, bias: Tensor | None) -> Attended:
    # This operator broadcasts size-1 dimensions of a 4-D mask.
    output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        queries, keys, values, 0.0, causal, attn_mask=bias, scale=scale
    )
    return output, lse.float()


def _flash(queries: Tensor, keys: Tensor, values: Tensor, scale: float, causal: bool, bias: Tensor | None) -> Attended:
    # Zeros behind keys and queries add nothing to inner products; ``scale`` is that of the true head size.
    padded = _padded(FLASH_MULTIPLE, queries, keys, values)
    output, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(*padded, 0.0, causal, False, scale=scale)
    return output[..., : values.shape[-1]], lse[..., : queries.shape[2]].float()


def _efficient(
    queries: Tensor, keys: Tensor, values: Tensor, scale: float, causal: bool, bias: Tensor | None
) -> Attended:
    padded = _padded(EFFICIENT_BYTES // queries.element_size(), queries, keys, values)
    output, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
        *padded, _aligned(bias, queries, keys), True, 0.0, causal, scale=scale
    )
    return output[..., : values.shape[-1]], lse[..., : queries.shape[2]].float()


def _cpu_backward(
    grad: Tensor, queries: Tensor, keys: Tensor, values: Tensor, output: Tensor, lse: Tensor,
    scale: float, causal: bool, bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, queries, keys, values, output, lse, 0.0, causal, attn_mask=bias, scale=scale
    )


def _flash_backward(
    grad: Tensor, queries: Tensor, keys: Tensor, values: Tensor, output: Tensor, lse: Tensor,
    scale: float, causal: bool, bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    size = queries.shape[-1]
    grad, queries, keys, values, output = _padded(FLASH_MULTIPLE, grad, queries, keys, values, output)
    unused = torch.empty(2, dtype=torch.int64, device=queries.device)  # the state of dropout, of which there is none
    found = torch.ops.aten._scaled_dot_product_flash_attention_backward(
        grad, queries, keys, values, output, lse, None, None, queries.shape[2], keys.shape[2], 0.0, causal, unused,
        unused, scale=scale,
    )  # fmt: skip
    return tuple(tensor[..., :size] for tensor in found)


def _efficient_backward(
    grad: Tensor, queries: Tensor, keys: Tensor, values: Tensor, output: Tensor, lse: Tensor,
    scale: float, causal: bool, bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    size = queries.shape[-1]
    multiple = EFFICIENT_BYTES // queries.element_size()
    padded = _padded(multiple, grad, queries, keys, values)
    (output,) = _padded(multiple, output)
    # In 16 bits the kernel computes grad . output itself and takes (B, T, H, D) for granted, without an error.
    output = output.transpose(1, 2).contiguous().transpose(1, 2)
    # Infinity: these queries are none, and their weights are 0.
    lse = pad(lse, (0, -lse.shape[2] % EFFICIENT_LSE), value=torch.inf)
    unused = torch.empty((), dtype=torch.int64, device=queries.device)
    found = torch.ops.aten._scaled_dot_product_efficient_attention_backward(
        *padded, _aligned(bias, queries, keys), output, lse, unused, unused, 0.0, [True, True, True, False], causal,
        scale=scale,
    )  # fmt: skip
    return tuple(tensor[..., :size] for tensor in found[:3])


def _aligned(bias: Tensor | None, queries: Tensor, keys: Tensor) -> Tensor | None:
    """A bias whose rows begin where the memory-efficient kernel wants them; what is broadcast stays so."""
    if bias is None:
        return None
    (batch, heads, rows, _), count = queries.shape, keys.shape[2]
    bias = pad(bias.expand(*bias.shape[:-1], count), (0, -count % EFFICIENT_BIAS))[..., :count]
    return bias.expand(batch, heads, rows, count)


def _padded(multiple: int, *tensors: Tensor) -> list[Tensor]:
    """Tensors whose head size is a multiple, and in which the numbers of a head lie side by side."""
    more = -tensors[0].shape[-1] % multiple
    wide = [pad(tensor, (0, more)) if more else tensor for tensor in tensors]
    return [tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in wide]


_FORWARD: dict[str, Any] = {"cpu": _cpu, "flash": _flash, "efficient": _efficient}
_BACKWARD: dict[str, Any] = {"cpu": _cpu_backward, "flash": _flash_backward, "efficient": _efficient_backward}
