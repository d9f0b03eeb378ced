"""Perplexity of real text within single windows; ``fot.evaluation.growing`` measures it with a memory."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

ROWS = 8  # windows at once


@torch.no_grad()
def within_windows(model: Any, windows: Tensor, *, progress: Any = None) -> float:
    """Perplexity of windows, each alone; its first token, which nothing precedes, is not counted.

    Args:
        model: a ``FoTForCausalLM``.
        windows: (N, T) token ids, T at least 2 and at most its window.
        progress: a tqdm bar that is moved by each token read, or None.
    """
    total = 0.0
    for rows in windows.split(ROWS):
        ids = rows.to(model.device)
        loss = model(ids, labels=ids, use_cache=False, logits_to_keep=1).loss
        total += float(loss) * len(rows)
        _move(progress, rows.numel())
    return math.exp(total / len(windows))


def spread_windows(ids: Sequence[int], window: int, count: int) -> Tensor:
    """``count`` whole windows of a text, evenly spread over it, or all that it has: (N, window).

    Raises:
        ValueError: the text is shorter than a window.
    """
    whole = len(ids) // window
    if not whole:
        raise ValueError(f"a text of {len(ids)} tokens is shorter than a window of {window}: give longer files")
    count = min(count, whole)
    starts = [number * whole // count * window for number in range(count)]
    return torch.tensor([list(ids[start : start + window]) for start in starts])


def run(model: Any, texts: dict[str, Sequence[int]], *, tokens: int = 32768, progress: Any = None) -> dict[str, Any]:
    """Perplexity within one window, text by text.

    Args:
        model: a ``FoTForCausalLM``.
        texts: token ids by name.
        tokens: at most so many are read, evenly shared by the texts; at least a window of each.
        progress: a tqdm bar that gets its total here and is moved by each token read, or None.

    Returns:
        ``{"texts": {name: {"perplexity": float, "tokens": int}}, "perplexity": float, "interrupted": bool}``, the
        second of all texts together, None if there are none. Ctrl-C ends the run and keeps the finished texts.

    Raises:
        ValueError: a text that is shorter than a window.
    """
    window = model.memory_config.window
    count = max(1, tokens // window // len(texts))
    rows = {name: spread_windows(ids, window, count) for name, ids in texts.items()}
    _expect(progress, sum(windows.numel() for windows in rows.values()))
    found: dict[str, Any] = {}
    interrupted = False
    try:
        for name, windows in rows.items():
            perplexity = within_windows(model, windows, progress=progress)
            found[name] = {"perplexity": perplexity, "tokens": windows.numel()}
    except KeyboardInterrupt:
        interrupted = True
    return {"texts": found, "perplexity": _joint(found), "interrupted": interrupted}


def _joint(texts: dict[str, Any]) -> float | None:
    """Perplexity of several texts together: their mean logarithm, weighted by tokens."""
    tokens = sum(text["tokens"] for text in texts.values())
    if not tokens:
        return None
    return math.exp(sum(math.log(text["perplexity"]) * text["tokens"] for text in texts.values()) / tokens)


def _expect(progress: Any, tokens: int) -> None:
    if progress is not None:
        progress.total = tokens


def _move(progress: Any, tokens: int) -> None:
    if progress is not None:
        progress.update(tokens)
