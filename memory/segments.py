"""What the segments of a memory's folder hold: tokens with their vectors."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from memory.clustered import Clusters
from memory.content import Content
from memory.manifest import Document, Manifest, Part
from memory.parts import MappedPart, Stream
from memory.tokens import NO_DOCUMENT
from memory.vectors import MOST_PLACES, VECTOR_DTYPES, Stored, VectorBlocks, rows_of, runs

SCALES = (torch.bfloat16, torch.float32)  # float32 in format version 1
PLACES = "places"  # tensor of where vectors are, if they lie cluster after cluster
DROPPED = -2  # document number of tokens that are no longer part of the memory

Section = tuple[int, int, Tensor | None]  # slots start..stop-1, and in which order (G, n) they are written


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


def segment_streams(
    content: Content, start: int, stop: int, rows: np.ndarray, clusters: Mapping[int, Clusters]
) -> dict[str, Stream]:
    """The tensors of a segment of slots start..stop-1.

    Args:
        content: what is written.
        start: first slot.
        stop: past-the-end slot.
        rows: (stop - start, 4) int32, documents numbered as in the manifest.
        clusters: layer -> clusters. The vectors of whole stretches of them are written cluster after cluster, all
            others in the order of the slots.
    """
    streams = {"tokens": Stream.of(torch.from_numpy(np.ascontiguousarray(rows)))}
    heads, count, dim = content.num_key_value_heads, stop - start, content.head_dim
    for layer, vectors in content.layers.items():
        sections = _sections(start, stop, clusters.get(layer))
        if any(order is not None for *_, order in sections):
            streams[f"{PLACES}.{layer}"] = Stream.of(_places(sections, heads))
        for name, blocks in (("keys", vectors.keys), ("values", vectors.values)):
            pieces = _by_head(blocks, sections, 0)
            streams[f"{name}.{layer}"] = Stream(blocks.dtype, (heads, count, dim), pieces)
            if blocks.dtype == torch.int8:
                found = {scales.dtype for _, scales in blocks.stored(start, stop) if scales is not None}
                dtype = torch.float32 if torch.float32 in found else torch.bfloat16
                pieces = (piece.to(dtype) for piece in _by_head(blocks, sections, 1))
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
        places = _mapped_places(mapped, part, layer, manifest)
        for name, into in (("keys", segment.keys), ("values", segment.values)):
            dtype = VECTOR_DTYPES[manifest.key_dtype if name == "keys" else manifest.value_dtype]
            shape = (manifest.num_key_value_heads, part.tokens, manifest.head_dim)
            data = mapped.take(f"{name}.{layer}", dtype, shape)
            scales = None
            if dtype == torch.int8:
                scales = mapped.take(f"{name}_scales.{layer}", SCALES, (*shape[:2], 1))
            if places is not None:
                into[layer] = [(data, scales, places[:, a:b]) for a, b in stretches]
            else:
                into[layer] = [(data[:, a:b], None if scales is None else scales[:, a:b], None) for a, b in stretches]
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


def check_places(folder: Path, manifest: Manifest) -> list[str]:
    """Segments whose vectors lie cluster after cluster, but not each at one place."""
    problems = []
    for part in manifest.segments:
        mapped = MappedPart(folder, part)
        for layer in manifest.layers:
            places = _mapped_places(mapped, part, layer, manifest)
            if places is not None and not _is_order(rows_of(places)):
                problems.append(f"{mapped.path}: two vectors of layer {layer} are at one place")
    return problems


def _is_order(numbers: Tensor) -> bool:
    """Whether each row (n,) has each of 0..n-1 once."""
    return torch.equal(numbers.sort(dim=1).values, torch.arange(numbers.shape[1]).expand_as(numbers))


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


def _sections(start: int, stop: int, clusters: Clusters | None) -> list[Section]:
    """Slots start..stop-1, cut where whole stretches of clusters begin and end."""
    sections: list[Section] = []
    if clusters is not None:
        firsts, lengths = clusters.stretches[:, :2].unbind(1)
        inside = ((start <= firsts) & (firsts + lengths <= stop)).nonzero().flatten()
        offsets = lengths.cumsum(0) - lengths
        for first, length, offset in torch.stack([firsts, lengths, offsets], 1)[inside].tolist():
            order = clusters.order[:, offset : offset + length].cpu().long()
            if _is_order(order):  # by a damaged one some vectors would be written twice and others not at all
                sections += [(start, first, None), (first, first + length, order)]
                start = first + length
    return [one for one in (*sections, (start, stop, None)) if one[0] < one[1]]


def _by_head(blocks: VectorBlocks, sections: list[Section], which: int) -> Iterator[Tensor]:
    """Vectors (0) or scales (1) of these slots, head after head."""
    for head in range(blocks.num_heads):
        for start, stop, order in sections:
            found = [stored[which] for stored in blocks.stored(start, stop)]
            pieces = [piece[head] for piece in found if piece is not None]
            yield from pieces if order is None else [torch.cat(pieces)[order[head]]]


def _places(sections: list[Section], heads: int) -> Tensor:
    """Where each slot's vector is written, (G, n) int16 as ``memory.vectors.rows_of`` takes them."""
    begin, end = sections[0][0], sections[-1][1]
    places = torch.arange(end - begin).repeat(heads, 1)
    for start, stop, order in sections:
        if order is not None:
            here = slice(start - begin, stop - begin)
            places[:, here] = torch.empty_like(order).scatter_(1, order, places[:, here])
    return places.to(torch.int16)


def _mapped_places(mapped: MappedPart, part: Part, layer: int, manifest: Manifest) -> Tensor | None:
    """What ``_places`` made; None of a segment in the order of the slots."""
    if f"{PLACES}.{layer}" not in mapped.names:
        return None
    if part.tokens > MOST_PLACES:
        raise mapped.damaged(f"it has {part.tokens:,} vectors cluster after cluster, where {MOST_PLACES:,} is the most")
    return mapped.take(f"{PLACES}.{layer}", torch.int16, (manifest.num_key_value_heads, part.tokens))
