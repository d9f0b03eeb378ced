"""What ``generate`` carries from call to call: the local window, and for each row the memories it reads."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from fot.config import MemoryConfig
from fot.local import LocalCache, copied, local_window
from fot.recording import Recorder
from fot.rotary import Rotary
from memory import Memory
from memory.layer import LayerMemory


class Row:
    """The memories of one row of a batch: some that it only reads, and one that its own tokens move to."""

    def __init__(self, reads: Sequence[Memory], own: Memory) -> None:
        self.reads = list(reads)
        self.own = own

    @property
    def memories(self) -> list[Memory]:
        """All that the row reads."""
        return [*self.reads, self.own]

    def fork(self, own_length: int | None = None) -> "Row":
        """The same row, to go on differently (a beam), perhaps from when its own memory held less."""
        own = self.own.clone()
        own.truncate(len(own) if own_length is None else own_length)
        return Row(self.reads, own)


@dataclass(frozen=True)
class Checkpoint:
    """A state of a ``FoTCache`` to go back to: its attributes, and how much each row's own memory held."""

    attributes: dict[str, Any]
    own_lengths: list[int]


class FoTCache(Cache):
    """State of one call of ``generate``: the local window, and the memories of each row.

    Attributes:
        rows: for each row, its memories; empty until the first tokens come.
        local: the local window.
        seen: tokens so far, padding included, as ``generate`` counts them.
        next_positions: (B, 1) position of each row's next token.
        revertible: whether what has moved to the memory can be taken back, too; see ``activate_past_recording``.
        align_padding: see ``MemoryConfig``.
        recorder: see ``fot.trace``.
    """

    def __init__(self, given: Sequence[Memory], align_padding: str, *, write: bool = False) -> None:
        """
        Args:
            given: memories to read: none, one for all rows, or one a row.
            align_padding: see ``MemoryConfig``.
            write: the rows' own tokens move to the given memories; each row needs one of its own.
        """
        super().__init__(layers=[])
        self.given = list(given)
        self.align_padding = align_padding
        self.write = write
        self.rows: list[Row] = []
        self.local = LocalCache([], MemoryConfig(mem_layers=()), Rotary(()))  # until rows are opened
        self.recorder: Recorder | None = None
        self.seen = 0
        self.next_positions: Tensor | None = None
        self.revertible = False
        self.before_moves: list[Checkpoint] = []  # the states before each move since the last ``crop``

    def open_rows(self, batch_size: int, model: Any) -> None:
        """Set up the memories of ``batch_size`` rows.

        Args:
            batch_size: rows; a multiple of the number of given memories (``num_beams`` repeats each prompt).
            model: the ``FoTForCausalLM`` whose cache this is.

        Raises:
            ValueError: the given memories cannot be shared out.
        """
        count = len(self.given)
        if self.write:
            if count != batch_size:
                raise ValueError(
                    f"update_memory=True with {batch_size} rows and {count} memories: rows must not write to one "
                    "memory; give memory= a list with one for each row, without beams or num_return_sequences"
                )
            self.rows = [_written(memory, model) if self.revertible else Row([], memory) for memory in self.given]
        elif count and batch_size % count:
            raise ValueError(f"{count} memories for {batch_size} rows: give one for all rows, or one for each")
        else:
            repeat = batch_size // count if count else 0
            reads = [[self.given[row // repeat]] if count else [] for row in range(batch_size)]
            empty = model.new_memory()
            self.rows = [Row(read, empty.clone()) for read in reads]
        self.local = local_window(model, [row.memories for row in self.rows], self.recorder)

    def open_window(self) -> None:
        """Start an empty local window that reads the rows' memories."""
        memories = [row.memories for row in self.rows]
        self.local = LocalCache(memories, self.local.config, self.local.rotary, self.recorder)

    def watch(self, recorder: Recorder | None) -> None:
        """Let a recorder take note of what is attended to from here on; None for nobody.

        Raises:
            ValueError: the cache is of assisted decoding, which takes tokens back that the recorder has noted.
        """
        if recorder is not None and self.revertible:
            raise ValueError(
                "assisted decoding cannot be recorded, because it takes back tokens: generate without assistant_model "
                "and prompt_lookup_num_tokens"
            )
        self.recorder = self.local.recorder = recorder
        if recorder is not None:
            recorder.follow(self)

    def checkpoint(self) -> Checkpoint:
        """The state now. It costs next to nothing, but keeps the window's keys and values as long as it is kept."""
        attributes = copied(self) | {"local": self.local.fork(), "recorder": None}
        return Checkpoint(attributes, [len(row.own) for row in self.rows])

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go back to a state of this cache: what the rows' own memories took in since is forgotten."""
        attributes = checkpoint.attributes
        for row, length in zip(attributes["rows"], checkpoint.own_lengths, strict=True):
            row.own.truncate(length)
        self.__dict__.update(attributes | {"rows": list(attributes["rows"]), "local": attributes["local"].fork()})

    def fork(self, checkpoint: Checkpoint) -> "FoTCache":
        """A cache in a state of this one, to go on differently; this one stays as it is.

        They share an own memory that has not grown since: before this one goes on instead, ``restore`` it.
        """
        other = copy.copy(self)
        other.__dict__.update(checkpoint.attributes | {"local": checkpoint.attributes["local"].fork()})
        pairs = zip(checkpoint.attributes["rows"], checkpoint.own_lengths, strict=True)
        other.rows = [row if len(row.own) == length else row.fork(length) for row, length in pairs]
        other.local.memories = [row.memories for row in other.rows]
        return other

    def advance(self, length: int, positions: Tensor) -> None:
        """Count tokens that went through, ``length`` a row, and their positions (B, length)."""
        self.seen += length
        self.next_positions = positions[:, -1:] + 1

    def activate_past_recording(self) -> None:
        """Keep what it takes to ``crop`` tokens that have moved to the memory; assisted decoding calls this.

        From here on the window overflows token by token, however many come at once, so that tokens taken back leave no
        trace. Given memories are not written to before ``flush``, since nobody can take tokens back from a file.
        """
        self.revertible = True

    def before_move(self) -> None:
        """Called before tokens move to the memory."""
        if self.revertible:
            self.before_moves.append(self.checkpoint())

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last tokens of every row.

        Args:
            tokens_to_remove: minus how many, as transformers says it since 5.24; a positive number is how many to keep.

        Raises:
            ValueError: some have moved to the memory, and the cache was not told to keep what takes them back.
        """
        target = min(tokens_to_remove, self.seen) if tokens_to_remove > 0 else self.seen + tokens_to_remove
        if target == self.seen:
            self.before_moves = []
            return
        # Of the states before moves, the first that has all tokens wanted: none of the others has moved there.
        state = next((one for one in self.before_moves if one.attributes["seen"] >= target), self.checkpoint())
        count = state.attributes["seen"] - target
        if count:
            local = state.attributes["local"]
            positions = local.positions
            local.drop_last(count)
            state.attributes["next_positions"] = positions[:, -count, None]
        self.restore(state)
        self.seen, self.before_moves = target, []

    def flush(self) -> None:
        """Move what is left in the local window to the rows' own memories, and all of that to memories written to."""
        for number, row in enumerate(self.rows):
            count = self.local.counts[number] - self.local.sinks[number]
            if count:
                self.local.move(number, count, row.own)
        if self.write and self.revertible:
            for row in self.rows:
                _append(row.reads[0], row.own)
                row.own.reset()
        self.open_window()

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens so far, moved or local: what ``generate`` has already fed."""
        return self.seen

    @property
    def is_compileable(self) -> bool:
        """False: the memory grows."""
        return False

    @property
    def is_croppable(self) -> bool:
        """Whether ``crop`` can take back any token that comes from here on; see ``activate_past_recording``."""
        return self.revertible

    @property
    def is_linear(self) -> list[bool]:
        """Not linear attention: ``generate`` feeds only what ``get_seq_length`` does not count (transformers 5.24)."""
        return [False]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row ``beam_idx[i]`` was."""
        self.before_moves = []
        order = beam_idx.tolist()
        taken: set[int] = set()
        rows = []
        for row in order:
            rows.append(self.rows[row].fork() if row in taken else self.rows[row])
            taken.add(row)
        self.rows = rows
        self.local.select_rows(beam_idx)
        self.local.memories = [row.memories for row in self.rows]
        if self.next_positions is not None:
            self.next_positions = self.next_positions[beam_idx.to(self.next_positions.device)]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row so many times, to go on differently: one prefix, many continuations."""
        self.reorder_cache(torch.arange(len(self.rows)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only these rows."""
        self.reorder_cache(indices)

    def __deepcopy__(self, memo: dict[int, Any]) -> "FoTCache":
        # Memories that are only read are shared, however large.
        other = self.fork(self.checkpoint())
        other.rows = [row.fork() for row in self.rows]
        other.local.memories = [row.memories for row in other.rows]
        return other


def _written(memory: Memory, model: Any) -> Row:
    """A row that reads a memory, and whose own tokens are to be appended to it later."""
    return Row(
        [memory],
        model.new_memory(
            key_dtype=memory.key_dtype, value_dtype=memory.value_dtype, index=memory.index, top_k=memory.top_k
        ),
    )


def _append(memory: Memory, other: Memory) -> None:
    """Append all that another memory holds, which has no documents."""
    if len(other):
        keys, values = ({n: part(other[n]) for n in other.layers} for part in (LayerMemory.keys, LayerMemory.values))
        memory.append(keys, values, torch.from_numpy(other.token_ids()))
