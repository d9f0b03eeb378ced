"""What a run writes down as it goes: JSON lines; TensorBoard's scalars and others' if the recipe asks for them."""

import json
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import accelerate
import accelerate.tracking

from training.files import write_file


class Log:
    """Appends lines to ``out/log.jsonl``, and their numbers to ``out/tensorboard``.

    What lies past the step that a resumed run starts from is cut off, or hidden by TensorBoard. So is a line that was
    torn when a run was killed or the disk was full. Figures that are not finite are written as null, which JSON knows.

    Attributes:
        last: the last line; empty before the first, and on processes that write nothing.
    """

    def __init__(self, out: Path, first_step: int, *, active: bool, tensorboard: bool) -> None:
        """
        Args:
            out: the run's folder.
            first_step: steps done before this start.
            active: write anything at all; one process does.
            tensorboard: write scalars, too.

        Raises:
            ImportError: ``tensorboard`` without the package.
        """
        self._path = out / "log.jsonl"
        self._active = active
        self._writer: Any = None
        self.last: dict[str, Any] = {}
        if active and tensorboard:
            self._writer = summary_writer()(str(out / "tensorboard"), purge_step=first_step + 1)
        if active and self._path.exists():
            self._cut(first_step)

    def __call__(self, line: dict[str, Any]) -> None:
        """Append one line, which has a ``step``.

        Raises:
            OSError: it could not be written.
        """
        if not self._active:
            return
        self.last = finite(line) | {"time": time.time()}
        try:
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(json.dumps(self.last, allow_nan=False) + "\n")
        except OSError as error:
            raise OSError(
                f"{self._path} could not be written ({error.strerror}): free some space, and continue with --resume"
            ) from error
        if self._writer is not None:
            for name, value in numbers(line).items():
                self._writer.add_scalar(name, value, line["step"])
            self._writer.flush()  # nothing is lost if the run is killed

    def sync(self) -> None:
        """Put the log on disk, as a checkpoint is about to be: a line is never lost whose step will not be repeated."""
        if self._active and self._path.exists():
            with open(self._path, "rb") as file:
                os.fsync(file.fileno())

    def _cut(self, first_step: int) -> None:
        """Keep the lines up to a step."""
        kept, torn = [], 0
        for text in self._path.read_text(encoding="utf-8", errors="replace").splitlines():
            line = _parse(text)
            if line is None:
                torn += 1
            elif line["step"] <= first_step:
                kept.append(text)
                self.last = line
        if torn:
            print(f"fot: {self._path}: removed {torn} incomplete line{'s' * (torn > 1)}", file=sys.stderr)
        write_file(self._path, "".join(f"{text}\n" for text in kept))


def end_trackers(accelerator: accelerate.Accelerator) -> None:
    """Let the trackers send what they have. ``Accelerator.end_training`` would also take the process group down."""
    for tracker in accelerator.trackers:
        tracker.finish()


def finite(line: dict[str, Any]) -> dict[str, Any]:
    """The same figures, with None for those that are not finite."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in line.items()
    }


def numbers(line: dict[str, Any]) -> dict[str, float]:
    """The figures of a line that can be drawn."""
    return {
        name: value
        for name, value in line.items()
        if name != "step" and isinstance(value, int | float) and math.isfinite(value)
    }


def flat(settings: dict[str, Any]) -> dict[str, Any]:
    """A recipe as trackers take it: one level, of numbers and texts."""
    return {
        key: value if isinstance(value, int | float | str) else json.dumps(value) for key, value in settings.items()
    }


def check_trackers(names: Sequence[str]) -> None:
    """Say before the work that a tracker is missing; accelerate would leave it out.

    Raises:
        ImportError: its package is not installed.
    """
    present = {str(name) for name in accelerate.tracking.get_available_trackers()}
    for name in names:
        if name not in present:
            raise ImportError(f"trackers: {name} needs its package: pip install {name.replace('_', '-')}")


def _parse(text: str) -> dict[str, Any] | None:
    """A line of the log; None if it is torn."""
    try:
        line = json.loads(text)
    except json.JSONDecodeError:
        return None
    return line if isinstance(line, dict) and isinstance(line.get("step"), int) else None


def summary_writer() -> type:
    """TensorBoard's writer.

    Raises:
        ImportError: the package is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError("tensorboard: true needs the package tensorboard: pip install 'fot[tensorboard]'") from error
    return SummaryWriter
