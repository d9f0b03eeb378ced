"""Dictionary lookup (arXiv 2307.03170, section 4.1): keys of four symbols, values of four symbols, then questions.

A record is ``<k> k1 k2 k3 k4 <v> v1 v2 v3 v4``, a question ``<q> k1 k2 k3 k4 <v> v1 v2 v3 v4``, both 10 tokens of a
vocabulary of 64. A window holds whole records and questions, as many as fit, and is padded at its end: none is cut
in two, so that a key is always read together with its value.

>>> table = DictionaryTable.of_tokens(16 * 2**20, seed=0)
>>> for chunk in record_chunks(table): model.ingest(chunk, memory)
>>> questions = ask(table, rng=np.random.default_rng(1))
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fot.tasks.task import Document

PAD, KEY, VALUE, QUESTION = range(4)
FIRST_SYMBOL = 4
VOCABULARY = 64
SYMBOLS = VOCABULARY - FIRST_SYMBOL
PART = 4  # symbols of a key, and of a value
RECORD = 2 + 2 * PART  # tokens of a record or a question
ALL_KEYS = SYMBOLS**PART  # 12,960,000
_HALF = SYMBOLS ** (PART // 2)
_ROUNDS = 6

Array = NDArray[np.int64]


@dataclass
class DictionaryTask:
    """Training documents: records with distinct random keys, then questions about them; a ``fot.tasks.task.Task``.

    All windows but the last hold records. The last one holds questions, as in evaluation, so that every answer has to
    come from the memory. No record is asked for twice.

    Full windows alone teach a new model nothing for a long time: of 25 records, attention that cannot tell them apart
    gives the right one 4 %. ``fewest_records`` lets the number of different records vary, evenly on a log scale,
    so that there are documents from which the next step can be learnt at every stage. They repeat their records until
    the windows are full.

    Attributes:
        windows: of a document, at least 2.
        window: tokens of each.
        fewest_records: different ones in a document; the most is what its windows hold. None: always the most.
        similar: share of records whose key is an earlier one's with one of its four symbols changed. In a dictionary
            of millions there are such for every key.
        name: in logs.
    """

    windows: int = 2
    window: int = 256
    fewest_records: int | None = None
    similar: float = 0.0
    name: str = "dictionary"

    def __post_init__(self) -> None:
        if self.windows < 2:
            raise ValueError(f"windows is {self.windows}, but records and questions need at least 2")
        most = _fit(self.window) * (self.windows - 1)
        if self.fewest_records is not None and not 1 <= self.fewest_records <= most:
            raise ValueError(f"fewest_records is {self.fewest_records}, but these windows hold 1 to {most} records")
        if not 0 <= self.similar <= 1:
            raise ValueError(
                f"similar is {self.similar}, but it is a share of the records: choose a number from 0 to 1"
            )

    def document(self, rng: random.Random) -> Document:
        """windows * window + 1 token ids, and weights: of the values of questions, else 0.

        The weights of a document add up to what a full window of questions has, one a token, however many it has.
        Padding ends windows; the last token makes the tokens before it, which have targets, whole windows.
        """
        fit = _fit(self.window)
        count = most = fit * (self.windows - 1)
        if self.fewest_records is not None:
            count = round(self.fewest_records * (most / self.fewest_records) ** rng.random())
        keys = self._keys(rng, count)
        values = [_symbols(rng.randrange(ALL_KEYS)) for _ in range(count)]
        records = [[KEY, *keys[i], VALUE, *values[i]] for i in range(count)]
        told = [i for _ in range(0, most, count) for i in rng.sample(range(count), count)][:most]
        asked = rng.sample(range(count), min(count, fit))
        questions = [[QUESTION, *keys[i], VALUE, *values[i]] for i in asked]
        windows = [[records[i] for i in told[first : first + fit]] for first in range(0, most, fit)] + [questions]
        ids: list[int] = []
        for entries in windows:
            filled = [token for entry in entries for token in entry]
            ids += filled + [PAD] * (self.window - len(filled))
        weights = [0.0] * (len(ids) - self.window) + [fit / len(asked) * w for w in _answer_weights(len(asked))]
        weights += [0.0] * (len(ids) - len(weights))
        return Document([*ids, PAD], [*weights, 0.0])

    def _keys(self, rng: random.Random, count: int) -> list[list[int]]:
        """Distinct keys, the share ``similar`` of them made from others."""
        taken: set[tuple[int, ...]] = set()
        keys: list[list[int]] = []
        while len(keys) < count:
            key = _symbols(rng.randrange(ALL_KEYS))
            if keys and rng.random() < self.similar:
                place, symbol = rng.randrange(PART), rng.randrange(SYMBOLS)
                key = list(rng.choice(keys))
                key[place] = FIRST_SYMBOL + symbol
            if tuple(key) not in taken:
                taken.add(tuple(key))
                keys.append(key)
        return keys


@dataclass(frozen=True)
class DictionaryTable:
    """Any number of records with distinct keys, computed from their numbers, so that none has to be kept.

    Record i's key is a permutation of the key space applied to i, a Feistel network of six rounds over two halves of
    60 * 60; its value is a hash of i. Both look random and depend on the seed alone.

    Attributes:
        records: how many there are.
        seed: another seed, another table.
    """

    records: int
    seed: int

    def __post_init__(self) -> None:
        if not 1 <= self.records <= ALL_KEYS:
            raise ValueError(f"{self.records} records cannot have distinct keys: choose 1 to {ALL_KEYS}")

    @staticmethod
    def of_tokens(tokens: int, seed: int, window: int = 256) -> "DictionaryTable":
        """The table whose records fill ``tokens`` tokens; those must be whole windows."""
        if tokens < window or tokens % window:
            raise ValueError(f"{tokens} tokens are not one or more whole windows of {window}")
        return DictionaryTable(tokens // window * _fit(window), seed)

    def keys(self, numbers: Array) -> Array:
        """(n,) record numbers -> (n, 4) token ids of their keys."""
        left, right = np.divmod(self._checked(numbers), _HALF)
        for turn in range(_ROUNDS):
            left, right = right, (left + self._hash(right, turn) % _HALF) % _HALF
        return _spread(left * _HALF + right)

    def values(self, numbers: Array) -> Array:
        """(n,) record numbers -> (n, 4) token ids of their values."""
        return _spread(self._hash(self._checked(numbers), _ROUNDS) % ALL_KEYS)

    def lookup(self, keys: Array) -> Array:
        """The right answers: (n, 4) token ids of keys -> (n, 4) token ids of values.

        Raises:
            ValueError: a key is in no record, or is no key.
        """
        if keys.size and not FIRST_SYMBOL <= keys.min() <= keys.max() < VOCABULARY:
            raise ValueError(f"keys are made of the symbols {FIRST_SYMBOL}..{VOCABULARY - 1}")
        packed = (keys.astype(np.int64) - FIRST_SYMBOL) @ (SYMBOLS ** np.arange(PART - 1, -1, -1))
        left, right = np.divmod(packed, _HALF)
        for turn in reversed(range(_ROUNDS)):
            left, right = (right - self._hash(left, turn) % _HALF) % _HALF, left
        numbers = left * _HALF + right
        if (numbers >= self.records).any():
            raise ValueError(f"key {keys[numbers >= self.records][0].tolist()} is in none of {self.records} records")
        return self.values(numbers)

    def _checked(self, numbers: Array) -> Array:
        if numbers.size and not 0 <= numbers.min() <= numbers.max() < self.records:
            raise ValueError(f"record numbers are 0..{self.records - 1}, not {numbers.min()}..{numbers.max()}")
        return numbers.astype(np.int64)

    def _hash(self, numbers: Array, salt: int) -> Array:
        """Splitmix64's finaliser: 63 well-mixed bits of (number, salt, seed)."""
        offset = (self.seed * (_ROUNDS + 1) + salt + 1) * 0x9E3779B97F4A7C15
        mixed = numbers.astype(np.uint64) + np.uint64(offset % 2**64)  # wraps, as it should
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
        return ((mixed ^ (mixed >> np.uint64(31))) >> np.uint64(1)).astype(np.int64)


def record_chunks(table: DictionaryTable, window: int = 256, chunk_windows: int = 1024) -> Iterator[Tensor]:
    """The table's records in whole windows, some windows at a time, as they go into a memory.

    Yields:
        (windows * window,) int64 token ids, at most ``chunk_windows`` windows. Under 100 bytes of memory a token of
        a chunk, whatever the table's size. The last window is padded where records run out.
    """
    fit = _fit(window)
    for first in range(0, table.records, fit * chunk_windows):
        numbers = np.arange(first, min(first + fit * chunk_windows, table.records))
        yield torch.from_numpy(_windows(_entries(table, numbers, KEY), window).reshape(-1))


@dataclass(frozen=True)
class Questions:
    """One window of questions.

    Attributes:
        ids: (window,) int64, the questions with their answers.
        answers: (window,) bool, true on the tokens of the answers.
        numbers: the record that each question asks for.
    """

    ids: Tensor
    answers: Tensor
    numbers: Array


def ask(table: DictionaryTable, rng: np.random.Generator, window: int = 256) -> Questions:
    """A window full of questions about records drawn uniformly from the whole table.

    No record is asked for twice as long as there are enough: a second answer could be copied from the first.
    """
    fit = _fit(window)
    numbers = rng.choice(table.records, fit, replace=table.records < fit).astype(np.int64)
    ids = _windows(_entries(table, numbers, QUESTION), window)[0]
    answers = np.zeros(window, dtype=bool)
    answers[: fit * RECORD] = np.array(_answer_weights(fit), dtype=bool)
    return Questions(torch.from_numpy(ids), torch.from_numpy(answers), numbers)


def _fit(window: int) -> int:
    """Records or questions that a window holds."""
    if window < RECORD:
        raise ValueError(f"a window of {window} tokens holds no record of {RECORD}")
    return window // RECORD


def _entries(table: DictionaryTable, numbers: Array, kind: int) -> Array:
    """(n, 10) records or questions."""
    entries = np.empty((len(numbers), RECORD), dtype=np.int64)
    entries[:, 0] = kind
    entries[:, 1 : 1 + PART] = table.keys(numbers)
    entries[:, 1 + PART] = VALUE
    entries[:, 2 + PART :] = table.values(numbers)
    return entries


def _windows(entries: Array, window: int) -> Array:
    """(n, 10) -> (windows, window), each with whole entries, then padding."""
    fit = _fit(window)
    count = -(-len(entries) // fit)
    whole = np.full((count * fit, RECORD), PAD, dtype=np.int64)
    whole[: len(entries)] = entries
    windows = np.full((count, window), PAD, dtype=np.int64)
    windows[:, : fit * RECORD] = whole.reshape(count, fit * RECORD)
    return windows


def _symbols(number: int) -> list[int]:
    """A number below ``ALL_KEYS`` as four symbols."""
    return [FIRST_SYMBOL + number // SYMBOLS**place % SYMBOLS for place in range(PART - 1, -1, -1)]


def _spread(numbers: Array) -> Array:
    """(n,) numbers below ``ALL_KEYS`` -> (n, 4) symbols."""
    return FIRST_SYMBOL + numbers[:, None] // SYMBOLS ** np.arange(PART - 1, -1, -1) % SYMBOLS


def _answer_weights(questions: int) -> list[float]:
    return ([0.0] * (2 + PART) + [1.0] * PART) * questions
