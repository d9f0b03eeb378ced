"""How a method reads a long text and goes on from it: what tasks ask of every method.

A reader reads a text into a state; a state can be read on from, any number of times, each time by a fork of it.
"""

import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from fot.compare.caches import cache_bytes
from fot.compat import CACHE
from fot.families import decoder_of, head
from fot.retrieval.words import WordIndex
from fot.tasks.haystack import bos
from memory import Memory

# Tokens that go through the layers at once while a text is read.
CHUNK = 512

# Of re-reading: tokens of a passage, and passages in front of a question.
PASSAGE = 128
PASSAGES = 4


# Told of tokens as they are read.
Progress = Callable[[int], object]


class Reader(Protocol):
    """One method on one model."""

    def read(self, ids: Sequence[int], progress: Progress) -> Any:
        """Read a text, token ids, and return the state after it; ``progress`` is told of tokens as they are read."""

    def fork(self, state: Any) -> Any:
        """The same state, to go on differently."""

    def feed(self, state: Any, ids: Sequence[int], keep: int) -> Tensor:
        """Read on, which changes the state: logits (keep, V) after the last ``keep`` of these tokens."""

    def held_bytes(self, state: Any) -> int:
        """Bytes that the state keeps of its text."""


@dataclass(frozen=True)
class CachedReader:
    """A plain model with a cache of transformers.

    Attributes:
        model: as the method has made it.
        new_cache: gives an empty cache.
    """

    model: Any
    new_cache: Callable[[], Any]

    def read(self, ids: Sequence[int], progress: Progress) -> Any:
        cache = self.new_cache()
        for start in range(0, len(ids), CHUNK):
            chunk = ids[start : start + CHUNK]
            self._hidden(cache, chunk)
            progress(len(chunk))
        return cache

    def fork(self, state: Any) -> Any:
        return copy.deepcopy(state)

    def feed(self, state: Any, ids: Sequence[int], keep: int) -> Tensor:
        chunks = [self._hidden(state, ids[start : start + CHUNK]) for start in range(0, len(ids), CHUNK)]
        return head(self.model, torch.cat(chunks)[-keep:])

    def held_bytes(self, state: Any) -> int:
        return cache_bytes(state)

    def _hidden(self, cache: Any, ids: Sequence[int]) -> Tensor:
        asked = torch.tensor([list(ids)], device=self.model.device)
        hidden: Tensor = decoder_of(self.model)(asked, use_cache=True, **{CACHE: cache}).last_hidden_state[0]
        return hidden


@dataclass
class Remembered:
    """A memory, and the local window after it; None before anything is read there."""

    memory: Memory
    cache: Any = None


@dataclass(frozen=True)
class MemoryReader:
    """A model with an external memory, which holds the text but for its end: as much as ``forward`` leaves local.

    Attributes:
        model: a ``FoTForCausalLM``.
    """

    model: Any

    def read(self, ids: Sequence[int], progress: Progress) -> Remembered:
        state = Remembered(self.model.new_memory())
        stored = len(ids) - (self.model.memory_config.local_length(len(ids)) if ids else 0)
        if stored:
            self.model.ingest(list(ids[:stored]), state.memory, progress=False)
        if ids:
            self.feed(state, ids[stored:], 1)
        progress(len(ids))
        return state

    def fork(self, state: Remembered) -> Remembered:
        return Remembered(state.memory, copy.deepcopy(state.cache))

    def feed(self, state: Remembered, ids: Sequence[int], keep: int) -> Tensor:
        given: dict[str, Any] = {"memory": state.memory} if state.cache is None else {CACHE: state.cache}
        asked = torch.tensor([list(ids)], device=self.model.device)
        outputs = self.model(asked, use_cache=True, logits_to_keep=keep, **given)
        state.cache = getattr(outputs, CACHE)
        logits: Tensor = outputs.logits[0]
        return logits

    def held_bytes(self, state: Remembered) -> int:
        local = 0 if state.cache is None else cache_bytes(state.cache.local)
        return sum(state.memory.nbytes().values()) + local


@dataclass
class Passages:
    """Passages of a text, and the cache of what was asked of them."""

    parts: list[list[int]]
    texts: list[str]
    words: WordIndex
    cache: Any = None


@dataclass(frozen=True)
class PassageReader:
    """A plain model that reads again, before each question, the passages that share most with it by BM25.

    Attributes:
        reader: of the plain model.
        tokenizer: of the model.
    """

    reader: CachedReader
    tokenizer: Any

    def read(self, ids: Sequence[int], progress: Progress) -> Passages:
        parts = [list(ids[start : start + PASSAGE]) for start in range(0, len(ids), PASSAGE)]
        texts = [self.tokenizer.decode(part, skip_special_tokens=True) for part in parts]
        progress(len(ids))
        return Passages(parts, texts, WordIndex(texts))

    def fork(self, state: Passages) -> Passages:
        return Passages(state.parts, state.texts, state.words, copy.deepcopy(state.cache))

    def feed(self, state: Passages, ids: Sequence[int], keep: int) -> Tensor:
        if state.cache is None:
            state.cache = self.reader.read(self._found(state, ids), lambda tokens: None)
        return self.reader.feed(state.cache, ids, keep)

    def _found(self, state: Passages, ids: Sequence[int]) -> list[int]:
        """The passages, the best last, next to the question."""
        scores = state.words.scores(self.tokenizer.decode(list(ids), skip_special_tokens=True))
        order = [int(one) for one in (-scores).argsort(kind="stable")[:PASSAGES] if scores[one] > 0]
        return bos(self.tokenizer) + list(itertools.chain.from_iterable(state.parts[one] for one in reversed(order)))

    def held_bytes(self, state: Passages) -> int:
        return sum(len(text.encode()) for text in state.texts)


def greedy(reader: Reader, state: Any, ids: Sequence[int], count: int) -> list[int]:
    """The ``count`` likeliest tokens one after another; changes the state."""
    return list(itertools.islice(written(reader, state, ids), count))


def written(reader: Reader, state: Any, ids: Sequence[int], generator: torch.Generator | None = None) -> Iterator[int]:
    """Tokens without end, after these ids; changes the state.

    Args:
        reader: of a method.
        state: of it.
        ids: at least one.
        generator: draws each token by its probability; None for always the likeliest.
    """
    while True:
        logits = reader.feed(state, ids, 1)[0].float().cpu()
        if generator is None:
            token = int(logits.argmax())
        else:
            token = int(torch.multinomial(logits.softmax(-1), 1, generator=generator))
        yield token
        ids = [token]
