"""Fetch FairytaleQA as rows for a task of kind ``questions``: people's questions about passages of fairy tales.

    python examples/fetch_fairytales.py .                  # writes fairytales.jsonl and fairytales_val.jsonl
    python examples/fetch_fairytales.py . --from clones    # from a clone in clones/FairytaleQAData; no network needed

Xu et al., "Fantastic Questions and Where to Find Them" (arXiv 2203.13947), under Apache-2.0. Only questions whose
answers stand in the passage are kept, with passages and answers that are not long.
"""

import argparse
import csv
import io
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from clones import read_files, write

URL = "https://github.com/uci-soe/FairytaleQAData"
FOLDER = "data-by-train-split"
FILES = {"train": "fairytales.jsonl", "val": "fairytales_val.jsonl"}
PASSAGE = 350  # most words
ANSWER = 20


def rows_of(files: dict[str, str], split: str) -> Iterator[dict[str, object]]:
    """Passage, question and answers of each question of a split, and the file that its story would be.

    Args:
        files: of the repository, by path.
        split: ``train`` or ``val``.
    """
    questions, suffix = f"{FOLDER}/questions/{split}/", "-questions.csv"
    for path in sorted(path for path in files if path.startswith(questions)):
        story = path.removeprefix(questions).removesuffix(suffix)
        sections = {row["section"]: row["text"] for row in _table(files[_story(split, story)])}
        for row in _table(files[path]):
            numbers = [number.strip() for number in row["cor_section"].split(",") if number.strip()]
            answers = [answer for answer in _answers(row) if len(answer.split()) <= ANSWER]
            if row["ex-or-im1"] != "explicit" or not answers or not set(numbers) <= set(sections):
                continue
            passage = "\n".join(sections[number].strip() for number in numbers)
            if passage and len(passage.split()) <= PASSAGE:
                title = f"{story.lower()}.txt"
                yield {"passage": passage, "question": _clean(row["question"]), "answers": answers, "title": title}


def _story(split: str, story: str) -> str:
    return f"{FOLDER}/section-stories/{split}/{story}-story.csv"


def _table(text: str) -> list[dict[str, str]]:
    return [{key: value or "" for key, value in row.items() if key} for row in csv.DictReader(io.StringIO(text))]


def _answers(row: dict[str, str]) -> list[str]:
    """The different answers of the people who found them in the passage."""
    found: dict[str, str] = {}
    for kind, names in (("ex-or-im1", ("1", "2", "3")), ("ex-or-im2", ("4", "5", "6"))):
        if row.get(kind) == "explicit":
            for answer in (_clean(row.get(f"answer{name}", "")) for name in names):
                if answer:
                    found.setdefault(answer.lower().strip("."), answer)
    return list(found.values())


def _clean(text: str) -> str:
    """As people write: one space between words, and none before marks or the end of a contraction."""
    return re.sub(r" +([.,!?;:]|'s\b|n't\b)", r"\1", " ".join(text.split()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder for the two files")
    parser.add_argument("--from", dest="clones", type=Path, help="folder with a clone; else git fetches it")
    given = parser.parse_args()
    files = read_files(URL, [f"{FOLDER}/questions", f"{FOLDER}/section-stories"], given.clones)
    for split, name in FILES.items():
        rows = list(rows_of(files, split))
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        passages = {row["passage"] for row in rows}
        write(given.out / name, text, f"{len(rows):,} questions about {len(passages):,} passages")
    return 0


if __name__ == "__main__":
    sys.exit(main())
