"""Pieces among real text: what the documents of tasks are laid out of, and questions in a chat template.

>>> laid = lay([(511, told), (513, asked)], filler, rng, bos=[], text_weight=0.5, text_share=0.1)
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from fot.tasks.task import Passage
from fot.tasks.wordings import forbidden
from training.pieces import content_of, framed, special_ids


class Stretch(NamedTuple):
    """Consecutive tokens of a real text.

    Attributes:
        text: names the text.
        first: place of the first token there.
        ids: the tokens.
    """

    text: int
    first: int
    ids: Sequence[int]


Filler = Callable[[random.Random, int], Sequence[Stretch]]


@dataclass(frozen=True)
class Piece:
    """Something told or asked in a document.

    Attributes:
        fact: number of what it tells or asks for, in its document.
        ids: its tokens.
        answer: for a question, where in ``ids`` the answer lies: (first, last + 1). The token after it ends it.
            None for what is told.
        reply: for a question in the chat template, where all that the model says lies, with the token that ends it.
        text: names the real text that all of it is; None for what was made up.
    """

    fact: int
    ids: list[int]
    answer: tuple[int, int] | None = None
    reply: tuple[int, int] = (0, 0)
    text: int | None = None


@dataclass(frozen=True)
class Laid:
    """A document laid out.

    Attributes:
        ids: its tokens.
        weights: for each token, its weight as a target.
        placed: (first position, piece) of every piece, in order.
        passages: what is real text.
    """

    ids: list[int]
    weights: list[float]
    placed: list[tuple[int, Piece]]
    passages: list[Passage]


def lay(
    regions: Sequence[tuple[int, Sequence[Piece]]],
    filler: Filler,
    rng: random.Random,
    *,
    bos: Sequence[int],
    text_weight: float,
    text_share: float,
) -> Laid:
    """One real text that runs through a document, with pieces between at random places.

    Args:
        regions: (tokens, pieces that stand in them, in order) of each part of the document.
        filler: gives the text.
        rng: draws the places, and which tokens count.
        bos: what comes before the first region, or nothing.
        text_weight: weight of those tokens of real text that count, and of a reply's words around its answer.
        text_share: share of the real text's tokens that count, drawn token by token.

    Raises:
        ValueError: the filler gives too few tokens.
    """
    rooms = [length - sum(len(piece.ids) for piece in pieces) for length, pieces in regions]
    found = list(_tokens_of(filler(rng, sum(rooms))))
    if len(found) != sum(rooms):
        raise ValueError(
            f"the filler gave {len(found)} tokens, but {sum(rooms)} were asked for: it must give all of them"
        )
    text, laid = iter(found), Laid(list(bos), [0.0] * len(bos), [], [])

    def add_text(tokens: Iterator[tuple[int, int, int]]) -> None:
        for token, name, place in tokens:
            _add_to(laid.passages, len(laid.ids), name, place)
            laid.ids.append(token)
            laid.weights.append(text_weight if rng.random() < text_share else 0.0)

    for room, (_, pieces) in zip(rooms, regions, strict=True):
        cuts = sorted(rng.randint(0, room) for _ in pieces)
        for before, cut, piece in zip([0, *cuts], [*cuts, room], [*pieces, None], strict=True):
            add_text(islice(text, cut - before))
            if piece is None:
                continue
            laid.placed.append((len(laid.ids), piece))
            if piece.text is None:
                laid.ids.extend(piece.ids)
                laid.weights.extend(_piece_weights(piece, text_weight))
            else:
                add_text(_tokens_of([Stretch(piece.text, 0, piece.ids)]))
    laid.weights[0] = 0.0  # nothing predicts the first token
    return laid


def chat_piece(tokenizer: Any, number: int, question: str, reply: tuple[str, str, str]) -> Piece | None:
    """A user's turn and the model's, in the chat template, as ``fot ask`` puts them.

    Args:
        tokenizer: with a chat template.
        number: of what is asked for.
        question: the user's turn.
        reply: the model's: what stands before the answer, the answer, what stands behind it.

    Returns:
        None if the two together read like the passkey test, or if the answer does not begin or end where tokens do.

    Raises:
        ValueError: the template changes replies.
    """
    head, answer, tail = reply
    said = head + answer + tail
    user = {"role": "user", "content": question}
    prompt = tokenizer.apply_chat_template([user], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template([user, {"role": "assistant", "content": said}], tokenize=False)
    if not whole.startswith(prompt + said):
        raise ValueError(
            "the chat template does not put a reply at the place where its generation prompt ends: set chat_share to "
            "0, and leave out tasks of kind questions"
        )
    texts = (prompt, prompt + head.rstrip(" "), prompt + head + answer, prompt + said, whole)
    different = list(dict.fromkeys(texts))
    encoded = dict(zip(different, tokenizer(different, add_special_tokens=False).input_ids, strict=True))
    pieces = [encoded[text] for text in texts]
    ids = pieces[-1]
    if forbidden(f"{question} {said}") or any(ids[: len(piece)] != piece for piece in pieces):
        return None
    first, start, end, last, _ = map(len, pieces)
    return Piece(number, ids, (start, end), (first, min(last + 1, len(ids))))


def _piece_weights(piece: Piece, text_weight: float) -> list[float]:
    weights = [0.0] * len(piece.ids)
    first, end = piece.reply
    weights[first:end] = [text_weight] * (end - first)
    if piece.answer is not None:
        first, end = piece.answer
        weights[first : end + 1] = [1.0] * (end + 1 - first)
    return weights


def _tokens_of(stretches: Sequence[Stretch]) -> Iterator[tuple[int, int, int]]:
    """(token, name of its text, place there) of each token."""
    for text, first, ids in stretches:
        yield from ((token, text, place) for place, token in enumerate(ids, first))


def _add_to(passages: list[Passage], start: int, text: int, place: int) -> None:
    """Note where the token ``start`` of a document was taken from; the last passage grows if it goes on there."""
    last = passages[-1] if passages else None
    if last is not None and (last.start + last.length, last.text, last.first + last.length) == (start, text, place):
        passages[-1] = last._replace(length=last.length + 1)
    else:
        passages.append(Passage(start, 1, text, place))


def filler_from(texts: Sequence[Sequence[int]], tokenizer: Any = None) -> Filler:
    """Real text from tokenised texts: n tokens from a random place of one, going on with others where it ends.

    Longer texts are drawn more often.

    Args:
        texts: token ids of each, without BOS and EOS.
        tokenizer: of a run whose lanes may read the same texts; they are then known as the same.

    Raises:
        ValueError: all texts are empty.
    """
    kept = [list(text) for text in texts if len(text)]
    if not kept:
        raise ValueError("no text to hide facts in: all texts are empty")
    lengths = [len(text) for text in kept]
    bos, eos, _ = special_ids(tokenizer)
    # As lanes read them, which leave EOS to the next text if it is BOS, too.
    whole = [framed(text, bos, None if bos == eos else eos) for text in kept]
    names = [content_of(np.asarray(text, np.int32)) for text in whole]
    numbers, before = range(len(kept)), int(bos is not None)

    def stretch(number: int, start: int, count: int) -> Stretch:
        return Stretch(names[number], before + start, kept[number][start : start + count])

    def fill(rng: random.Random, count: int) -> list[Stretch]:
        number = rng.choices(numbers, lengths)[0]
        found = [stretch(number, rng.randrange(max(1, lengths[number] - count + 1)), count)]
        while (left := count - sum(len(some.ids) for some in found)) > 0:
            found.append(stretch(rng.choices(numbers, lengths)[0], 0, left))
        return found if count else []

    return fill
