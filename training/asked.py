"""Passages with the questions that people asked about them, read from rows of JSON."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Asked = tuple[str, Sequence[str]]  # a question and its answers
_ROW = '{"passage": "...", "question": "...", "answers": ["..."]}'


@dataclass(frozen=True)
class AskedPassage:
    """A passage and what was asked about it.

    Attributes:
        text: the passage.
        title: the document that it is from, or empty.
        questions: what was asked.
    """

    text: str
    title: str
    questions: Sequence[Asked]


def read_asked(path: str) -> list[AskedPassage]:
    """Passages of a file in the order of their first rows.

    Args:
        path: a file with a JSON object a line: ``passage``, ``question``, ``answers`` and, if there is one, the
            ``title`` of the document. Rows with the same passage and title belong together. Empty lines are left out.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line that is no such row, or no row at all.
    """
    found: dict[tuple[str, str], list[Asked]] = {}
    with find_asked(path).open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            place = f"{path}, line {number}"
            try:
                row = json.loads(line.decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:  # lists in lists in lists
                raise ValueError(f"{place}, is no JSON in UTF-8 ({error}): write it as {_ROW}") from None
            passage, title, question, answers = _checked(row, place)
            found.setdefault((passage, title), []).append((question, answers))
    if not found:
        raise ValueError(f"{path} has no rows: add lines such as {_ROW}")
    return [AskedPassage(passage, title, questions) for (passage, title), questions in found.items()]


def find_asked(path: str) -> Path:
    """The file.

    Raises:
        FileNotFoundError: there is none.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"no such file: {file.absolute()}; correct path, or write it: a row is {_ROW}")
    return file


def _checked(row: Any, place: str) -> tuple[str, str, str, list[str]]:
    if not isinstance(row, dict):
        raise ValueError(f"{place}, is {_shown(row)}, no object: write it as {_ROW}")
    for key in ("passage", "question", "title"):
        if not (key == "title" and key not in row) and not _is_text(row.get(key)):
            raise ValueError(f"{place}: {key} is {_shown(row.get(key))}; it must be a text: write {_ROW}")
    answers = row.get("answers")
    if not isinstance(answers, list) or not answers or not all(map(_is_text, answers)):
        raise ValueError(f"{place}: answers is {_shown(answers)}; it must be a list of texts: write {_ROW}")
    return row["passage"].strip(), row.get("title", "").strip(), row["question"].strip(), answers


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
