"""Files as documents of a memory: find them, read their text, add them step by step."""

import hashlib
import io
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from itertools import chain
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fot.ingest import Piece, check_utf8, ingest_pieces, text_pieces
from memory import DocumentNote, Memory

# A long document is written to disk each time that so many tokens have been read.
FLUSH_TOKENS = 65_536

CHARACTERS_PER_TOKEN = 4  # a first guess for the progress bar


class EmptyDocumentError(ValueError):
    """A file that can be read, but has no text."""


@dataclass
class Documents:
    """Files with text.

    Attributes:
        paths: in the order to be read, each once.
        characters: of each.
        left_out: why files in folders were left out (hidden, binary, empty, not asked for), and how many.
    """

    paths: list[Path] = field(default_factory=list)
    characters: list[int] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)


def find_documents(paths: Sequence[Path], include: Sequence[str] = (), exclude: Sequence[str] = ()) -> Documents:
    """The documents among files and folders.

    Args:
        paths: files, which must have text; folders, of whose files those with text are taken, in order of name.
        include: globs; of the files in folders, only those whose name or path in the folder fits one. None: all.
        exclude: globs; those that fit are left out, and folders that fit are not entered.

    Raises:
        ValueError: a named file without text, or nothing found at all.
        OSError: a path that is not there or cannot be read.
        ImportError: a package that reads this kind of file is missing.
    """
    found, seen = Documents(), set()
    for path in paths:
        inside = path.is_dir()
        for file in _walk(path, include, exclude, found.left_out) if inside else [path]:
            if file.resolve() in seen:
                continue
            seen.add(file.resolve())
            try:
                text = read_document(file)
            except ValueError as error:
                if not inside:
                    raise
                found.left_out["empty" if isinstance(error, EmptyDocumentError) else "binary"] += 1
                continue
            found.paths.append(file)
            found.characters.append(len(text))
    if not found.paths:
        raise ValueError(f"no file with text in {', '.join(map(str, paths))} ({describe_left_out(found) or 'empty'}); "
                         "check the path, --include and --exclude")  # fmt: skip
    return found


def describe_left_out(found: Documents) -> str:
    """``3 binary, 1 hidden``; empty if nothing was left out."""
    return ", ".join(f"{count:,} {reason}" for reason, count in sorted(found.left_out.items()))


def read_document(path: Path) -> str:
    """The text of a UTF-8 file, a PDF or an HTML page.

    Raises:
        EmptyDocumentError: it has no text.
        ValueError: it is binary, damaged or not UTF-8. The file is named in either.
        OSError: it cannot be read.
        ImportError: pypdf or beautifulsoup4 is missing.
    """
    readers: dict[str, Callable[[Path], str]] = {".pdf": _read_pdf, ".html": _read_html, ".htm": _read_html}
    text = readers.get(path.suffix.lower(), _read_text)(path)
    if not text.strip():
        raise EmptyDocumentError(f"{path} has no text; nothing was stored")
    return text


def add_documents(model: Any, memory: Memory, found: Documents) -> tuple[int, int]:
    """Read documents into a memory that was opened to grow, under one progress bar; see ``add_document``.

    Returns:
        tokens read, and how many documents were there already.
    """
    after, read, same = sum(found.characters), 0, 0
    with tqdm(total=after // CHARACTERS_PER_TOKEN, unit="tok", desc="documents", disable=None) as bar:
        for path, characters in zip(found.paths, found.characters, strict=True):
            after -= characters
            bar.set_postfix_str(path.name)
            text = read_document(path)
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
        ValueError: the memory holds another text of this name, or one of which the text is not known.
        OSError: the disk is full, or the folder cannot be written.
    """
    digest, stored = hashlib.sha256(text.encode()).hexdigest(), memory.documents().get(name, 0)
    note = memory.notes.get(name, DocumentNote(complete=False))
    if stored and note.sha256 != digest:
        raise ValueError(f"{name} has changed since it was read into this memory: drop it first (fot memory drop), "
                         "then add it again")  # fmt: skip
    if stored and note.complete:
        return 0
    memory.notes[name] = DocumentNote(digest, complete=False)
    bar = progress if progress is not None else tqdm(disable=True)
    context = min(stored, model.memory_config.window_overlap)  # read once more, not stored again
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


def _walk(folder: Path, include: Sequence[str], exclude: Sequence[str], left_out: Counter[str]) -> Iterator[Path]:
    for parent, folders, files in os.walk(folder):
        here = Path(parent)
        for name in sorted(folders):
            if name.startswith(".") or _fits(here.relative_to(folder) / name, exclude):
                folders.remove(name)
                left_out["hidden folders" if name.startswith(".") else "excluded folders"] += 1
        folders.sort()
        for name in sorted(files):
            inside = here.relative_to(folder) / name
            if name.startswith("."):
                left_out["hidden"] += 1
            elif _fits(inside, exclude) or (include and not _fits(inside, include)):
                left_out["not asked for"] += 1
            else:
                yield here / name


def _fits(path: Path, globs: Sequence[str]) -> bool:
    return any(fnmatch(path.name, glob) or fnmatch(path.as_posix(), glob) for glob in globs)


def _read_text(path: Path) -> str:
    with open(path, "rb") as file:
        if b"\0" in file.read(1 << 13):
            raise ValueError(f"{path} is a binary file, not text; nothing was stored")
    check_utf8(path)
    with open(path, encoding="utf-8", newline="") as text:
        return text.read().removeprefix("\ufeff")


def _read_pdf(path: Path) -> str:
    try:
        import pypdf
    except ImportError as error:
        raise ImportError(f"reading {path} needs pypdf: pip install 'fot[documents]'") from error
    try:
        pages = [page.extract_text() for page in pypdf.PdfReader(path).pages]
    except pypdf.errors.PyPdfError as error:
        raise ValueError(f"{path} cannot be read as PDF: {error}; nothing was stored") from error
    return "\n".join(pages)


def _read_html(path: Path) -> str:
    try:
        from bs4 import BeautifulSoup
    except ImportError as error:
        raise ImportError(f"reading {path} needs beautifulsoup4: pip install 'fot[documents]'") from error
    soup = BeautifulSoup(path.read_bytes(), "html.parser")
    for tag in soup(["script", "style", "template", "noscript"]):
        tag.decompose()
    lines = (line.strip() for line in soup.get_text("\n").splitlines())
    return "\n".join(line for line in lines if line)
