"""The text of a PDF, by pypdf: pure Python, kept up, and without a licence that binds (PyMuPDF is AGPL)."""

import io
from pathlib import Path

from fot.files import UnreadableFileError


def read_pdf(path: Path) -> str:
    """The text of all pages, a line end between them.

    Raises:
        UnreadableFileError: it is damaged or encrypted.
        ImportError: pypdf is missing, or cryptography for an encrypted file.
    """
    import pypdf

    content = io.BytesIO(path.read_bytes())  # here, so that an error of the disk is not taken for one of the file
    try:
        return "\n".join(page.extract_text() for page in pypdf.PdfReader(content).pages)
    except pypdf.errors.FileNotDecryptedError as error:
        raise UnreadableFileError(path, "is an encrypted PDF", remedy="save it without its password") from error
    except pypdf.errors.DependencyError as error:
        raise ImportError(f"reading {path} (encrypted) needs cryptography: pip install 'fot[documents]'") from error
    except Exception as error:
        # pypdf meets damage where it is, with whatever Python raises there: KeyError, RecursionError, zlib.error, ...
        said = " ".join(f"{type(error).__name__} {error}".split())[:120]
        raise UnreadableFileError(path, f"cannot be read as PDF ({said})") from error
