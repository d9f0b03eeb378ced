"""LongLoRA (arXiv 2309.12307): attention within groups while training, full attention while reading.

A sequence of T tokens has four groups of G = T / 4. The first half of the heads attends within the groups 0..G-1,
G..2G-1, ...; the other half within groups that begin half a group earlier, so that what a group knows reaches the next
one. The authors roll the second half's tokens by G / 2, which would put the end of a text before its beginning in one
group; here, as in their kernel for sequences of many lengths, the two ends are groups of G / 2 of their own.

Attention in groups trains low-rank matrices well only if embeddings and norms are trained, too.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

GROUPS = 4
NAME = "shifted_sparse"  # of the attention implementation
TRAINS = ("embed", "norm")  # parts of names, as in the authors' code


def shifted_sparse(
    module: Any,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """What transformers calls in every layer: groups in training, ``sdpa`` otherwise.

    Args:
        module: the attention module.
        queries: (B, H, T, D), rotated.
        keys: (B, G, S, D), rotated.
        values: likewise.
        attention_mask: None in training.
        scaling: factor on inner products; None: D**-0.5.
        kwargs: of ``sdpa``.

    Returns:
        (B, T, H, D), and no weights.

    Raises:
        ValueError: in training: padding, or a length that has no four groups of two halves.
    """
    if not module.training:
        return sdpa_attention_forward(module, queries, keys, values, attention_mask, scaling=scaling, **kwargs)
    if attention_mask is not None:
        raise ValueError("shifted sparse attention trains on whole sequences: give no attention_mask")
    heads, length = queries.shape[1], queries.shape[2]
    repeat = heads // keys.shape[1]
    queries = queries.to(values.dtype)  # under autocast rotations leave float32
    keys, values = keys.to(values.dtype).repeat_interleave(repeat, dim=1), values.repeat_interleave(repeat, dim=1)
    halves = []
    for half, shift in ((slice(heads // 2), False), (slice(heads // 2, None), True)):
        groups = []
        for start, stop in bounds(length, shift=shift):
            asked, known, read = (tensor[:, half, start:stop] for tensor in (queries, keys, values))
            groups.append(scaled_dot_product_attention(asked, known, read, is_causal=True, scale=scaling))
        halves.append(torch.cat(groups, dim=2))
    return torch.cat(halves, dim=1).transpose(1, 2).contiguous(), None


def bounds(length: int, *, shift: bool = False) -> list[tuple[int, int]]:
    """First token of each group, and the one after its last.

    Raises:
        ValueError: the length is not divisible by twice the number of groups.
    """
    if length % (2 * GROUPS):
        raise ValueError(
            f"a sequence has {length} tokens, and LongLoRA needs {GROUPS} groups of two equal halves: set length to a "
            f"multiple of {2 * GROUPS}"
        )
    size = length // GROUPS
    starts = [0, *range(size // 2, length, size)] if shift else list(range(0, length, size))
    return list(zip(starts, [*starts[1:], length], strict=True))


AttentionInterface.register(NAME, shifted_sparse)
AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
