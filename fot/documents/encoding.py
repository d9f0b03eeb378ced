"""The text of a plain file, in whatever encoding it is.

A byte order mark decides, then what the user says, then UTF-8; the rest is detected by charset-normalizer, which is
kept up, needs nothing else, and judges what a decoded text reads like. (chardet guesses from byte statistics alone.)
"""

import codecs
from pathlib import Path

from charset_normalizer import from_bytes

from fot.files import UnreadableFileError

# UTF-32 first: its little-endian mark begins with that of UTF-16.
MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)

HEAD = 1 << 13  # bytes that tell whether a file is binary
SAMPLE = 1 << 15  # bytes of lines that are not ASCII, from which an encoding is detected
FEWEST = 24  # with less than so many bytes in such lines, a guess would be one
MOST_CONTROLS = 0.01  # share of control characters in a text

# What most texts of Western Europe are in; detection calls some of them by other names.
WESTERN = "cp1252"
# Those that texts are found in. Rarer ones would be taken for these: of short texts, detection tells few apart.
COMMON = [
    *(WESTERN, "cp1250", "cp1251", "cp1253", "cp1254", "cp1255", "cp1256", "iso8859_2", "iso8859_5", "iso8859_7"),
    *("iso8859_15", "koi8_r", "koi8_u", "cp866", "cp932", "euc_jp", "iso2022_jp", "cp949", "gb18030", "big5", "cp874"),
]

CONTROLS = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\t\n\r\f\b\x1b\x85"}


def is_binary(head: bytes) -> bool:
    """Whether a file that begins so is no text: it has zero bytes, and is in none of the encodings that do."""
    return b"\0" in head and _marked(head) is None and _wide(head) is None


def decode(path: Path, content: bytes, encoding: str | None) -> tuple[str, str | None]:
    """A plain text and its encoding, if that was detected.

    Args:
        path: of the file, for errors.
        content: all of it.
        encoding: of it, if it has no byte order mark; None: UTF-8, or what is detected.

    Raises:
        UnreadableFileError: it is binary, damaged, or in an encoding that cannot be told.
    """
    known = _marked(content[:4]) or encoding
    if known is not None:
        try:
            text = content.decode(known).removeprefix("\ufeff")
        except UnicodeError as error:
            where = f" (byte {error.start})" if isinstance(error, UnicodeDecodeError) else ""
            raise UnreadableFileError(path, f"is not {known.upper()} text{where}", remedy=_REMEDY) from error
        return _checked(path, text), None
    wide = _wide(content[:HEAD])
    if wide is not None:
        try:
            return _checked(path, content.decode(wide)), wide
        except UnicodeError:
            pass
    if b"\0" in content[:HEAD]:
        raise UnreadableFileError(path, "is a binary file, not text", kind="binary")
    try:
        return content.decode("utf-8"), None
    except UnicodeDecodeError as error:
        detected = _detect(content)
        if detected is not None:
            try:
                return _checked(path, content.decode(detected)), detected
            except UnicodeError:
                pass
        raise UnreadableFileError(path, f"is not UTF-8 text (byte {error.start})", remedy=_REMEDY) from error


_REMEDY = "give its encoding with --encoding, or convert it, for instance with iconv -t utf-8"


def _marked(head: bytes) -> str | None:
    """The encoding that a byte order mark names."""
    return next((encoding for mark, encoding in MARKS if head.startswith(mark)), None)


def _wide(head: bytes) -> str | None:
    """UTF-16 without a mark: in most texts, one byte of each pair is 0 nearly everywhere, and the other one never."""
    pairs = len(head) // 2
    if pairs < 4:
        return None
    first, second = head[: 2 * pairs : 2].count(0), head[1 : 2 * pairs : 2].count(0)
    if max(first, second) < 0.4 * pairs or min(first, second) > 0:
        return None
    return "utf-16-be" if first > second else "utf-16-le"


def _detect(content: bytes) -> str | None:
    """The encoding of a text that is not UTF-8; None if it cannot be told."""
    replaced = content.decode("utf-8", "replace")
    if _whole_characters(replaced) >= replaced.count("\ufffd"):
        return None  # UTF-8 with some damage is no other encoding
    sample = bytearray()
    for line in content.splitlines(keepends=True):
        if not line.isascii():
            sample += line[: SAMPLE - len(sample)]
        if len(sample) >= SAMPLE:
            break
    if len(sample) < FEWEST:
        return None
    results = from_bytes(bytes(sample), cp_isolation=COMMON)
    best = results.best()
    if best is None:
        return None
    western = next((one for one in results if WESTERN in one.could_be_from_charset), None)
    if western is not None and western.chaos <= best.chaos and western.coherence >= best.coherence:
        return WESTERN
    return str(best.encoding)


def _whole_characters(replaced: str) -> int:
    """Characters beyond ASCII that were read whole."""
    return sum(1 for character in replaced if character > "\x7f" and character != "\ufffd")


def _checked(path: Path, text: str) -> str:
    """The text, unless so much of it is control characters that it is none."""
    if len(text) - len(text.translate(CONTROLS)) > MOST_CONTROLS * len(text):
        raise UnreadableFileError(path, "is a binary file, not text", kind="binary")
    return text
