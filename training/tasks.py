"""Synthetic retrieval: documents whose last window asks for facts that were told in earlier windows.

``fot.tasks.task`` says what a task is. ``SyntheticRetrieval`` hides facts (``fot.tasks.wordings``) in real text; the
dictionary task is in ``fot.tasks.dictionary``. ``fot.evaluation.needles`` asks in wordings and on subjects unknown to
training.

>>> filler = filler_from([tokenizer(path.read_text()).input_ids for path in Path("texts").iterdir()])
>>> task = SyntheticRetrieval(tokenizer, filler, windows=2, window=512)
>>> ids, weights, passages = task.document(random.Random(0))
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fot.tasks.task import Document, Passage
from fot.tasks.wordings import KINDS, Kind, chat_turns, draw, forbidden, render
from training.hiding import Filler, Piece, chat_piece, lay

# What stands around a statement or question. Each ends with a line break, so that some token ends every answer.
_FRAMES = (("\n", "\n"), ("\n", "\n"), ("\n\n", "\n\n"), (" ", "\n"), ("\n# ", "\n"), ("\n- ", "\n"), ("\n> ", "\n"))
_BLOCK_FRAMES = (("\n", "\n"), ("\n\n", "\n\n"))  # for templates of several lines
_ASKED = 0.8  # share of facts that are asked for, as far as questions fit
_MOST_SYNTHETIC = 0.75  # share of the tokens of a window that facts and questions may take; the rest is real text
_ATTEMPTS = 50


@dataclass(frozen=True)
class Fact:
    """One thing told: ``value`` is the ``relation`` of ``entity``."""

    kind: Kind
    entity: str
    relation: str
    value: str


@dataclass(frozen=True)
class Sample:
    """A document and what was hidden in it.

    Attributes:
        ids: windows * window + 1 tokens; the last one is only a target.
        weights: for each token, its weight as a target.
        facts: all that was told.
        placed: (first position, piece) of every statement and question, in order.
        passages: what is real text.
    """

    ids: list[int]
    weights: list[float]
    facts: list[Fact]
    placed: list[tuple[int, Piece]]
    passages: list[Passage]


@dataclass
class SyntheticRetrieval:
    """Facts in windows 0..windows-2 of real text, questions with answers in the last window; a ``Task``.

    Two facts of a document differ in (entity, relation) and in value. Some facts are never asked for.

    Attributes:
        tokenizer: of transformers; BOS is put first if it has ``add_bos_token``.
        filler: (rng, n) -> n tokens of real text, in one stretch or more.
        windows: of a document, at least 2.
        window: tokens of each.
        facts: least and most facts of a document; fewer where they do not fit.
        text_weight: weight of those tokens of the real text that count.
        text_share: share of the real text's tokens that count, drawn token by token. Statements and the words of
            questions never count: they hold random names and numbers that cannot be foretold.
        near_share: share of facts that are told in the last window, before their question, for local attention.
        again_share: share of asked facts that are asked for twice, mostly in other words.
        distractor_share: share of facts that repeat the relation of another fact for another entity, or tell
            something else of its entity.
        chat_share: share of questions that are put in the tokenizer's chat template, as ``fot ask`` puts them, and
            answered by the value alone or in a sentence, whose other words count like real text.
        kinds: kinds of facts; leave some out to test on them.
        name: in logs.
    """

    tokenizer: Any
    filler: Filler
    windows: int = 2
    window: int = 512
    facts: tuple[int, int] = (4, 12)
    text_weight: float = 0.5
    text_share: float = 0.1
    near_share: float = 0.1
    again_share: float = 0.15
    distractor_share: float = 0.7
    chat_share: float = 0.0
    kinds: Sequence[Kind] = KINDS
    name: str = "retrieval"

    def __post_init__(self) -> None:
        if self.windows < 2 or self.window < 1:
            raise ValueError(
                f"there are {self.windows} windows of {self.window} tokens, but facts and questions need "
                "at least 2 windows"
            )
        if not 1 <= self.facts[0] <= self.facts[1]:
            raise ValueError(f"facts={self.facts} must be (least, most) with 1 <= least <= most")
        for field in ("text_share", "near_share", "again_share", "distractor_share", "chat_share"):
            if not 0 <= getattr(self, field) <= 1:
                raise ValueError(f"{field}={getattr(self, field)} is a share: choose a number from 0 to 1")
        if self.near_share == 1:
            raise ValueError("near_share=1 puts no fact into the earlier windows: lower it")
        if self.text_weight < 0:
            raise ValueError(f"text_weight={self.text_weight} must not be negative")
        if self.chat_share and not getattr(self.tokenizer, "chat_template", None):
            raise ValueError(f"chat_share={self.chat_share}, but the tokenizer has no chat template: set it to 0")
        if not self.kinds:
            raise ValueError("kinds is empty: leave it out to use all kinds of facts")

    def document(self, rng: random.Random) -> Document:
        """Token ids, windows * window + 1 of them, and their weights as targets: 1 for answers and their ends."""
        sample = self.sample(rng)
        return Document(sample.ids, sample.weights, sample.passages)

    def sample(self, rng: random.Random) -> Sample:
        """A document with its facts and where they are.

        Raises:
            ValueError: the windows are too short for a fact and a question, or the filler keeps giving text that
                has words of the passkey test.
        """
        reason = ""
        for _ in range(_ATTEMPTS):
            facts = draw_facts(self.kinds, rng.randint(*self.facts), self.distractor_share, rng)
            earlier, last = self._pieces(facts, rng)
            if not {piece.fact for piece in earlier} & {piece.fact for piece in last}:
                reason = f"a window of {self.window} tokens has no room for a fact or a question: make windows longer"
                continue
            sample = self._place(facts, earlier, last, rng)
            found = forbidden(self.tokenizer.decode(sample.ids))
            if found is None:
                return sample
            reason = f"the filler gives text of the passkey test ({found!r}): take such documents out of it"
        raise ValueError(reason)

    def _pieces(self, facts: Sequence[Fact], rng: random.Random) -> tuple[list[Piece], list[Piece]]:
        """What goes into the earlier windows, and what into the last; each in its order."""
        earlier: list[Piece] = []
        groups: list[list[Piece]] = []  # what must enter the last window together
        room = _MOST_SYNTHETIC * self.window * (self.windows - 1)
        for number, fact in enumerate(facts):
            told = self._statement(number, fact, rng)
            near = rng.random() < self.near_share
            if not near and sum(len(piece.ids) for piece in [*earlier, told]) <= room:
                earlier.append(told)
            elif not near:
                continue  # never told, so never asked
            if rng.random() < _ASKED:
                groups.append([told] * near + [self._question(number, fact, rng)])
                if rng.random() < self.again_share:
                    groups.append([self._question(number, fact, rng)])
        rng.shuffle(groups)
        last: list[Piece] = []
        for group in groups:
            if sum(len(piece.ids) for piece in last + group) <= _MOST_SYNTHETIC * self.window:
                last += group
        rng.shuffle(earlier)
        rng.shuffle(last)
        return earlier, _tell_first([piece for piece in last if self._answerable(piece, earlier + last)])

    @staticmethod
    def _answerable(piece: Piece, others: Sequence[Piece]) -> bool:
        # The second question about a near fact may have found room where the fact itself had none.
        return any(other.answer is None and other.fact == piece.fact for other in others)

    def _place(self, facts: list[Fact], earlier: list[Piece], last: list[Piece], rng: random.Random) -> Sample:
        bos = [self.tokenizer.bos_token_id] if getattr(self.tokenizer, "add_bos_token", False) else []
        regions = ((self.window * (self.windows - 1) - len(bos), earlier), (self.window + 1, last))
        laid = lay(regions, self.filler, rng, bos=bos, text_weight=self.text_weight, text_share=self.text_share)
        return Sample(laid.ids, laid.weights, facts, laid.placed, laid.passages)

    def _statement(self, number: int, fact: Fact, rng: random.Random) -> Piece:
        text = render(rng.choice(fact.kind.statements), fact.entity, fact.relation, fact.value, rng)
        before, after = rng.choice(_BLOCK_FRAMES if "\n" in text else _FRAMES)
        return Piece(number, self._encode(before + text + after))

    def _question(self, number: int, fact: Fact, rng: random.Random) -> Piece:
        """A question whose answer begins and ends where tokens do, as when a model is prompted with it.

        The space before an answer counts to it: some tokenizers make it a token, which the model must then write.
        """
        asked, sentences = chat_turns(fact.kind)
        chat = bool(asked) and rng.random() < self.chat_share
        for _ in range(_ATTEMPTS):
            if chat:
                reply = rng.choice(sentences) if sentences and rng.random() < 0.5 else rng.choice(("{v}", "{v}."))
                found = self._chat_question(number, fact, rng.choice(asked), reply, rng)
                if found is not None:
                    return found
                continue
            template = rng.choice(fact.kind.questions)
            before, after = rng.choice(_BLOCK_FRAMES if "\n" in template else _FRAMES)
            head, tail = (render(part, fact.entity, fact.relation, "", rng) for part in template.split("{v}"))
            text = before + head + fact.value
            prompt, answered, ids = map(self._encode, ((before + head).rstrip(" "), text, text + tail + after))
            if answered[: len(prompt)] == prompt and ids[: len(answered)] == answered and len(ids) > len(answered):
                return Piece(number, ids, (len(prompt), len(answered)))
        raise ValueError(f"the tokenizer joins {fact.value!r} with the text around it in all of {fact.kind.questions}")

    def _chat_question(self, number: int, fact: Fact, question: str, reply: str, rng: random.Random) -> Piece | None:
        """A user's turn and the model's; None if the two together read like the passkey test, or tokens join."""
        asked, head, tail = (
            render(part, fact.entity, fact.relation, "", rng) for part in (question, *reply.split("{v}"))
        )
        return chat_piece(self.tokenizer, number, asked, (head, fact.value, tail))

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids


def draw_facts(kinds: Sequence[Kind], count: int, distractor_share: float, rng: random.Random) -> list[Fact]:
    """Facts of which no two share (entity, relation), or the value, and no entity is part of another's name."""
    facts: list[Fact] = []
    while len(facts) < count:
        kind = rng.choice(kinds)
        entity, relation = draw(kind.entity, rng), rng.choice(kind.relations)
        if facts and rng.random() < distractor_share:
            like = rng.choice(facts)
            if rng.random() < 0.5:
                kind, relation = like.kind, like.relation
                entity = draw(kind.entity, rng)
            else:
                kind = rng.choice([other for other in kinds if other.entity == like.kind.entity])
                entity, relation = like.entity, rng.choice(kind.relations)
        fact = Fact(kind, entity, relation, draw(kind.value, rng))
        if not any(_clash(fact, other) for other in facts):
            facts.append(fact)
    return facts


def _clash(one: Fact, two: Fact) -> bool:
    if one.value == two.value:
        return True
    if one.entity == two.entity:
        return one.relation == two.relation
    return one.entity in two.entity or two.entity in one.entity


def _tell_first(pieces: list[Piece]) -> list[Piece]:
    """The same pieces, each statement moved to the first place that its fact has among them."""
    order = list(pieces)
    for told in [piece for piece in pieces if piece.answer is None]:
        places = [place for place, piece in enumerate(order) if piece.fact == told.fact]
        order.remove(told)
        order.insert(places[0], told)
    return order
