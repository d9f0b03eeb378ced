"""Passages by the words that they share with a question: BM25."""

import logging
import re
from collections.abc import Sequence

import bm25s
import numpy as np

logging.getLogger("bm25s").setLevel(logging.WARNING)  # it tells each step of an index

_WORD = re.compile(r"\w+")


class WordIndex:
    """BM25 over the texts of passages, upper case as lower case.

    Args:
        texts: of the passages.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self._numbers: dict[str, int] = {}
        corpus = [[self._numbers.setdefault(word, len(self._numbers)) for word in words(text)] for text in texts]
        self._count = len(texts)
        self._index: bm25s.BM25 | None = None
        if self._numbers:
            self._index = bm25s.BM25()
            self._index.index((corpus, self._numbers), show_progress=False)

    def scores(self, question: str) -> np.ndarray:
        """(P,) float32, 0 for a passage that shares no word with the question."""
        asked = sorted({self._numbers[word] for word in words(question) if word in self._numbers})
        if self._index is None or not asked:
            return np.zeros(self._count, dtype=np.float32)
        return np.asarray(self._index.get_scores_from_ids(asked), dtype=np.float32)


def words(text: str) -> list[str]:
    """The words of a text in lower case."""
    return _WORD.findall(text.casefold())
