"""The text of a Jupyter notebook: its cells and what they printed, no pictures."""

import json
import re
from pathlib import Path
from typing import Any

from fot.files import UnreadableFileError

# Colours of tracebacks and progress bars.
ESCAPES = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]")


def notebook_text(path: Path, content: str) -> str:
    """The cells of a notebook in order, each followed by its text output, an empty line between them.

    Raises:
        UnreadableFileError: it is no notebook.
    """
    try:
        cells = _cells(json.loads(content))
        parts = [
            part for cell in cells for part in (_joined(cell.get("source", cell.get("input", ""))), *_printed(cell))
        ]
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        said = " ".join(f"{type(error).__name__} {error}".split())[:120]
        raise UnreadableFileError(path, f"cannot be read as a notebook ({said})") from error
    return "\n\n".join(part.strip("\n") for part in parts if part.strip())


def _cells(notebook: Any) -> list[dict[str, Any]]:
    """Cells of a notebook, also of format 3, where they lie in worksheets."""
    sheets = notebook.get("worksheets", [notebook])
    return [cell for sheet in sheets for cell in sheet["cells"]]


def _printed(cell: dict[str, Any]) -> list[str]:
    """What a cell wrote as text. What stands for a picture (``<Figure size 640x480>``) is left out."""
    found = []
    for output in cell.get("outputs", []):
        data = output.get("data", output)
        if any(kind.startswith("image/") or kind in ("png", "jpeg", "svg") for kind in data):
            continue
        text = output.get("text") or data.get("text/plain") or "\n".join(output.get("traceback", []))
        found.append(ESCAPES.sub("", _joined(text)))
    return found


def _joined(lines: str | list[str]) -> str:
    return lines if isinstance(lines, str) else "".join(lines)
