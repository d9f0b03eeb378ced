"""Sources of documents, as entries of a recipe, and the files that they stand for."""

import glob
import math
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

_BUILDERS = {".json": "json", ".jsonl": "json", ".ndjson": "json", ".parquet": "parquet", ".csv": "csv", ".tsv": "csv"}
_COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
HUB_FILES = "hf://datasets/"
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_TEXT_SUFFIX = re.compile(r"\.(txt|md|rst|tex|html?|py|c|h|cc|cpp|rs|go|js|ts|java|sh|yaml|yml|csv|tsv)")


@dataclass(frozen=True)
class DataSource:
    """Where documents come from, as an entry of a recipe.

    Attributes:
        path: a file, a folder, a glob such as ``books/*.txt``, a data set's id on the hub, or files of one
            (``hf://datasets/ORG/NAME/*.jsonl``). ``.jsonl``, ``.json``, ``.parquet``, ``.csv`` and ``.tsv`` hold a
            document a row; any other file is one document, in UTF-8.
        weight: share of the tokens, relative to the weights of the other sources.
        split: split of a data set on the hub.
        name: configuration of a data set on the hub.
        text_field: column with the text, if the source has rows.
        pattern: which files of a folder are read, such as ``**/*.py``; None reads all. Hidden files and folders are
            never read.
        min_tokens: documents with fewer tokens (BOS and EOS not counted) are left out.
        min_chars: documents with fewer characters are left out, before they are tokenised.
        shuffle_buffer: number of rows that are shuffled together. Files are shuffled all together.
    """

    path: str
    weight: float = 1.0
    split: str = "train"
    name: str | None = None
    text_field: str = "text"
    pattern: str | None = None
    min_tokens: int = 1
    min_chars: int = 1
    shuffle_buffer: int = 1000

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError("a source has an empty path: give a file, a folder or a hub id")
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise ValueError(
                f"source {self.path!r}: weight is {self.weight}; it must be above 0: correct it, or omit it"
            )
        for entry in ("min_tokens", "min_chars", "shuffle_buffer"):
            if getattr(self, entry) < 1:
                raise ValueError(f"source {self.path!r}: {entry} is {getattr(self, entry)}; it must be at least 1")

    @property
    def label(self) -> str:
        """Its name in messages, in the log and in checkpoints."""
        return ":".join(str(part) for part in (self.path, self.name, self.pattern) if part)

    @staticmethod
    def from_dict(entry: dict[str, Any]) -> "DataSource":
        """From a recipe's entry.

        Raises:
            ValueError: no path, or an entry that is not known.
        """
        known = [f.name for f in fields(DataSource)]
        unknown = sorted(set(entry) - set(known))
        if unknown:
            raise ValueError(f"source {entry}: unknown entry {unknown[0]!r}; known: {', '.join(known)}")
        if "path" not in entry:
            raise ValueError(f"source {entry} has no path: add a file, a folder or a hub id")
        return DataSource(**entry)


def find_files(source: DataSource) -> list[Path] | None:
    """The files of a source, sorted; None if its path is a data set's id on the hub, or files of one.

    Raises:
        FileNotFoundError: nothing is there, or nothing that matches.
        ValueError: a pattern, but no folder to apply it to; files on the hub that hold no rows, or with a name.
    """
    if source.path.startswith(HUB_FILES):
        if builder_of(Path(source.path)) is None:
            known = ", ".join(_BUILDERS)
            raise ValueError(f"source {source.label!r}: files on the hub hold rows: give files that end in {known}")
        if source.name or source.pattern or source.split != "train":
            raise ValueError(f"source {source.label!r} names files, so name, split and pattern have no use: omit them")
        return None
    path = Path(source.path).expanduser()
    if path.is_dir():
        pattern = source.pattern or "**/*"
        found = sorted(file for file in path.glob(pattern) if file.is_file() and not _hidden(file.relative_to(path)))
        if not found:
            raise FileNotFoundError(f"{path} holds no file that matches {pattern!r}: correct pattern, or path")
        return found
    if source.pattern and path.is_file():
        raise ValueError(f"source {source.label!r}: pattern is for a folder, but {path} is a file: omit pattern")
    if path.is_file():
        return [path]
    if glob.has_magic(source.path):
        found = sorted(Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file())
        if not found:
            raise FileNotFoundError(f"no file matches {source.path!r}: correct path")
        return found
    suffix = path.suffix.lower()
    local = source.pattern or not _HUB_ID.fullmatch(source.path)
    if local or suffix in _BUILDERS or _TEXT_SUFFIX.fullmatch(suffix):
        raise FileNotFoundError(f"no such file or folder: {path.absolute()}; correct the path of the source")
    return None


def describe(source: DataSource) -> dict[str, Any]:
    """What a source was when it was read: its settings, and its files with their sizes in bytes, if it has files."""
    settings = {entry.name: getattr(source, entry.name) for entry in fields(source)}
    found = find_files(source)
    if found is None:
        return settings
    folder = Path(source.path).expanduser()
    names = [str(file.relative_to(folder)) if folder.is_dir() else str(file) for file in found]
    return settings | {
        "files": {name: file.stat().st_size for name, file in zip(names, found, strict=True)},
        "bytes": sum(file.stat().st_size for file in found),
    }


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def builder_of(file: Path) -> str | None:
    """The ``datasets`` builder that reads a file of rows; None for a text."""
    suffixes = [suffix.lower() for suffix in file.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSED:
        suffixes.pop()
    return _BUILDERS.get(suffixes[-1]) if suffixes else None
