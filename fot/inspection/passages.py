"""Hits that lie side by side, as passages of the documents they come from."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fot.chat import are_marks, template_marks
from fot.inspection.texts import one_line, token_texts
from memory import Memory

# Hits at most this many slots apart belong to one passage, until it is as long as LONGEST.
GAP = 8
LONGEST = 48
# Tokens shown on either side of a passage.
CONTEXT = 12

PROMPT = "(prompt)"
UNNAMED = "(unnamed)"


@dataclass(frozen=True)
class Passage:
    """Stored tokens that carried attention mass, or that a question is about.

    Attributes:
        document: its name; ``(prompt)`` for what the prompt itself moved to memory, ``(unnamed)`` if it has none.
        start: first slot in its memory.
        stop: past-the-end slot.
        span: characters in the document, None if not known.
        share: of the attention mass on all memory beyond what any question or token has there, 0..1: see
            ``Trace.passages`` and ``fot.retrieval.find``.
        text: one line of text: the passage with some tokens on either side.
        marked: where in ``text`` the passage itself begins and ends.
    """

    document: str
    start: int
    stop: int
    span: tuple[int, int] | None
    share: float
    text: str
    marked: tuple[int, int]


def document_name(document: str | None, *, own: bool) -> str:
    """What to call a document; ``own`` if it lies in the memory that the prompt itself moved to."""
    return document if document is not None else PROMPT if own else UNNAMED


def find_passages(
    slots: np.ndarray, documents: np.ndarray, weights: np.ndarray, count: int
) -> list[tuple[int, int, float]]:
    """The ``count`` runs of nearby slots of a document with most weight, in order: (first, past-the-end slot, weight).

    Args:
        slots: (n,) int64, ascending and distinct.
        documents: (n,) number of each slot's document.
        weights: (n,), what decides about the order.
        count: runs wanted.
    """
    # Plain lists: a page ranks thousands of small sets, and NumPy's scalars would take most of the time.
    places, numbers, weight = slots.tolist(), documents.tolist(), weights.tolist()
    taken = [False] * len(places)
    found: list[tuple[int, int, float]] = []
    for seed in np.argsort(-weights, kind="stable").tolist():
        if taken[seed]:
            continue
        low, high = _grow(places, numbers, taken, seed)
        run = slice(low, high + 1)
        taken[run] = [True] * (high + 1 - low)
        found.append((places[low], places[high] + 1, sum(weight[run])))
        if len(found) >= 8 * count:  # a later seed weighs less than any of these; few such add up to more
            break
    return sorted(found, key=lambda run: -run[2])[:count]


def make_passage(
    memory: Memory, start: int, stop: int, share: float, tokenizer: Any, *, own: bool, context: int = CONTEXT
) -> Passage:
    """Name and text of slots start..stop-1, with ``context`` tokens of the same document on either side."""
    first, last = memory.source(start), memory.source(stop - 1)
    low, high = start, stop
    while low > 0 and start - low < context and memory.source(low - 1).document == first.document:
        low -= 1
    while high < len(memory) and high - stop < context and memory.source(high).document == last.document:
        high += 1
    texts = token_texts(tokenizer, memory.token_ids(slice(low, high)).tolist(), special=False)
    if own:  # a conversation's own memory holds the marks of its chat template, which are no text
        # Turns stay apart.
        texts = ["\n" if mark else text for text, mark in zip(texts, _marks(memory, low, high, tokenizer), strict=True)]
    text, marked = _line(texts, start - low, stop - low)
    same = first.document == last.document and first.span is not None and last.span is not None
    span = (first.span[0], last.span[1]) if same and first.span and last.span else None
    return Passage(document_name(first.document, own=own), start, stop, span, share, text, marked)


def _grow(slots: list[int], documents: list[int], taken: list[bool], seed: int) -> tuple[int, int]:
    """The run around a seed: the nearer neighbour first, while it is near enough and the run short enough."""

    def distance(inside: int, outside: int) -> int:
        if not 0 <= outside < len(slots) or taken[outside] or documents[outside] != documents[seed]:
            return LONGEST
        return abs(slots[inside] - slots[outside])

    low = high = seed
    while True:
        left, right = distance(low, low - 1), distance(high, high + 1)
        if min(left, right) > GAP or slots[high] - slots[low] + min(left, right) >= LONGEST:
            return low, high
        if left <= right:
            low -= 1
        else:
            high += 1


def _marks(memory: Memory, low: int, high: int, tokenizer: Any) -> list[bool]:
    """Which of the slots low..high-1 hold marks of a chat template; some reach over the ends."""
    marks = template_marks(tokenizer)
    longest = max(map(len, marks), default=0)
    first = max(0, low - longest)
    found = are_marks(memory.token_ids(slice(first, high + longest)).tolist(), marks)
    return found[low - first : high - first]


def _line(texts: Sequence[str], start: int, stop: int) -> tuple[str, tuple[int, int]]:
    """The texts on one line, and where in it texts[start:stop] lie."""
    whole = "".join(texts)
    before, inside = "".join(texts[:start]), "".join(texts[:stop])
    text = one_line(whole)
    # Cut off what was collapsed: the end of a part on one line, spaces at its end counted as one.
    first, last = (len(one_line(part + "|")) - 1 for part in (before, inside))
    return text, (min(first, len(text)), min(last, len(text)))
