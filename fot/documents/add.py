"""Add documents to a memory, step by step."""

import hashlib
import io
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

from tqdm import tqdm

from fot.documents.find import Documents
from fot.files import check_unicode
from fot.ingest import Piece, ingest_pieces, text_pieces
from memory import DocumentNote, Memory

# A long document is written to disk each time that so many tokens have been read.
FLUSH_TOKENS = 65_536

CHARACTERS_PER_TOKEN = 4  # a first guess for the progress bar


def add_documents(model: Any, memory: Memory, found: Documents) -> tuple[int, int]:
    """Read documents into a memory that was opened to grow, under one progress bar; see ``add_document``.

    A file that can be read no longer is left out and noted in ``found``.

    Returns:
        tokens read, and how many documents were there already.
    """
    after, read, same = sum(found.characters), 0, 0
    with tqdm(total=after // CHARACTERS_PER_TOKEN, unit="tok", desc="documents", disable=None) as bar:
        for path, characters in zip(found.paths, found.characters, strict=True):
            after -= characters
            bar.set_postfix_str(path.name)
            try:
                text = found.text(path)
            except (ValueError, OSError) as error:
                found.leave_out(path, error)
                continue
            new = add_document(model, memory, path.as_posix(), text, progress=bar, characters_after=after)
            read, same = read + new, same + (new == 0)
        bar.total = bar.n
    return read, same


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
    check_unicode(name, "the name of a document")
    check_unicode(text, name)
    digest, stored = hashlib.sha256(text.encode()).hexdigest(), memory.documents().get(name, 0)
    note = memory.notes.get(name, DocumentNote(complete=False))
    if stored and note.sha256 != digest:
        raise ValueError(f"{name} has changed since it was read into this memory: drop it first (fot memory drop), "
                         "then add it again")  # fmt: skip
    if stored and note.complete:
        return 0
    memory.notes[name] = DocumentNote(digest, complete=False)
    bar = progress if progress is not None else tqdm(disable=True)
    context = min(stored, model.memory_config.overlap)  # read once more, not stored again
    pieces = _rest(text_pieces(io.StringIO(text, newline=""), len(text.encode()), model.tokenizer), stored - context)
    first, read = next(pieces, None), 0
    try:
        if first is not None:  # otherwise it was killed just before it could be called complete
            rest = _estimating(chain([first], pieces), bar, stored - context, len(text), characters_after)
            read = ingest_pieces(model, _flushing(rest, memory), memory, name, bar, stored=context)
    except OSError:
        raise
    except BaseException:
        memory.flush()
        raise
    memory.notes[name] = DocumentNote(digest, complete=True)
    memory.flush()
    return read


def _estimating(pieces: Iterator[Piece], bar: tqdm, tokens: int, characters: int, after: int) -> Iterator[Piece]:
    """The same pieces of a text; the bar's total follows the tokens that its characters have taken so far."""
    for piece in pieces:
        tokens, done = tokens + len(piece.ids), piece.done or 1.0
        left = (1 - done) * characters + after
        bar.total = round(bar.n + len(piece.ids) + left * tokens / (done * characters))
        yield piece


def _flushing(pieces: Iterator[Piece], memory: Memory) -> Iterator[Piece]:
    """The same pieces; between them, what is stored goes to disk once it is enough."""
    flushed = len(memory)
    for piece in pieces:
        yield piece
        if len(memory) - flushed >= FLUSH_TOKENS:
            memory.flush()
            flushed = len(memory)


def _rest(pieces: Iterable[Piece], skip: int) -> Iterator[Piece]:
    """The pieces without their first ``skip`` tokens."""
    for piece in pieces:
        taken = min(skip, len(piece.ids))
        skip -= taken
        if taken < len(piece.ids):
            spans = None if piece.spans is None else piece.spans[taken:]
            yield Piece(piece.ids[taken:], spans, piece.done)
