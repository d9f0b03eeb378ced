"""Which windows each row of a batch attends to, so that no token is shown what follows it.

A batch is read in an order, as windows are read into one memory: all lanes' first windows, then all their second ones,
and so on; within these, lanes in an order drawn anew for each batch. A row attends only to rows before it in the order,
so what a row knows, through however many memory layers, comes from rows before it, and a lane's windows stand in the
order in their own order: nothing of a row's own lane that comes after the row reaches it.

The same text may be in two lanes. So a row's negatives hold nothing of the documents that the row itself is of, and
neither they, nor its positives, nor what reached those, hold a token that follows in them. A task's document may have
passages of texts. The same is true of these texts from its first token of each to its last; the rest is not in the
document. Its own earlier windows remain its positives, even if it has a passage twice.

With isolated windows, rows that others read read nothing. Then the last window of each lane reads, and the others are
read, in whatever order.
"""

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from training.batches import NO_DOCUMENT, Batch
from training.groups import Contexts
from training.schedule import ContextSchedule

Held = tuple[int, int, int]  # content, first and last position there


@dataclass(frozen=True)
class Rows:
    """What is known of the C candidate rows of all processes.

    Attributes:
        lane: (C,) which document stream a row belongs to; no two processes share one.
        index: (C,) place among its lane's windows in this batch.
        document: (C,) document of most of its tokens, -1 if it is all padding; positives are of the same document.
        padding: (C, T) bool, True at padding; None if there is none.
        held: of each row, which parts of which contents it has. None: of its document the ``index``-th part.
        whole: (C,) bool, rows of documents that are all in their lane's rows, as a task's are; None: there are none.
    """

    lane: Tensor
    index: Tensor
    document: Tensor
    padding: Tensor | None = None
    held: Sequence[Sequence[Held]] | None = None
    whole: Tensor | None = None


def rows_of(batch: Batch) -> Rows:
    """All that choosing contexts needs to know of a batch's rows."""
    padding = batch.padding if bool(batch.padding.any()) else None
    held = held_by(batch.content, batch.position)
    return Rows(batch.lane, batch.index, batch.document, padding, held, batch.whole)


def held_by(content: Tensor, position: Tensor) -> list[list[Held]]:
    """The parts of contents in each row, from (C, W) tokens' contents and positions."""
    rows = []
    for names, places in zip(content.cpu().numpy(), position.cpu().numpy(), strict=True):
        starts = np.flatnonzero((np.diff(names, prepend=names[0] - 1) != 0) | (np.diff(places, prepend=0) != 1))
        ends = np.append(starts[1:], len(names)) - 1
        parts = zip(names[starts].tolist(), places[starts].tolist(), places[ends].tolist(), strict=True)
        rows.append([part for part in parts if part[0] != NO_DOCUMENT])
    return rows


@dataclass(frozen=True)
class Choice:
    """The contexts of all C rows, the same on every process.

    Attributes:
        rows: for each row, those it attends to.
        copies: for each row, how often each of those counts; None: once.
        positives: for each row, how many of those are of its own document: the first ones.
        wanted: negatives that the schedule asks for, of all rows together.
        found: negatives that there are.
    """

    rows: list[list[int]]
    copies: list[list[float]] | None
    positives: list[int]
    wanted: int
    found: int

    def of(self, mine: range, padding: Tensor | None) -> Contexts:
        """Those of some rows, for crossbatch, which moves them to its device."""
        rows = [torch.tensor(self.rows[row], dtype=torch.int64) for row in mine]
        copies = None if self.copies is None else [torch.tensor(self.copies[row]) for row in mine]
        return Contexts(rows, padding, copies, positives=[self.positives[row] for row in mine])

    def mixed(self) -> int:
        """How many rows see both their own document and others."""
        return sum(0 < own < len(chosen) for own, chosen in zip(self.positives, self.rows, strict=True))


def choose_contexts(
    schedule: ContextSchedule, rows: Rows, mine: range, d: int, seed: str, *, isolated: bool = False
) -> Contexts:
    """``choose_all``, for the rows ``mine`` of this process."""
    return choose_all(schedule, rows, d, seed, isolated=isolated).of(mine, rows.padding)


def choose_all(schedule: ContextSchedule, rows: Rows, d: int, seed: str, *, isolated: bool = False) -> Choice:
    """Draw the rows that each row attends to, as the module says.

    Positives are a row's own document's windows before it in its lane, the nearest first; negatives are rows of other
    lanes. Where fewer may be seen than wanted, all of them are taken.

    Args:
        schedule: says how many positives and negatives.
        rows: all candidates.
        d: number of contexts, unless the schedule has segments.
        seed: draws order and negatives.
        isolated: as in the memory's settings: a window that others read reads nothing itself.
    """
    lane, index = rows.lane.tolist(), rows.index.tolist()
    order = reading_order(rows, seed, isolated=isolated)
    place = {row: number for number, row in enumerate(order)}
    overlaps = _Overlaps(rows)
    last = max(index, default=0)
    demands = _Demands(schedule, d, lane)
    chosen: list[list[int]] = [[] for _ in lane]
    copies: list[list[float]] = [[] for _ in lane]
    known = [0] * len(lane)
    reached = [1 << row for row in range(len(lane))]  # as bits: the row itself, and all that it knows of
    wanted = found = 0
    for row in range(len(lane)) if isolated else order:
        if isolated and (index[row] < last or not overlaps.real[row]):
            continue
        before = order if isolated else order[: place[row]]
        follows = overlaps.follows[row]
        own = [other for other in overlaps.earlier[row] if not reached[other] & follows]
        positives, negatives = demands.of(row, len(own))
        barred = {place[other] for other in overlaps.kin[row] if place.get(other, len(before)) < len(before)}
        if follows:
            barred |= {number for number, other in enumerate(before) if reached[other] & follows}
        rng = random.Random(f"{seed}/{row}")
        drawn = _sample(rng, before, sorted(barred), negatives)
        times = schedule.copies ** rng.random()
        chosen[row], known[row] = own[:positives] + drawn, positives
        copies[row] = [1.0] * positives + [times] * len(drawn)
        for other in chosen[row]:
            reached[row] |= reached[other]
        wanted, found = wanted + negatives, found + len(drawn)
    return Choice(chosen, copies if schedule.copies > 1 else None, known, wanted, found)


def reading_order(rows: Rows, seed: str, *, isolated: bool = False) -> list[int]:
    """The rows that others may attend to, in an order in which a row attends to rows before it alone.

    With isolated windows, those that are read, in no particular order. Rows of padding alone are left out.
    """
    lane, index, document = rows.lane.tolist(), rows.index.tolist(), rows.document.tolist()
    real = [row for row in range(len(lane)) if document[row] != NO_DOCUMENT]
    if isolated:
        return [row for row in real if index[row] < max(index)]
    lanes = sorted(set(lane))
    random.Random(f"{seed}/order").shuffle(lanes)
    turn = {number: place for place, number in enumerate(lanes)}
    return sorted(real, key=lambda row: (index[row], turn[lane[row]]))


class _Demands:
    """How many positives and negatives a row asks for."""

    def __init__(self, schedule: ContextSchedule, d: int, lane: list[int]) -> None:
        self._schedule, self._d, self._lane = schedule, d, lane
        self._place = {number: place for place, number in enumerate(sorted(set(lane)))}

    def of(self, row: int, own: int) -> tuple[int, int]:
        """(positives, negatives) of a row that may see ``own`` windows of its document."""
        segments = self._schedule.segments
        if segments:
            positives, negatives = segments[self._place[self._lane[row]] * len(segments) // len(self._place)]
            return min(positives, own), negatives
        positives = min(self._d, self._schedule.previous_windows, own)
        return positives, self._d - positives


class _Overlaps:
    """Which rows have to do with which.

    Attributes:
        real: rows that are not all padding.
        earlier: for each row, rows before it in its lane of the same document, the nearest first.
        kin: for each row, those of its lane, and those that have something of its documents: never negatives.
        follows: for each row, those that hold what follows in its documents, as bits; but for itself and those after it
            in its lane, which the order keeps from it, and for all of its lane if its document is whole.
    """

    def __init__(self, rows: Rows) -> None:
        self._lane, self._index = rows.lane.tolist(), rows.index.tolist()
        lane, index, document = self._lane, self._index, rows.document.tolist()
        self._held: Sequence[Sequence[Held]] = rows.held or [
            [(name, number, number)] for name, number in zip(document, index, strict=True)
        ]
        self._whole = [False] * len(lane) if rows.whole is None else rows.whole.tolist()
        self.real = [name != NO_DOCUMENT for name in document]
        self._lanes: dict[int, list[int]] = {}
        holders: dict[int, list[tuple[int, int, int]]] = {}  # of a content: rows, and the first and last position there
        for row, parts in enumerate(self._held):
            self._lanes.setdefault(lane[row], []).append(row)
            for name, first, last in parts:
                holders.setdefault(name, []).append((row, first, last))
        self.earlier: list[list[int]] = []
        self.kin: list[set[int]] = []
        self.follows: list[int] = []
        for row in range(len(lane)):
            mine = self._lanes[lane[row]]
            earlier = [o for o in mine if self.real[o] and index[o] < index[row] and document[o] == document[row]]
            self.earlier.append(sorted(earlier, key=lambda other: -index[other]))
            self.kin.append(set(mine))
            self.follows.append(0)
            for name, low, high, ahead in self._extents(row):
                for other, first, last in holders[name]:
                    if first > high or last < low:
                        continue
                    self.kin[row].add(other)
                    kept_away = lane[other] == lane[row] and (self._whole[row] or index[other] >= index[row])
                    if last >= ahead and not kept_away:
                        self.follows[row] |= 1 << other

    def _extents(self, row: int) -> Iterator[tuple[int, float, float, float]]:
        """What the row's documents have of contents: name, first and last position, and from where on it follows.

        Of a text that a lane reads that is all of it, since the lane goes on after this batch.
        """
        if not self._whole[row]:
            yield from ((name, -math.inf, math.inf, first + 1) for name, first, _ in self._held[row])
            return
        found: dict[int, tuple[float, float, float]] = {}
        for other in self._lanes[self._lane[row]]:
            for name, first, last in self._held[other]:
                low, high, ahead = found.get(name, (math.inf, -math.inf, math.inf))
                if self._index[other] >= self._index[row]:
                    ahead = min(ahead, first + (other == row))
                found[name] = min(low, first), max(high, last), ahead
        yield from ((name, *extent) for name, extent in found.items())


def _sample(rng: random.Random, rows: list[int], barred: list[int], count: int) -> list[int]:
    """``count`` of ``rows``, or all there are, but for those at the places ``barred``, ascending."""
    left = len(rows) - len(barred)
    drawn = []
    for place in rng.sample(range(left), min(count, left)):
        for other in barred:
            place += place >= other
        drawn.append(rows[place])
    return drawn
