"""A memory as a folder: save, open, grow, compact and verify. ``docs/memory_files.md`` describes the format.

A change writes new files beside the old ones and then replaces the manifest, which alone says what belongs to the
memory: until that moment the folder holds the old memory, from then on the new one. Nothing that was written is ever
written again, so those who read keep what they opened.
"""

from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from memory.folder import Folder, changing, commit, is_ours, next_path, remove_leftovers, take_lock
from memory.index import LearntIndex
from memory.lock import Lock
from memory.manifest import LOCK, MANIFEST, Manifest, Part, read_manifest
from memory.parts import MappedPart, file_sha256, write_part
from memory.segments import (
    Segment,
    check_documents,
    check_learnt,
    learnt_streams,
    map_learnt,
    map_segment,
    number_documents,
    segment_streams,
)
from memory.store import IndexFactory, Memory
from memory.tokens import DocumentNote, TokenTable

# A segment is no larger than either of these.
SEGMENT_TOKENS = 65_536
SEGMENT_BYTES = 1 << 28


def writable_folder(memory: Memory) -> Folder:
    """The folder that a memory may write to; ValueError if there is none."""
    if memory._folder is None:
        raise ValueError("this memory has no folder yet: save(path), then Memory.open(path, mode='a')")
    memory._folder.check_writable()
    return memory._folder


def save(memory: Memory, path: str | Path) -> None:
    """Write all of a memory to a new folder, or in place of the memory in that folder.

    A custom index is saved as ``auto``. The memory object does not change: its vectors stay in RAM, or mapped from the
    folder that they come from.

    Raises:
        ValueError: The folder is not empty and holds no memory, or JSON cannot hold the metadata.
        OSError: The folder cannot be written, or another process writes to it. What was there has not changed.
    """
    folder, old = Path(path), None
    if folder.exists() and (not folder.is_dir() or (folder / MANIFEST).exists()):
        old = read_manifest(folder)
    elif folder.exists() and any(not is_ours(entry.name) for entry in folder.iterdir()):
        raise ValueError(f"{folder} is not empty and holds no memory: save to a new folder")
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock = take_lock(folder)
        try:
            _write_all(memory, folder, old.created if old else "")
        finally:
            lock.release()
    except BaseException:
        if new:
            (folder / LOCK).unlink(missing_ok=True)
            folder.rmdir()
        raise


def open_memory(
    path: str | Path,
    mode: str,
    *,
    index: str | IndexFactory | None = None,
    top_k: int | None = None,
    device: str | torch.device = "cpu",
) -> Memory:
    """Open a memory that ``save`` wrote. On a CPU it is mapped: vectors are read from disk when they are needed.

    Opening checks sizes and not hashes; ``verify`` checks hashes. Indexes are built at the first search.

    Args:
        path: the folder.
        mode: ``r`` opens the memory to read, ``a`` to change it as well. Any number of processes may read it at once,
            but only one may change it.
        index: replaces the index that the memory was made with; as for ``Memory``.
        top_k: replaces the number of pairs that a query attends to.
        device: device of the vectors.

    Raises:
        OSError: There is no such folder, or it cannot be read. With mode ``a``: it cannot be written, or another
            process writes to it.
        ValueError: The folder holds no memory, a part is damaged (the message names it), or the mode is not known.
    """
    if mode not in ("r", "a"):
        raise ValueError(f"mode is {mode!r}; choose 'r' to read or 'a' to add")
    folder = Path(path)
    manifest = read_manifest(folder)
    lock = take_lock(folder) if mode == "a" else None
    try:
        if lock is not None:
            remove_leftovers(folder)
        while True:
            try:
                manifest = read_manifest(folder)
                return _load(folder, manifest, lock, index, top_k, device)
            except (ValueError, OSError):
                if read_manifest(folder) == manifest:
                    raise  # else: somebody put another memory there while this one was being opened
    except BaseException:
        if lock is not None:
            lock.release()
        raise


def flush(memory: Memory, folder: Folder) -> None:
    """Write what is not on disk yet as a new segment (several if it is large), and map it from there."""
    manifest, start = deepcopy(folder.manifest), folder.stored
    _describe(memory, manifest)
    with changing(folder.path):
        new = _write_segments(memory, folder.path, manifest, start)
        if any(memory[layer]._index is not None for layer in memory.layers):
            learnt = _learnt(memory)
            if not manifest.learnt or not learnt or manifest.learnt.tokens != _known(learnt) or new:
                _write_learnt(folder.path, manifest, learnt)
        if manifest == folder.manifest:
            return
        commit(folder.path, manifest)
    folder.manifest, folder.stored = manifest, len(memory)
    _swap(memory, [map_segment(folder.path, manifest, part) for part in new], start)


def drop(memory: Memory, folder: Folder, name: str, keep: Tensor) -> dict[int, LearntIndex]:
    """Mark a document as dropped in the manifest, if it is there.

    Args:
        memory: which still holds the document.
        folder: its own.
        name: of the document.
        keep: (M,) int64, slots of the other tokens.

    Returns:
        layer -> what its index learnt, for the slots kept.
    """
    learnt = {layer: one.kept(keep) for layer, one in _learnt(memory).items()}
    manifest, stored = deepcopy(folder.manifest), int((keep < folder.stored).sum())
    on_disk = [document for document in manifest.documents if document.name == name and not document.dropped]
    if on_disk:
        on_disk[0].dropped = True
        with changing(folder.path):
            short = {layer: replace(one, lists=one.lists[:, :stored]) for layer, one in learnt.items()}
            _write_learnt(folder.path, manifest, short)
            commit(folder.path, manifest)
    folder.manifest, folder.stored = manifest, stored
    return learnt


def compact(memory: Memory, folder: Folder) -> None:
    """Write everything anew, without what was dropped, and map it from there. Needs room for both at once."""
    folder.manifest, folder.stored = _write_all(memory, folder.path, folder.manifest.created), len(memory)
    _swap(memory, [map_segment(folder.path, folder.manifest, part) for part in folder.manifest.segments], 0)


def verify(path: str | Path) -> list[str]:
    """Read every byte of a memory's folder and compare it with the manifest.

    Returns:
        One line for each problem, which names the damaged part. The list is empty if there is none.

    Raises:
        OSError, ValueError: There is no memory to verify, or its manifest is damaged.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    problems = [problem for part in manifest.files() for problem in _problems(folder, manifest, part)]
    if not problems:
        problems = check_documents(folder, manifest) + check_learnt(folder, manifest)
    return problems


def _write_all(memory: Memory, folder: Path, created: str) -> Manifest:
    manifest = Manifest(
        layers=list(memory.layers),
        num_key_value_heads=memory.num_key_value_heads,
        head_dim=memory.head_dim,
        key_dtype=memory.key_dtype,
        value_dtype=memory.value_dtype,
        index="",
        top_k=None,
        fingerprint=memory.fingerprint,
        metadata={},
        created=created,
    )
    with changing(folder):
        _write_segments(memory, folder, manifest, 0)
        _describe(memory, manifest)
        _write_learnt(folder, manifest, _learnt(memory))
        commit(folder, manifest)
    return manifest


def _describe(memory: Memory, manifest: Manifest) -> None:
    """Put into the manifest what may change without a token."""
    manifest.metadata = deepcopy(memory.metadata)
    manifest.index = memory.index if isinstance(memory.index, str) else "auto"
    manifest.top_k = memory.top_k


def _write_segments(memory: Memory, folder: Path, manifest: Manifest, start: int) -> list[Part]:
    """Write the tokens from slot ``start`` on, and note them and their documents in the manifest."""
    rows = number_documents(manifest, memory, start)
    for document in manifest.documents:
        if not document.dropped:
            note = memory.notes.get(document.name, DocumentNote())
            document.sha256, document.complete = note.sha256, note.complete
    size = min(SEGMENT_TOKENS, max(1, SEGMENT_BYTES // _bytes_per_token(memory)))
    parts = []
    for first in range(start, len(memory), size):
        stop = min(first + size, len(memory))
        streams = segment_streams(memory, first, stop, rows[first - start : stop - start])
        parts.append(write_part(next_path(folder, "segment"), streams, stop - first))
    manifest.segments += parts
    return parts


def _write_learnt(folder: Path, manifest: Manifest, learnt: dict[int, LearntIndex]) -> None:
    manifest.learnt, manifest.learnt_name = None, ""
    if learnt:
        manifest.learnt = write_part(next_path(folder, "index"), learnt_streams(learnt), _known(learnt))
        manifest.learnt_name = next(iter(learnt.values())).name


def _learnt(memory: Memory) -> dict[int, LearntIndex]:
    found = {layer: memory[layer]._learnt() for layer in memory.layers}
    return {layer: one for layer, one in found.items() if one is not None}


def _known(learnt: dict[int, LearntIndex]) -> int:
    return min(one.lists.shape[1] for one in learnt.values())


def _bytes_per_token(memory: Memory) -> int:
    blocks = [b for layer in memory.layers for b in (memory[layer]._keys, memory[layer]._values)]
    numbers = sum(b.head_dim * b.dtype.itemsize + (4 if b.dtype == torch.int8 else 0) for b in blocks)
    return max(1, numbers * memory.num_key_value_heads)


def _load(
    folder: Path,
    manifest: Manifest,
    lock: Lock | None,
    index: str | IndexFactory | None,
    top_k: int | None,
    device: str | torch.device,
) -> Memory:
    memory = Memory(
        manifest.layers,
        manifest.num_key_value_heads,
        manifest.head_dim,
        key_dtype=manifest.key_dtype,
        value_dtype=manifest.value_dtype,
        index=manifest.index if index is None else index,
        top_k=manifest.top_k if top_k is None else top_k,
        device=device,
        fingerprint=manifest.fingerprint,
    )
    living = [document for document in manifest.documents if not document.dropped]
    segments = [map_segment(folder, manifest, part) for part in manifest.segments]
    memory._tokens = TokenTable(
        np.concatenate([np.empty((0, 4), np.int32), *(segment.rows for segment in segments)]),
        [document.name for document in living],
    )
    memory.metadata = deepcopy(manifest.metadata)
    memory.notes = {document.name: DocumentNote(document.sha256, document.complete) for document in living}
    _swap(memory, segments, 0)
    learnt = map_learnt(folder, manifest)
    for layer in memory.layers:
        memory[layer]._put_off(learnt.get(layer))
    memory._folder = Folder(folder, manifest, len(memory), lock)
    return memory


def _swap(memory: Memory, segments: list[Segment], start: int) -> None:
    """Put mapped vectors in place of those from slot ``start`` on."""
    for number in memory.layers:
        layer = memory[number]
        for blocks, name in ((layer._keys, "keys"), (layer._values, "values")):
            parts = [part for segment in segments for part in getattr(segment, name)[number]]
            blocks.remap(
                start,
                ((data.to(memory.device), None if s is None else s.to(memory.device)) for data, s in parts),
            )


def _problems(folder: Path, manifest: Manifest, part: Part) -> list[str]:
    try:
        MappedPart(folder, part)
        if part is manifest.learnt:
            map_learnt(folder, manifest)
        else:
            map_segment(folder, manifest, part)
    except (ValueError, OSError) as error:
        return [str(error)]
    found = file_sha256(folder / part.file)
    if found != part.sha256:
        return [f"{folder / part.file} was changed: its sha256 is {found}, the manifest says {part.sha256}"]
    return []
