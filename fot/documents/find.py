"""Which files among files and folders are documents, and why the others are none."""

import os
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import IO

from fot.documents.options import DEFAULT, Options
from fot.documents.read import Read, read, read_document, takes_time
from fot.documents.record import State
from fot.documents.rules import Ignored, has_private_key, is_generated, is_generated_folder, is_secret, looks_generated
from fot.files import UnreadableFileError, check_regular, shown
from memory.manifest import FORMAT, MANIFEST

# Files that were left out and are named; the others are counted.
MOST_NAMED = 10

# Files left out for these reasons are named: their owner may think that they are read.
NAMED = ("unreadable", "archives", "secrets", "links out of the folder")

# Texts that took time to parse are kept from finding them to adding them: this many bytes in RAM, more on disk.
KEPT_BYTES = 1 << 26

BYTES_PER_CHARACTER = 10  # of files that are parsed, a guess for the progress bar

# A manifest of a memory begins so, damaged further on or not.
OF_A_MEMORY = re.compile(rb'"format"\s*:\s*"' + re.escape(FORMAT.encode()) + b'"')


@dataclass
class Documents:
    """Files with text.

    Attributes:
        paths: in the order to be read, each once.
        characters: of each.
        options: how they are read.
        left_out: why files in folders were left out (hidden, binary, empty, unreadable, not asked for), and how many.
        named: of those left out whose owner may think that they are read: which, and what is wrong with them.
        detected: which texts are in an encoding that was detected, and in which.
        states: of each file, before it was read.
        unchanged: files that are known and were not read.
    """

    paths: list[Path] = field(default_factory=list)
    characters: list[int] = field(default_factory=list)
    options: Options = DEFAULT
    left_out: Counter[str] = field(default_factory=Counter)
    named: list[str] = field(default_factory=list)
    detected: dict[Path, str] = field(default_factory=dict)
    states: dict[Path, State] = field(default_factory=dict)
    unchanged: list[Path] = field(default_factory=list)
    _later: set[Path] = field(default_factory=set, repr=False)
    _kept: "_Kept" = field(default_factory=lambda: _Kept(), repr=False)

    def add(self, path: Path, done: Read, state: State) -> None:
        """One more file, and what was read of it."""
        self.paths.append(path)
        self.characters.append(len(done.text))
        self.states[path] = state
        if done.detected is not None:
            self.detected[path] = done.detected
        if takes_time(path):
            self._kept.put(path, done.text)

    def put_off(self, path: Path, state: State) -> None:
        """One more file, which is read when its text is asked for."""
        self.paths.append(path)
        self.characters.append(state.size // BYTES_PER_CHARACTER)
        self.states[path] = state
        self._later.add(path)

    def text(self, path: Path) -> str:
        """The text of one of them; see ``read_document``. What took time to parse is not parsed again."""
        kept = self._kept.get(path)
        text = read_document(path, self.options) if kept is None else kept
        if path in self._later:
            _check_text(path, text, self.options)
        return text

    def leave_out(self, path: Path, error: Exception) -> None:
        """Note that a file is not read, and why."""
        kind, what = "unreadable", str(error)
        if isinstance(error, UnreadableFileError):
            kind, what = error.kind, f"{error.path} {error.reason}"
        elif isinstance(error, OSError):
            what = f"{path} cannot be read ({error.strerror or error})"
        self.left_out[kind] += 1
        if kind in NAMED:
            self.named.append(shown(what))


class _Kept:
    """Texts by path, in a file that begins in RAM."""

    def __init__(self) -> None:
        self._places: dict[Path, tuple[int, int]] = {}
        self._file: IO[bytes] | None = None

    def put(self, path: Path, text: str) -> None:
        if self._file is None:
            self._file = tempfile.SpooledTemporaryFile(KEPT_BYTES)  # noqa: SIM115  deleted with this object
        content = text.encode()
        self._places[path] = self._file.seek(0, os.SEEK_END), len(content)
        self._file.write(content)

    def get(self, path: Path) -> str | None:
        if self._file is None or path not in self._places:
            return None
        start, size = self._places[path]
        self._file.seek(start)
        return self._file.read(size).decode()


def find_documents(
    paths: Sequence[Path],
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    options: Options = DEFAULT,
    known: Callable[[Path, State], bool] = lambda path, state: False,
    *,
    later: bool = False,
) -> Documents:
    """The documents among files and folders.

    In folders, what is no regular file with text that can be read is left out and noted: pipes, devices, links to
    folders, links out of the folder, files that are hidden, binary, damaged, encrypted or in an encoding that cannot be
    told, or that need a package which is missing. So are memories, the one that is to be written among them; and,
    unless the options ask for them, what ``.gitignore`` and ``.fotignore`` name, secrets, and what programs made.

    Args:
        paths: files, which must have text; folders, of whose files those with text are taken, in order of name.
        include: globs; of the files in folders, only those whose name or path in the folder fits one. None: all.
        exclude: globs; those that fit are left out, and folders that fit are not entered.
        options: how they are read.
        known: whether a file in this state need not be read; it is noted as unchanged.
        later: parse files of folders (PDF, EPUB, ...) when their text is asked for, all but the first; only then is
            known which of them cannot be read.

    Raises:
        ValueError: a named file that has no text or cannot be read, a named memory, or nothing found at all.
        OSError: a path that is not there or cannot be read.
        ImportError: a package that reads a named file is missing.
    """
    found, seen = Documents(options=options), set()
    for path in paths:
        inside = path.is_dir()
        _check_no_memory(path if inside else path.parent, path)
        for file in _walk(path, include, exclude, found) if inside else [path]:
            real = os.path.realpath(file)
            if real in seen:
                continue
            seen.add(real)
            try:
                if inside and file.is_symlink():
                    _check_link(file, Path(real), path)
                state = State.of(file)
                if known(file, state):
                    found.unchanged.append(file)
                    continue
                if later and inside and found.paths and takes_time(file):
                    found.put_off(file, state)
                    continue
                done = read(file, options)
                if inside:
                    _check_text(file, done.text, options)
                found.add(file, done, state)
            except (ValueError, OSError, ImportError) as error:
                if not inside:
                    raise
                found.leave_out(file, error)
    if not found.paths and not found.unchanged:
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


def _check_link(link: Path, real: Path, top: Path) -> None:
    """Raise UnreadableFileError for a link that leaves the folder: what lies outside was not given to be read."""
    if not real.is_relative_to(os.path.realpath(top)):
        check_regular(link)
        raise UnreadableFileError(link, "is a symbolic link out of the folder", kind="links out of the folder")


def _check_text(path: Path, text: str, options: Options) -> None:
    """Raise UnreadableFileError for what shows only in a text to be a secret, or made by a program."""
    if not options.secrets and has_private_key(text):
        raise UnreadableFileError(path, "holds a private key", kind="secrets")
    if not options.generated and looks_generated(path.name, text):
        raise UnreadableFileError(path, "is generated", kind="generated")


def _walk(top: Path, include: Sequence[str], exclude: Sequence[str], found: Documents) -> Iterator[Path]:
    """Files of a folder in order of name, then those of its folders; links to folders, which may lead in circles,
    are not followed."""
    ignored, options, waiting = Ignored(top), found.options, [top]
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
            leads_to_folder = os.path.isdir(path)
            is_folder = leads_to_folder and not path.is_symlink()
            why = _left_out(path, top, exclude, options, is_folder)
            if not why and not options.ignored and ignored.leaves_out(path, is_folder=is_folder):
                why = "ignored"
            if why == "secrets":
                found.leave_out(path, UnreadableFileError(path, "may hold secrets", kind="secrets"))
            elif why:
                found.left_out[f"{why} folders" if is_folder else "not asked for" if why == "excluded" else why] += 1
            elif is_folder:
                folders.append(path)
            elif leads_to_folder:
                found.leave_out(path, UnreadableFileError(path, "is a link to a folder"))
            elif include and not _fits(path.relative_to(top), include):
                found.left_out["not asked for"] += 1
            else:
                yield path
        waiting += reversed(folders)


def _left_out(path: Path, top: Path, exclude: Sequence[str], options: Options, is_folder: bool) -> str:
    """Why a file or folder is left out by its name alone; empty if it is not."""
    secret = not is_folder and is_secret(path.name)
    if path.name.startswith(".") and not (secret and options.secrets):
        return "hidden"
    if _fits(path.relative_to(top), exclude):
        return "excluded"
    if secret and not options.secrets:
        return "secrets"
    if not options.generated and (is_generated_folder(path) if is_folder else is_generated(path.name)):
        return "generated"
    return ""


def _fits(path: Path, globs: Sequence[str]) -> bool:
    return any(fnmatch(path.name, glob) or fnmatch(path.as_posix(), glob) for glob in globs)
