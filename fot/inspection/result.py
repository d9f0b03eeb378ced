"""What a recording found."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from fot.inspection.measure import Hits
from fot.inspection.passages import Passage, document_name, find_passages, make_passage
from fot.inspection.strip import Strip, run_of
from fot.inspection.texts import token_texts
from memory import Memory
from memory.atomic import write_bytes

# Slots of several memories in one row of numbers.
MEMORY_STRIDE = 1 << 40


@dataclass(frozen=True)
class Token:
    """A token of prompt or answer: its id, its text (characters of several tokens belong to the last)."""

    id: int
    text: str
    is_generated: bool


@dataclass(frozen=True)
class Found:
    """Hits of Q query tokens in L memory layers and H query heads, K each, best first.

    Attributes:
        positions: (Q,) place of each query token in the sequence.
        chose: (Q,) bool, the next token was chosen after this one.
        local: (Q, L, H) float32, share of all attention that stayed in the local window.
        memory: (Q, L, H, K) number of the memory; -1 where fewer than K were found.
        slot: (Q, L, H, K); see ``Hits`` for this and the rest.
    """

    positions: np.ndarray
    chose: np.ndarray
    local: np.ndarray
    memory: np.ndarray
    slot: np.ndarray
    score: np.ndarray
    knn_score: np.ndarray
    share: np.ndarray
    focus_score: np.ndarray

    @classmethod
    def of_layer(cls, positions: Tensor, chose: Tensor, hits: Hits, local: Tensor) -> "Found":
        """From one layer: hits (H, Q, K), ``local`` (H, Q)."""
        arrays = {field.name: getattr(hits, field.name).transpose(0, 1).unsqueeze(1).numpy() for field in fields(hits)}
        return cls(positions.cpu().numpy(), chose.cpu().numpy(), local.T.unsqueeze(1).cpu().numpy(), **arrays)

    @classmethod
    def stack(cls, layers: Sequence["Found"]) -> "Found":
        """The same queries in several layers."""
        return cls(
            layers[0].positions,
            layers[0].chose,
            *(np.concatenate([getattr(found, field.name) for found in layers], axis=1) for field in fields(cls)[2:]),
        )

    @classmethod
    def join(cls, parts: Sequence["Found"]) -> "Found":
        """One after another; at least one."""
        return cls(*(np.concatenate([getattr(found, field.name) for found in parts]) for field in fields(cls)))


@dataclass(frozen=True)
class Trace:
    """Which memory slots an answer's tokens attended to.

    A token's hits are what was attended to while it was read: they decide about the token *after* it. The last token
    of the answer was never read and has none. Texts are read from the memories when asked for, so keep those as they
    are.

    Attributes:
        tokens: prompt and answer.
        layers: memory layers.
        found: hits of each recorded token, layer and head.
        memories: what was read: the memory given, if any, then that which the prompt itself moved to.
        own: number of that last memory; None if the prompt was stored in the memory given.
        strips: for each memory, attention mass by position and by document, summed over heads and over the tokens
            that chose the next one.
        complete: strips are exact sums over all slots; otherwise over retrieved hits, see ``coverage``.
        tokenizer: for texts; may be None.
    """

    tokens: list[Token]
    layers: tuple[int, ...]
    found: Found
    memories: list[Memory]
    own: int | None
    strips: list[Strip]
    complete: bool
    tokenizer: Any

    @property
    def text(self) -> str:
        """The answer."""
        return "".join(token.text for token in self.tokens if token.is_generated)

    @property
    def memory_share(self) -> float:
        """Share of all attention that went to memory while tokens were chosen, over layers and heads."""
        return 1.0 - float(self.found.local[self.found.chose].mean())

    @cached_property
    def coverage(self) -> float:
        """Share of the attention to memory that ``strips`` hold; 1 if it is ``complete``."""
        held = sum(float(strip.bins.sum()) for strip in self.strips)
        mass = float((1.0 - self.found.local[self.found.chose].astype(np.float64)).sum())
        return min(1.0, held / mass) if mass else 1.0

    def documents(self) -> dict[str, float]:
        """Name -> share of the attention mass in ``strips``, most first."""
        sums: dict[str, float] = {}
        for number, strip in enumerate(self.strips):
            for document, masses in strip.documents.items():
                name = document_name(document, own=number == self.own)
                sums[name] = sums.get(name, 0.0) + float(masses.sum())
        total = sum(sums.values())
        return {name: mass / total for name, mass in sorted(sums.items(), key=lambda item: -item[1])}

    def passages(self, count: int = 5) -> list[Passage]:
        """What carried attention mass for tokens of the answer in particular, adjacent hits merged, most first.

        Shares are of the mass on all memory, over all layers and heads; only the hits kept count. What is hit at every
        token (an attention sink, such as the first token of a book) says nothing about this answer. So the order is by
        mass times ``log((1 + tokens) / tokens that hit the slot)``, as rare words count in text retrieval.
        """
        slots, masses, weights = self._hit_masses()
        documents = np.zeros_like(slots)
        for number, memory in enumerate(self.memories):
            mine = slots // MEMORY_STRIDE == number
            documents[mine] = run_of(memory.document_runs(), slots[mine] % MEMORY_STRIDE)
        passages = []
        for start, stop, mass in find_passages(slots, documents, masses, weights, count):
            number, start = divmod(start, MEMORY_STRIDE)
            stop %= MEMORY_STRIDE
            passages.append(
                make_passage(self.memories[number], start, stop, mass, self.tokenizer, own=number == self.own)
            )
        return passages

    def to_columns(self) -> dict[str, list[Any]]:
        """The hits as columns: name -> one value a hit. ``pandas.DataFrame`` takes it."""
        found = self.found
        query, layer, head, rank = np.nonzero(found.memory >= 0)
        at = (query, layer, head, rank)
        places = [self._place(int(m), int(s)) for m, s in zip(found.memory[at], found.slot[at], strict=True)]
        positions = found.positions[query].tolist()
        return {
            "query": positions,
            "query_text": [self.tokens[position].text for position in positions],
            "is_generated": [self.tokens[position].is_generated for position in positions],
            "layer": np.asarray(self.layers)[layer].tolist(),
            "head": head.tolist(),
            "rank": rank.tolist(),
            "memory": found.memory[at].tolist(),
            "slot": found.slot[at].tolist(),
            "score": found.score[at].tolist(),
            "knn_score": found.knn_score[at].tolist(),
            "share": found.share[at].tolist(),
            "focus_score": found.focus_score[at].tolist(),
            "local_share": found.local[at[:3]].tolist(),
            **{name: [place[name] for place in places] for name in ("token_id", "text", "document", "start", "end")},
        }

    def to_records(self) -> list[dict[str, Any]]:
        """A flat dictionary for each hit: its query token, layer, head, rank, slot, scores and source."""
        columns = self.to_columns()
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    def to_json(self, path: Path) -> None:
        """Write all of it, hits as columns (see ``to_columns``)."""
        content = {
            "text": self.text,
            "tokens": [vars(token) for token in self.tokens],
            "layers": list(self.layers),
            "memory_share": self.memory_share,
            "documents": self.documents(),
            "passages": [vars(passage) for passage in self.passages()],
            "positions": [
                {"tokens": len(memory), "tokens_a_bin": strip.width, "mass": strip.bins.round(8).tolist()}
                for memory, strip in zip(self.memories, self.strips, strict=True)
            ],
            "positions_complete": self.complete,
            "positions_coverage": self.coverage,
            "hits": self.to_columns(),
        }
        write_bytes(Path(path), json.dumps(content).encode())

    def _hit_masses(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Slots hit while tokens were chosen, ascending, as number * MEMORY_STRIDE + slot; their shares of the mass;
        and their weights, see ``passages``."""
        found, chose = self.found, self.found.chose
        hit = found.memory[chose] >= 0
        slots = (found.memory[chose] * MEMORY_STRIDE + found.slot[chose])[hit]
        distinct, place = np.unique(slots, return_inverse=True)
        total = float((1.0 - found.local[chose].astype(np.float64)).sum()) or 1.0
        masses = np.bincount(place, weights=found.share[chose][hit] / total, minlength=len(distinct)).astype(np.float64)
        token = np.nonzero(hit)[0]
        pairs = np.unique(place * len(hit) + token)  # a slot and a token that hit it, each once
        tokens = np.bincount(pairs // max(1, len(hit)), minlength=len(distinct))
        return distinct, masses, masses * np.log((1 + len(hit)) / np.maximum(tokens, 1))

    @cached_property
    def _places(self) -> dict[tuple[int, int], dict[str, Any]]:
        return {}

    def _place(self, number: int, slot: int) -> dict[str, Any]:
        """Token and source of a slot."""
        if (number, slot) not in self._places:
            memory = self.memories[number]
            source, token = memory.source(slot), int(memory.token_ids([slot])[0])
            start, end = source.span or (None, None)
            self._places[number, slot] = {
                "token_id": token,
                "text": token_texts(self.tokenizer, [token])[0],
                "document": document_name(source.document, own=number == self.own),
                "start": start,
                "end": end,
            }
        return self._places[number, slot]
