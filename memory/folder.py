"""The folder of a memory as files: who may write, how a change happens whole or not at all, what is left over."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from memory.atomic import sync_folder, write_text
from memory.manifest import LOCK, MANIFEST, PART_NAME, Manifest, read_manifest
from memory.parts import TEMPORARY, unfinished


class Folder:
    """The folder that a memory was opened from.

    Attributes:
        path: of the folder.
        manifest: as it is on disk.
        stored: how many of the memory's first tokens are on disk.
    """

    def __init__(self, path: Path, manifest: Manifest, stored: int, lock: FileLock | None) -> None:
        self.path = path
        self.manifest = manifest
        self.stored = stored
        self._lock = lock
        self._why = "is closed" if lock else "was opened read-only"

    def check_writable(self) -> None:
        """Raise ValueError if the memory must not change."""
        if self._lock is None:
            raise ValueError(
                f"the memory {self.path} {self._why}: open it with Memory.open(path, mode='a') to change it"
            )

    def close(self) -> None:
        """Let others write."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None


def take_lock(folder: Path) -> FileLock:
    """Be the only one who writes to a folder, until the lock is released or this process ends, however it ends.

    Raises:
        OSError: it is read-only, or somebody else writes to it.
    """
    # Whichever thread closes the memory lets go of it.
    lock = FileLock(folder / LOCK, thread_local=False)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise BlockingIOError(
            errno.EAGAIN,
            f"{folder} is already open for writing: wait until the other writer has finished, or close that memory",
        ) from error
    except OSError as error:
        raise OSError(
            error.errno,
            f"{folder} cannot be written to ({error.strerror}): choose another folder, or change its permissions",
        ) from error
    return lock


@contextmanager
def changing(folder: Path) -> Iterator[None]:
    """What is written in this block and not committed goes again: a full disk must not stay full."""
    try:
        yield
    except BaseException as error:
        remove_leftovers(folder)
        if isinstance(error, OSError) and error.errno is not None:
            raise OSError(
                error.errno,
                f"{folder} could not be written ({error.strerror}), and nothing in it was changed: free some space, or "
                "choose another folder",
            ) from error
        raise


def commit(folder: Path, manifest: Manifest) -> None:
    """Make a change real: from here on the folder holds what this manifest says."""
    manifest.stamp()
    sync_folder(folder)  # the parts have their names before the manifest has them
    write_text(folder / MANIFEST, manifest.to_json(), unfinished(folder / MANIFEST))
    sync_folder(folder)
    remove_leftovers(folder)


def remove_leftovers(folder: Path) -> None:
    """Delete files of ours that the manifest does not name: of writers that were killed, or replaced ones.

    Only for those who hold the lock.
    """
    named = set()
    if (folder / MANIFEST).exists():
        named = {part.file for part in read_manifest(folder).files()}
    for entry in folder.iterdir():
        if is_ours(entry.name) and entry.name not in (MANIFEST, LOCK, *named):
            try:
                entry.unlink()
            except PermissionError:
                continue  # Windows keeps files that somebody has mapped; the next writer will do it


def next_path(folder: Path, kind: str) -> Path:
    """For a new part: a number higher than all there are."""
    names = [PART_NAME.fullmatch(entry.name) for entry in folder.iterdir()]
    number = 1 + max((int(name[2]) for name in names if name and name[1] == kind), default=0)
    return folder / f"{kind}-{number:06}.safetensors"


def is_ours(name: str) -> bool:
    """Whether a file of this name belongs to a memory."""
    return name in (MANIFEST, LOCK, MANIFEST + TEMPORARY) or bool(PART_NAME.fullmatch(name.removesuffix(TEMPORARY)))
