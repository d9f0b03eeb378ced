"""The documents of a memory, cut into passages that can be read again."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from fot.inspection.texts import token_texts
from memory import Memory

# Tokens of a passage. A cut between the two comes at the end of a paragraph, else of a sentence, else of a line.
SHORTEST = 64
LONGEST = 128

_SENTENCE_ENDS = (".", "!", "?", "\u2026", "\u3002", "\uff01", "\uff1f")
_CLOSING = "\"'\u201d\u2019)]_*"


@dataclass(frozen=True)
class Cut:
    """The passages of a memory, in the order of its slots; together they hold every slot.

    Attributes:
        starts: (P,) int64, first slot of each.
        stops: (P,) int64, past-the-end slot.
        documents: (P,) the document of each; None if it has no name.
    """

    starts: np.ndarray
    stops: np.ndarray
    documents: list[str | None]

    def __len__(self) -> int:
        return len(self.starts)


def cut(memory: Memory, tokenizer: Any, shortest: int = SHORTEST, longest: int = LONGEST) -> Cut:
    """Cut the documents of a memory into passages. None crosses from one document into another.

    Args:
        memory: its token ids are the documents.
        tokenizer: says where sentences end.
        shortest: tokens that a passage has at least, but for the last of a document.
        longest: tokens that it has at most.
    """
    weights = _ends(memory.token_ids(), tokenizer)
    starts, documents = [], []
    for document, first, last in memory.document_runs():
        while first < last:
            starts.append(first)
            documents.append(document)
            if last - first <= longest:
                break
            choices = weights[first + shortest - 1 : first + longest]
            # The last of the best ends.
            first += longest - int(np.argmax(choices[::-1]))
    stops = [*starts[1:], len(memory)]
    return Cut(np.asarray(starts, dtype=np.int64), np.asarray(stops, dtype=np.int64), documents)


def passage_texts(memory: Memory, tokenizer: Any, passages: Cut) -> list[str]:
    """The text of each passage, as it stands in the document."""
    ids = np.maximum(memory.token_ids(), 0)  # inputs given as embeddings have no id
    bounds = zip(passages.starts.tolist(), passages.stops.tolist(), strict=True)
    return [
        tokenizer.decode(ids[start:stop].tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        for start, stop in bounds
    ]


def _ends(ids: np.ndarray, tokenizer: Any) -> np.ndarray:
    """(N,) how good a place each token is to end a passage: 3 a paragraph's end, 2 a sentence's, 1 a line's, else 0."""
    distinct, place = np.unique(ids, return_inverse=True)
    texts = ["".join(token_texts(tokenizer, [number])) for number in distinct.tolist()]
    breaks = np.asarray([text.count("\n") for text in texts])[place]
    ends = np.asarray([text.rstrip().rstrip(_CLOSING).endswith(_SENTENCE_ENDS) for text in texts])[place]
    after = np.append(breaks[1:], 0)  # two line breaks may be two tokens
    before = np.concatenate([[0], breaks[:-1]])
    paragraph = (breaks > 0) & (breaks + before >= 2) & (after == 0)
    # A mark that ends a sentence, unless a closing quotation mark or a line break follows, which then ends it.
    return np.where(paragraph, 3, np.where(ends & (after < 2), 2, np.where(breaks > 0, 1, 0)))
