"""How fluent is a text that a model has written? Three shares, each 0 for a fluent one.

A model that has lost its positions repeats itself, or writes empty lines, or what it would not have expected itself.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# Words of a repeated piece, line breaks of a run, and the probability below which a token is unlikely.
NGRAM = 4
RUN = 3
UNLIKELY = 1e-4
# Tokens that are read at once to judge a token, and by which such windows move on.
WINDOW, STEP = 512, 256
# Tokens, about, of each stretch of a long text that is judged on its own.
STRETCH = 2048


def repeated_ngrams(ids: Sequence[int], size: int = NGRAM) -> float:
    """Share of the pieces of ``size`` tokens that stand earlier in the text, too; 0 for a shorter text."""
    pieces = [tuple(ids[start : start + size]) for start in range(len(ids) - size + 1)]
    return 1 - len(set(pieces)) / len(pieces) if pieces else 0.0


def newline_runs(text: str, shortest: int = RUN) -> float:
    """Share of the characters of a text that are line breaks in runs of at least ``shortest``; blanks between count
    neither for nor against a run."""
    lengths, run = [], 0
    for letter in text:
        if letter == "\n":
            run += 1
        elif not letter.isspace():
            lengths.append(run)
            run = 0
    lengths.append(run)
    return sum(length for length in lengths if length >= shortest) / len(text) if text else 0.0


def unlikely_tokens(losses: Tensor, probability: float = UNLIKELY) -> float:
    """Share of the tokens that a model gave a lower probability; ``losses`` (N,) are negative logarithms of these."""
    return float((losses > -math.log(probability)).float().mean()) if len(losses) else 0.0


@torch.no_grad()
def losses_in_windows(model: Any, ids: Sequence[int], window: int = WINDOW, step: int = STEP) -> Tensor:
    """Losses (N - 1,) of a text's tokens but the first, each after at least ``window - step`` tokens or the beginning.

    Args:
        model: plain, of transformers; reads windows, so that it judges any text within its positions.
        ids: N tokens.
        window: tokens read at once.
        step: of them, new ones.
    """
    found: list[Tensor] = []
    for start in range(0, max(1, len(ids) - window + step), step):
        piece = torch.tensor(ids[start : start + window], device=model.device)
        if len(piece) < 2:
            break
        logits = model(piece[None], use_cache=False).logits[0, :-1].float()
        losses = torch.nn.functional.cross_entropy(logits, piece[1:], reduction="none").cpu()
        found.append(losses if not found else losses[window - step - 1 :])
    return torch.cat(found) if found else torch.zeros(0)


def measures(ids: Sequence[int], text: str, losses: Tensor) -> dict[str, float]:
    """All three shares of a text that was written."""
    return {
        "repeated_ngrams": repeated_ngrams(ids),
        "newline_runs": newline_runs(text),
        "unlikely_tokens": unlikely_tokens(losses),
    }


def stretches(ids: Sequence[int], losses: Tensor, decode: Callable[[list[int]], str]) -> list[dict[str, float]]:
    """The three shares along a text, each of a stretch as if it were all of the text.

    Args:
        ids: N tokens.
        losses: (N - 1,), of all but the first.
        decode: gives the text of tokens.

    Returns:
        for each stretch the number of its last token, ``end``, and its measures. Stretches are equally long, as nearly
        as can be: a short one would repeat itself less.
    """
    count = max(1, round(len(ids) / STRETCH))
    bounds = [len(ids) * number // count for number in range(count + 1)]
    return [
        {"end": stop, **measures(ids[start:stop], decode(list(ids[start:stop])), losses[max(0, start - 1) : stop - 1])}
        for start, stop in itertools.pairwise(bounds)
    ]
