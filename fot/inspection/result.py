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
        local: (Q, L, H) float32, share of all attention that stayed in the local window, learnt sinks included.
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

    def passages(self, count: int = 5, *, token: int | None = None) -> list[Passage]:
        """What carried attention mass for tokens of the answer in particular, adjacent hits merged, most first.

        What is hit at every token (an attention sink, such as the first token of a book) says nothing about this
        answer. So a hit weighs its mass times ``log((1 + tokens) / tokens that hit the slot)``, as rare words count in
        text retrieval. Passages are ordered by this weight. Shares are of the weight of all hits kept, over all layers
        and heads: all passages together have 1.

        Args:
            count: passages wanted.
            token: place in ``tokens``: only what was attended to when this token of the answer was chosen, or this
                token of the prompt was read; None for the whole answer.
        """
        found = self.found
        if token is None:
            ranked = self._ranked(np.flatnonzero(found.chose), count)
        else:
            position = token - 1 if self.tokens[token].is_generated else token
            ranked = [run for q in np.flatnonzero(found.positions == position) for run in self.ranked(int(q))[:count]]
        return [
            make_passage(self.memories[number], start, stop, share, self.tokenizer, own=number == self.own)
            for number, start, stop, share in ranked
        ]

    def ranked(self, query: int) -> list[tuple[int, int, int, float]]:
        """All passages of a query token, ranked as ``passages`` does: (memory, first, past-the-end slot, share).

        Args:
            query: number of the token among those of ``found``.
        """
        if query not in self._ranks:
            self._ranks[query] = self._ranked(np.asarray([query]), self.found.memory[query].size)
        return self._ranks[query]

    def _ranked(self, queries: np.ndarray, count: int) -> list[tuple[int, int, int, float]]:
        slots, weights = self._hit_weights(queries)
        documents = np.zeros_like(slots)
        for number, memory in enumerate(self.memories):
            mine = slots // MEMORY_STRIDE == number
            documents[mine] = run_of(memory.document_runs(), slots[mine] % MEMORY_STRIDE)
        runs = find_passages(slots, documents, weights / (weights.sum() or 1.0), count)
        return [(*divmod(start, MEMORY_STRIDE), stop % MEMORY_STRIDE, share) for start, stop, share in runs]

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

    def _hit_weights(self, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Slots that these query tokens hit, ascending, as number * MEMORY_STRIDE + slot; and their weights, see
        ``passages``."""
        found = self.found
        hit = found.memory[queries] >= 0
        distinct, place = np.unique(self._slots_hit(queries)[hit], return_inverse=True)
        masses = np.bincount(place, weights=found.share[queries][hit], minlength=len(distinct)).astype(np.float64)
        known, tokens = self._answer_tokens
        at = np.searchsorted(known, distinct)
        counts = np.where(np.isin(distinct, known), tokens[np.minimum(at, len(tokens) - 1)], 1) if len(known) else 1
        return distinct, masses * np.log((1 + int(found.chose.sum())) / counts)

    def _slots_hit(self, queries: np.ndarray) -> np.ndarray:
        """(q, L, H, K) number * MEMORY_STRIDE + slot."""
        return self.found.memory[queries] * MEMORY_STRIDE + self.found.slot[queries]

    @cached_property
    def _answer_tokens(self) -> tuple[np.ndarray, np.ndarray]:
        """Slots hit while the answer was chosen, ascending, and how many of its tokens hit each."""
        chose = np.flatnonzero(self.found.chose)
        hit = self.found.memory[chose] >= 0
        known, place = np.unique(self._slots_hit(chose)[hit], return_inverse=True)
        pairs = np.unique(place * len(hit) + np.nonzero(hit)[0])  # a slot and a token that hit it, each once
        return known, np.bincount(pairs // max(1, len(hit)), minlength=len(known))

    @cached_property
    def _ranks(self) -> dict[int, list[tuple[int, int, int, float]]]:
        return {}

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
