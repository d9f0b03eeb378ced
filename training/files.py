"""Files and folders that are there whole or not at all, whatever happens while they are written."""

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from memory.atomic import file_sha256, sync_folder, write_text

SUMS = "sha256.json"
_LEFTOVER = re.compile(r"\.(?P<name>.+)\.\d+(?P<old>\.old)?")


def write_file(path: Path, text: str) -> None:
    """Write a file anew; until it is on disk, the old one stays."""
    write_text(path, text)
    _sync_folder(path.parent)


@contextmanager
def whole_folder(final: Path) -> Iterator[Path]:
    """A folder that takes the place of ``final`` when the block ends, with all its files on disk; or never.

    A folder cannot be replaced by one rename, so the old one is moved aside first; ``recover`` brings it back if the
    process is killed between the two.
    """
    temporary = final.parent / f".{final.name}.{os.getpid()}"
    aside = temporary.with_name(temporary.name + ".old")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for path in temporary.rglob("*"):
            if path.is_file():
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
        if final.exists():
            os.replace(final, aside)
        os.replace(temporary, final)
    except BaseException:
        if aside.exists() and not final.exists():
            os.replace(aside, final)
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _sync_folder(final.parent)
    shutil.rmtree(aside, ignore_errors=True)


def recover(folder: Path) -> None:
    """Clear away what a killed process left while it wrote into ``folder``, and bring back what it had moved aside."""
    for path in sorted(folder.glob(".*")):
        match = _LEFTOVER.fullmatch(path.name)
        if match is None:
            continue
        final = folder / match["name"]
        if match["old"] and not final.exists():
            os.replace(path, final)
        elif path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def write_sums(folder: Path) -> None:
    """Write the SHA-256 of every file of ``folder`` beside them; the last thing that is written there."""
    sums = {path.name: file_sha256(path) for path in sorted(folder.iterdir())}
    (folder / SUMS).write_text(json.dumps(sums, indent=1) + "\n")


def damage(folder: Path) -> str | None:
    """What is wrong with a folder that ``write_sums`` has sealed; None if nothing is."""
    try:
        sums = json.loads((folder / SUMS).read_text(encoding="utf-8"))
        for name, expected in sums.items():
            if file_sha256(folder / name) != expected:
                return f"the content of {name} has changed"
    except FileNotFoundError as error:
        return f"{Path(str(error.filename)).name} is missing"
    except OSError as error:
        return f"it cannot be read ({error.strerror})"
    except (ValueError, AttributeError):
        return f"{SUMS} is damaged"
    return None


def _sync_folder(folder: Path) -> None:
    """Put renames in a folder on disk, where the system can (Windows opens no folders)."""
    with suppress(OSError):
        sync_folder(folder)
