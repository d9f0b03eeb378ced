"""How good a retrieval is: the share of the exact attention that it keeps."""

import torch
from torch import Tensor

from memory.softmax import NAIVE_SCORES


def attention_mass_recall(queries: Tensor, keys: Tensor, hits: Tensor, *, scale: float) -> Tensor:
    """Share of the exact softmax mass over all memory that the retrieved keys carry.

    Judges an approximate index against dense memory attention, as in LongLLaMA (arXiv 2307.03170).

    Args:
        queries: (G, T, D) float; the query heads of a KV head lie along T.
        keys: (G, N, D) float, unrotated.
        hits: (G, T, K) int64 slots in ``keys``, distinct per query; -1 where an index found fewer than K.
        scale: factor on inner products, normally ``head_dim**-0.5``.

    Returns:
        The shares, (G, T) float32 in [0, 1]. They are computed in slices of queries, so a full (G, T, N) matrix never
        exists.

    Raises:
        ValueError: A slot lies outside -1..N-1.
    """
    bad = hits[(hits < -1) | (hits >= keys.shape[1])]
    if bad.numel():
        raise ValueError(f"slot {bad[0].item()} is outside 0..{keys.shape[1] - 1}: these hits belong to another memory")
    keys = keys.float()
    rows = max(1, NAIVE_SCORES // (keys.shape[0] * keys.shape[1]))
    recalls = []
    for start in range(0, queries.shape[1], rows):
        found = hits[:, start : start + rows]
        # float32: bfloat16 logits would let rounding decide between near-equal keys.
        logits = scale * (queries[:, start : start + rows].float() @ keys.mT)  # (G, rows, N)
        kept = logits.gather(-1, found.clamp(min=0)).masked_fill(found < 0, -torch.inf)
        recalls.append((kept.logsumexp(-1) - logits.logsumexp(-1)).exp())
    return torch.cat(recalls, dim=1).clamp(max=1.0)  # rounding can pass 1
