"""Fused attention kernels that return their log-sum-exp, and which of them takes what.

torch's public ``scaled_dot_product_attention`` returns no log-sum-exp; the operators behind it do, but leave to the
caller what the public function does for them: padding, and the choice of one that this device has.

| device | dtypes | kernel |
| --- | --- | --- |
| CPU | float32, bfloat16, float16 | flash for the CPU |
| CUDA 8.0 (Ampere) and newer, no mask, head size up to 256 | bfloat16, float16 | flash |
| CUDA 8.0 and newer, else | float32, bfloat16, float16 | memory-efficient |
| CUDA 5.0 to 7.5 | float32, float16 | memory-efficient |
| anything else, and wherever gradients are wanted | all | none: ``memory.softmax`` computes it in slices |
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
AMPERE = (8, 0)
OLDEST = (5, 0)


def choose(device: str, capability: tuple[int, int], dtype: torch.dtype, head_dim: int, masked: bool) -> str | None:
    """The kernel for this, ``cpu``, ``flash`` or ``efficient``; None if there is none.

    Args:
        device: type of the device, such as ``cuda``.
        capability: of a CUDA device, (major, minor).
        dtype: of queries, keys and values.
        head_dim: D.
        masked: whether there is a mask besides a causal one.
    """
    if device == "cpu":
        return "cpu" if dtype in (torch.float32, *HALF) else None
    if device != "cuda" or capability < OLDEST or dtype not in (torch.float32, *HALF):
        return None
    if capability < AMPERE:
        return None if dtype == torch.bfloat16 else "efficient"
    if dtype in HALF and not masked and head_dim <= FLASH_LARGEST:
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
        keys: (B, H, N, D).
        values: likewise.
        scale: factor on inner products.
        causal: query t sees keys 0..t.
        bias: added to the scores, broadcastable to (B, H, T, N), in the dtype of ``queries``; None for nothing.

    Returns:
        output (B, H, T, D), log-sum-exp (B, H, T) float32.
    """
    return _KERNELS[kernel](queries, keys, values, scale, causal, bias)


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
    if bias is not None:
        (batch, heads, rows, _), count = queries.shape, keys.shape[2]
        wide = pad(bias.expand(batch, heads, rows, count), (0, -count % EFFICIENT_BIAS))
        bias = wide[..., :count]
    output, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
        *padded, bias, True, 0.0, causal, scale=scale
    )
    # Its log-sum-exp is padded to a multiple of 32 queries.
    return output[..., : values.shape[-1]], lse[..., : queries.shape[2]].float()


def _padded(multiple: int, *tensors: Tensor) -> list[Tensor]:
    more = -tensors[0].shape[-1] % multiple
    return [pad(tensor, (0, more)) if more else tensor for tensor in tensors]


_KERNELS: dict[str, Any] = {"cpu": _cpu, "flash": _flash, "efficient": _efficient}
