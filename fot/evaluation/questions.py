"""Ordinary questions about novels: is the answer right, and does a listed passage hold it?

The questions come with the package (``fot/evaluation/books``), each with answers to accept and quotes of the novel
that hold the answer. Questions and the books to be measured are in no training document; only *Northanger Abbey*, on
which settings are chosen, is among the training texts of ``smollm2-135m-fot``. docs/results.md says where the texts
can be had.
"""

import json
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from difflib import SequenceMatcher
from importlib.resources import files
from typing import Any

import torch

from fot.ask import Conversation
from fot.evaluation.intervals import wilson
from fot.retrieval.passages import cut, passage_texts
from fot.retrieval.prompt import with_passages
from memory import Memory

# Ways to answer: a name, and what ``Conversation.say`` takes for it. Those without memory stand apart.
READING = {"memory": "off", "attention": "attention", "bm25": "bm25", "both": "both"}
WITHOUT, CEILING = "without text", "right passage given"
ROWS = (*READING, WITHOUT, CEILING)

# A passage that overlaps a quote by this share of the quote's characters holds it.
HELD = 0.5


@dataclass(frozen=True)
class Question:
    """A question about a book.

    Attributes:
        question: as a reader asks it.
        answers: what to accept; an answer is right if one of them occurs in it.
        quotes: verbatim from the book, white space aside; each holds the answer.
    """

    question: str
    answers: tuple[str, ...]
    quotes: tuple[str, ...]


@dataclass(frozen=True)
class Result:
    """One answer.

    Attributes:
        book: asked about.
        row: one of ``ROWS``.
        question: asked.
        answer: what the model wrote.
        correct: an accepted answer occurs in it.
        listed: place in the list, from 1, of the first passage that holds a quote; None if none does.
        passages: those listed: document, share, text.
    """

    book: str
    row: str
    question: str
    answer: str
    correct: bool
    listed: int | None
    passages: list[dict[str, Any]]


def books() -> list[str]:
    """Names of the books that there are questions about."""
    return sorted(entry.name.removesuffix(".json") for entry in _folder().iterdir() if entry.name.endswith(".json"))


def load_questions(book: str) -> list[Question]:
    """The questions about a book.

    Raises:
        ValueError: there are none about this book.
    """
    if book not in books():
        raise ValueError(f"there are no questions about {book!r}: choose one of {', '.join(books())}")
    content = json.loads((_folder() / f"{book}.json").read_text("utf-8"))
    return [
        Question(entry["question"], tuple(entry["answers"]), tuple(entry["quotes"])) for entry in content["questions"]
    ]


def is_right(text: str, answers: Sequence[str]) -> bool:
    """Whether one of the answers occurs in a text as whole words; case, punctuation and white space do not count."""
    said = f" {normalised(text)} "
    return any(f" {normalised(answer)} " in said for answer in answers)


def holds(text: str, quotes: Sequence[str]) -> bool:
    """Whether a text holds one of the quotes, or most of one in a piece."""
    said = normalised(text)
    for quote in map(normalised, quotes):
        match = SequenceMatcher(None, quote, said, autojunk=False).find_longest_match()
        if match.size >= HELD * len(quote):
            return True
    return False


def normalised(text: str) -> str:
    """Words in lower case, one space between them; without the mark of the genitive."""
    plain = unicodedata.normalize("NFKC", text).casefold().replace("\u2019", "'").replace("_", " ")
    return " ".join(re.findall(r"\w+", re.sub(r"'s?\b|'", "", plain)))


@torch.no_grad()
def run(
    model: Any,
    memories: Mapping[str, Memory],
    *,
    rows: Sequence[str] = ROWS,
    num_passages: int = 5,
    max_new_tokens: int = 48,
    report: Callable[[Result], None] = lambda result: None,
    progress: Any = None,
) -> dict[str, Any]:
    """Ask every question about these books, in each way.

    Args:
        model: a ``FoTForCausalLM`` with ``tokenizer``.
        memories: book -> what the model read of it. Memories do not change.
        rows: ways to answer, of ``ROWS``.
        num_passages: passages listed with each answer.
        max_new_tokens: most tokens in an answer.
        report: called after each answer.
        progress: a tqdm bar that is moved by each answer, or None.

    Returns:
        ``{"rows": {row: {"questions", "correct", "listed", ...}}, "answers": [...], "interrupted": bool}``: counts with
        Wilson 95 % intervals, over all books and under ``books`` for each; ``answers`` are the fields of ``Result``.
        Ctrl-C ends the run and keeps the answers that were given.
    """
    results: list[Result] = []
    interrupted = False
    try:
        for book, memory in memories.items():
            asker = _Asker(model, book, memory, num_passages, max_new_tokens)
            for question in load_questions(book):
                for row in rows:
                    results.append(asker.answer(question, row))
                    report(results[-1])
                    if progress is not None:
                        progress.update()
    except KeyboardInterrupt:
        interrupted = True
    summaries = {row: _summary(row, [one for one in results if one.row == row]) for row in rows}
    return {
        "rows": {row: summary for row, summary in summaries.items() if summary["questions"]},
        "answers": [asdict(result) for result in results],
        "interrupted": interrupted,
    }


class _Asker:
    """Asks about one book, each question in a conversation of its own."""

    def __init__(self, model: Any, book: str, memory: Memory, num_passages: int, max_new_tokens: int) -> None:
        self._book = book
        self._options: dict[str, Any] = {"num_passages": num_passages, "max_new_tokens": max_new_tokens}
        self._with, self._without = Conversation(model, memory), Conversation(model, None)
        self._texts = passage_texts(memory, model.tokenizer, cut(memory, model.tokenizer))

    def answer(self, question: Question, row: str) -> Result:
        text = question.question
        if row == CEILING:
            text = with_passages(text, [(self._book, right_passage(self._texts, question.quotes))])
        chat = (self._with if row in READING else self._without).anew()
        said = chat.say(text, reread=READING.get(row, "off"), **self._options)
        passages = said.passages if row in READING else []
        listed = next((place for place, one in enumerate(passages, 1) if holds(one.text, question.quotes)), None)
        shown = [{"document": one.document, "share": one.share, "text": one.text} for one in passages]
        correct = is_right(said.text, question.answers)
        return Result(self._book, row, question.question, said.text, correct, listed, shown)


def right_passage(texts: Sequence[str], quotes: Sequence[str]) -> str:
    """The first text that holds a whole quote, else the first that holds most of one.

    Raises:
        ValueError: none does; these are the passages of another book.
    """
    whole = [normalised(quote) for quote in quotes]
    for text in texts:
        said = normalised(text)
        if any(quote in said for quote in whole):
            return text
    for text in texts:
        if holds(text, quotes):
            return text
    raise ValueError(f"no passage holds {quotes[0]!r}: give the memory of the book that is asked about")


def _summary(row: str, results: Sequence[Result]) -> dict[str, Any]:
    of_book = {
        book: [one for one in results if one.book == book] for book in dict.fromkeys(one.book for one in results)
    }
    return _counts(row, results) | {"books": {book: _counts(row, some) for book, some in of_book.items()}}


def _counts(row: str, results: Sequence[Result]) -> dict[str, Any]:
    correct, count = sum(one.correct for one in results), len(results)
    listed = sum(one.listed is not None for one in results)
    counts: dict[str, Any] = {"questions": count, "correct": correct, "correct_interval": wilson(correct, count)}
    if row in READING:
        counts |= {"listed": listed, "listed_interval": wilson(listed, count)}
    return counts


def _folder() -> Any:
    return files("fot.evaluation") / "books"
