"""The documents of a source, in the order in which they are stored, in blocks that are shuffled together.

Rows of the hub, JSON, parquet and CSV come through Hugging Face ``datasets``, streamed. Text files are opened directly,
one document a file: ``datasets`` can't pass over a file that is not UTF-8, and a list of files can be shuffled as a
whole.
"""

import glob
import hashlib
import json
import logging
import zlib
from collections.abc import Iterable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from training.sources import HUB_FILES, DataSource, builder_of, find_files

logger = logging.getLogger(__name__)

# A block of rows ends at this many characters too, so that a buffer of books does not fill the machine.
BLOCK_CHARACTERS = 100_000_000


# Texts that are tokenized together, by several cores, end at this many characters: a token takes a hundred bytes then.
TOGETHER_CHARACTERS = 4_000_000


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids without BOS and EOS; special tokens spelt out in the text are ordinary characters."""
    return tokenize_all(tokenizer, [text])[0]


def tokenize_all(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """``tokenize`` of several texts."""
    settings = {"add_special_tokens": False, "split_special_tokens": True, "return_attention_mask": False}
    return tokenizer(list(texts), verbose=False, **settings)["input_ids"]


@dataclass(frozen=True)
class Block:
    """Documents that are shuffled together: (number, text or file), the first's number, and how to get here again."""

    items: Sequence[tuple[int, str | Path]]
    first: int
    rows: dict[str, Any] | None = None  # position in the data set where the block starts
    check: int = 0  # of the first document, to notice data that has changed


class Reader:
    """One process's share of the documents of a source, in the order in which they are stored."""

    def __init__(
        self, source: DataSource, tokenizer: PreTrainedTokenizerBase, rank: int = 0, world_size: int = 1
    ) -> None:
        files = find_files(source)
        kinds = {builder_of(file) for file in files or ()}
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

    def blocks(self, first: int = 0, rows: dict[str, Any] | None = None) -> Iterator[Block]:
        """Blocks from document ``first`` on, where the data set has position ``rows``."""
        if self._files is not None and self._builder is None:
            items = list(enumerate(self._files[self._rank :: self._world_size]))
            return iter([Block(items, 0, check=len(items))] if items else [])
        return self._row_blocks(first, rows)

    def ids(self, item: str | Path) -> list[int] | None:
        """Tokens of a document; None if it is left out, which is counted."""
        text = self._text(item)
        return None if text is None else self._kept(tokenize(self._tokenizer, text))

    def all_ids(self, items: Iterable[str | Path]) -> Iterator[list[int]]:
        """Tokens of those documents that are not left out, in order; ``tokenizers`` reads several on several cores."""
        texts: list[str] = []
        waiting = 0
        for item in items:
            text = self._text(item)
            if text is None:
                continue
            texts.append(text)
            waiting += len(text)
            if waiting >= TOGETHER_CHARACTERS:
                yield from self._all_kept(texts)
                texts, waiting = [], 0
        yield from self._all_kept(texts)

    def _all_kept(self, texts: list[str]) -> Iterator[list[int]]:
        for ids in tokenize_all(self._tokenizer, texts) if texts else ():
            if (kept := self._kept(ids)) is not None:
                yield kept

    def _text(self, item: str | Path) -> str | None:
        """A document's text; None if it is left out, which is counted."""
        text = self._read(item) if isinstance(item, Path) else item
        if text is None:
            self.skipped["unreadable"] += 1
        elif not text.strip() or len(text) < self.source.min_chars:
            self.skipped["short"] += 1
        else:
            return text
        return None

    def _kept(self, ids: list[int]) -> list[int] | None:
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

    def _row_blocks(self, first: int, rows: dict[str, Any] | None) -> Iterator[Block]:
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
            yield Block(items, first, rows, zlib.crc32(str(items[0][1]).encode()))
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
            if source.path.startswith(HUB_FILES):
                kind = str(builder_of(Path(source.path)))
                tabs = {"sep": "\t"} if ".tsv" in Path(source.path).suffixes else {}
                dataset = load_dataset(kind, data_files=source.path, split="train", streaming=True, **tabs)
            elif self._files is None:
                dataset = load_dataset(source.path, source.name, split=source.split, streaming=True)
            else:
                # load_dataset would tell the hub that local files are read, and wait for it where there is no network.
                readers = {"json": JsonDatasetReader, "parquet": ParquetDatasetReader, "csv": CsvDatasetReader}
                tabs = {"sep": "\t"} if any(".tsv" in file.suffixes for file in self._files) else {}
                names = [glob.escape(str(file)) for file in self._files]
                dataset = readers[str(self._builder)](names, split="train", streaming=True, **tabs).read()
        except StopIteration as error:  # of the JSON reader
            raise ValueError(f"source {source.label!r} holds no rows: add some, or omit it") from error
        except RuntimeError as error:
            if "scripts are no longer supported" not in str(error):
                raise
            files = f"{HUB_FILES}{source.path}/*.jsonl"
            raise ValueError(f"source {source.label!r}: {error}; name its files, such as {files}") from error
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
