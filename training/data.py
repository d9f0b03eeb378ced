"""Sources of documents: the hub, tables (jsonl, parquet, csv), texts; shuffled, repeated, resumed where they were.

    stream = DocumentStream(DataSource("novels", pattern="**/*.txt"), tokenizer)
    number, ids = stream.draw()

Rows of the hub, JSON, parquet and CSV come through Hugging Face ``datasets``, streamed. Text files are opened directly,
one document a file: ``datasets`` can't pass over a file that is not UTF-8, and a list of files can be shuffled as a
whole.

Shuffling is by blocks: ``shuffle_buffer`` rows are read and permuted (files: all of them). A rolling buffer, such as
that of ``datasets``, mixes further, but its content would have to be read or kept to resume exactly; for a block it is
enough to know where it starts. ``training.batches`` says what becomes of the documents.
"""

import glob
import hashlib
import json
import logging
import math
import random
import re
import zlib
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# A block of rows ends at this many characters too, so that a buffer of books does not fill the machine.
BLOCK_CHARACTERS = 100_000_000

_BUILDERS = {".json": "json", ".jsonl": "json", ".ndjson": "json", ".parquet": "parquet", ".csv": "csv", ".tsv": "csv"}
_COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_TEXT_SUFFIX = re.compile(r"\.(txt|md|rst|tex|html?|py|c|h|cc|cpp|rs|go|js|ts|java|sh|yaml|yml|csv|tsv)")


@dataclass(frozen=True)
class DataSource:
    """Where documents come from, as an entry of a recipe.

    Attributes:
        path: a file, a folder, a glob such as ``books/*.txt``, or a data set's id on the hub. ``.jsonl``, ``.json``,
            ``.parquet``, ``.csv`` and ``.tsv`` hold a document a row; any other file is one document, in UTF-8.
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


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids without BOS and EOS; special tokens spelt out in the text are ordinary characters."""
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]


def read_documents(source: DataSource, tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    """Each document of a source once, in order, as token ids without BOS and EOS; short ones left out.

    Raises:
        ValueError, FileNotFoundError: as ``DocumentStream``, where the fault is met.
    """
    reader = _Reader(source, tokenizer)
    for block in reader.blocks():
        for _, item in block.items:
            ids = reader.ids(item)
            if ids is not None:
                yield ids


class DocumentStream:
    """A process's share of a source, in an order drawn from the seed, over and over.

    Args:
        source: where documents come from.
        tokenizer: makes them token ids.
        seed: decides the order, which differs from epoch to epoch.
        rank: of this process. It gets the files rank, rank + world_size, ...; or shards or rows as
            ``datasets.distributed.split_dataset_by_node`` deals them out. No two processes share a document.
        world_size: number of processes.

    Attributes:
        epoch: how often all documents were read.
        skipped: documents left out so far for being too ``short`` or ``unreadable`` (no UTF-8).

    Raises:
        FileNotFoundError: no such file or folder, or no file in it.
        ValueError: files of several kinds in a folder, or a setting that does not fit.
    """

    def __init__(
        self, source: DataSource, tokenizer: PreTrainedTokenizerBase, seed: int = 0, rank: int = 0, world_size: int = 1
    ) -> None:
        self._reader = _Reader(source, tokenizer, rank, world_size)
        self._seed = seed
        self._kept = 0  # in this epoch
        self._place = 0  # in the block
        self._block = _Block([], 0)
        self._blocks: Iterator[_Block] | None = None
        self.epoch = 0

    @property
    def skipped(self) -> dict[str, int]:
        return self._reader.skipped

    def draw(self) -> tuple[int, list[int]]:
        """The next document: its number in this process's share, and its token ids without BOS and EOS.

        Raises:
            ValueError: none of the documents is long enough; a row without the text; a file that is not UTF-8.
        """
        while True:
            if self._place == len(self._block.items):
                self._next_block()
            number, item = self._block.items[self._place]
            self._place += 1
            ids = self._reader.ids(item)
            if ids is not None:
                self._kept += 1
                return number, ids

    def state_dict(self) -> dict[str, Any]:
        """The position, for JSON: a few numbers, whatever was read."""
        return {
            "epoch": self.epoch,
            "kept": self._kept,
            "place": self._place,
            "first": self._block.first,
            "rows": self._block.rows,
            "check": self._block.check if self._blocks else None,
            "files": self._reader.fingerprint,
            "skipped": dict(self.skipped),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a position.

        Raises:
            ValueError: the documents are not those of that position.
        """
        self.epoch, self._kept = state["epoch"], state["kept"]
        self._reader.skipped.update(state["skipped"])
        self._blocks, self._block, self._place = None, _Block([], 0), 0
        if state["check"] is None:
            return
        self._blocks = self._reader.blocks(state["first"], state["rows"])
        block = next(self._blocks, _Block([], 0))
        if state["files"] != self._reader.fingerprint or state["check"] != block.check:
            raise ValueError(
                f"source {self._reader.source.label!r} has changed since the checkpoint, so its order cannot be kept: "
                "restore the old files, or start a new run from the last result"
            )
        self._enter(block)
        self._place = state["place"]

    def _next_block(self) -> None:
        if self._blocks is None:
            self._blocks = self._reader.blocks()
        while (block := next(self._blocks, None)) is None:
            if not self._kept:
                raise ValueError(self._reader.nothing_kept())
            self.epoch, self._kept = self.epoch + 1, 0
            self._blocks = self._reader.blocks()
        self._enter(block)

    def _enter(self, block: "_Block") -> None:
        items = list(block.items)
        random.Random(f"{self._seed}/{self._reader.source.label}/{self.epoch}/{block.first}").shuffle(items)
        self._block, self._place = replace(block, items=items), 0


@dataclass(frozen=True)
class _Block:
    """Documents that are shuffled together: (number, text or file), the first's number, and how to get here again."""

    items: Sequence[tuple[int, str | Path]]
    first: int
    rows: dict[str, Any] | None = None  # position in the data set where the block starts
    check: int = 0  # of the first document, to notice data that has changed


class _Reader:
    """One process's share of the documents of a source, in the order in which they are stored."""

    def __init__(
        self, source: DataSource, tokenizer: PreTrainedTokenizerBase, rank: int = 0, world_size: int = 1
    ) -> None:
        files = find_files(source)
        kinds = {_builder(file) for file in files or ()}
        if len(kinds) > 1:
            mixed = ", ".join(sorted(kind or "text" for kind in kinds))
            raise ValueError(f"source {source.label!r} has files of kinds {mixed}: name one with pattern, as '**/*.py'")
        if files and (source.name or source.split != "train"):
            raise ValueError(
                f"source {source.label!r} is on this machine, but name and split are only for data sets on "
                "the hub: omit them"
            )
        self.source = source
        self.skipped = {"short": 0, "unreadable": 0}
        self._tokenizer = tokenizer
        self._rank, self._world_size = rank, world_size
        self._files = files
        self._builder = kinds.pop() if kinds else None
        self._single = files is not None and str(files[0]) == str(Path(source.path).expanduser())
        names = [] if files is None else [str(file) for file in files]
        self.fingerprint = hashlib.sha256(json.dumps(names).encode()).hexdigest()[:16]

    def blocks(self, first: int = 0, rows: dict[str, Any] | None = None) -> Iterator[_Block]:
        """Blocks from document ``first`` on, where the data set has position ``rows``."""
        if self._files is not None and self._builder is None:
            items = list(enumerate(self._files[self._rank :: self._world_size]))
            return iter([_Block(items, 0, check=len(items))] if items else [])
        return self._row_blocks(first, rows)

    def ids(self, item: str | Path) -> list[int] | None:
        """Tokens of a document; None if it is left out, which is counted."""
        text = self._read(item) if isinstance(item, Path) else item
        if text is None:
            self.skipped["unreadable"] += 1
            return None
        if text.strip() and len(text) >= self.source.min_chars:
            ids = tokenize(self._tokenizer, text)
            if len(ids) >= self.source.min_tokens:
                return ids
        self.skipped["short"] += 1
        return None

    def nothing_kept(self) -> str:
        """Why a whole epoch gave no document, and what to do."""
        few = f", or use fewer processes than {self._world_size}" if self._world_size > 1 else ""
        return (
            f"source {self.source.label!r} gives process {self._rank} no document: {self.skipped['short']} have fewer "
            f"than min_tokens={self.source.min_tokens} tokens or min_chars={self.source.min_chars} characters, "
            f"{self.skipped['unreadable']} are not UTF-8; lower the limits or add documents{few}"
        )

    def _read(self, file: Path) -> str | None:
        try:
            return file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            if self._single:
                raise ValueError(f"{file} is not UTF-8 ({error.reason} at byte {error.start}): convert it") from error
            logger.warning("left out %s: not UTF-8 (byte %d)", file, error.start)
            return None

    def _row_blocks(self, first: int, rows: dict[str, Any] | None) -> Iterator[_Block]:
        dataset = self._open_rows()
        if rows is not None:
            dataset.load_state_dict(deepcopy(rows))
        iterator = self._texts(dataset)
        while True:
            items: list[tuple[int, str | Path]] = []
            size = 0
            for text in iterator:
                items.append((first + len(items), text))
                size += len(text)
                if len(items) == self.source.shuffle_buffer or size > BLOCK_CHARACTERS:
                    break
            if not items:
                return
            yield _Block(items, first, rows, zlib.crc32(str(items[0][1]).encode()))
            first += len(items)
            rows = deepcopy(dataset.state_dict())

    def _texts(self, dataset: Any) -> Iterator[str]:
        field = self.source.text_field
        for row in self._guarded(iter(dataset)):
            text = row.get(field)
            if field not in row or not isinstance(text, str | None):
                found = "is missing" if field not in row else f"holds {type(text).__name__}, not text,"
                raise ValueError(
                    f"source {self.source.label!r}: field {field!r} {found} in a row with {', '.join(map(repr, row))}; "
                    "set text_field to the one that holds the text"
                )
            yield text or ""

    def _open_rows(self) -> Any:
        from datasets import load_dataset
        from datasets.distributed import split_dataset_by_node
        from datasets.exceptions import DatasetsError
        from datasets.io.csv import CsvDatasetReader
        from datasets.io.json import JsonDatasetReader
        from datasets.io.parquet import ParquetDatasetReader

        source = self.source
        try:
            if self._files is None:
                dataset = load_dataset(source.path, source.name, split=source.split, streaming=True)
            else:
                # load_dataset would tell the hub that local files are read, and wait for it where there is no network.
                readers = {"json": JsonDatasetReader, "parquet": ParquetDatasetReader, "csv": CsvDatasetReader}
                tabs = {"sep": "\t"} if any(".tsv" in file.suffixes for file in self._files) else {}
                names = [glob.escape(str(file)) for file in self._files]
                dataset = readers[str(self._builder)](names, split="train", streaming=True, **tabs).read()
        except StopIteration as error:  # of the JSON reader
            raise ValueError(f"source {source.label!r} holds no rows: add some, or omit it") from error
        except (DatasetsError, OSError, ValueError) as error:
            what = "neither a file or folder here nor readable from the hub" if self._files is None else "not readable"
            raise ValueError(f"source {source.label!r} is {what}: {error}") from error
        if self._world_size > 1:
            dataset = split_dataset_by_node(dataset, self._rank, self._world_size)
        return dataset

    def _guarded(self, rows: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        from datasets.exceptions import DatasetsError

        while True:
            try:
                row = next(rows)
            except StopIteration:
                return
            except (DatasetsError, OSError, ValueError) as error:
                raise ValueError(f"source {self.source.label!r} cannot be read any further: {error}") from error
            yield row


def find_files(source: DataSource) -> list[Path] | None:
    """The files of a source, sorted; None if its path is a data set's id on the hub.

    Raises:
        FileNotFoundError: nothing is there, or nothing that matches.
        ValueError: a pattern, but no folder to apply it to.
    """
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


def _builder(file: Path) -> str | None:
    """The ``datasets`` builder that reads a file of rows; None for a text."""
    suffixes = [suffix.lower() for suffix in file.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSED:
        suffixes.pop()
    return _BUILDERS.get(suffixes[-1]) if suffixes else None
