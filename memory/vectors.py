"""Growable storage for the vectors of one memory layer: blocks that are never copied when more is appended."""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

# Blocks double from the first size to the last, so that a small memory stays small and a large one has few blocks.
FIRST_BLOCK = 1024
LAST_BLOCK = 16384

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
        self._data: list[Tensor] = []  # each (G, capacity, D)
        self._scales: list[Tensor] = []  # each (G, capacity, 1), for int8 alone
        self._starts: list[int] = []  # slot of each block's first vector
        self._length = 0
        self._mapped = 0  # so many first blocks are mapped

    def __len__(self) -> int:
        return self._length

    @property
    def device(self) -> torch.device | None:
        """Where the vectors lie; None while there are none."""
        return self._data[0].device if self._data else None

    @property
    def mapped_length(self) -> int:
        """How many of the first vectors are mapped."""
        return sum(block.shape[1] for block in self._data[: self._mapped])

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

    def map(self, data: Tensor, scales: Tensor | None) -> None:
        """Add vectors at the end without a copy, in the form in which ``stored`` gives them.

        Nothing may have been appended before. The tensors are never written to: what is appended later goes to
        blocks of its own.

        Args:
            data: (G, n, D) of the dtype of these blocks.
            scales: (G, n, 1) bfloat16 for int8, float32 in files of before; else None.
        """
        assert self._mapped == len(self._data), "mapped vectors come before all others"
        for start in range(0, data.shape[1], LAST_BLOCK):
            self._starts.append(self._length)
            self._data.append(data[:, start : start + LAST_BLOCK])
            if scales is not None:
                self._scales.append(scales[:, start : start + LAST_BLOCK])
            self._mapped += 1
            self._length += self._data[-1].shape[1]

    def remap(self, start: int, parts: Iterable[tuple[Tensor, Tensor | None]]) -> None:
        """Put mapped vectors in place of those from slot ``start`` on. Interrupted, nothing has changed.

        Args:
            start: those before are mapped.
            parts: as for ``map``, in order.
        """
        fresh, blocks = VectorBlocks.like(self), bisect_left(self._starts, start)
        assert blocks <= self._mapped
        fresh._data, fresh._scales, fresh._starts = self._data[:blocks], self._scales[:blocks], self._starts[:blocks]
        fresh._length, fresh._mapped = start, blocks
        for data, scales in parts:
            fresh.map(data, scales)
        self.__dict__.update(fresh.__dict__)

    def stored(self, start: int, stop: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Vectors of slots start..stop-1 as they are kept: views (G, n, D) and, for int8, their scales (G, n, 1)."""
        index = max(0, bisect_right(self._starts, start) - 1)
        while start < stop:
            offset = start - self._starts[index]
            count = min(stop - start, self._data[index].shape[1] - offset)
            window = slice(offset, offset + count)
            yield self._data[index][:, window], self._scales[index][:, window] if self._scales else None
            start, index = start + count, index + 1

    def kept(self, slots: Tensor) -> "VectorBlocks":
        """Blocks of the vectors in these slots, (M,) int64 ascending. Mapped ones stay mapped, others are copied."""
        chosen = VectorBlocks.like(self)
        split = int((slots < self.mapped_length).sum())
        for run in runs(slots[:split]):
            for data, scales in self.stored(*run):
                chosen.map(data, scales)
        chosen.take(self, slots[split:])
        return chosen

    def nbytes(self) -> int:
        """Bytes held, the free room of the last block included; mapped ones count as if they were in memory."""
        return sum(block.numel() * block.element_size() for block in (*self._data, *self._scales))

    def append(self, vectors: Tensor) -> None:
        """Add (G, T, D) vectors at the end. Never touches what is stored already."""
        done, total = 0, vectors.shape[1]
        while done < total:
            if not self._data or self._free() == 0:
                self._add_block(vectors.device)
            count = min(total - done, self._free())
            self._write(vectors[:, done : done + count])
            done += count

    def truncate(self, length: int) -> None:
        """Forget every vector from slot ``length`` on, but no mapped one."""
        assert length >= self.mapped_length, "a mapped block cut short would be written to"
        while self._starts and self._starts[-1] >= length:
            self._starts.pop()
            self._data.pop()
            if self._scales:
                self._scales.pop()
        self._length = min(self._length, length)

    def blocks(self, dtype: torch.dtype) -> Iterator[Tensor]:
        """The stored vectors in slot order as (G, n, D) tensors of ``dtype``; a view where no cast is needed."""
        for index, start in enumerate(self._starts):
            count = min(self._length - start, self._data[index].shape[1])
            if count:
                yield self._decode(self._data[index][:, :count], index, slice(0, count), dtype)

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
        if len(self._data) == 1:
            out = self._decode(self._data[0], 0, (head_of, flat), dtype)
        else:
            block_of = torch.bucketize(flat, torch.tensor(self._starts[1:], device=slots.device), right=True)
            for index in range(len(self._data)):
                rows, columns = (block_of == index).nonzero(as_tuple=True)
                inside = flat[rows, columns] - self._starts[index]
                out[rows, columns] = self._decode(self._data[index], index, (rows, inside), dtype)
        return out.reshape(*slots.shape, self.head_dim)

    def gather_heads(self, heads: slice, slots: Tensor) -> Tensor:
        """The vectors (g, m, D) float32 of some heads in these slots, (g, m) int64 ascending, where the vectors are."""
        starts = torch.tensor([*self._starts, self._length], device=slots.device).expand(len(slots), -1).contiguous()
        sizes = torch.searchsorted(slots, starts).diff()
        places = slots - starts[:, :-1].flatten().repeat_interleave(sizes.flatten()).view_as(slots)
        found = torch.empty(*slots.shape, self.head_dim, dtype=self.dtype, device=slots.device)
        scales = torch.empty(*slots.shape, 1, device=slots.device) if self._scales else None
        # Slices made at once: with many blocks, making them one by one takes longer than reading the vectors.
        lengths = sizes.flatten().tolist()
        wheres, rows = places.flatten().split(lengths), found.flatten(0, 1).split(lengths)
        for where, row, source in zip(wheres, rows, _by_heads(self._data, heads), strict=True):
            if len(where):
                torch.index_select(source, 0, where, out=row)
        if scales is not None:
            rows = scales.flatten(0, 1).split(lengths)
            for where, row, source in zip(wheres, rows, _by_heads(self._scales, heads), strict=True):
                if len(where):
                    row.copy_(source.index_select(0, where))
        return found.float() if scales is None else found.float() * scales

    def pieces(self, start: int, stop: int, dtype: torch.dtype) -> Iterator[Tensor]:
        """Vectors of slots start..stop-1 as (G, n, D) tensors of ``dtype``; views where no cast is needed."""
        index = max(0, bisect_right(self._starts, start) - 1)
        while start < stop:
            offset = start - self._starts[index]
            count = min(stop - start, self._data[index].shape[1] - offset)
            window = slice(offset, offset + count)
            yield self._decode(self._data[index][:, window], index, window, dtype)
            start, index = start + count, index + 1

    def take_range(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Vectors of slots start..stop-1 as one (G, stop - start, D) tensor of ``dtype``."""
        parts = list(self.pieces(start, stop, dtype))
        if not parts:
            return torch.empty(self.num_heads, 0, self.head_dim, dtype=dtype, device=self.device)
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def _free(self) -> int:
        return self._starts[-1] + self._data[-1].shape[1] - self._length

    def _add_block(self, device: torch.device) -> None:
        capacity = min(LAST_BLOCK, FIRST_BLOCK << min(len(self._data) - self._mapped, 30))
        self._starts.append(self._length)
        with torch.inference_mode(False):  # a block made in inference mode could not be written to outside it
            self._data.append(torch.empty(self.num_heads, capacity, self.head_dim, dtype=self.dtype, device=device))
            if self.dtype == torch.int8:
                self._scales.append(torch.empty(self.num_heads, capacity, 1, dtype=torch.bfloat16, device=device))

    def _write(self, vectors: Tensor) -> None:
        offset = self._length - self._starts[-1]
        window = slice(offset, offset + vectors.shape[1])
        # ``data``: what autograd has saved of this block stays valid, for only room that nobody has read is written.
        if self.dtype == torch.int8:
            vectors, scales = packed(vectors)
            self._scales[-1].data[:, window] = scales
        self._data[-1].data[:, window] = vectors
        self._length += vectors.shape[1]

    def _decode(self, stored: Tensor, block: int, where: Where, dtype: torch.dtype) -> Tensor:
        """``stored`` is a block or its window at ``where``; a tuple of index tensors still has to be looked up."""
        if isinstance(where, tuple):
            stored = stored[where]
        if self.dtype != torch.int8:
            return stored.to(dtype)
        scales = self._scales[block][:, where] if isinstance(where, slice) else self._scales[block][where]
        return (stored.float() * scales).to(dtype)


def _by_heads(blocks: list[Tensor], heads: slice) -> list[Tensor]:
    """Of blocks (G, n, D), the part (n, D) of each head and block, head after head."""
    return [part for parts in zip(*(block[heads].unbind() for block in blocks), strict=True) for part in parts]


def runs(slots: Tensor) -> list[tuple[int, int]]:
    """First and past-the-end slot of each run of neighbours among ascending slots (M,)."""
    if not len(slots):
        return []
    breaks = (slots.diff() != 1).nonzero().flatten() + 1
    return [(int(part[0]), int(part[-1]) + 1) for part in slots.tensor_split(breaks.cpu())]
