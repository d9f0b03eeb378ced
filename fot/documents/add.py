"""Add documents to a memory, step by step."""

import hashlib
import io
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fot.documents.ahead import ahead
from fot.documents.find import Documents
from fot.documents.record import note_file
from fot.files import check_unicode
from fot.ingest import Piece, ingest_pieces, text_pieces
from fot.inspection.texts import one_line
from fot.progress import progress_bar
from memory import DocumentNote, Memory

# What was read goes to disk once it is so many tokens, or was read so long ago (seconds). Each time makes a new file,
# and writes the manifest anew: thousands of short documents would take longer to write than to read.
FLUSH_TOKENS = 65_536
FLUSH_SECONDS = 30.0

CHARACTERS_PER_TOKEN = 4  # a first guess for the progress bar


@dataclass(frozen=True)
class Added:
    """What came of adding documents.

    Attributes:
        tokens: read.
        same: documents that were there already, under their name or another.
    """

    tokens: int
    same: int


def add_documents(
    model: Any,
    memory: Memory,
    found: Documents,
    name: Callable[[Path], str] = Path.as_posix,
    bar: Callable[..., tqdm] | None = None,
) -> Added:
    """Read documents into a memory that was opened to grow, under one progress bar; see ``add_document``.

    Interrupted, all whole windows are on disk; killed, what was read in the last ``FLUSH_SECONDS`` may be missing. A
    file that can be read no longer is left out and noted in ``found``. A text that the memory holds is not stored
    again under another name. The next file is read while the one before goes through the model.

    Args:
        model: that made the memory, with its tokenizer.
        memory: opened with ``mode="a"``.
        found: the documents; the state of each file is noted in the memory.
        name: of the document that a file is.
        bar: makes the progress bar; None: ``progress_bar``.
    """
    after, read, same = sum(found.characters), 0, 0
    disk = _Disk(memory)
    held = {note.sha256: known for known, note in memory.notes.items() if note.complete and note.sha256}
    make_bar = bar or progress_bar
    with (
        make_bar(total=after // CHARACTERS_PER_TOKEN, unit="tok", desc="documents") as shown,
        disk.whole_at_the_end(),
    ):
        for path, characters, text in ahead(_texts(found), 1):
            after -= characters
            shown.set_postfix_str(one_line(path.name))
            if isinstance(text, Exception):
                found.leave_out(path, text)
                continue
            digest = text_digest(text)
            new = 0
            if held.get(digest, name(path)) == name(path):
                new = _add(model, memory, name(path), text, shown, after, disk)
                held[digest] = name(path)
            note_file(memory, name(path), found.states[path], digest)
            read, same = read + new, same + (new == 0)
            disk.after_document()
        shown.total = shown.n
    return Added(read, same)


def _texts(found: Documents) -> Iterator[tuple[Path, int, str | Exception]]:
    """Path, characters when it was found, and text of each document; what is wrong, where it can be read no longer."""
    for path, characters in zip(found.paths, found.characters, strict=True):
        try:
            yield path, characters, found.text(path)
        except (ValueError, OSError, ImportError) as error:
            yield path, characters, error


def text_digest(text: str) -> str:
    """The SHA-256 by which a document's text is known."""
    return hashlib.sha256(text.encode()).hexdigest()


def add_document(
    model: Any, memory: Memory, name: str, text: str, *, progress: tqdm | None = None, characters_after: int = 0
) -> int:
    """Read a document into a memory that was opened to grow, writing to disk on the way.

    What is there of it already is not read again: a complete document costs nothing, a part is continued. Interrupted,
    the whole windows read so far are on disk.

    Args:
        model: that made the memory, with its tokenizer.
        memory: opened with ``mode="a"``.
        name: of the document.
        text: all of it.
        progress: a bar to move, by tokens.
        characters_after: of the documents that the bar has still to show after this one.

    Returns:
        tokens read.

    Raises:
        ValueError: the memory holds another text of this name, or one of which the text is not known; name or text
            have lone surrogates.
        OSError: the disk is full, or the folder cannot be written.
    """
    disk = _Disk(memory)
    with disk.whole_at_the_end():
        return _add(model, memory, name, text, progress, characters_after, disk)


def _add(
    model: Any, memory: Memory, name: str, text: str, progress: tqdm | None, characters_after: int, disk: "_Disk"
) -> int:
    """What ``add_document`` does, but that the end of the document need not be on disk."""
    check_unicode(name, "the name of a document")
    check_unicode(text, name)
    digest, stored = text_digest(text), memory.documents().get(name, 0)
    note = memory.notes.get(name, DocumentNote(complete=False))
    if stored and note.sha256 != digest:
        raise ValueError(f"{name} has changed since it was read into this memory: bring the memory up to date with "
                         "fot memory sync, or drop it first (fot memory drop), then add it again")  # fmt: skip
    if stored and note.complete:
        return 0
    memory.notes[name] = DocumentNote(digest, complete=False)
    bar = progress if progress is not None else tqdm(disable=True)
    context = min(stored, model.memory_config.overlap)  # read once more, not stored again
    # The next piece becomes tokens while the one before goes through the model.
    pieces = ahead(text_pieces(io.StringIO(text, newline=""), len(text.encode()), model.tokenizer), 2)
    pieces = _rest(pieces, stored - context)
    first, read = next(pieces, None), 0
    if first is not None:  # otherwise it was killed just before it could be called complete
        rest = _estimating(chain([first], pieces), bar, stored - context, len(text), characters_after)
        read = ingest_pieces(model, _flushing(rest, disk), memory, name, bar, stored=context)
    memory.notes[name] = DocumentNote(digest, complete=True)
    return read


class _Disk:
    """Writes what a memory was given to its folder, from time to time."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._tokens, self._time = len(memory), time.monotonic()

    def after_piece(self) -> None:
        """Write, if it is much."""
        if len(self._memory) - self._tokens >= FLUSH_TOKENS:
            self._write()

    def after_document(self) -> None:
        """Write, if it is much or was read long ago."""
        if time.monotonic() - self._time >= FLUSH_SECONDS:
            self._write()
        self.after_piece()

    @contextmanager
    def whole_at_the_end(self) -> Iterator[None]:
        """When the block ends, by whatever but a full disk, all is on disk."""
        try:
            yield
        except OSError:
            raise
        except BaseException:
            self._write()
            raise
        self._write()

    def _write(self) -> None:
        self._memory.flush()
        self._tokens, self._time = len(self._memory), time.monotonic()


def _estimating(pieces: Iterator[Piece], bar: tqdm, tokens: int, characters: int, after: int) -> Iterator[Piece]:
    """The same pieces of a text; the bar's total follows the tokens that its characters have taken so far."""
    for piece in pieces:
        tokens, done = tokens + len(piece.ids), piece.done or 1.0
        left = (1 - done) * characters + after
        bar.total = round(bar.n + len(piece.ids) + left * tokens / (done * characters))
        yield piece


def _flushing(pieces: Iterator[Piece], disk: _Disk) -> Iterator[Piece]:
    """The same pieces; between them, what is stored goes to disk once it is enough."""
    for piece in pieces:
        yield piece
        disk.after_piece()


def _rest(pieces: Iterable[Piece], skip: int) -> Iterator[Piece]:
    """The pieces without their first ``skip`` tokens."""
    for piece in pieces:
        taken = min(skip, len(piece.ids))
        skip -= taken
        if taken < len(piece.ids):
            spans = None if piece.spans is None else piece.spans[taken:]
            yield Piece(piece.ids[taken:], spans, piece.done)
