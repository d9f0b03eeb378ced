"""From documents to batches for crossbatch: sources mixed by proportion, windows side by side, next tokens as labels.

    sources = [DataSource("novels", pattern="**/*.txt"), TaskSource(task, weight=0.5)]
    loader = DocumentLoader(sources, tokenizer, lanes=4, windows=2, window=512)
    batch = next(loader)          # (8, 512): two consecutive windows of each of four lanes
    state = loader.state_dict()   # for a checkpoint; load_state_dict goes on from there with the same batches

What happens at a document's start and end:

- A document is BOS, its tokens, EOS, as far as the tokenizer has these two. Special tokens spelt out in a text are
  ordinary characters there, so neither is doubled or faked.
- A lane reads one document to its end, then EOS BOS and the next document, in one stream of tokens. So a window may
  hold the end of one document and the start of another, as it may when several texts are read into a memory, and no
  token is padding. This is the default because padding every document to whole steps wastes most of the computation
  on short documents, such as source files.
- A row's ``document`` is the one that most of its tokens are of. Positives are earlier windows of the step with the
  same document. What a window holds of another document at its edge is local context, and seen with it by others.
- The token after EOS gives no loss: nothing foretells the next document. A token that is both BOS and EOS, as in
  GPT-2, stands once between two documents, and gives loss as the end of the first.
- ``align_documents=True`` starts each document at the first window of a step and pads the rest of its last step (no
  loss, ``padding`` True, and ``document`` -1 for rows of padding alone). EOS is then a label, never an input.
- A ``Task``'s document is a step of one lane by itself, aligned so. The text that the lane was reading goes on in the
  lane's next step; nothing is lost by that, as crossbatch sees only windows of one step.

Proportions are counted in tokens: a step of a lane goes to the task, or to the texts together, that is furthest behind
its share, and a lane that needs a text takes it from the text source that is, counting documents in whole when drawn.
A document that is long against the run is over-represented until it ends.

``document`` is the same number for the same document in another lane, epoch or process, and ``content`` the same for
the same text, whatever source or number it comes under, and whether a lane reads it or a task takes passages from it.
With ``position`` it says what a row holds of which text, so that no row is shown what follows in its own document
(``training.contexts``). The processes that a run begins with have disjoint shares of the documents, the same in every
epoch; ``training.shares`` says what becomes of them with other numbers of processes.

Where lanes outnumber documents, several read the same one. Then a lane's first document starts in the widest gap
between the places where the others are in it, so that lanes do not go through the same tokens side by side.
"""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fot.tasks.task import Task
from training.data import DocumentStream
from training.pieces import Piece, Span, framed, special_ids, take, task_span, whole_piece
from training.sources import DataSource

IGNORED = -100  # label of tokens without loss, as in transformers
NO_DOCUMENT = -1  # document of a row that is all padding
LAYOUT = 2  # of a position in the data; raised when older ones can't be gone on from
_NUMBERS = 2**40  # document = number of its source * _NUMBERS + its number there


@dataclass(frozen=True)
class Batch:
    """One step: R = lanes * k rows of W tokens; row lane * k + j is the j-th of the lane's k consecutive windows.

    Attributes:
        input_ids: (R, W) int64.
        labels: (R, W) int64: the token after each, already shifted: that of a window's last token is the first of the
            lane's next window. -100 where there is no loss.
        weights: (R, W) float32, weight of each label in the loss; 0 where there is none.
        padding: (R, W) bool, True at padding, which only follows the tokens of a lane.
        lane: (R,) int64.
        index: (R,) int64, place among the lane's k windows.
        document: (R,) int64, the document that most of the row's tokens belong to (of equals the first in the row);
            -1 if the row is all padding. Equal on all lanes and processes for the same document.
        content: (R, W) int64, names the text that each token is of: its document, or what a task took it from; -1 at
            padding. The same tokens have the same name, in all lanes, epochs, sources, tasks and processes.
        position: (R, W) int64, place of each token in that text; 0 at padding.
        answers: (R, W) bool, labels that are answers to questions; none of plain text is.
        whole: (R,) bool, rows of a task's document, all of which is in this step.
    """

    input_ids: Tensor
    labels: Tensor
    weights: Tensor
    padding: Tensor
    lane: Tensor
    index: Tensor
    document: Tensor
    content: Tensor
    position: Tensor
    answers: Tensor
    whole: Tensor

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on another device."""
        return Batch(*(getattr(self, f.name).to(device) for f in fields(self)))


def batch_of(spans: Sequence[Span], windows: int, window: int, pad_token_id: int) -> Batch:
    """Rows from one span of at most windows * window inputs for each lane."""
    rows, count = len(spans) * windows, windows * window

    def table(values: Sequence[NDArray[Any]], fill: float, dtype: type) -> NDArray[Any]:
        padded = [np.pad(line, (0, count - len(line)), constant_values=fill) for line in values]
        return np.stack(padded).astype(dtype).reshape(rows, window)

    weights = table([span.weights for span in spans], 0, np.float32)
    labels = table([span.targets for span in spans], IGNORED, np.int64)
    documents = table([span.documents for span in spans], NO_DOCUMENT, np.int64)
    return Batch(
        input_ids=torch.from_numpy(table([span.inputs for span in spans], pad_token_id, np.int64)),
        labels=torch.from_numpy(np.where(weights > 0, labels, IGNORED)),
        weights=torch.from_numpy(weights),
        padding=torch.from_numpy(documents == NO_DOCUMENT),
        lane=torch.arange(rows) // windows,
        index=torch.arange(rows) % windows,
        document=torch.tensor([_document_of(row) for row in documents]),
        content=torch.from_numpy(table([span.contents for span in spans], NO_DOCUMENT, np.int64)),
        position=torch.from_numpy(table([span.positions for span in spans], 0, np.int64)),
        answers=torch.from_numpy(table([span.answers for span in spans], False, np.bool_)),
        whole=torch.tensor([span.whole for span in spans]).repeat_interleave(windows),
    )


def select_lanes(batch: Batch, start: int, stop: int) -> Batch:
    """Lanes ``start`` to ``stop - 1`` of a batch, numbered from 0."""
    rows = (batch.lane >= start) & (batch.lane < stop)
    found = Batch(*(getattr(batch, f.name)[rows] for f in fields(Batch)))
    return replace(found, lane=found.lane - start)


def join_lanes(batches: Sequence[Batch]) -> Batch:
    """The lanes of several batches of one shape in one batch, numbered through."""
    joint = Batch(*(torch.cat([getattr(batch, f.name) for batch in batches]) for f in fields(Batch)))
    firsts = accumulate((int(batch.lane[-1]) + 1 for batch in batches[:-1]), initial=0)
    return replace(joint, lane=torch.cat([batch.lane + first for batch, first in zip(batches, firsts, strict=True)]))


@dataclass(frozen=True)
class TaskSource:
    """Generated documents in the mix: ``weight`` is their share of the tokens, as that of ``DataSource``."""

    task: Task
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise ValueError(
                f"task {self.label!r}: weight is {self.weight}; it must be above 0: correct it, or omit it"
            )

    @property
    def label(self) -> str:
        """The task's name, which also seeds its documents."""
        return self.task.name


class DocumentLoader(Iterator[Batch]):
    """Batches without end, the same for the same arguments.

    Args:
        sources: texts and tasks; each label once.
        tokenizer: of the model; None if all sources are tasks.
        lanes: documents side by side.
        windows: consecutive windows of a lane in a batch (k).
        window: tokens of a window.
        seed: of the order of documents. Document n of a task is made by ``Random(f"{seed}/{task.name}/{n}")``.
        rank: number of the share of the documents to read, such as that of a process (``training.shares``).
        world_size: number of shares, of which no two have a document in common.
        align_documents: start each document at the first window of a step, with padding.

    Raises:
        ValueError: settings that do not fit; later, from ``next``: a source without a document that is long enough, a
            document of a task that does not fit, and what ``DocumentStream.draw`` raises.
        FileNotFoundError: a source that is not there.
    """

    def __init__(
        self,
        sources: Sequence[DataSource | TaskSource],
        tokenizer: PreTrainedTokenizerBase | None,
        *,
        lanes: int,
        windows: int,
        window: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        align_documents: bool = False,
    ) -> None:
        for name, value in (("lanes", lanes), ("windows", windows), ("window", window), ("world_size", world_size)):
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is outside 0..{world_size - 1}")
        self._labels = [source.label for source in sources]
        if not sources or len(set(self._labels)) < len(sources):
            twice = [label for label in self._labels if self._labels.count(label) > 1]
            raise ValueError(
                f"source {twice[0]!r} is there twice: keep one, or rename a task" if twice else "no source is given"
            )
        self._weights = [source.weight for source in sources]
        self._tasks = {n: source.task for n, source in enumerate(sources) if isinstance(source, TaskSource)}
        texts = {n: source for n, source in enumerate(sources) if isinstance(source, DataSource)}
        if texts and tokenizer is None:
            raise ValueError(
                f"source {self._labels[min(texts)]!r} is text, and text needs a tokenizer: name a model that has one"
            )
        self._streams = {
            n: DocumentStream(source, tokenizer, seed=seed, rank=rank, world_size=world_size)
            for n, source in texts.items()
            if tokenizer is not None
        }
        self._bos, self._eos, self._pad = special_ids(tokenizer)
        self._windows, self._window, self._seed, self._aligned = windows, window, seed, align_documents
        self._rank, self._world_size = rank, world_size
        self._lanes: list[list[Piece]] = [[] for _ in range(lanes)]
        self._drawn = [0] * len(sources)  # documents
        self._tokens = [0] * len(sources)  # of the documents drawn
        self._text_tokens = 0  # in batches
        self._begun = [False] * lanes  # has drawn a text

    def __next__(self) -> Batch:
        spans = [self._next_span(lane) for lane in range(len(self._lanes))]
        return batch_of(spans, self._windows, self._window, self._pad)

    def progress(self) -> dict[str, dict[str, int]]:
        """For each source by its label, on this process: ``documents`` drawn, their ``tokens``, and for texts ``epoch``
        and the documents left out as ``short`` or ``unreadable``."""
        return {
            label: {"documents": self._drawn[n], "tokens": self._tokens[n]}
            | ({"epoch": self._streams[n].epoch, **self._streams[n].skipped} if n in self._streams else {})
            for n, label in enumerate(self._labels)
        }

    def origin(self, document: int) -> str:
        """Source of a document of a ``Batch``, and its place there, for messages."""
        if document == NO_DOCUMENT:
            return "padding"
        return f"{self._labels[document // _NUMBERS]}, document {document % _NUMBERS}"

    def state_dict(self) -> dict[str, Any]:
        """The position in the data, for JSON. Holds the tokens left of the documents that lanes are reading."""
        return self.here()()

    def here(self) -> Callable[[], dict[str, Any]]:
        """What gives this position later, when the loader has gone on; it costs next to nothing until then."""
        lanes = [list(pieces) for pieces in self._lanes]
        state = {
            "settings": self._settings(),
            "streams": {str(n): stream.state_dict() for n, stream in self._streams.items()},
            "drawn": list(self._drawn),
            "tokens": list(self._tokens),
            "text_tokens": self._text_tokens,
            "begun": list(self._begun),
            "layout": LAYOUT,
        }
        return lambda: state | {"lanes": [[piece.to_dict() for piece in pieces] for pieces in lanes]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a position, with the batches that would have followed it.

        Raises:
            ValueError: the position is of a loader with other settings, or the documents have changed.
        """
        if state.get("layout") != LAYOUT:
            raise ValueError(
                "the checkpoint's position in the data was saved by another version of fot: start a new run from the "
                "last result"
            )
        for name, value in self._settings().items():
            if state["settings"].get(name) != value:
                was = state["settings"].get(name)
                raise ValueError(
                    f"the checkpoint was made with {name} {was!r}, but this run has {value!r}: resume with {was!r}"
                )
        for n, stream in self._streams.items():
            stream.load_state_dict(state["streams"][str(n)])
        self._lanes = [[Piece.from_dict(piece) for piece in pieces] for pieces in state["lanes"]]
        self._drawn, self._tokens = list(state["drawn"]), list(state["tokens"])
        self._text_tokens, self._begun = state["text_tokens"], list(state["begun"])

    def _settings(self) -> dict[str, Any]:
        return {
            "sources": self._labels, "weights": self._weights, "lanes": len(self._lanes), "windows": self._windows,
            "window": self._window, "seed": self._seed, "rank": self._rank, "world_size": self._world_size,
            "align_documents": self._aligned,
        }  # fmt: skip

    def _next_span(self, lane: int) -> Span:
        count = self._windows * self._window
        # Each document of a task is a step, in which all its tokens but the last are inputs.
        shares = {n: (self._tokens[n] - self._drawn[n]) / self._weights[n] for n in self._tasks}
        if self._streams:
            shares[-1] = self._text_tokens / sum(self._weights[n] for n in self._streams)
        turn = min(shares, key=lambda n: shares[n])
        if turn >= 0:
            return self._task_document(turn)
        pieces = self._lanes[lane]
        while not pieces or (not self._aligned and sum(map(len, pieces)) <= count):
            pieces.append(self._text_document() if self._begun[lane] else self._first_document())
            self._begun[lane] = True
        span, rest = take(pieces, count)
        # An aligned document whose last token has been a target is done.
        self._lanes[lane] = [] if self._aligned and len(rest[0]) == 1 else rest
        self._text_tokens += len(span.inputs)
        return span

    def _first_document(self) -> Piece:
        """A lane's first text, from a place where no other lane is."""
        piece = self._text_document()
        taken = [other.first for pieces in self._lanes for other in pieces if other.content == piece.content]
        return piece[_between(taken, len(piece)) :]

    def _text_document(self) -> Piece:
        n = min(self._streams, key=lambda n: self._tokens[n] / self._weights[n])
        number, ids = self._streams[n].draw()
        shared = self._bos is not None and self._bos == self._eos and not self._aligned  # the next one's BOS is our EOS
        ids = framed(ids, self._bos, None if shared else self._eos)
        weights = np.ones(len(ids), np.float32)
        weights[0] = shared
        return whole_piece(self._count(n, number, len(ids)), ids, weights)

    def _task_document(self, n: int) -> Span:
        number, most = self._drawn[n], self._windows * self._window + 1
        rng = random.Random(f"{self._seed}/{self._labels[n]}/{number * self._world_size + self._rank}")
        document = self._tasks[n].document(rng)
        ids, weights, _ = document
        if not 2 <= len(ids) <= most:
            raise ValueError(
                f"task {self._labels[n]!r} gave {len(ids)} tokens; a step holds 2..{most}: correct the task"
            )
        if len(weights) != len(ids) or not all(0 <= weight < math.inf for weight in weights):
            raise ValueError(
                f"task {self._labels[n]!r}: {len(ids)} tokens need as many weights, finite and not below 0"
            )
        return task_span(self._count(n, number, len(ids)), document)

    def _count(self, n: int, number: int, tokens: int) -> int:
        """Count a document that was drawn; returns its number on all processes."""
        self._drawn[n] += 1
        self._tokens[n] += tokens
        return n * _NUMBERS + number * self._world_size + self._rank


def _document_of(row: NDArray[np.int64]) -> int:
    """The commonest document of a row; of equals the first in it."""
    present, first, counts = np.unique(row[row != NO_DOCUMENT], return_index=True, return_counts=True)
    if not len(present):
        return NO_DOCUMENT
    return int(present[np.lexsort((first, -counts))[0]])


def _between(taken: Sequence[int], length: int) -> int:
    """Where to start in a document of ``length`` tokens that others read from the places ``taken`` on: farthest from
    all of them, at its start or halfway between two."""
    if not taken:
        return 0
    halfway = [(one + two) // 2 for one, two in pairwise(sorted({*taken, length}))]
    place = max([0, *halfway], key=lambda place: min(abs(place - other) for other in taken))
    return min(place, max(0, length - 2))  # a token and the one after it
