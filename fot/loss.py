"""Next-token loss whose logits never exist for all tokens at once."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

# Rows of logits alive at a time: 1,024 x 50k x 4 bytes are 200 MB.
ROWS = 1024


def chunked_loss(
    hidden: Tensor, labels: Tensor, lm_head: Callable[[Tensor], Tensor], num_items: Tensor | int | None = None
) -> Tensor:
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
    states = hidden.flatten(0, 1)
    total = torch.zeros((), device=hidden.device)
    for chunk, target in zip(states.split(ROWS), targets.split(ROWS), strict=True):
        total = total + functional.cross_entropy(lm_head(chunk).float(), target, ignore_index=-100, reduction="sum")
    return total / ((targets != -100).sum() if num_items is None else num_items)
