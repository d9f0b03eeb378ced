"""How far a run is: a bar on a terminal, and a line now and then where stderr goes to a file."""

import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import TracebackType
from typing import Any

from tqdm import tqdm

# Seconds between lines.
INTERVAL = 30.0


class Progress:
    """Says on stderr how far a run is.

    Args:
        total: steps of the run.
        first: steps done before this start.
        active: say anything at all; one process does.
    """

    def __init__(self, total: int, first: int, *, active: bool) -> None:
        terminal = sys.stderr.isatty()
        self._bar = tqdm(total=total, initial=first, unit="step", disable=not (active and terminal))
        self._lines = active and not terminal
        self._total, self._first = total, first
        self._started = time.monotonic()
        self._said = float("-inf")

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def say(self, text: str) -> None:
        """A line of its own, above the bar."""
        if self._lines or not self._bar.disable:
            tqdm.write(f"fot: {text}", file=sys.stderr)

    def update(self, step: int, *, ending: bool, **figures: str) -> None:
        """After a step (1, 2, ...); ``figures`` are shown with it."""
        self._bar.set_postfix(figures)
        self._bar.update()
        now = time.monotonic()
        if self._lines and (ending or now - self._said >= INTERVAL):
            self._said = now
            left = (now - self._started) / (step - self._first) * (self._total - step)
            shown = ", ".join(f"{name} {value}" for name, value in figures.items())
            rest = "the last" if ending else f"{timedelta(seconds=round(left))} left"
            print(f"step {step} of {self._total}: {shown}; {rest}", file=sys.stderr, flush=True)


@contextmanager
def each_warning_once(*, active: bool) -> Iterator[None]:
    """Within the block a warning is shown once, however often its filters are reset; on one process."""
    shown: set[tuple[str, type[Warning]]] = set()
    show = warnings.showwarning

    def show_once(message: Any, category: type[Warning], *rest: Any, **options: Any) -> None:
        if active and (str(message), category) not in shown:
            shown.add((str(message), category))
            show(message, category, *rest, **options)

    warnings.showwarning = show_once
    try:
        yield
    finally:
        warnings.showwarning = show
