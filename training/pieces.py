"""What lanes hold: documents, or what is left of them, and the cutting of spans of consecutive tokens off them."""

import base64
import hashlib
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fot.tasks.task import Document

ANSWER_WEIGHT = 1.0  # a task's tokens of this weight or more are answers; text around them counts less or not at all


@dataclass(frozen=True)
class Piece:
    """What is left of a document.

    Attributes:
        document: its number.
        ids: (n,) int32.
        weights: (n,) float32, of each token as a target; that of the first counts if another document comes before it.
        content: names the tokens of the whole document.
        first: place of ``ids[0]`` in the document.
    """

    document: int
    ids: NDArray[np.int32]
    weights: NDArray[np.float32]
    content: int
    first: int = 0

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, place: slice) -> "Piece":
        first = self.first + place.indices(len(self))[0]
        return Piece(self.document, self.ids[place], self.weights[place], self.content, first)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        packed = {"ids": _pack(self.ids), "weights": _pack(self.weights)}
        return {"document": self.document, "content": self.content, "first": self.first} | packed

    @staticmethod
    def from_dict(state: dict[str, Any]) -> "Piece":
        """What ``to_dict`` gave."""
        ids, weights = _unpack(state["ids"], "<i4"), _unpack(state["weights"], "<f4")
        return Piece(state["document"], ids, weights, state["content"], state["first"])


@dataclass(frozen=True)
class Span:
    """Consecutive tokens of one lane: (n,) inputs, the tokens after them and their weights, and of the inputs their
    documents, the names of the texts that they are of and the places in them. Targets may be answers. ``whole``: the
    span is all of a document."""

    inputs: NDArray[np.int32]
    targets: NDArray[np.int32]
    weights: NDArray[np.float32]
    documents: NDArray[np.int64]
    contents: NDArray[np.int64]
    positions: NDArray[np.int64]
    answers: NDArray[np.bool_]
    whole: bool = False


def take(pieces: Sequence[Piece], count: int) -> tuple[Span, list[Piece]]:
    """Cut the next tokens off a lane.

    Args:
        pieces: what the lane holds, in order; at least 2 tokens.
        count: inputs wanted. With fewer than count + 1 tokens there are as many as have a token after them.

    Returns:
        the tokens, and the rest; its first token was the last target, and is the next input.
    """
    needed, parts = count + 1, []
    for piece in pieces:
        parts.append(piece[:needed])
        needed -= len(parts[-1])
        if not needed:
            break
    ids = np.concatenate([part.ids for part in parts])
    weights = np.concatenate([part.weights for part in parts])
    documents = np.concatenate([np.full(len(part), part.document, np.int64) for part in parts])
    contents = np.concatenate([np.full(len(part), part.content, np.int64) for part in parts])
    positions = np.concatenate([np.arange(part.first, part.first + len(part), dtype=np.int64) for part in parts])
    nothing = np.zeros(len(ids) - 1, np.bool_)
    span = Span(ids[:-1], ids[1:], weights[1:], documents[:-1], contents[:-1], positions[:-1], nothing)
    return span, _drop(pieces, len(ids) - 1)


def whole_piece(document: int, ids: Sequence[int], weights: Sequence[float] | NDArray[np.float32]) -> Piece:
    """All of a document."""
    tokens = np.asarray(ids, np.int32)
    return Piece(document, tokens, np.asarray(weights, np.float32), content_of(tokens))


def task_span(number: int, document: Document) -> Span:
    """A task's document with its number. Tokens that count in full are answers."""
    ids, weights, passages = document
    span, _ = take([whole_piece(number, ids, weights)], len(ids) - 1)
    contents, positions = span.contents.copy(), span.positions.copy()
    for start, length, text, first in passages:
        contents[start : start + length] = text
        positions[start : start + length] = np.arange(first, first + length)[: max(0, len(positions) - start)]
    answers = span.weights >= ANSWER_WEIGHT
    return replace(span, contents=contents, positions=positions, answers=answers, whole=True)


def special_ids(tokenizer: Any) -> tuple[int | None, int | None, int]:
    """BOS and EOS, if there are any, and what fills padding: any id will do, as nothing sees it."""
    if tokenizer is None:
        return None, None, 0
    bos, eos, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    return bos, eos, next((n for n in (pad, eos) if n is not None), 0)


def framed(ids: Sequence[int], bos: int | None, eos: int | None) -> list[int]:
    """A text between BOS and EOS, as far as they are given."""
    return [*([] if bos is None else [bos]), *ids, *([] if eos is None else [eos])]


def content_of(ids: NDArray[np.int32]) -> int:
    """Names a document by its tokens: 63 bits of their hash."""
    digest = hashlib.blake2b(ids.astype("<i4").tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _drop(pieces: Sequence[Piece], count: int) -> list[Piece]:
    rest = []
    for piece in pieces:
        if count < len(piece):
            rest.append(piece[count:])
        count -= min(count, len(piece))
    return rest


def _pack(values: NDArray[Any]) -> str:
    """Little-endian bytes, compressed, as text: a long novel's tokens take about half a megabyte."""
    little_endian = values.astype(values.dtype.newbyteorder("<"))
    return base64.b64encode(zlib.compress(little_endian.tobytes())).decode("ascii")


def _unpack(text: str, dtype: str) -> NDArray[Any]:
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), dtype).astype(np.dtype(dtype).newbyteorder("="))
