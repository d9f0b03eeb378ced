"""Which files among files and folders are documents, and why the others are none."""

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

from fot.documents.read import read_document, readers
from fot.files import UnreadableFileError, shown
from memory.manifest import FORMAT, MANIFEST

# Files that were left out and are named; the others are counted.
MOST_NAMED = 10

# Texts of PDF and HTML files that are kept from finding them to adding them, in characters: to parse takes time.
KEPT_CHARACTERS = 1 << 26

# A manifest of a memory begins so, damaged further on or not.
OF_A_MEMORY = re.compile(rb'"format"\s*:\s*"' + re.escape(FORMAT.encode()) + b'"')


@dataclass
class Documents:
    """Files with text.

    Attributes:
        paths: in the order to be read, each once.
        characters: of each.
        texts: of some of them, those that took time to parse.
        left_out: why files in folders were left out (hidden, binary, empty, unreadable, not asked for), and how many.
        named: of those left out whose owner may think that they are read: which, and what is wrong with them.
    """

    paths: list[Path] = field(default_factory=list)
    characters: list[int] = field(default_factory=list)
    texts: dict[Path, str] = field(default_factory=dict)
    left_out: Counter[str] = field(default_factory=Counter)
    named: list[str] = field(default_factory=list)
    _kept: int = field(default=0, init=False, repr=False)  # characters in texts, once all are found

    def add(self, path: Path, text: str) -> None:
        """One more file."""
        self.paths.append(path)
        self.characters.append(len(text))
        if path.suffix.lower() in readers() and self._kept + len(text) <= KEPT_CHARACTERS:
            self.texts[path] = text
            self._kept += len(text)

    def text(self, path: Path) -> str:
        """The text of one of them; see ``read_document``. What was kept of it is forgotten."""
        return self.texts.pop(path, None) or read_document(path)

    def leave_out(self, path: Path, error: Exception) -> None:
        """Note that a file is not read, and why."""
        kind, what = "unreadable", str(error)
        if isinstance(error, UnreadableFileError):
            kind, what = error.kind, f"{error.path} {error.reason}"
        elif isinstance(error, OSError):
            what = f"{path} cannot be read ({error.strerror or error})"
        self.left_out[kind] += 1
        if kind == "unreadable":
            self.named.append(shown(what))


def find_documents(paths: Sequence[Path], include: Sequence[str] = (), exclude: Sequence[str] = ()) -> Documents:
    """The documents among files and folders.

    In folders, what is no regular file with text that can be read is left out and noted: pipes, devices, links to
    folders, files that are binary, damaged, encrypted or not UTF-8, or that need a package which is missing. So are
    memories, the one that is to be written among them.

    Args:
        paths: files, which must have text; folders, of whose files those with text are taken, in order of name.
        include: globs; of the files in folders, only those whose name or path in the folder fits one. None: all.
        exclude: globs; those that fit are left out, and folders that fit are not entered.

    Raises:
        ValueError: a named file that has no text or cannot be read, a named memory, or nothing found at all.
        OSError: a path that is not there or cannot be read.
        ImportError: a package that reads a named file is missing.
    """
    found, seen = Documents(), set()
    for path in paths:
        inside = path.is_dir()
        _check_no_memory(path if inside else path.parent, path)
        for file in _walk(path, include, exclude, found) if inside else [path]:
            real = os.path.realpath(file)
            if real in seen:
                continue
            seen.add(real)
            try:
                found.add(file, read_document(file))
            except (ValueError, OSError, ImportError) as error:
                if not inside:
                    raise
                found.leave_out(file, error)
    if not found.paths:
        raise ValueError(f"no file with text in {', '.join(map(str, paths))} ({describe_left_out(found) or 'empty'}); "
                         "check the path, --include and --exclude")  # fmt: skip
    return found


def describe_left_out(found: Documents) -> str:
    """``1 hidden, 2 unreadable; a.pdf is an encrypted PDF; b is a socket, not ...``; empty if nothing was left out."""
    counts = ", ".join(f"{count:,} {reason}" for reason, count in sorted(found.left_out.items()))
    more = len(found.named) - MOST_NAMED
    return "; ".join([counts, *found.named[:MOST_NAMED]] + ([f"and {more:,} more"] if more > 0 else []))


def is_memory(folder: Path) -> bool:
    """Whether a folder is a memory, damaged or not."""
    manifest = folder / MANIFEST
    try:
        if not manifest.is_file():  # a pipe of that name would never end
            return False
        with open(manifest, "rb") as file:
            return OF_A_MEMORY.search(file.read(1 << 12)) is not None
    except OSError:
        return False


def _check_no_memory(folder: Path, path: Path) -> None:
    if (path == folder or path.name == MANIFEST) and is_memory(folder):
        raise ValueError(f"{path} is {'' if path == folder else 'part of '}a memory, not a document: give the files "
                         "that it was made of")  # fmt: skip


def _walk(top: Path, include: Sequence[str], exclude: Sequence[str], found: Documents) -> Iterator[Path]:
    """Files of a folder in order of name, then those of its folders; links to folders, which may lead in circles,
    are not followed."""
    waiting = [top]
    while waiting:
        here = waiting.pop()
        if is_memory(here):
            found.left_out["memories"] += 1
            continue
        try:
            names = sorted(os.listdir(here))
        except OSError as error:
            if here == top:
                raise
            found.leave_out(here, error)
            continue
        folders = []
        for name in names:
            path = here / name
            inside = path.relative_to(top)
            hidden, leads_to_folder = name.startswith("."), os.path.isdir(path)
            is_folder = leads_to_folder and not path.is_symlink()
            if hidden or _fits(inside, exclude):
                kind = "hidden folders" if hidden else "excluded folders"
                found.left_out[kind if is_folder else "hidden" if hidden else "not asked for"] += 1
            elif is_folder:
                folders.append(path)
            elif leads_to_folder:
                found.leave_out(path, UnreadableFileError(path, "is a link to a folder"))
            elif include and not _fits(inside, include):
                found.left_out["not asked for"] += 1
            else:
                yield path
        waiting += reversed(folders)


def _fits(path: Path, globs: Sequence[str]) -> bool:
    return any(fnmatch(path.name, glob) or fnmatch(path.as_posix(), glob) for glob in globs)
