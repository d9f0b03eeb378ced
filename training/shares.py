"""The lanes of a run, spread over any number of processes.

The data of a run comes in shares, one for each process that began it. A share reads documents of its own in some lanes,
and these lanes stay the same for the whole run. Of all lanes, in order, each process has as many as any other. So a run
goes on with another number of processes if that number divides the number of lanes: each process then reads the shares
that its lanes are in.

A process with some lanes of a share reads the whole share, since its lanes take turns in drawing documents, and drops
the other lanes' rows. Reading costs little beside a training step.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from training.batches import Batch, DocumentLoader, join_lanes, select_lanes

# Of each share, what gives its position in the data.
Position = dict[int, Callable[[], dict[str, Any]]]


def lanes_of_a_process(lanes: int, processes: int) -> int:
    """How many of a run's ``lanes`` each process has.

    Raises:
        ValueError: they cannot be divided evenly.
    """
    if lanes % processes:
        fitting = ", ".join(str(count) for count in range(1, lanes + 1) if lanes % count == 0)
        raise ValueError(
            f"the run's batch has {lanes} lanes, which cannot be divided evenly among {processes} processes: use a "
            f"number of processes out of {fitting}"
        )
    return lanes // processes


class LaneLoader(Iterator[Batch]):
    """Batches of one process's lanes. While one is used, a thread makes the next, so that a GPU need not wait for it.

    Args:
        make_share: the number of a share -> its loader.
        shares: number of shares.
        lanes: number of lanes of each share.
        process: number of this process.
        processes: how many there are.

    Raises:
        ValueError: the lanes cannot be divided evenly among the processes.
    """

    def __init__(
        self, make_share: Callable[[int], DocumentLoader], *, shares: int, lanes: int, process: int, processes: int
    ) -> None:
        count = lanes_of_a_process(shares * lanes, processes)
        self._mine = range(process * count, (process + 1) * count)
        self._lanes = lanes
        self._loaders = {
            number: make_share(number) for number in range(self._mine[0] // lanes, self._mine[-1] // lanes + 1)
        }
        self._thread = ThreadPoolExecutor(1, "batches")
        self._next: Future[tuple[Batch, Position]] | None = None
        self._position = self._here()

    def __next__(self) -> Batch:
        coming = self._next or self._thread.submit(self._made)
        self._next = None
        batch, self._position = coming.result()
        self._next = self._thread.submit(self._made)
        return batch

    def _made(self) -> tuple[Batch, Position]:
        batch = self._batch()
        return batch, self._here()

    def _here(self) -> Position:
        """The position after the last batch that was made, for ``state_dict``."""
        return {number: loader.here() for number, loader in self._loaders.items() if number * self._lanes in self._mine}

    def _batch(self) -> Batch:
        parts = []
        for number, loader in self._loaders.items():
            first = number * self._lanes
            start, stop = max(self._mine.start - first, 0), min(self._mine.stop - first, self._lanes)
            parts.append(select_lanes(next(loader), start, stop))
        return join_lanes(parts)

    def state_dict(self) -> dict[int, dict[str, Any]]:
        """The positions of the shares whose first lane this process has, by number. All processes' are the run's."""
        return {number: state() for number, state in self._position.items()}

    def load_state_dict(self, states: Sequence[dict[str, Any]]) -> None:
        """Go on from the positions of all shares, in order, with the batches that would have followed.

        Raises:
            ValueError: as ``DocumentLoader.load_state_dict``.
        """
        if self._next is not None:
            self._next.exception()  # it is done then
            self._next = None
        for number, loader in self._loaders.items():
            loader.load_state_dict(states[number])
        self._position = self._here()


def all_shares(found: Sequence[dict[int, dict[str, Any]]]) -> list[dict[str, Any]]:
    """The positions of all shares, in order, from those that ``state_dict`` gave on each process."""
    states = {number: state for some in found for number, state in some.items()}
    return [states[number] for number in sorted(states)]
