"""Documents of a source: shuffled, repeated, resumed where they were.

    stream = DocumentStream(DataSource("novels", pattern="**/*.txt"), tokenizer)
    number, ids = stream.draw()

Shuffling is by blocks: ``shuffle_buffer`` rows are read and permuted (files: all of them). A rolling buffer, such as
that of ``datasets``, mixes further, but its content would have to be read or kept to resume exactly; for a block it is
enough to know where it starts. ``training.batches`` says what becomes of the documents.
"""

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from training.reader import Block, Reader
from training.sources import DataSource


def read_documents(source: DataSource, tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    """Each document of a source once, in order, as token ids without BOS and EOS; short ones left out.

    Raises:
        ValueError, FileNotFoundError: as ``DocumentStream``, where the fault is met.
    """
    reader = Reader(source, tokenizer)
    for block in reader.blocks():
        yield from reader.all_ids(item for _, item in block.items)


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
        self._reader = Reader(source, tokenizer, rank, world_size)
        self._seed = seed
        self._kept = 0  # in this epoch
        self._place = 0  # in the block
        self._block = Block([], 0)
        self._blocks: Iterator[Block] | None = None
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
        self._blocks, self._block, self._place = None, Block([], 0), 0
        if state["check"] is None:
            return
        self._blocks = self._reader.blocks(state["first"], state["rows"])
        block = next(self._blocks, Block([], 0))
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

    def _enter(self, block: Block) -> None:
        items = list(block.items)
        random.Random(f"{self._seed}/{self._reader.source.label}/{self.epoch}/{block.first}").shuffle(items)
        self._block, self._place = replace(block, items=items), 0
