"""The text of a file: UTF-8, PDF or HTML."""

import io
from collections.abc import Callable
from pathlib import Path

from fot.documents.html import html_text
from fot.files import UnreadableFileError, check_not_binary, check_regular, check_utf8, shown

# Marks at the start of UTF-16 and UTF-32, in which text has zero bytes.
WIDE_MARKS = (b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff")


class EmptyDocumentError(UnreadableFileError):
    """A file that can be read, but has no text."""

    def __init__(self, path: Path) -> None:
        if path.suffix.lower() == ".pdf":  # its owner sees text in it
            super().__init__(path, "has no text (scanned pages?)")
        else:
            super().__init__(path, "has no text", kind="empty")


def read_document(path: Path) -> str:
    """The text of a UTF-8 file, a PDF or an HTML page. It has no lone surrogates.

    Raises:
        EmptyDocumentError: it has no text.
        UnreadableFileError: it is binary, damaged, encrypted, not UTF-8, or no file at all.
        OSError: it cannot be read.
        ImportError: a package that reads it is missing. The file is named in each.
    """
    check_regular(path)
    text = readers().get(path.suffix.lower(), _read_text)(path)
    if not text.strip():
        raise EmptyDocumentError(path)
    return text


def readers() -> dict[str, Callable[[Path], str]]:
    """Who reads files of which suffix, other than as plain text."""
    return {".pdf": _read_pdf, ".html": _read_html, ".htm": _read_html}


def _read_text(path: Path) -> str:
    check_not_binary(path)  # most binary files are not UTF-8 either: say the plainer
    check_utf8(path)
    with open(path, encoding="utf-8", newline="") as text:
        return text.read().removeprefix("\ufeff")


def _read_pdf(path: Path) -> str:
    try:
        import pypdf
    except ImportError as error:
        raise ImportError(f"reading {path} needs pypdf: pip install 'fot[documents]'") from error
    content = io.BytesIO(path.read_bytes())  # here, so that an error of the disk is not taken for one of the file
    try:
        text = "\n".join(page.extract_text() for page in pypdf.PdfReader(content).pages)
    except pypdf.errors.FileNotDecryptedError as error:
        raise UnreadableFileError(path, "is an encrypted PDF", remedy="save it without its password") from error
    except pypdf.errors.DependencyError as error:
        raise ImportError(f"reading {path} (encrypted) needs cryptography: pip install 'fot[documents]'") from error
    except Exception as error:
        # pypdf meets damage where it is, with whatever Python raises there: KeyError, RecursionError, zlib.error, ...
        said = " ".join(f"{type(error).__name__} {error}".split())[:120]
        raise UnreadableFileError(path, f"cannot be read as PDF ({said})") from error
    # Fonts with a damaged table of characters give halves of surrogate pairs.
    return shown(text)


def _read_html(path: Path) -> str:
    check_not_binary(path, WIDE_MARKS)
    try:
        return shown(html_text(path.read_bytes()))
    except ImportError as error:
        raise ImportError(f"reading {path} needs selectolax: pip install 'fot[documents]'") from error
