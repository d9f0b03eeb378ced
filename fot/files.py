"""Is this a file of text? What can be said of a file or a text before it is read in earnest."""

import codecs
import os
import stat
from pathlib import Path

# Opening one of these can wait for ever, or do something.
SPECIAL = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}


class UnreadableFileError(ValueError):
    """A file that is no document.

    Attributes:
        path: the file.
        reason: what is wrong, to follow the name: ``is not UTF-8 text (byte 3)``.
        kind: under which such files are counted.
    """

    def __init__(self, path: Path, reason: str, *, remedy: str = "", kind: str = "unreadable") -> None:
        super().__init__(f"{path} {reason}" + (f": {remedy}" if remedy else "") + "; nothing was stored")
        self.path, self.reason, self.kind = path, reason, kind


def check_regular(path: Path) -> None:
    """Raise UnreadableFileError if a path is a pipe, socket, device or folder, or its name is not UTF-8.

    Nothing is opened. OSError: it is not there.
    """
    name = shown(path)
    if name != str(path):
        raise UnreadableFileError(Path(name), "has a name that is not UTF-8", remedy="rename it")
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        raise UnreadableFileError(path, f"is {SPECIAL.get(stat.S_IFMT(mode), 'a special file')}, not a file of text")


def check_not_binary(path: Path, allowed: tuple[bytes, ...] = ()) -> None:
    """Raise UnreadableFileError if a file has zero bytes near its start, unless it starts with one of ``allowed``."""
    with open(path, "rb") as file:
        start = file.read(1 << 13)
    if b"\0" in start and not (allowed and start.startswith(allowed)):
        raise UnreadableFileError(path, "is a binary file, not text", kind="binary")


def check_utf8(path: Path) -> None:
    """Raise UnreadableFileError if a file is no file, not UTF-8 (the byte is named), or binary."""
    check_regular(path)
    decoder = codecs.getincrementaldecoder("utf-8")()
    start = 0
    with open(path, "rb") as file:
        while True:
            block = file.read(1 << 20)
            pending = len(decoder.getstate()[0])  # bytes of a character that the last block cut in two
            try:
                decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                raise UnreadableFileError(
                    path,
                    f"is not UTF-8 text (byte {start - pending + error.start})",
                    remedy="convert it, for instance with iconv -t utf-8",
                ) from error
            if not block:
                break
            start += len(block)
    check_not_binary(path)  # zero bytes are UTF-8


def check_unicode(text: str, what: str) -> None:
    """Raise ValueError, naming it, if a text has lone surrogates, which UTF-8 has no form for.

    Python makes them of bytes that are not UTF-8, in arguments and names of files.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{what} is not UTF-8 text, from character {error.start} on: convert it to UTF-8") from None


def shown(name: str | Path) -> str:
    """A name or text as it may be printed anywhere: U+FFFD in place of lone surrogates."""
    return str(name).encode("utf-16", "surrogatepass").decode("utf-16", "replace")
