"""The text of a JSON Lines file: one field of its objects."""

import json
from pathlib import Path
from typing import Any

from fot.files import UnreadableFileError

FIELD = "text"  # where none is asked for


def jsonl_text(path: Path, content: str, field: str | None) -> str:
    """One field of each object, an empty line between them. Objects without it are passed over.

    Args:
        path: of the file, for errors.
        content: its text.
        field: a name, or names with dots between them for objects in objects; None: ``text``.

    Raises:
        UnreadableFileError: a line is no JSON object, or no object has the field.
    """
    found, names = [], dict[str, None]()
    for number, line in enumerate(content.split("\n"), start=1):  # not splitlines: JSON may hold U+2028
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UnreadableFileError(path, f"is not JSON Lines (line {number})") from error
        if not isinstance(record, dict):
            raise UnreadableFileError(path, f"has no object in line {number}, so no field {field or FIELD!r}")
        names |= dict.fromkeys(record)
        text = _value(record, field or FIELD)
        if text:
            found.append(text.strip("\n"))
    if not found and names:
        known = ", ".join(list(names)[:10])
        raise UnreadableFileError(path, f"has no text in the field {field or FIELD!r}; it has {known}",
                                  remedy="choose one with --field")  # fmt: skip
    return "\n\n".join(found)


def _value(record: dict[str, Any], field: str) -> str:
    """The field as text; empty if it is not there. A name with dots in it goes first."""
    value: Any = record
    for name in [field] if field in record else field.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    if isinstance(value, list):
        return "\n".join(part for part in value if isinstance(part, str))
    return value if isinstance(value, str) else "" if value is None else json.dumps(value, ensure_ascii=False)
