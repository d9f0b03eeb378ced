"""Focus: a loss on how attention to other windows is shared between the own document and others.

Crossbatch shows windows of other documents, so that keys of one document learn to differ from those of another (arXiv
2307.03170, section 3.2). The loss of next tokens alone pulls weakly at that: where no context helps, it does not matter
which one attention goes to. This loss says it outright, as the auxiliary loss of memory sparse attention does: in each
memory layer, for rows that see windows of their own document P and of others, with C all of these::

    loss(q) = log( sum over k in C of exp(s q.k) ) - log( sum over k in P of exp(s q.k) )

It is the -log of what ``fot eval distraction`` measures as the share of the attention to memory: the own window is left
out, each context counts once, whatever its ``copies``, and padding counts never. It is 0 if all goes to P.

All queries x contexts would be too many scores. So some queries of each row are drawn, and their scores are computed in
slices, in the backward pass once more.
"""

import random
from typing import Any

import torch
from torch import Tensor

from training.groups import Contexts, Group, fold, pick

# Queries of a row that have this loss; drawn anew for each batch.
QUERIES = 32
# Scores of one slice. float32, and about four tensors of them at a time.
SCORES = 1 << 25
# In place of a score of padding. Finite: what is padding throughout has a log-sum-exp, and a gradient of 0.
NOTHING = -1e30


def draw_queries(lengths: list[int], first: int, seed: str) -> Tensor:
    """Queries of each row for which the loss is taken.

    Args:
        lengths: tokens of each row before its padding.
        first: number of the first row among those of all processes, so that any number of them draws the same.
        seed: of this batch.

    Returns:
        (R, S) int64 with S = ``QUERIES``, or the longest row's tokens if it has fewer. A row that has fewer than S
        repeats some.
    """
    count = min(QUERIES, max(lengths, default=0))
    rows = []
    for number, length in enumerate(lengths):
        rng = random.Random(f"{seed}/focus/{first + number}")
        rows.append(
            rng.sample(range(length), count) if length >= count else rng.choices(range(max(1, length)), k=count)
        )
    return torch.tensor(rows, dtype=torch.int64).reshape(len(lengths), count)


def focus_loss(queries: Tensor, context_keys: Tensor, contexts: Contexts, *, scale: float) -> Tensor | None:
    """Sum over rows of the mean loss of their drawn queries and heads.

    Args:
        queries: (R, H, T, D), rotated.
        context_keys: (C, G, T, D) at position 0.
        contexts: with ``asked`` and ``positives``.
        scale: factor on inner products.

    Returns:
        a float32 scalar, differentiable in queries and keys; None if no row sees both its own document and others.
    """
    assert contexts.asked is not None
    groups = contexts.mixed_groups(queries.device)
    if not groups:
        return None
    asked = contexts.asked.to(queries.device)[:, None, :, None]
    drawn = queries.gather(2, asked.expand(-1, queries.shape[1], -1, queries.shape[3]))  # (R, H, S, D)
    losses = []
    for group, lses in zip(groups, _ContextLse.apply(drawn, context_keys, groups, scale), strict=True):
        assert group.positives is not None
        # (r, H, S, M)
        own = lses.masked_fill(~group.positives[:, None, None], -torch.inf).logsumexp(-1)
        losses.append((lses.logsumexp(-1) - own).mean((1, 2)).sum())
    return torch.stack(losses).sum()


class _ContextLse(torch.autograd.Function):
    """Log-sum-exps of each query's scores over each of its row's contexts, without keeping the scores."""

    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor, groups: list[Group], scale: float) -> tuple[Tensor, ...]:
        """(R, H, S, D), (C, G, T, D) -> (r, H, S, M) for each group."""
        found = []
        with torch.autocast(queries.device.type, enabled=False):
            for group in groups:
                lses = [
                    _scores(queries, keys, part, scale)[0]
                    .logsumexp(-1)
                    .reshape(len(part.rows), *queries.shape[1:3], -1)
                    for part in _slices(group, queries, keys)
                ]
                found.append(torch.cat(lses))
        ctx.save_for_backward(queries, keys, *found)
        ctx.groups, ctx.scale = groups, scale
        return tuple(found)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        queries, keys, *found = ctx.saved_tensors
        wide = _wide(queries)
        grad_q, grad_k = (torch.zeros_like(tensor, dtype=wide) for tensor in (queries, keys))
        with torch.autocast(queries.device.type, enabled=False):
            for group, lses, grad in zip(ctx.groups, found, grads, strict=True):
                start = 0
                for part in _slices(group, queries, keys):
                    here = slice(start, start + len(part.rows))
                    start = here.stop
                    scores, folded, picked = _scores(queries, keys, part, ctx.scale)
                    shape = scores.shape[:-1]  # (r, G, H / G * S, M)
                    scores.sub_(lses[here].reshape(shape).unsqueeze(-1)).exp_()
                    scores.mul_(grad[here].reshape(shape).unsqueeze(-1))
                    weights = scores.flatten(3)  # (r, G, H / G * S, M * T)
                    part_q = ctx.scale * (weights @ picked)
                    part_k = (weights.mT @ folded).unflatten(2, (part.chosen.shape[1], -1)).transpose(1, 2)
                    grad_q.index_add_(0, part.rows, part_q.reshape(len(part.rows), *queries.shape[1:]))
                    grad_k.index_add_(0, part.chosen.flatten(), part_k.flatten(0, 1))
        return grad_q.to(queries.dtype), grad_k.to(keys.dtype), None, None


def _slices(group: Group, queries: Tensor, keys: Tensor) -> list[Group]:
    scores = queries[0, ..., 0].numel() * group.chosen.shape[1] * keys.shape[2]
    return list(group.slices(SCORES // scores))


def _scores(queries: Tensor, keys: Tensor, part: Group, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Scores (r, G, H / G * S, M, T), and what they are of: scaled queries and keys, in float32 at least."""
    wide = _wide(queries)
    folded = scale * fold(queries[part.rows], keys.shape[1]).to(wide)  # (r, G, H / G * S, D)
    picked = pick(keys, part.chosen).to(wide)  # (r, G, M * T, D)
    scores = (folded @ picked.mT).unflatten(-1, (part.chosen.shape[1], -1))
    if part.hidden is not None:
        scores.masked_fill_(part.hidden[:, None, None], NOTHING)
    return scores, folded, picked


def _wide(queries: Tensor) -> torch.dtype:
    # float32: bfloat16 logits would let rounding decide between near-equal keys.
    return torch.promote_types(queries.dtype, torch.float32)
