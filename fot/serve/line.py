"""Those who wait for the model: so many at a time, so many behind them, and no more."""

import asyncio
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, TypeVar

from fot.serve.errors import ApiError

T = TypeVar("T")

Stopped = Callable[[], bool]
Tell = Callable[[Any], None]  # a result, or the exception there was instead

# Jobs done together, at most.
MOST_JOINED = 4


class Joint(ABC, Generic[T]):
    """Work that may be done together with other work of its key. Called with a function, it is done alone."""

    @property
    @abstractmethod
    def key(self) -> Hashable | None:
        """None: it is done alone."""

    @abstractmethod
    def __call__(self, stopped: Stopped) -> T:
        """Do it alone."""

    @classmethod
    @abstractmethod
    def together(cls, jobs: Sequence[tuple[Any, Stopped, Tell]]) -> None:
        """Do several of one key; each with whether it is to stop, and told of as soon as it is done."""


@dataclass(eq=False)
class _Job:
    work: Callable[[Stopped], Any]
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    stop: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.key = self.work.key if isinstance(self.work, Joint) else None
        self.done: asyncio.Future[Any] = self.loop.create_future()

    def tell(self, result: Any) -> None:
        """Called in the thread of the model; what comes first counts."""
        self.loop.call_soon_threadsafe(self._tell, result)

    def _tell(self, result: Any) -> None:
        if self.done.done():
            return
        if isinstance(result, BaseException):
            self.done.set_exception(result)
        else:
            self.done.set_result(result)


class Line:
    """A queue in front of the model. Jobs of one key that wait together are done together.

    Args:
        places: jobs, or batches of them, at a time.
        waiting: jobs that may wait; one more is refused.

    Attributes:
        joined: jobs that were begun with others so far.
    """

    def __init__(self, places: int, waiting: int) -> None:
        self._free, self._places, self._waiting = places, places, waiting
        self._inside = 0
        self._queue: list[_Job] = []
        self._threads = ThreadPoolExecutor(places, "model")
        self.joined = 0

    @property
    def length(self) -> int:
        """Jobs that run or wait."""
        return self._inside

    async def run(self, work: Callable[[Stopped], T]) -> T:
        """Do some work in a thread, when its turn comes.

        Whoever is cancelled while waiting leaves the line at once. While the work runs, it is told to stop, and its
        place is free when it has.

        Args:
            work: is given a function that says whether it is to stop.

        Raises:
            ApiError: 429, the line is full.
        """
        if self._inside >= self._places + self._waiting:
            raise ApiError(
                429, f"the server is busy: {self._inside} requests run or wait; try again later", code="queue_full"
            )
        job = _Job(work)
        self._inside += 1
        self._queue.append(job)
        self._begin()
        try:
            result: T = await asyncio.shield(job.done)
            return result
        except asyncio.CancelledError:
            job.stop.set()
            if job in self._queue:
                self._queue.remove(job)
            else:
                await asyncio.shield(asyncio.wait({job.done}))
                job.done.exception()  # nobody wants to know
            raise
        finally:
            self._inside -= 1

    def _begin(self) -> None:
        """Give free places to those in front, and to those who can join them."""
        while self._queue and self._free:
            first = self._queue[0]
            others = [job for job in self._queue[1:] if first.key is not None and job.key == first.key]
            jobs = [first, *others[: MOST_JOINED - 1]]
            self._queue = [job for job in self._queue if job not in jobs]
            self._free -= 1
            self.joined += len(jobs) if len(jobs) > 1 else 0
            left = set(jobs)
            for job in jobs:
                job.done.add_done_callback(partial(self._end, left, job))
            self._threads.submit(_do, jobs)

    def _end(self, left: set[_Job], job: _Job, done: "asyncio.Future[Any]") -> None:
        """A job has ended; with the last of its batch, the place is free."""
        left.remove(job)
        if not left:
            self._free += 1
            self._begin()


def _do(jobs: list[_Job]) -> None:
    """Work on them, in the thread of the model."""
    first = jobs[0]
    rest: BaseException = RuntimeError("the work has ended without a result")
    try:
        if len(jobs) == 1:
            first.tell(first.work(first.stop.is_set))
        else:
            assert isinstance(first.work, Joint)
            first.work.together([(job.work, job.stop.is_set, job.tell) for job in jobs])
    except BaseException as error:
        rest = error
    for job in jobs:  # those that have been told are not told again
        job.tell(rest)
