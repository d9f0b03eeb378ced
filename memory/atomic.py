"""Files that are there whole or not at all, whatever happens while they are written."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO


@contextmanager
def replacing(path: Path, temporary: Path | None = None) -> Iterator[BinaryIO]:
    """A file that takes the place of ``path`` when the block ends, its content on stable storage; or never.

    The new name itself survives a loss of power only after ``sync_folder``.

    Args:
        path: of the file; what is there stays until the block ends.
        temporary: where it is written until then, in the same folder; None for ``.NAME.PROCESS_ID``.

    Raises:
        OSError: it cannot be written; the old file is as it was, and nothing of the new one is left.
    """
    temporary = temporary or path.parent / f".{path.name}.{os.getpid()}"
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_bytes(path: Path, content: bytes, temporary: Path | None = None) -> None:
    """Write a small file; as ``replacing``."""
    with replacing(path, temporary) as file:
        file.write(content)


def write_text(path: Path, text: str, temporary: Path | None = None) -> None:
    """Write a small file in UTF-8; as ``replacing``."""
    write_bytes(path, text.encode(), temporary)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a small JSON file; as ``replacing``."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a loss of power."""
    if os.name == "nt":  # which cannot open a folder
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def file_sha256(path: Path) -> str:
    """Hash of a file's content, hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
