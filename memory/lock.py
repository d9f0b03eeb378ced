"""A lock on a file, held by one process at a time and let go when it ends, however it ends."""

import sys
from pathlib import Path
from typing import IO

if sys.platform == "win32":
    import msvcrt

    def _lock(file: IO[bytes]) -> None:
        file.seek(0)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)

else:
    import fcntl

    def _lock(file: IO[bytes]) -> None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


class Lock:
    """Held from the start until ``release``.

    Raises:
        BlockingIOError: somebody else holds it.
        OSError: the file cannot be opened, or the file system has no locks.
    """

    def __init__(self, path: Path) -> None:
        self._file = open(path, "ab")  # noqa: SIM115  it is what holds the lock
        try:
            _lock(self._file)
        except PermissionError as error:  # how Windows says it
            self._file.close()
            raise BlockingIOError(error.errno, "locked") from error
        except BaseException:
            self._file.close()
            raise

    def release(self) -> None:
        """Let it go; again does nothing."""
        self._file.close()
