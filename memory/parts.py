"""The safetensors parts of a memory's folder: written in a stream, whole or not at all; mapped and checked."""

import ctypes
import hashlib
import json
import mmap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from memory.atomic import replacing
from memory.manifest import Part

TEMPORARY = ".tmp"

# How safetensors calls a dtype.
DTYPE_CODES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
}


@dataclass(frozen=True)
class Stream:
    """A tensor to be written: what it is, and its numbers in order, in as many pieces as suit."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: Iterable[Tensor]

    @classmethod
    def of(cls, tensor: Tensor) -> "Stream":
        return cls(tensor.dtype, tuple(tensor.shape), [tensor])

    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def unfinished(path: Path) -> Path:
    """The name of a file of the folder while it is written."""
    return path.with_name(path.name + TEMPORARY)


def write_part(path: Path, streams: Mapping[str, Stream], tokens: int) -> Part:
    """Write a safetensors file under a temporary name, then give it its own; on stable storage when this returns.

    No more than a piece is held in memory, and the hash is taken on the way.

    Raises:
        OSError: it cannot be written; nothing is left of it.
    """
    # By size of a number: so each tensor is aligned.
    ordered = dict(sorted(streams.items(), key=lambda item: -item[1].dtype.itemsize))
    digest, size = hashlib.sha256(), 0
    with replacing(path, unfinished(path)) as file:
        for block in _bytes(ordered):
            file.write(block)
            digest.update(block)
            size += len(block)
    return Part(path.name, size, digest.hexdigest(), tokens)


class MappedPart:
    """The tensors of a part, mapped: reading them costs no memory until they are touched.

    Args:
        folder: of the memory.
        part: what the manifest says of it.

    Raises:
        ValueError: the file is missing, of another size, or no safetensors file; it is named.
    """

    def __init__(self, folder: Path, part: Part) -> None:
        self.path = folder / part.file
        found = self.path.stat().st_size if self.path.is_file() else None
        if found != part.bytes:
            what = "is missing" if found is None else f"has {found:,} bytes"
            raise ValueError(f"{self.path} {what}; the manifest says {part.bytes:,} bytes: restore it from a copy, or "
                             "build the memory again")  # fmt: skip
        try:
            safe_open(self.path, framework="pt")  # checks the header: every tensor lies within the file, on its own
        except (SafetensorError, OSError) as error:
            raise self.damaged(str(error)) from error
        with self.path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            self._entries = json.loads(file.read(length))
        self._entries.pop("__metadata__", None)
        self.names = set(self._entries)
        self._start = 8 + length  # of the numbers
        # Mapped here, since safetensors reads a page of each tensor that it hands out.
        self._bytes = torch.from_file(str(self.path), shared=False, size=part.bytes, dtype=torch.uint8)

    def take(self, name: str, dtype: torch.dtype | tuple[torch.dtype, ...], shape: tuple[int | None, ...]) -> Tensor:
        """A tensor by name.

        Args:
            name: in the file.
            dtype: that it must have, or of which it must have one.
            shape: that it must have; None where any length will do.

        Raises:
            ValueError: it is not there, or of another dtype or shape.
        """
        entry = self._entries.get(name)
        if entry is None:
            raise self.damaged(f"it has no {name!r}")
        code, found = entry["dtype"], tuple(entry["shape"])
        same = len(found) == len(shape) and all(b in (None, a) for a, b in zip(found, shape, strict=True))
        codes = {DTYPE_CODES[one]: one for one in (dtype if isinstance(dtype, tuple) else (dtype,))}
        if not same or code not in codes:
            wanted = tuple("any" if length is None else length for length in shape)
            raise self.damaged(f"{name!r} is {code} of shape {found}, not {' or '.join(codes)} of {wanted}")
        first, stop = (self._start + offset for offset in entry["data_offsets"])
        numbers = self._bytes[first:stop]
        if first % codes[code].itemsize:  # of a file that another program wrote
            numbers = numbers.clone()
        return numbers.view(codes[code]).view(found)

    def damaged(self, why: str) -> ValueError:
        """The error that names this part."""
        return ValueError(
            f"{self.path} is damaged or belongs to another memory: {why}; restore it from a copy, or "
            "build the memory again"
        )


def read_at_random(tensor: Tensor) -> None:
    """Tell the system that little of a mapped tensor is read at a time, so that it reads no more from the disk.

    Where it cannot be told, as on Windows, reading stays as it was.
    """
    advice = getattr(mmap, "MADV_RANDOM", None)
    if advice is None:
        return
    numbers = 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    length = tensor.data_ptr() + numbers * tensor.itemsize - start
    ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), ctypes.c_int(advice))


def _bytes(streams: Mapping[str, Stream]) -> Iterator[memoryview | bytes]:
    """The content of a safetensors file: size of the header, header, numbers."""
    entries, start = {}, 0
    for name, stream in streams.items():
        stop = start + stream.nbytes()
        entries[name] = {"dtype": DTYPE_CODES[stream.dtype], "shape": list(stream.shape), "data_offsets": [start, stop]}
        start = stop
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    yield len(header).to_bytes(8, "little") + header
    for name, stream in streams.items():
        written = 0
        for piece in stream.pieces:
            block = piece.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
            written += len(block)
            yield block
        assert written == stream.nbytes(), name
