"""Running text of an exact length with pieces hidden in it."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Hidden:
    """A text with pieces hidden in it.

    Attributes:
        ids: exactly as many token ids as were asked for.
        depths: share of the text that lies before each piece, 0..1, ascending.
    """

    ids: list[int]
    depths: list[float]


def hide(
    tokenizer: Any, texts: Sequence[Sequence[int]], pieces: Sequence[str], length: int, rng: random.Random
) -> Hidden:
    """Pieces, each a line of its own, in this order at random depths of running text.

    Args:
        tokenizer: of the model.
        texts: token ids of real texts. The text goes on from a random place in them, and starts again where they end.
        pieces: what is hidden.
        length: tokens of the whole.
        rng: draws the place and the depths.

    Raises:
        ValueError: The pieces alone take more tokens.
    """
    encoded = [encode(tokenizer, f"\n{piece}\n") for piece in pieces]
    ids = bos(tokenizer)
    room = length - len(ids) - sum(map(len, encoded))
    if room < 0:
        raise ValueError(
            f"{len(pieces)} needles do not fit in {length} tokens: they need {length - room} tokens without any other "
            "text"
        )
    text = [token for some in texts for token in some]
    start = rng.randrange(len(text))
    text = (text[start:] + text * (room // len(text) + 1))[:room]
    cuts = sorted(rng.randint(0, room) for _ in encoded)
    depths = []
    for before, cut, piece in zip([0, *cuts], cuts, encoded, strict=False):
        ids += text[before:cut]
        depths.append(len(ids) / length)
        ids += piece
    return Hidden(ids + text[cuts[-1] if cuts else 0 :], depths)


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text, nothing added."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)


def bos(tokenizer: Any) -> list[int]:
    """What the tokenizer puts in front of a text."""
    return [tokenizer.bos_token_id] if getattr(tokenizer, "add_bos_token", False) else []
