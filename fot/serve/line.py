"""Those who wait for the model: so many at a time, so many behind them, and no more."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import TypeVar

from fot.serve.errors import ApiError

T = TypeVar("T")

Stopped = Callable[[], bool]


class Line:
    """A queue in front of the model.

    Args:
        places: jobs at a time.
        waiting: jobs that may wait; one more is refused.
    """

    def __init__(self, places: int, waiting: int) -> None:
        self._free = asyncio.Semaphore(places)
        self._places, self._waiting = places, waiting
        self._inside = 0
        self._threads = ThreadPoolExecutor(places, "model")

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
        async with self._place():
            stop = threading.Event()
            future = asyncio.get_running_loop().run_in_executor(self._threads, work, stop.is_set)
            try:
                return await asyncio.shield(future)
            except asyncio.CancelledError:
                stop.set()
                await asyncio.shield(asyncio.wait({future}))
                future.exception()  # nobody wants to know
                raise

    @asynccontextmanager
    async def _place(self) -> AsyncIterator[None]:
        if self._inside >= self._places + self._waiting:
            raise ApiError(
                429, f"the server is busy: {self._inside} requests run or wait; try again later", code="queue_full"
            )
        self._inside += 1
        try:
            async with self._free:
                yield
        finally:
            self._inside -= 1
