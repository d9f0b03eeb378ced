"""SIGINT and SIGTERM ask a run to stop after the step that it is in."""

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

ASKED = (signal.SIGINT, signal.SIGTERM)

# A signal so soon after the first is the same wish: Ctrl-C reaches torchrun and its processes, and torchrun tells them.
SECONDS = 1.0


class Stopped(Exception):  # noqa: N818 - nothing went wrong
    """A run was asked to stop and has saved a checkpoint.

    Attributes:
        signum: of the signal; the exit status is 128 more.
    """

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.signum = signum


class Signals:
    """Within the block, the first signal is noted, and the next, ``SECONDS`` later, ends the process as without it.

    Python lets the main thread alone handle signals; in another, nothing is noted.

    Attributes:
        received: number of the signal, 0 while there is none.
    """

    def __init__(self) -> None:
        self.received = 0
        self._before: dict[int, Any] = {}
        self._first = 0.0

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in ASKED}
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if not self.received:
            self.received, self._first = signum, time.monotonic()
        elif time.monotonic() - self._first > SECONDS:
            self._restore()
            os.kill(os.getpid(), signum)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
