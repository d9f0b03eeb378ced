"""Passages by the words that they share with a question: BM25, over English stems.

On the twelve questions about *Northanger Abbey*, stems put the right passage among the first ten of 1,006 for ten
questions, words as they are for six. Words of other languages lose or keep their ends alike in question and text.
"""

import logging
import re
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np
import Stemmer


def _without_jax() -> ModuleType:
    """bm25s, imported as where JAX is not installed: it would start JAX, which takes three quarters of a GPU's memory.

    JAX is only one of two ways in which it picks the best passages, which is not asked of it here.
    """
    hidden = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == "jax"}
    sys.modules["jax"] = None  # type: ignore[assignment]  # an import of it fails
    try:
        import bm25s
    finally:
        del sys.modules["jax"]
        sys.modules.update(hidden)
    return bm25s


bm25s = _without_jax()

logging.getLogger("bm25s").setLevel(logging.WARNING)  # it tells each step of an index

# Share of all passages. "Then", "she" and names on every page are in more.
FEW = 0.1

_WORD = re.compile(r"\w+")
_STEMMER = Stemmer.Stemmer("english")


class WordIndex:
    """BM25 over the texts of passages: "Engaged" in a question finds "engagement".

    Args:
        texts: of the passages.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self._numbers: dict[str, int] = {}
        corpus = [[self._numbers.setdefault(word, len(self._numbers)) for word in words(text)] for text in texts]
        self._count = len(texts)
        self._passages = np.bincount([number for text in corpus for number in set(text)], minlength=len(self._numbers))
        self._index: Any = None
        if self._numbers:
            self._index = bm25s.BM25()
            self._index.index((corpus, self._numbers), show_progress=False)

    def scores(self, question: str) -> np.ndarray:
        """(P,) float32, 0 for a passage that shares no word with the question."""
        asked = sorted({self._numbers[word] for word in words(question) if word in self._numbers})
        if self._index is None or not asked:
            return np.zeros(self._count, dtype=np.float32)
        return np.asarray(self._index.get_scores_from_ids(asked), dtype=np.float32)

    def telling(self, question: str) -> int:
        """How many words of a question tell passages apart: those in some passages, but in few (``FEW``)."""
        known = [self._passages[self._numbers[word]] for word in set(words(question)) if word in self._numbers]
        return sum(count <= max(1, FEW * self._count) for count in known)


def words(text: str) -> list[str]:
    """The stems of a text's words, in lower case."""
    stems: list[str] = _STEMMER.stemWords(_WORD.findall(text.casefold()))
    return stems
