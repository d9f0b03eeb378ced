"""What a run writes down as it goes: JSON lines, and TensorBoard's scalars if the recipe asks for them."""

import json
import time
from pathlib import Path
from typing import Any


class Log:
    """Appends lines to ``out/log.jsonl``, and their numbers to ``out/tensorboard``.

    What lies past the step that a resumed run starts from is cut off, or hidden by TensorBoard.

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
            lines = [line for line in self._path.read_text().splitlines() if line]
            kept = [line for line in lines if json.loads(line)["step"] <= first_step]
            self._path.write_text("".join(f"{line}\n" for line in kept))
            self.last = json.loads(kept[-1]) if kept else {}

    def __call__(self, line: dict[str, Any]) -> None:
        """Append one line, which has a ``step``."""
        if not self._active:
            return
        self.last = line | {"time": time.time()}
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps(self.last) + "\n")
        if self._writer is not None:
            for name, value in line.items():
                if name != "step":
                    self._writer.add_scalar(name, value, line["step"])
            self._writer.flush()  # nothing is lost if the run is killed


def summary_writer() -> type:
    """TensorBoard's writer.

    Raises:
        ImportError: the package is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError("tensorboard: true needs a package: pip install 'fot[tensorboard]'") from error
    return SummaryWriter
