"""What a memory notes of the files that it was made of, so that it can keep up with them.

In ``metadata``: ``sources``, what was asked to be read; ``files``, the state of each file then. Paths are relative to
the memory's folder, so that a memory that is passed on does not tell where its maker's files lie.
"""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fot.documents.options import Options
from memory import Memory

SOURCES, FILES = "sources", "files"

# A file that was changed so recently may change once more without another time stamp.
RECENT = 2.0


@dataclass(frozen=True)
class State:
    """A file as it was: size in bytes, time of its last change in ns. 0 for a time that says nothing."""

    size: int
    mtime_ns: int

    @classmethod
    def of(cls, path: Path) -> "State":
        """The file as it is now.

        Raises:
            OSError: it is not there.
        """
        found = os.stat(path)
        recent = time.time() - found.st_mtime < RECENT
        return cls(found.st_size, 0 if recent else found.st_mtime_ns)


@dataclass(frozen=True)
class Source:
    """Something that was asked to be read.

    Attributes:
        name: as it was given; names of documents begin with it.
        path: of it now.
        include: as for ``find_documents``.
        exclude: likewise.
        options: likewise.
    """

    name: str
    path: Path
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    options: Options


def note_sources(
    memory: Memory,
    folder: Path,
    paths: Sequence[Path],
    include: Sequence[str],
    exclude: Sequence[str],
    options: Options,
) -> None:
    """Note what is about to be read into the memory in a folder."""
    noted = memory.metadata.setdefault(SOURCES, [])
    for path in paths:
        entry = {
            "name": path.as_posix(),
            "path": _relative(path, folder),
            "include": list(include),
            "exclude": list(exclude),
            "options": options.to_dict(),
        }
        if entry not in noted:
            noted.append(entry)


def sources(memory: Memory, folder: Path) -> list[Source]:
    """What was read into the memory in a folder.

    Raises:
        ValueError: nothing is noted, or what is noted is damaged.
    """
    noted = memory.metadata.get(SOURCES)
    if not noted:
        raise ValueError(f"{folder} does not say which files it was made of: add them with fot memory append")
    try:
        return [
            Source(
                _text(entry["name"]),
                Path(os.path.normpath(folder.resolve() / _text(entry["path"]))),
                tuple(map(_text, entry["include"])),
                tuple(map(_text, entry["exclude"])),
                Options(**entry["options"]),
            )
            for entry in noted
        ]
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"what {folder} says of its files is damaged ({error}): build it again") from error


def note_file(memory: Memory, name: str, state: State, sha256: str) -> None:
    """Note the state of a file and the SHA-256 of its text, under the name of its document."""
    memory.metadata.setdefault(FILES, {})[name] = [state.size, state.mtime_ns, sha256]


def files(memory: Memory) -> dict[str, tuple[State, str]]:
    """Name -> state and SHA-256 of the text of each file that was read; damaged entries are left out."""
    noted: Any = memory.metadata.get(FILES)
    found = {}
    for name, entry in noted.items() if isinstance(noted, dict) else ():
        if isinstance(entry, list) and [type(one) for one in entry] == [int, int, str]:
            found[name] = State(entry[0], entry[1]), entry[2]
    return found


def _relative(path: Path, folder: Path) -> str:
    try:
        return Path(os.path.relpath(path.absolute(), folder.resolve())).as_posix()
    except ValueError:  # on another drive
        return path.absolute().as_posix()


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r:.60} is no text")
    return value
