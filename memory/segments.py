"""What the segments of a memory's folder hold: tokens with their vectors."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from memory.content import Content
from memory.manifest import Document, Manifest, Part
from memory.parts import MappedPart, Stream
from memory.tokens import NO_DOCUMENT
from memory.vectors import VECTOR_DTYPES, VectorBlocks, runs

SCALES = (torch.bfloat16, torch.float32)  # float32 in format version 1
DROPPED = -2  # document number of tokens that are no longer part of the memory

Stored = tuple[Tensor, Tensor | None]  # vectors as blocks keep them, and the scales of int8


@dataclass
class Segment:
    """A segment as it is mapped, without its dropped tokens.

    Attributes:
        rows: (n, 4) int32, for ``TokenTable``; documents are numbered as the living ones of the manifest.
        keys: layer -> mapped runs of neighbours, in order.
        values: likewise.
    """

    rows: np.ndarray
    keys: dict[int, list[Stored]]
    values: dict[int, list[Stored]]


def segment_streams(content: Content, start: int, stop: int, rows: np.ndarray) -> dict[str, Stream]:
    """The tensors of a segment of slots start..stop-1.

    Args:
        content: what is written.
        start: first slot.
        stop: past-the-end slot.
        rows: (stop - start, 4) int32, documents numbered as in the manifest.
    """
    streams = {"tokens": Stream.of(torch.from_numpy(np.ascontiguousarray(rows)))}
    heads, count, dim = content.num_key_value_heads, stop - start, content.head_dim
    for layer, vectors in content.layers.items():
        for name, blocks in (("keys", vectors.keys), ("values", vectors.values)):
            pieces = _by_head(blocks, start, stop, 0)
            streams[f"{name}.{layer}"] = Stream(blocks.dtype, (heads, count, dim), pieces)
            if blocks.dtype == torch.int8:
                found = {scales.dtype for _, scales in blocks.stored(start, stop) if scales is not None}
                dtype = torch.float32 if torch.float32 in found else torch.bfloat16
                pieces = (piece.to(dtype) for piece in _by_head(blocks, start, stop, 1))
                streams[f"{name}_scales.{layer}"] = Stream(dtype, (heads, count, 1), pieces)
    return streams


def number_documents(manifest: Manifest, content: Content, start: int) -> np.ndarray:
    """The token rows from slot ``start`` on, documents numbered as in the manifest, which takes them in."""
    rows = content.tokens.rows[start:].copy()
    living = {document.name: number for number, document in enumerate(manifest.documents) if not document.dropped}
    numbers, offset = rows[:, 1].copy(), manifest.tokens()
    for number in np.unique(numbers[numbers != NO_DOCUMENT]).tolist():
        name, places = content.tokens.names[number], np.flatnonzero(numbers == number)
        if name not in living:
            living[name] = len(manifest.documents)
            manifest.documents.append(Document(name, 0, offset + int(places[0]), 0))
        document = manifest.documents[living[name]]
        document.tokens += len(places)
        document.last = offset + int(places[-1])
        rows[places, 1] = living[name]
    return rows


def map_segment(folder: Path, manifest: Manifest, part: Part) -> Segment:
    """Map a segment, every name, dtype and size checked; vectors are not read.

    Raises:
        ValueError: the part is missing, damaged or of another memory; it is named.
    """
    mapped = MappedPart(folder, part)
    rows, slots = _living(manifest, _rows(mapped, part, len(manifest.documents)))
    stretches = runs(torch.from_numpy(slots))
    segment = Segment(rows, {}, {})
    for layer in manifest.layers:
        for name, into in (("keys", segment.keys), ("values", segment.values)):
            dtype = VECTOR_DTYPES[manifest.key_dtype if name == "keys" else manifest.value_dtype]
            shape = (manifest.num_key_value_heads, part.tokens, manifest.head_dim)
            data = mapped.take(f"{name}.{layer}", dtype, shape)
            scales = None
            if dtype == torch.int8:
                scales = mapped.take(f"{name}_scales.{layer}", SCALES, (*shape[:2], 1))
            into[layer] = [(data[:, a:b], None if scales is None else scales[:, a:b]) for a, b in stretches]
    return segment


def check_documents(folder: Path, manifest: Manifest) -> list[str]:
    """What the manifest says of documents that the segments contradict."""
    numbers = [_rows(MappedPart(folder, part), part, len(manifest.documents))[:, 1] for part in manifest.segments]
    all_numbers = np.concatenate([np.empty(0, np.int32), *numbers])
    problems = []
    for number, document in enumerate(manifest.documents):
        places = np.flatnonzero(all_numbers == number)
        found = (len(places), *places[[0, -1]].tolist()) if len(places) else (0, 0, 0)
        said = (document.tokens, document.first, document.last)
        if found != said:
            problems.append(f"{folder}: document {document.name!r} has (tokens, first, last) = {found}; the manifest "
                            f"says {said}")  # fmt: skip
    return problems


def _rows(mapped: MappedPart, part: Part, num_documents: int) -> np.ndarray:
    rows = mapped.take("tokens", torch.int32, (part.tokens, 4)).numpy()
    if len(rows) and not NO_DOCUMENT <= int(rows[:, 1].min()) <= int(rows[:, 1].max()) < num_documents:
        raise mapped.damaged(f"a token is of a document outside 0..{num_documents - 1}")
    return rows


def _living(manifest: Manifest, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows of tokens that are not dropped, renumbered, and their places: (m, 4) int32, (m,) int64."""
    new_numbers, living = np.full(len(manifest.documents) + 1, NO_DOCUMENT, dtype=np.int32), 0
    for number, document in enumerate(manifest.documents):
        new_numbers[number] = DROPPED if document.dropped else living
        living += not document.dropped
    numbers = new_numbers[rows[:, 1]]  # NO_DOCUMENT is -1, the last
    slots = np.flatnonzero(numbers != DROPPED)
    rows = rows[slots]
    rows[:, 1] = numbers[slots]
    return rows, slots


def _by_head(blocks: VectorBlocks, start: int, stop: int, which: int) -> Iterator[Tensor]:
    """Vectors (0) or scales (1) of a range, head after head."""
    for head in range(blocks.num_heads):
        for stored in blocks.stored(start, stop):
            piece = stored[which]
            assert piece is not None
            yield piece[head]
