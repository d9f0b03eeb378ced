"""Documents that are ZIP files within: EPUB books and DOCX files."""

import posixpath
import re
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote
from xml.etree import ElementTree

from fot.documents.html import html_text
from fot.files import UnreadableFileError

# A book unpacks to less; what unpacks to more was made to fill a disk or a memory.
MOST_BYTES = 1 << 29
PAGES = {"application/xhtml+xml", "text/html", "application/x-dtbook+xml", "text/x-oeb1-document"}
CONTAINER, ENCRYPTION = "META-INF/container.xml", "META-INF/encryption.xml"


def read_epub(path: Path) -> str:
    """The chapters of a book in reading order, by its package document (EPUB 2 and 3), an empty line between them.

    Raises:
        UnreadableFileError: it is no EPUB, damaged or encrypted.
        ImportError: selectolax is missing.
    """
    with _opened(path, "EPUB") as book:
        package = _package(book)
        encrypted = _encrypted(book)
        texts = []
        for name in _chapters(book, package):
            if name in encrypted:
                raise UnreadableFileError(path, "is an encrypted EPUB (DRM)")
            texts.append(html_text(book.read(name), title=False))
    return "\n\n".join(text for text in texts if text.strip())


def read_docx(path: Path) -> str:
    """The text of a DOCX file with its tables, lists and notes: mammoth makes HTML of it.

    mammoth is kept up, has one small dependency, and follows what a document means. (MarkItDown takes it, too, for
    DOCX; for the other formats it would bring an ONNX runtime and a second PDF parser to what is read here without.)

    Raises:
        UnreadableFileError: it is no DOCX file, damaged or encrypted.
        ImportError: mammoth or selectolax is missing.
    """
    import mammoth

    with _opened(path, "DOCX"):
        pass
    try:
        with open(path, "rb") as file:
            page = mammoth.convert_to_html(file, convert_image=mammoth.images.img_element(lambda image: {}))
    except OSError:
        raise
    except Exception as error:  # as with PDF files: whatever damage leads to
        raise _damaged(path, "DOCX", error) from error
    return html_text(page.value.encode(), title=False)


@contextmanager
def _opened(path: Path, kind: str) -> Iterator[zipfile.ZipFile]:
    """The ZIP file in a document.

    Raises:
        UnreadableFileError: it is none, is damaged (in the block, too), or unpacks to too much.
    """
    try:
        with zipfile.ZipFile(path) as file:
            if sum(entry.file_size for entry in file.infolist()) > MOST_BYTES:
                raise UnreadableFileError(path, f"unpacks to more than {MOST_BYTES >> 20} MiB")
            yield file
    except (zipfile.BadZipFile, zlib.error, KeyError, ElementTree.ParseError, RuntimeError, NotImplementedError,
            EOFError, UnicodeError) as error:  # fmt: skip
        raise _damaged(path, kind, error) from error


def _damaged(path: Path, kind: str, error: Exception) -> UnreadableFileError:
    said = " ".join(f"{type(error).__name__} {error}".split())[:120]
    return UnreadableFileError(path, f"cannot be read as {kind} ({said})")


def _xml(content: bytes) -> ElementTree.Element:
    """Raises ElementTree.ParseError for entities, too: a few lines of them stand for gigabytes."""
    if re.search(rb"<!ENTITY", content, re.IGNORECASE):
        raise ElementTree.ParseError("it declares entities")
    return ElementTree.fromstring(content)


def _package(book: zipfile.ZipFile) -> str:
    """The name of the package document."""
    for entry in _xml(book.read(CONTAINER)).iter():
        if _local(entry) == "rootfile" and entry.get("full-path"):
            return str(entry.get("full-path"))
    raise KeyError("no package document")


def _chapters(book: zipfile.ZipFile, package: str) -> list[str]:
    """The names of its pages in reading order."""
    entries = list(_xml(book.read(package)).iter())
    items = {entry.get("id"): entry for entry in entries if _local(entry) == "item"}
    names = []
    for entry in entries:
        item = items.get(entry.get("idref")) if _local(entry) == "itemref" else None
        if item is None or item.get("media-type") not in PAGES or "nav" in (item.get("properties") or "").split():
            continue
        href = unquote(item.get("href", "").split("#")[0])
        names.append(posixpath.normpath(posixpath.join(posixpath.dirname(package), href)))
    return list(dict.fromkeys(names))


def _encrypted(book: zipfile.ZipFile) -> set[str]:
    """Names of what cannot be read without a key; fonts are often among them, and no matter."""
    if ENCRYPTION not in book.namelist():
        return set()
    references = (entry for entry in _xml(book.read(ENCRYPTION)).iter() if _local(entry) == "CipherReference")
    return {unquote(entry.get("URI", "")) for entry in references}


def _local(entry: ElementTree.Element) -> str:
    """The name of an element without its namespace."""
    return str(entry.tag).rpartition("}")[2]
