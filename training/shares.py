"""The lanes of a run, spread over any number of processes.

The data of a run comes in shares, one for each process that began it. A share reads documents of its own in some lanes,
and these lanes stay the same for the whole run. Of all lanes, in order, each process has as many as any other. So a run
goes on with another number of processes if that number divides the number of lanes: each process then reads the shares
that its lanes are in.

A process with some lanes of a share reads the whole share, since its lanes take turns in drawing documents, and drops
the other lanes' rows. Reading costs little beside a training step.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from training.batches import Batch, DocumentLoader, join_lanes, select_lanes


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
    """Batches of one process's lanes.

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

    def __next__(self) -> Batch:
        parts = []
        for number, loader in self._loaders.items():
            first = number * self._lanes
            start, stop = max(self._mine.start - first, 0), min(self._mine.stop - first, self._lanes)
            parts.append(select_lanes(next(loader), start, stop))
        return join_lanes(parts)

    def state_dict(self) -> dict[int, dict[str, Any]]:
        """The positions of the shares whose first lane this process has, by number. All processes' are the run's."""
        return {
            number: loader.state_dict()
            for number, loader in self._loaders.items()
            if number * self._lanes in self._mine
        }

    def load_state_dict(self, states: Sequence[dict[str, Any]]) -> None:
        """Go on from the positions of all shares, in order, with the batches that would have followed.

        Raises:
            ValueError: as ``DocumentLoader.load_state_dict``.
        """
        for number, loader in self._loaders.items():
            loader.load_state_dict(states[number])


def all_shares(found: Sequence[dict[int, dict[str, Any]]]) -> list[dict[str, Any]]:
    """The positions of all shares, in order, from those that ``state_dict`` gave on each process."""
    states = {number: state for some in found for number, state in some.items()}
    return [states[number] for number in sorted(states)]
