"""The text of a file: plain text in any encoding, PDF, HTML, EPUB, DOCX, notebooks, JSON Lines and mail."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fot.documents.encoding import HEAD, MARKS, decode, is_binary
from fot.documents.html import html_text
from fot.documents.jsonl import jsonl_text
from fot.documents.mail import in_maildir, is_mailbox, read_mailbox, read_message
from fot.documents.notebook import notebook_text
from fot.documents.options import DEFAULT, Options
from fot.documents.pdf import read_pdf
from fot.documents.zipped import read_docx, read_epub
from fot.files import UnreadableFileError, check_not_binary, check_regular, shown

# Of UTF-16 and UTF-32, in which text has zero bytes.
WIDE_MARKS = tuple(mark for mark, encoding in MARKS if encoding != "utf-8")

ARCHIVES = {
    *(".7z", ".apk", ".ar", ".bz2", ".cab", ".cpio", ".crate", ".deb", ".dmg", ".gz", ".iso", ".jar", ".lz4", ".rar"),
    *(".rpm", ".tar", ".tbz2", ".tgz", ".txz", ".war", ".whl", ".xz", ".zip", ".zst"),
}
STARTS_OF_ARCHIVES = (
    b"PK\3\4",
    b"\x1f\x8b",
    b"7z\xbc\xaf\x27\x1c",
    b"Rar!\x1a\7",
    b"\xfd7zXZ\0",
    b"BZh9",
    b"\x28\xb5\x2f\xfd",
)


class EmptyDocumentError(UnreadableFileError):
    """A file that can be read, but has no text."""

    def __init__(self, path: Path) -> None:
        if path.suffix.lower() == ".pdf":  # its owner sees text in it
            super().__init__(path, "has no text (scanned pages?)", remedy="put a text layer into it, by OCR")
        else:
            super().__init__(path, "has no text", kind="empty")


@dataclass(frozen=True)
class Read:
    """What was read of a file.

    Attributes:
        text: all of it, without lone surrogates.
        detected: the encoding, if it was detected and may be wrong.
    """

    text: str
    detected: str | None = None


def read_document(path: Path, options: Options = DEFAULT) -> str:
    """The text of a file. It has no lone surrogates.

    Raises:
        EmptyDocumentError: it has no text.
        UnreadableFileError: it is binary, an archive, damaged, encrypted, in an encoding that cannot be told, or no
            file at all.
        OSError: it cannot be read.
        ImportError: a package that reads it is missing. The file is named in each.
    """
    return read(path, options).text


def read(path: Path, options: Options = DEFAULT) -> Read:
    """What ``read_document`` reads, and how; it raises the same."""
    check_regular(path)
    special = reader(path)
    try:
        done = Read(shown(special(path, options))) if special else _read_plain(path, options)
    except ModuleNotFoundError as error:
        package = (error.name or "a package").partition(".")[0]
        raise ImportError(f"reading {path} needs {package}: pip install 'fot[documents]'") from error
    if not done.text.strip():
        raise EmptyDocumentError(path)
    return done


def reader(path: Path) -> Callable[[Path, Options], str] | None:
    """Who reads a file that is more than plain text; None for others. Nothing is opened that has a known suffix."""
    suffix = path.suffix.lower()
    if suffix in ARCHIVES:
        return _refuse_archive
    if suffix in READERS:
        return READERS[suffix]
    if in_maildir(path):
        return _read_message
    if not suffix and is_mailbox(_head(path)):
        return _read_mailbox
    return None


def takes_time(path: Path) -> bool:
    """Whether a file has to be parsed, which takes longer than to read it.

    Raises:
        UnreadableFileError: it is no file: a pipe would never end.
    """
    check_regular(path)
    return reader(path) not in (None, _refuse_archive)


def _head(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(HEAD)


def _refuse_archive(path: Path, options: Options) -> str:
    raise UnreadableFileError(path, "is an archive", remedy="unpack it and give the folder", kind="archives")


def _read_plain(path: Path, options: Options) -> Read:
    head = _head(path)
    if head.startswith(STARTS_OF_ARCHIVES):
        _refuse_archive(path, options)
    if options.encoding is None and is_binary(head):  # before all of a film is read
        raise UnreadableFileError(path, "is a binary file, not text", kind="binary")
    return Read(*decode(path, path.read_bytes(), options.encoding))


def _read_pdf(path: Path, options: Options) -> str:
    return read_pdf(path)


def _read_html(path: Path, options: Options) -> str:
    check_not_binary(path, WIDE_MARKS)
    content = path.read_bytes()
    if options.encoding is not None and not content.startswith(WIDE_MARKS):
        content = decode(path, content, options.encoding)[0].encode("utf-8", "replace")
    return html_text(content)


def _read_epub(path: Path, options: Options) -> str:
    return read_epub(path)


def _read_docx(path: Path, options: Options) -> str:
    return read_docx(path)


def _read_notebook(path: Path, options: Options) -> str:
    return notebook_text(path, _read_plain(path, Options()).text)


def _read_jsonl(path: Path, options: Options) -> str:
    return jsonl_text(path, _read_plain(path, options).text, options.field)


def _read_message(path: Path, options: Options) -> str:
    return read_message(path)


def _read_mailbox(path: Path, options: Options) -> str:
    return read_mailbox(path)


# Who reads files of which suffix.
READERS: dict[str, Callable[[Path, Options], str]] = {
    ".pdf": _read_pdf,
    **dict.fromkeys((".html", ".htm", ".xhtml"), _read_html),
    ".epub": _read_epub,
    ".docx": _read_docx,
    ".ipynb": _read_notebook,
    **dict.fromkeys((".jsonl", ".ndjson"), _read_jsonl),
    ".eml": _read_message,
    ".mbox": _read_mailbox,
}
