"""A memory as a folder: save, open, grow, compact and verify. ``docs/memory_files.md`` describes the format.

A change writes new files beside the old ones and then replaces the manifest, which alone says what belongs to the
memory: until that moment the folder holds the old memory, from then on the new one. Nothing that was written is ever
written again, so those who read keep what they opened.
"""

import logging
from collections.abc import Callable, Collection, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import torch
from filelock import FileLock
from torch import Tensor

from memory.atomic import file_sha256
from memory.clustered import SEGMENT, Clusters, LearntClusters
from memory.content import Content
from memory.folder import Folder, changing, commit, is_ours, next_path, remove_leftovers, take_lock
from memory.index import Learnt
from memory.manifest import LOCK, MANIFEST, Manifest, Part, read_manifest
from memory.parts import MappedPart, read_at_random, write_part
from memory.saved_index import check_learnt, learnt_streams, map_learnt
from memory.segments import Segment, check_documents, check_places, map_segment, number_documents, segment_streams
from memory.tokens import DocumentNote, TokenTable
from memory.vectors import Block, Stored

logger = logging.getLogger(__name__)

# A segment is no larger than either of these.
SEGMENT_TOKENS = 65_536
SEGMENT_BYTES = 1 << 28


@dataclass(frozen=True)
class Opened:
    """What a folder holds.

    Attributes:
        content: of the memory.
        folder: it was read from.
        learnt: layer -> what its index learnt.
    """

    content: Content
    folder: Folder
    learnt: dict[int, Learnt]


def save(content: Content, path: str | Path, learnt: dict[int, Learnt]) -> None:
    """Write all of a memory to a new folder, or in place of the memory in that folder.

    A custom index is saved as ``auto``. The memory object does not change: its vectors stay in RAM, or mapped from the
    folder that they come from.

    Args:
        content: what is written.
        path: of the folder.
        learnt: layer -> what its index learnt.

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
            _write_all(content, folder, learnt, old.created if old else "")
        finally:
            lock.release()
    except BaseException:
        if new:
            (folder / LOCK).unlink(missing_ok=True)
            folder.rmdir()
        raise


def open_folder(path: str | Path, mode: str, device: torch.device) -> Opened:
    """What ``save`` wrote; arguments and errors as for ``Memory.open``."""
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
                return _load(folder, manifest, lock, device)
            except (ValueError, OSError):
                if read_manifest(folder) == manifest:
                    raise  # else: somebody put another memory there while this one was being opened
    except BaseException:
        if lock is not None:
            lock.release()
        raise


def flush(content: Content, folder: Folder, learnt: dict[int, Learnt] | None) -> None:
    """Write what is not on disk yet as a new segment (several if it is large), and map it from there.

    Args:
        content: of the memory.
        folder: its own.
        learnt: layer -> what its index learnt; None while no index is built, to leave what is there.
    """
    manifest, start = deepcopy(folder.manifest), folder.stored
    _describe(content, manifest)
    with changing(folder.path):
        new = _write_segments(content, folder.path, manifest, start, {}, lambda tokens: None)
        if learnt is not None and (new or not _is_saved(learnt, folder.path, manifest)):
            _write_learnt(folder.path, manifest, learnt)
        if manifest == folder.manifest:
            return
        commit(folder.path, manifest)
    folder.manifest, folder.stored = manifest, len(content)
    _swap(content, [map_segment(folder.path, manifest, part) for part in new], start)


def drop(folder: Folder, names: Collection[str], keep: Tensor, learnt: dict[int, Learnt]) -> None:
    """Mark documents as dropped in the manifest, those that are there.

    Args:
        folder: of the memory, which still holds the documents.
        names: of the documents.
        keep: (M,) int64, slots of the other tokens.
        learnt: layer -> what its index learnt, for the slots kept.
    """
    manifest, stored = deepcopy(folder.manifest), int((keep < folder.stored).sum())
    on_disk = [document for document in manifest.documents if document.name in names and not document.dropped]
    if on_disk:
        for document in on_disk:
            document.dropped = True
        with changing(folder.path):
            short = {layer: one.kept(torch.arange(stored)) for layer, one in learnt.items()}
            _write_learnt(folder.path, manifest, short)
            commit(folder.path, manifest)
    folder.manifest, folder.stored = manifest, stored


def rename(folder: Folder, names: Mapping[str, str]) -> None:
    """Give documents other names in the manifest, as far as they are there, all at once."""
    manifest = deepcopy(folder.manifest)
    for document in manifest.documents:
        if not document.dropped:
            document.name = names.get(document.name, document.name)
    if manifest != folder.manifest:
        with changing(folder.path):
            commit(folder.path, manifest)
        folder.manifest = manifest


def compact(
    content: Content, folder: Folder, learnt: dict[int, Learnt], by_cluster: bool, progress: Callable[[int], object]
) -> None:
    """Write everything anew, without what was dropped, and map it from there. Needs room for both at once.

    ``by_cluster`` and ``progress`` are as for ``Memory.compact``.
    """
    created = folder.manifest.created
    folder.manifest = _write_all(content, folder.path, learnt, created, by_cluster, progress)
    folder.stored = len(content)
    _swap(content, [map_segment(folder.path, folder.manifest, part) for part in folder.manifest.segments], 0)


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
        problems = check_documents(folder, manifest) + check_places(folder, manifest) + check_learnt(folder, manifest)
    return problems


def _write_all(
    content: Content,
    folder: Path,
    learnt: dict[int, Learnt],
    created: str,
    by_cluster: bool = False,
    progress: Callable[[int], object] = lambda tokens: None,
) -> Manifest:
    manifest = Manifest(
        layers=list(content.layers),
        num_key_value_heads=content.num_key_value_heads,
        head_dim=content.head_dim,
        key_dtype=content.key_dtype,
        value_dtype=content.value_dtype,
        index="",
        top_k=None,
        fingerprint=content.fingerprint,
        metadata={},
        created=created,
        by_cluster=by_cluster,
    )
    clusters = {layer: one.clusters for layer, one in learnt.items() if isinstance(one, LearntClusters)}
    with changing(folder):
        _write_segments(content, folder, manifest, 0, clusters if by_cluster else {}, progress)
        _describe(content, manifest)
        _write_learnt(folder, manifest, learnt)
        commit(folder, manifest)
    return manifest


def _describe(content: Content, manifest: Manifest) -> None:
    """Put into the manifest what may change without a token."""
    manifest.metadata = deepcopy(content.metadata)
    manifest.index = content.index
    manifest.top_k = content.top_k


def _write_segments(
    content: Content,
    folder: Path,
    manifest: Manifest,
    start: int,
    clusters: Mapping[int, Clusters],
    progress: Callable[[int], object],
) -> list[Part]:
    """Write the tokens from slot ``start`` on, and note them and their documents in the manifest.

    ``clusters`` are as for ``segment_streams``; ``progress`` is called with the tokens of each segment.
    """
    rows = number_documents(manifest, content, start)
    for document in manifest.documents:
        if not document.dropped:
            note = content.notes.get(document.name, DocumentNote())
            document.sha256, document.complete = note.sha256, note.complete
    size = min(SEGMENT_TOKENS, max(1, SEGMENT_BYTES // _bytes_per_token(content)))
    if clusters:
        size = max(SEGMENT, size // SEGMENT * SEGMENT)  # whole stretches, where none was lost
    parts = []
    for first in range(start, len(content), size):
        stop = min(first + size, len(content))
        streams = segment_streams(content, first, stop, rows[first - start : stop - start], clusters)
        parts.append(write_part(next_path(folder, "segment"), streams, stop - first))
        progress(stop - first)
    manifest.segments += parts
    return parts


def _write_learnt(folder: Path, manifest: Manifest, learnt: dict[int, Learnt]) -> None:
    manifest.learnt, manifest.learnt_name = None, ""
    if learnt:
        manifest.learnt = write_part(next_path(folder, "index"), learnt_streams(learnt), _known(learnt))
        manifest.learnt_name = next(iter(learnt.values())).name


def _is_saved(learnt: dict[int, Learnt], folder: Path, manifest: Manifest) -> bool:
    """Whether the folder's index part has it: of the same layers, up to the same token."""
    if not learnt or manifest.learnt is None or manifest.learnt.tokens != _known(learnt):
        return False
    return map_learnt(folder, manifest).keys() == learnt.keys()


def _known(learnt: dict[int, Learnt]) -> int:
    return min(one.known for one in learnt.values())


def _bytes_per_token(content: Content) -> int:
    blocks = [blocks for layer in content.layers.values() for blocks in (layer.keys, layer.values)]
    numbers = sum(b.head_dim * b.dtype.itemsize + (2 if b.dtype == torch.int8 else 0) for b in blocks)
    return max(1, numbers * content.num_key_value_heads)


def _load(folder: Path, manifest: Manifest, lock: FileLock | None, device: torch.device) -> Opened:
    living = [document for document in manifest.documents if not document.dropped]
    segments = [map_segment(folder, manifest, part) for part in manifest.segments]
    learnt = map_learnt(folder, manifest)
    size, ram = sum(part.bytes for part in manifest.segments), psutil.virtual_memory().total
    if size > ram and manifest.by_cluster:
        for segment in segments:
            _read_at_random(segment)
    elif size > ram and any(isinstance(one, LearntClusters) for one in learnt.values()):
        logger.warning(
            "%s has %.1f GB, more than the %.1f GB of RAM: questions wait for the disk; "
            "`fot memory compact --by-cluster` writes it so that they wait less",
            folder,
            size / 1e9,
            ram / 1e9,
        )
    content = Content(
        num_key_value_heads=manifest.num_key_value_heads,
        head_dim=manifest.head_dim,
        key_dtype=manifest.key_dtype,
        value_dtype=manifest.value_dtype,
        index=manifest.index,
        top_k=manifest.top_k,
        fingerprint=manifest.fingerprint,
        device=device,
        tokens=TokenTable(
            np.concatenate([np.empty((0, 4), np.int32), *(segment.rows for segment in segments)]),
            [document.name for document in living],
        ),
        metadata=deepcopy(manifest.metadata),
        notes={document.name: DocumentNote(document.sha256, document.complete) for document in living},
    )
    content.layers = {layer: content.empty_layer() for layer in manifest.layers}
    _swap(content, segments, 0)
    return Opened(content, Folder(folder, manifest, len(content), lock), learnt)


def _swap(content: Content, segments: list[Segment], start: int) -> None:
    """Put mapped vectors in place of those from slot ``start`` on."""
    for number, layer in content.layers.items():
        for blocks, name in ((layer.keys, "keys"), (layer.values, "values")):
            parts = [part for segment in segments for part in getattr(segment, name)[number]]
            blocks.remap(start, (_placed(Block(*part), content.device) for part in parts))


def _read_at_random(segment: Segment) -> None:
    """A cluster of keys is a page or two: the system need not read what lies around it."""
    for parts in (*segment.keys.values(), *segment.values.values()):
        for stored in parts[:1]:  # all parts are of the same tensors
            for tensor in stored:
                if tensor is not None:
                    read_at_random(tensor)


def _placed(block: Block, device: torch.device | None) -> Stored:
    """The vectors there: in the order of the slots, unless they stay mapped."""
    if device is None or device.type == "cpu":
        return block.data, block.scales, block.places
    data, scales = block.at(slice(0, len(block)))
    return data.to(device), None if scales is None else scales.to(device), None


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
