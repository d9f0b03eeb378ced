"""Texts to measure a model on, as token ids."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fot.files import check_utf8


def read_texts(paths: Sequence[Path], tokenizer: Any) -> list[list[int]]:
    """Token ids of each file, whole, without special tokens.

    Raises:
        ValueError: a file that is empty or not UTF-8 (named).
        OSError: a file that cannot be read.
    """
    texts = []
    for path in paths:
        check_utf8(path)
        ids = tokenizer(path.read_text(encoding="utf-8"), add_special_tokens=False, verbose=False).input_ids
        if not ids:
            raise ValueError(f"{path} is empty: give a file with text")
        texts.append(list(ids))
    return texts
