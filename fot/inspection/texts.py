"""Token ids as text, token by token."""

from collections.abc import Sequence
from typing import Any

# What commands a terminal, such as the escape character and the carriage return; surrogates, which no terminal can
# show; and what turns the order of characters on a line around, so that a name is read as another.
_TURNING = (0x202D, 0x202E, *range(0x2066, 0x206A))
UNPRINTABLE = {
    code: "\ufffd"
    for code in (*range(32), *range(127, 160), *range(0xD800, 0xE000), *_TURNING)
    if chr(code) not in "\t\n"
}


def token_texts(tokenizer: Any, ids: Sequence[int], *, special: bool = True) -> list[str]:
    """The text of each token, such that together they are the text of all.

    A character made of several tokens goes to the last of them; the others are "".

    Args:
        tokenizer: None shows the numbers.
        ids: negative ones (inputs given as embeddings) show as such.
        special: False leaves special tokens out: their text is "".
    """
    if tokenizer is None or any(number < 0 for number in ids):
        return [f"‹{number}›" for number in ids]
    texts = []
    start = read = 0  # what was read before a token decides about its spaces, so it is decoded along
    for stop in range(1, len(ids) + 1):
        before, text = (_decode(tokenizer, ids[start:end], special) for end in (read, stop))
        if len(text) > len(before) and (not text.endswith("\ufffd") or stop == len(ids)):
            texts.append(text[len(before) :])
            start, read = read, stop
        else:
            texts.append("")
    return texts


def one_line(text: str) -> str:
    """The same on one line, printable: each run of white space becomes a space."""
    return printable(" ".join(text.split()))


def printable(text: str) -> str:
    """The same as it may go to a terminal: a text or a file name of others must not steer it."""
    return text.replace("\r\n", "\n").translate(UNPRINTABLE)


def _decode(tokenizer: Any, ids: Sequence[int], special: bool) -> str:
    return tokenizer.decode(list(ids), skip_special_tokens=not special, clean_up_tokenization_spaces=False)
