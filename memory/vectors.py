"""Growable storage for the vectors of one memory layer: blocks that are never copied when more is appended."""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# Blocks double from the first size to the last, so that a small memory stays small and a large one has few blocks.
FIRST_BLOCK = 1024
LAST_BLOCK = 16384

MOST_PLACES = 1 << 16

VECTOR_DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.int8,
}


def as_stored(vectors: Tensor, dtype: torch.dtype) -> Tensor:
    """Vectors in the dtype that they are stored in; those for int8 in float32, which they are scaled in."""
    return vectors.to(torch.float32 if dtype == torch.int8 else dtype)


def packed(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Vectors (..., D) as int8, and their scales (..., 1) bfloat16, ``max(abs(x)) / 127``.

    A scale of so few bits makes the largest number 127 again, so that what was packed before is packed into the same.
    """
    vectors = vectors.float()
    scales = (vectors.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 127.0).bfloat16()
    return (vectors / scales).round().to(torch.int8), scales


# A range of a block's vectors, or heads and positions to pick from it.
Where = slice | tuple[Tensor, Tensor]

# Vectors as they are kept, scales for int8, and places as ``Block`` has them.
Stored = tuple[Tensor, Tensor | None, Tensor | None]


@dataclass(frozen=True)
class Block:
    """Vectors of n neighbouring slots, or room for them.

    Attributes:
        data: (G, n, D).
        scales: (G, n, 1) for int8, else None.
        places: (G, n) int16 for ``rows_of``, where in ``data`` the vector of each slot is; there may be others in it,
            too. None if they lie in the order of the slots.
    """

    data: Tensor
    scales: Tensor | None
    places: Tensor | None = None

    def __len__(self) -> int:
        return (self.data if self.places is None else self.places).shape[1]

    def nbytes(self) -> int:
        """Bytes of its own slots, those with room for a vector included."""
        rows = [one[:, : len(self)] for one in (self.data, self.scales, self.places) if one is not None]
        return sum(tensor.numel() * tensor.element_size() for tensor in rows)

    def at(self, where: Where) -> tuple[Tensor, Tensor | None]:
        """Vectors and scales of some slots, counted from the block's first."""
        if isinstance(where, slice):
            if self.places is None:
                return self.data[:, where], None if self.scales is None else self.scales[:, where]
            heads = torch.arange(len(self.places), device=self.places.device).unsqueeze(1)
            where = heads, rows_of(self.places[:, where])
        elif self.places is not None:
            where = where[0], rows_of(self.places[where])
        return self.data[where], None if self.scales is None else self.scales[where]

    def decoded(self, where: Where, dtype: torch.dtype) -> Tensor:
        """Vectors of some slots; a view where no cast is needed and they lie in order."""
        data, scales = self.at(where)
        return data.to(dtype) if scales is None else (data.float() * scales).to(dtype)


class VectorBlocks:
    """(G, N, D) vectors in append order; N grows, in time proportional to what is appended.

    With ``dtype=int8`` each vector is stored as integers and one scale, as ``packed`` makes them.
    The first vectors may be *mapped*: views of a file, which are never written to.
    """

    def __init__(self, num_heads: int, head_dim: int, dtype: torch.dtype) -> None:
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.dtype = dtype
        self.reset()

    def reset(self) -> None:
        """Forget every vector and free their space."""
        self._blocks: list[Block] = []
        self._starts: list[int] = []  # slot of each block's first vector
        self._length = 0
        self._mapped = 0  # so many first blocks are mapped

    def __len__(self) -> int:
        return self._length

    @property
    def device(self) -> torch.device | None:
        """Where the vectors lie; None while there are none."""
        return self._blocks[0].data.device if self._blocks else None

    @property
    def mapped_length(self) -> int:
        """How many of the first vectors are mapped."""
        return sum(map(len, self._blocks[: self._mapped]))

    @classmethod
    def like(cls, other: "VectorBlocks") -> "VectorBlocks":
        """Empty blocks for vectors of the same shape and dtype."""
        return cls(other.num_heads, other.head_dim, other.dtype)

    def take(self, other: "VectorBlocks", slots: Tensor) -> None:
        """Append the vectors that ``other``, of the same dtype, holds in these slots: (M,) int64."""
        for start in range(0, len(slots), LAST_BLOCK):
            chosen = slots[start : start + LAST_BLOCK].expand(self.num_heads, -1)
            # float32 holds every stored value exactly, and an int8 vector gets its own scale and integers back: but
            # not that of a file of before, whose scale had more bits.
            self.append(other.gather(chosen, torch.float32))

    def map(self, data: Tensor, scales: Tensor | None, places: Tensor | None = None) -> None:
        """Add vectors at the end without a copy, in the form in which ``Block`` has them.

        Nothing may have been appended before. The tensors are never written to: what is appended later goes to
        blocks of its own.

        Args:
            data: (G, n, D) of the dtype of these blocks.
            scales: (G, n, 1) bfloat16 for int8, float32 in files of before; else None.
            places: (G, m) int16 for ``rows_of``, where the vectors of m slots are; None for all n in order.
        """
        assert self._mapped == len(self._blocks), "mapped vectors come before all others"
        if places is not None:
            blocks = [Block(data, scales, places)]
        else:
            parts = [slice(start, start + LAST_BLOCK) for start in range(0, data.shape[1], LAST_BLOCK)]
            blocks = [Block(*Block(data, scales).at(part)) for part in parts]
        for block in blocks:
            self._starts.append(self._length)
            self._blocks.append(block)
            self._mapped += 1
            self._length += len(block)

    def remap(self, start: int, parts: Iterable[Stored]) -> None:
        """Put mapped vectors in place of those from slot ``start`` on. Interrupted, nothing has changed.

        Args:
            start: those before are mapped.
            parts: as for ``map``, in order.
        """
        fresh, number = VectorBlocks.like(self), bisect_left(self._starts, start)
        assert number <= self._mapped
        fresh._blocks, fresh._starts = self._blocks[:number], self._starts[:number]
        fresh._length, fresh._mapped = start, number
        for part in parts:
            fresh.map(*part)
        self.__dict__.update(fresh.__dict__)

    def stored(self, start: int, stop: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Vectors of slots start..stop-1 as they are kept: (G, n, D) and, for int8, their scales (G, n, 1)."""
        return (block.at(window) for block, window in self._windows(start, stop))

    def kept(self, slots: Tensor) -> "VectorBlocks":
        """Blocks of the vectors in these slots, (M,) int64 ascending. Mapped ones stay mapped, others are copied."""
        chosen = VectorBlocks.like(self)
        split = int((slots < self.mapped_length).sum())
        for run in runs(slots[:split]):
            for block, window in self._windows(*run):
                if block.places is None:
                    chosen.map(*block.at(window))
                else:
                    chosen.map(block.data, block.scales, block.places[:, window])
        chosen.take(self, slots[split:])
        return chosen

    def nbytes(self) -> int:
        """Bytes held, the free room of the last block included; mapped ones count as if they were in memory."""
        return sum(block.nbytes() for block in self._blocks)

    def append(self, vectors: Tensor) -> None:
        """Add (G, T, D) vectors at the end. Never touches what is stored already."""
        done, total = 0, vectors.shape[1]
        while done < total:
            if not self._blocks or self._free() == 0:
                self._add_block(vectors.device)
            count = min(total - done, self._free())
            self._write(vectors[:, done : done + count])
            done += count

    def truncate(self, length: int) -> None:
        """Forget every vector from slot ``length`` on, but no mapped one."""
        assert length >= self.mapped_length, "a mapped block cut short would be written to"
        while self._starts and self._starts[-1] >= length:
            self._starts.pop()
            self._blocks.pop()
        self._length = min(self._length, length)

    def blocks(self, dtype: torch.dtype, *, ordered: bool = True) -> Iterator[Tensor]:
        """The stored vectors as (G, n, D) tensors of ``dtype``; a view where no cast is needed.

        They come in slot order, or with ``ordered=False`` as they lie, which copies less where those of a cluster lie
        behind one another. Blocks of the same slots, places and dtype come in one order.
        """
        for block, window in self._windows(0, self._length):
            if ordered or block.places is None or len(block) < block.data.shape[1]:
                yield block.decoded(window, dtype)
            else:
                as_it_lies = Block(block.data, block.scales)
                for start in range(0, len(block), LAST_BLOCK):
                    yield as_it_lies.decoded(slice(start, start + LAST_BLOCK), dtype)

    def gather(self, slots: Tensor, dtype: torch.dtype) -> Tensor:
        """The vectors in the given slots.

        Args:
            slots: (G, ...) int64 in 0..N-1, per head, on the device of the vectors.
            dtype: of the result.

        Returns:
            (G, ..., D) of ``dtype``.
        """
        heads, flat = slots.shape[0], slots.reshape(slots.shape[0], -1).contiguous()  # (G, M)
        out = torch.empty(heads, flat.shape[1], self.head_dim, dtype=dtype, device=slots.device)
        head_of = torch.arange(heads, device=slots.device).unsqueeze(1)
        if len(self._blocks) == 1:
            out = self._blocks[0].decoded((head_of, flat), dtype)
        else:
            block_of = torch.bucketize(flat, torch.tensor(self._starts[1:], device=slots.device), right=True)
            for index, block in enumerate(self._blocks):
                rows, columns = (block_of == index).nonzero(as_tuple=True)
                inside = flat[rows, columns] - self._starts[index]
                out[rows, columns] = block.decoded((rows, inside), dtype)
        return out.reshape(*slots.shape, self.head_dim)

    def gather_heads(self, heads: slice, slots: Tensor) -> Tensor:
        """The vectors (g, m, D) float32 of some heads in these slots, (g, m) int64 ascending, where the vectors are."""
        starts = torch.tensor([*self._starts, self._length], device=slots.device).expand(len(slots), -1).contiguous()
        sizes = torch.searchsorted(slots, starts).diff()
        inside = slots - starts[:, :-1].flatten().repeat_interleave(sizes.flatten()).view_as(slots)
        found = torch.empty(*slots.shape, self.head_dim, dtype=self.dtype, device=slots.device)
        # Slices made at once: with many blocks, making them one by one takes longer than reading the vectors.
        lengths = sizes.flatten().tolist()
        wheres = list(inside.flatten().split(lengths))
        if any(block.places is not None for block in self._blocks):
            tables = [block.places for _ in range(len(slots)) for block in self._blocks]
            of = [head for head in range(*heads.indices(self.num_heads)) for _ in self._blocks]
            wheres = [
                where if table is None or not len(where) else rows_of(table[head].index_select(0, where))
                for where, table, head in zip(wheres, tables, of, strict=True)
            ]
        rows = found.flatten(0, 1).split(lengths)
        for where, row, source in zip(wheres, rows, _by_heads([b.data for b in self._blocks], heads), strict=True):
            if len(where):
                torch.index_select(source, 0, where, out=row)
        if self.dtype != torch.int8:
            return found.float()
        scales = torch.empty(*slots.shape, 1, device=slots.device)
        kept = [block.scales for block in self._blocks if block.scales is not None]
        for where, row, source in zip(wheres, scales.flatten(0, 1).split(lengths), _by_heads(kept, heads), strict=True):
            if len(where):
                row.copy_(source.index_select(0, where))
        return found.float() * scales

    def pieces(self, start: int, stop: int, dtype: torch.dtype) -> Iterator[Tensor]:
        """Vectors of slots start..stop-1 as (G, n, D) tensors of ``dtype``; views where no cast is needed."""
        return (block.decoded(window, dtype) for block, window in self._windows(start, stop))

    def take_range(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Vectors of slots start..stop-1 as one (G, stop - start, D) tensor of ``dtype``."""
        parts = list(self.pieces(start, stop, dtype))
        if not parts:
            return torch.empty(self.num_heads, 0, self.head_dim, dtype=dtype, device=self.device)
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def _windows(self, start: int, stop: int) -> Iterator[tuple[Block, slice]]:
        """Each block that has some of slots start..stop-1, and which of its own these are."""
        index = max(0, bisect_right(self._starts, start) - 1)
        while start < stop:
            offset = start - self._starts[index]
            count = min(stop - start, len(self._blocks[index]) - offset)
            yield self._blocks[index], slice(offset, offset + count)
            start, index = start + count, index + 1

    def _free(self) -> int:
        return self._starts[-1] + len(self._blocks[-1]) - self._length

    def _add_block(self, device: torch.device) -> None:
        capacity = min(LAST_BLOCK, FIRST_BLOCK << min(len(self._blocks) - self._mapped, 30))
        self._starts.append(self._length)
        with torch.inference_mode(False):  # a block made in inference mode could not be written to outside it
            data = torch.empty(self.num_heads, capacity, self.head_dim, dtype=self.dtype, device=device)
            scales = None
            if self.dtype == torch.int8:
                scales = torch.empty(self.num_heads, capacity, 1, dtype=torch.bfloat16, device=device)
            self._blocks.append(Block(data, scales))

    def _write(self, vectors: Tensor) -> None:
        offset = self._length - self._starts[-1]
        window = slice(offset, offset + vectors.shape[1])
        block = self._blocks[-1]
        # ``data``: what autograd has saved of this block stays valid, for only room that nobody has read is written.
        if block.scales is not None:
            vectors, scales = packed(vectors)
            block.scales.data[:, window] = scales
        block.data.data[:, window] = vectors
        self._length += vectors.shape[1]


def rows_of(places: Tensor) -> Tensor:
    """Numbers 0..``MOST_PLACES`` - 1 that are kept in 16 bits, as int64."""
    return places.long() & (MOST_PLACES - 1)


def _by_heads(blocks: list[Tensor], heads: slice) -> list[Tensor]:
    """Of blocks (G, n, D), the part (n, D) of each head and block, head after head."""
    return [part for parts in zip(*(block[heads].unbind() for block in blocks), strict=True) for part in parts]


def runs(slots: Tensor) -> list[tuple[int, int]]:
    """First and past-the-end slot of each run of neighbours among ascending slots (M,)."""
    if not len(slots):
        return []
    breaks = (slots.diff() != 1).nonzero().flatten() + 1
    return [(int(part[0]), int(part[-1]) + 1) for part in slots.tensor_split(breaks.cpu())]
