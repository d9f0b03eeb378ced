"""Next-token loss whose logits never exist for all tokens at once, forward or backward."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

# Rows of logits alive at a time: 1,024 x 50k x 4 bytes are 200 MB.
ROWS = 1024

Head = Callable[[Tensor], Tensor]


def token_losses(states: Tensor, targets: Tensor, lm_head: Head) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each token, with logits made anew in the backward pass.

    Args:
        states: (N, hidden_size), after the final norm.
        targets: (N,) int64; -100 has loss 0.
        lm_head: hidden states -> logits.

    Returns:
        losses (N,) float32, and (N,) bool: the likeliest token is the target.
    """

    def some(chunk: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        logits = lm_head(chunk).float()
        losses = functional.cross_entropy(logits, target, ignore_index=-100, reduction="none")
        return losses, logits.argmax(-1) == target

    parts = []
    for chunk, target in zip(states.split(ROWS), targets.split(ROWS), strict=True):
        if torch.is_grad_enabled():
            parts.append(checkpoint(some, chunk, target, use_reentrant=False))
        else:
            parts.append(some(chunk, target))
    if not parts:
        return states.new_zeros(0).float(), torch.zeros(0, dtype=torch.bool, device=states.device)
    return torch.cat([losses for losses, _ in parts]), torch.cat([correct for _, correct in parts])


def chunked_loss(hidden: Tensor, labels: Tensor, lm_head: Head, num_items: Tensor | int | None = None) -> Tensor:
    """Mean cross-entropy of each token given those before it, as transformers computes it.

    Args:
        hidden: (B, T, hidden_size), after the final norm.
        labels: (B, T) int64; -100 is left out.
        lm_head: hidden states -> logits.
        num_items: divide the sum by this instead of by the number of labels (gradient accumulation).

    Returns:
        float32 scalar; NaN if no label counts.
    """
    targets = functional.pad(labels[:, 1:], (0, 1), value=-100).to(hidden.device).flatten()
    losses, _ = token_losses(hidden.flatten(0, 1), targets, lm_head)
    return losses.sum() / ((targets != -100).sum() if num_items is None else num_items)
