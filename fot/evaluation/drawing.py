"""Tables as text, and pictures as files."""

import io
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from memory.atomic import write_bytes


def render(table: Table) -> str:
    """A table as text of at most 120 columns."""
    console = Console(file=io.StringIO(), width=120)
    console.print(table)
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue().rstrip("\n")


def new_figure(width: int, height: int) -> Any:
    """An empty figure, so many inches wide and high.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("drawing needs matplotlib: pip install 'fot[plot]'") from error
    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure in the format that its name ends in."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=path.suffix.lstrip(".") or "png", dpi=120)
    write_bytes(path, buffer.getvalue())
