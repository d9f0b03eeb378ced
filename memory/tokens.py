"""What is known of each stored token: its id, and where it came from."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

NO_DOCUMENT = -1
NO_SPAN = -1


@dataclass(frozen=True)
class Source:
    """Where a stored token came from: a document's name, and its characters there (None if not known)."""

    document: str | None
    span: tuple[int, int] | None


@dataclass(frozen=True)
class DocumentNote:
    """What is known of a document as a whole.

    Attributes:
        sha256: of its text in UTF-8, hexadecimal; empty if it is not known.
        complete: whether all of it has been read.
    """

    sha256: str = ""
    complete: bool = True


class TokenTable:
    """Per stored token: id, document number, character span. NumPy columns that grow by doubling.

    Args:
        rows: (n, 4) int32 of what is stored already: id, document (-1: none), first and past-the-end character
            (-1: not known).
        names: of the documents, by number.
    """

    def __init__(self, rows: np.ndarray | None = None, names: Sequence[str] = ()) -> None:
        self._columns = np.empty((0, 4), dtype=np.int32) if rows is None else rows
        self._length = len(self._columns)
        self._names = list(names)

    def __len__(self) -> int:
        return self._length

    @property
    def ids(self) -> np.ndarray:
        return self._columns[: self._length, 0]

    @property
    def rows(self) -> np.ndarray:
        """(n, 4) int32, as ``TokenTable`` takes them."""
        return self._columns[: self._length]

    @property
    def names(self) -> tuple[str, ...]:
        """The documents, by number."""
        return tuple(self._names)

    def prepare(
        self, ids: np.ndarray, document: str | None, spans: Sequence[tuple[int, int]] | np.ndarray | None
    ) -> tuple[np.ndarray, str | None]:
        rows = np.full((len(ids), 4), NO_SPAN, dtype=np.int32)
        rows[:, 0] = ids
        if spans is not None:
            if len(spans) != len(ids):
                raise ValueError(f"there are {len(spans)} spans for {len(ids)} token ids: give one span for each token")
            rows[:, 2:] = np.asarray(spans, dtype=np.int32).reshape(-1, 2)
        return rows, document

    def commit(self, prepared: tuple[np.ndarray, str | None]) -> None:
        rows, document = prepared
        if document is not None and document not in self._names:
            self._names.append(document)
        rows[:, 1] = NO_DOCUMENT if document is None else self._names.index(document)
        needed = self._length + len(rows)
        if needed > len(self._columns):
            grown = np.empty((max(needed, 2 * len(self._columns), 1024), 4), dtype=np.int32)
            grown[: self._length] = self._columns[: self._length]
            self._columns = grown
        self._columns[self._length : needed] = rows
        self._length = needed

    def source(self, slot: int) -> Source:
        _, document, first, last = (int(x) for x in self._columns[slot])
        return Source(
            None if document == NO_DOCUMENT else self._names[document], None if first == NO_SPAN else (first, last)
        )

    def documents(self) -> dict[str, int]:
        numbers = self._columns[: self._length, 1]
        counts = np.bincount(numbers[numbers >= 0], minlength=len(self._names))
        return {name: int(count) for name, count in zip(self._names, counts, strict=True)}

    def runs(self) -> list[tuple[str | None, int, int]]:
        numbers = self._columns[: self._length, 1]
        starts = np.flatnonzero(np.diff(numbers, prepend=NO_DOCUMENT - 1)).tolist()
        names = [None if numbers[start] == NO_DOCUMENT else self._names[numbers[start]] for start in starts]
        return list(zip(names, starts, [*starts[1:], self._length], strict=False))

    def starts(self, start: int, stop: int, count: int) -> np.ndarray:
        """Slots of the first ``count`` tokens of each run of one document, of those in start..stop-1, ascending."""
        low = max(0, start - count + 1)
        before = int(self._columns[low - 1, 1]) if low else NO_DOCUMENT - 1
        firsts = low + np.flatnonzero(np.diff(self._columns[low:stop, 1], prepend=before))
        slots = np.unique(firsts[:, None] + np.arange(count))
        return slots[(slots >= start) & (slots < stop)]

    def slots_outside(self, documents: Collection[str]) -> np.ndarray:
        for document in documents:
            if document not in self._names:
                raise KeyError(f"no document {document!r} in this memory; it holds {', '.join(self._names) or 'none'}")
        numbers = [self._names.index(document) for document in documents]
        return np.flatnonzero(~np.isin(self._columns[: self._length, 1], numbers))

    def kept(self, slots: np.ndarray) -> "TokenTable":
        """A copy of these slots, (n,) int64 ascending, without the documents that lose all their tokens."""
        rows = self.rows[slots]  # a copy
        numbers = self.rows[:, 1]
        lost = np.setdiff1d(numbers[numbers >= 0], rows[:, 1])
        rows[:, 1] -= np.searchsorted(lost, rows[:, 1]).astype(np.int32)
        return TokenTable(rows, [name for number, name in enumerate(self._names) if number not in lost])

    def rename(self, names: Mapping[str, str]) -> None:
        self._names = [names.get(name, name) for name in self._names]

    def truncate(self, length: int) -> None:
        self._length = min(self._length, length)
        used = int(self._columns[: self._length, 1].max(initial=NO_DOCUMENT)) + 1
        self._names = self._names[:used]  # in the order of their first tokens

    def nbytes(self) -> int:
        return self._columns.nbytes
