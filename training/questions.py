"""Questions that people asked: passages stand in earlier windows of real text, the last window asks about them.

``fot.tasks.task`` says what a task is. The questions are put as ``fot ask`` puts them: in the tokenizer's chat
template, some with passages to be read again in front of them.

>>> task = PassageQuestions(tokenizer, filler, read_asked("fairytales.jsonl"), windows=4, window=512)
>>> ids, weights, passages = task.document(random.Random(0))
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fot.chat import has_template
from fot.retrieval.passages import LONGEST
from fot.retrieval.prompt import with_passages
from fot.tasks.haystack import bos
from fot.tasks.task import Document
from fot.tasks.wordings import forbidden
from training.asked import Asked, AskedPassage
from training.hiding import Filler, Laid, Piece, chat_piece, lay
from training.pieces import content_of

_MOST_ASKED = 0.9  # share of the tokens of a window that passages and questions may take; the rest is filler
_ATTEMPTS = 50
_OTHERS = 2  # passages that stand beside the right one in front of a question, at most: `fot ask` reads three again
_UNTITLED = "text"
_SENTENCE = re.compile(r".+?(?:[.!?\u2026][\"'\u201d\u2019)]*(?=\s)|$)", re.DOTALL)


@dataclass(frozen=True)
class AskedDocument:
    """A document, and what it asks.

    Attributes:
        laid: its tokens. The number of a piece is that of its passage in the task's ``kept``.
        asked: of each question, in order: the number of its passage, the question, and whether passages are in front.
    """

    laid: Laid
    asked: list[tuple[int, str, bool]]


@dataclass
class PassageQuestions:
    """Passages in windows 0..windows-2 of real text, questions about them in the last window; a ``Task``.

    Attributes:
        tokenizer: of transformers, with a chat template; BOS is put first if it has ``add_bos_token``.
        filler: (rng, n) -> n tokens of real text, in one stretch or more.
        asked: passages with questions. Those that do not fit a document are never taken.
        windows: of a document, at least 2.
        window: tokens of each.
        passages: least and most passages of a document; fewer where they do not fit. No two have the same title.
        text_weight: weight of those tokens of real text, passages included, that count.
        text_share: share of the real text's tokens that count. Questions never count, and answers fully.
        near_share: share of questions that have the passage, or the part of it with the answer, in front of them, as
            ``fot ask`` reads passages again. Half of these passages stand nowhere else.
        name: in logs.
        kept: the passages that fit.
    """

    tokenizer: Any
    filler: Filler
    asked: Sequence[AskedPassage]
    windows: int = 2
    window: int = 512
    passages: tuple[int, int] = (2, 6)
    text_weight: float = 0.5
    text_share: float = 0.1
    near_share: float = 0.3
    name: str = "questions"
    kept: list[AskedPassage] = field(init=False)

    def __post_init__(self) -> None:
        if self.windows < 2 or self.window < 1:
            raise ValueError(
                f"there are {self.windows} windows of {self.window} tokens, but passages and questions need at least 2 "
                "windows"
            )
        if not 1 <= self.passages[0] <= self.passages[1]:
            raise ValueError(f"passages={self.passages} must be (least, most) with 1 <= least <= most")
        for share in ("text_share", "near_share"):
            if not 0 <= getattr(self, share) <= 1:
                raise ValueError(f"{share}={getattr(self, share)} is a share: choose a number from 0 to 1")
        if self.text_weight < 0:
            raise ValueError(f"text_weight={self.text_weight} must not be negative")
        if not has_template(self.tokenizer):
            raise ValueError("the tokenizer has no chat template, in which questions are asked: leave this task out")
        framed = [f"\n\n{passage.text}\n\n" for passage in self.asked]
        encoded = self.tokenizer(framed, add_special_tokens=False, verbose=False).input_ids if framed else []
        told = zip(self.asked, encoded, strict=True)
        fitting = [(passage, ids) for passage, ids in told if len(ids) <= self._room]
        if not fitting:
            raise ValueError(
                f"none of {len(self.asked)} passages fits {self._room} tokens of the windows before the last: make "
                "windows more or longer"
            )
        self.kept = [passage for passage, _ in fitting]
        self._pieces = [
            Piece(number, ids, text=content_of(np.asarray(ids, np.int32))) for number, (_, ids) in enumerate(fitting)
        ]

    @property
    def _room(self) -> int:
        return int(_MOST_ASKED * self.window * (self.windows - 1)) - 1  # a token for BOS

    def document(self, rng: random.Random) -> Document:
        """Token ids, windows * window + 1 of them, and their weights as targets: 1 for answers and their ends."""
        laid = self.sample(rng).laid
        return Document(laid.ids, laid.weights, laid.passages)

    def sample(self, rng: random.Random) -> AskedDocument:
        """A document and what it asks.

        Raises:
            ValueError: the windows are too short for a question, or the filler keeps giving text that has words of
                the passkey test.
        """
        reason, start = "", bos(self.tokenizer)
        regions = (self.window * (self.windows - 1) - len(start), self.window + 1)
        for _ in range(_ATTEMPTS):
            told, questions = self._draw(rng)
            if not questions:
                reason = f"a window of {self.window} tokens has no room for a question: make windows longer"
                continue
            pieces = ([self._pieces[number] for number in told], [piece for piece, *_ in questions])
            laid = lay(
                list(zip(regions, pieces, strict=True)),
                self.filler,
                rng,
                bos=start,
                text_weight=self.text_weight,
                text_share=self.text_share,
            )
            found = forbidden(self.tokenizer.decode(laid.ids))
            if found is None:
                return AskedDocument(laid, [(piece.fact, question, near) for piece, question, near in questions])
            reason = f"the text is like the passkey test's ({found!r}): take such documents out of filler and passages"
        raise ValueError(reason)

    def _draw(self, rng: random.Random) -> tuple[list[int], list[tuple[Piece, str, bool]]]:
        """The passages that stand in earlier windows, and (piece, question, near) of each question, in order."""
        chosen = self._choose(rng)
        # Half of the near questions are about passages that stand only there, half about the others.
        only_near = {number for number in chosen if rng.random() < self.near_share / 2}
        near_share = self.near_share / (2 - self.near_share)
        drawn = [
            (number, asked, number in only_near or rng.random() < near_share)
            for number in chosen
            for asked in self.kept[number].questions
        ]
        rng.shuffle(drawn)
        left, questions = int(_MOST_ASKED * self.window), []
        for number, asked, near in drawn:
            piece = self._question(number, asked, chosen if near else None, left, rng)
            if piece is not None:
                left -= len(piece.ids)
                questions.append((piece, asked[0], near))
            elif questions:
                break  # going on, short questions would be found that fit: fewer near ones than near_share says
        return [number for number in chosen if number not in only_near], questions

    def _choose(self, rng: random.Random) -> list[int]:
        """Numbers of passages that fit the earlier windows together, of different documents."""
        count, left = rng.randint(*self.passages), self._room
        chosen: list[int] = []
        titles: set[str] = set()
        for number in rng.sample(range(len(self.kept)), min(len(self.kept), 4 * self.passages[1])):
            title, length = self.kept[number].title, len(self._pieces[number].ids)
            if len(chosen) < count and length <= left and title not in titles:
                chosen.append(number)
                left -= length
                titles |= {title} - {""}
        return chosen

    def _question(
        self, number: int, asked: Asked, near: Sequence[int] | None, room: int, rng: random.Random
    ) -> Piece | None:
        """A question and its answer of at most ``room`` tokens; None if it takes more.

        Args:
            number: of its passage.
            asked: the question and its answers.
            near: numbers of the document's passages, if passages are to stand in front of the question.
        """
        question, answers = asked
        said = as_said(rng.choice(answers))
        sources = [] if near is None else self._sources(number, answers, near, rng)
        for count in range(len(sources), min(len(sources), 1) - 1, -1):
            read = rng.sample(sources[:count], count)  # `fot ask` does not know which is the right one
            content = with_passages(question, read) if read else question
            piece = chat_piece(self.tokenizer, number, content, ("", said, ""))
            if piece is not None and len(piece.ids) <= room:
                return piece
        return None

    def _sources(
        self, number: int, answers: Sequence[str], chosen: Sequence[int], rng: random.Random
    ) -> list[tuple[str, str]]:
        """(title, text) of the passage, whole or the part that has an answer, and behind it of others."""
        passage = self.kept[number]
        parts = self._parts(passage.text)
        holding = [part for part in parts if any(_plain(answer) in _plain(part) for answer in answers)]
        right = rng.choice(holding) if holding else passage.text
        source = (passage.title or _UNTITLED, right)
        beside = [other for other in chosen if other != number]
        others = []
        for other in rng.sample(beside, min(len(beside), rng.randint(0, _OTHERS) if holding else 0)):
            found = self.kept[other]
            others.append((found.title or _UNTITLED, rng.choice(self._parts(found.text))))
        return [source, *others]

    def _parts(self, text: str) -> list[str]:
        """A text cut at ends of sentences into parts of at most as many tokens as a passage that is read again."""
        sentences = _SENTENCE.findall(text)
        parts, last = [""], 0
        encoded = self.tokenizer(sentences, add_special_tokens=False).input_ids
        for sentence, length in zip(sentences, map(len, encoded), strict=True):
            if last and last + length > LONGEST:
                parts, last = [*parts, ""], 0
            parts[-1] += sentence
            last += length
        return [part.strip() for part in parts]


def as_said(answer: str) -> str:
    """An answer as a person writes it: with a capital letter, and a full stop where nothing ends it."""
    said = " ".join(answer.split())
    said = said[:1].upper() + said[1:]
    return said if said.rstrip("\"'\u201d\u2019)").endswith((".", "!", "?", "\u2026")) else f"{said}."


def _plain(text: str) -> str:
    return " ".join(text.lower().strip(" .!?").split())
