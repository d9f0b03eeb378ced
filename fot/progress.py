"""How far long work is: a bar on a terminal, and a line a minute where stderr goes to a file."""

import sys
import time
from datetime import timedelta
from typing import Any

from tqdm import tqdm

# Seconds between lines.
INTERVAL = 60.0


class Unseen(tqdm):
    """A tqdm bar that draws nothing; what is shown of a move is up to its class.

    Args:
        options: tqdm's.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options | {"disable": True})
        self.doing: str = ""
        self._started = time.monotonic()

    def set_postfix_str(self, s: str = "", refresh: bool = True) -> None:
        """What is done now, as the name of a file."""
        self.doing = s

    def update(self, n: float | None = 1) -> None:
        """So many more are done."""
        self.n += n or 0
        self.moved()

    def moved(self) -> None:
        """Called after each move."""
        raise NotImplementedError

    def rate(self) -> float:
        """How many a second, since the start."""
        return self.n / max(time.monotonic() - self._started, 1e-9)

    def seconds_left(self) -> float:
        """How long the rest takes at this rate; 0 without a total."""
        return max(0.0, (self.total or self.n) - self.n) / max(self.rate(), 1e-9)


class Lines(Unseen):
    """A line on stderr every ``INTERVAL`` seconds; work that takes less says nothing."""

    def __init__(self, *, desc: str, unit: str, **options: Any) -> None:
        super().__init__(**options)
        self._name, self._unit = desc, unit
        self._said = time.monotonic()

    def moved(self) -> None:
        """A line, if it is time for one."""
        now = time.monotonic()
        if now - self._said < INTERVAL:
            return
        self._said = now
        done = f"{self.n:,.0f} {self._unit}"
        if self.total:
            done = f"{self.n:,.0f} of {self.total:,.0f} {self._unit} ({self.n / self.total:.0%})"
        parts = [f"{self._name}: {done}", f"{self.rate():,.3g} {self._unit}/s"]
        if self.total:
            parts.append(f"{timedelta(seconds=round(self.seconds_left()))} left")
        print(", ".join(parts + [self.doing] * bool(self.doing)), file=sys.stderr, flush=True)


def progress_bar(*, desc: str, unit: str, **options: Any) -> tqdm:
    """A tqdm bar where stderr is a terminal, else ``Lines``; ``options`` are tqdm's."""
    made: type[tqdm] = tqdm if sys.stderr.isatty() else Lines
    return made(desc=desc, unit=unit, **options)
