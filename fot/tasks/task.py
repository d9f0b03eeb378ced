"""What a synthetic task is: it gives ready documents, and says which of their tokens it took from real texts."""

import random
from collections.abc import Sequence
from typing import NamedTuple, Protocol


class Passage(NamedTuple):
    """Consecutive tokens of a document that are consecutive in a real text, too.

    Attributes:
        start: place of the first of them in the document.
        length: how many they are.
        text: names the text; the same text has the same name in all documents.
        first: place of the first of them in the text.
    """

    start: int
    length: int
    text: int
    first: int


class Document(NamedTuple):
    """A document of a task.

    Attributes:
        ids: token ids, at most windows * window + 1.
        weights: for each token, its weight as a target of the loss; 0: it counts nothing.
        passages: what was taken from real texts. No document is shown another one that holds what follows in them.
    """

    ids: list[int]
    weights: list[float]
    passages: Sequence[Passage] = ()


class Task(Protocol):
    """Gives documents. The same state of ``rng`` gives the same document."""

    name: str

    def document(self, rng: random.Random) -> Document: ...
