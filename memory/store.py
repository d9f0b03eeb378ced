"""Memory: everything stored for one logical context.

Per memory layer and KV head, keys and values in append order; once per token, its id and where it came from.
"""

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from memory import disk
from memory.backends import Backends, IndexFactory, check_index, is_clusters
from memory.checks import check_pairs
from memory.clustered import SEGMENT, LearntClusters
from memory.content import Content
from memory.facts import MemoryFacts
from memory.folder import Folder
from memory.index import Index, Learnt
from memory.indexed import IndexedLayer
from memory.layer import LayerMemory
from memory.tokens import TokenTable

logger = logging.getLogger(__name__)


class Memory(MemoryFacts):
    """An external memory of (key, value) pairs for the memory layers of one model.

    Args:
        layers: indices of the memory layers.
        num_key_value_heads: G, KV heads of a layer.
        head_dim: D, size of a head.
        key_dtype: dtype in which keys are stored: float32, bfloat16, float16 or int8 (with one scale for each vector).
        value_dtype: dtype in which values are stored, likewise.
        index: ``exact``, ``auto``, ``clusters`` (see ``memory.clusters``), a FAISS factory string for inner product
            such as ``IVF1024,Flat`` or ``HNSW32`` (see ``memory.faiss_index``; ``gpu:`` in front puts it on a GPU), or
            a function of (key blocks, value blocks) that makes an ``Index``.
        top_k: number of pairs that a query attends to. None means all pairs with ``exact``, and 128 with FAISS.
        device: device of the vectors. None keeps them on the device that they come from.
        fingerprint: identifies the weights that made the keys. A model refuses a memory that other weights made.

    Raises:
        ValueError: An argument is out of range, or it is a name that is not known.
    """

    def __init__(
        self,
        layers: Sequence[int],
        num_key_value_heads: int,
        head_dim: int,
        *,
        key_dtype: str = "float32",
        value_dtype: str = "float32",
        index: str | IndexFactory = "auto",
        top_k: int | None = None,
        device: str | torch.device | None = None,
        fingerprint: str = "",
    ) -> None:
        backends = Backends(index, top_k)
        where = None if device is None else torch.device(device)
        content = Content(
            num_key_value_heads, head_dim, key_dtype, value_dtype, backends.name, top_k, fingerprint, where
        )
        check_index(index, head_dim)
        content.layers = {layer: content.empty_layer() for layer in layers}
        self._hold(content, backends)

    def _hold(self, content: Content, backends: Backends, folder: Folder | None = None) -> None:
        self._content = content
        self._backends = backends
        self._folder = folder  # what it was opened from
        self._indexed = {
            number: IndexedLayer(layer, backends, content.document_starts) for number, layer in content.layers.items()
        }
        self._layers = {number: LayerMemory(layer) for number, layer in self._indexed.items()}

    @classmethod
    def _of(cls, content: Content, backends: Backends, folder: Folder | None = None) -> "Memory":
        memory = cls.__new__(cls)
        memory._hold(content, backends, folder)
        return memory

    @staticmethod
    def open(
        path: str | Path,
        mode: str = "r",
        *,
        index: str | IndexFactory | None = None,
        top_k: int | None = None,
        device: str | torch.device = "cpu",
    ) -> "Memory":
        """A memory that ``save`` wrote. On a CPU it is mapped: vectors are read from disk when they are needed.

        Sizes are checked, hashes are not (``memory.disk.verify`` does). Indexes are built at the first search.

        Args:
            path: the folder.
            mode: ``r`` to read, by any number of processes at once; ``a`` to add and drop as well, by one at a time.
            index: another index than the one it was made with, as for ``Memory``.
            top_k: another number of pairs that a query attends to. ``clusters`` attends to a share instead, so if that
                is asked for, the number that was saved does not count.
            device: where the vectors are put.

        Raises:
            OSError: there is no such folder, it cannot be read, or with mode ``a`` not written, or another process
                writes to it.
            ValueError: it holds no memory, a part is damaged (it is named), or an argument is out of range.
        """
        opened = disk.open_folder(path, mode, torch.device(device))
        content = opened.content
        try:
            by_share = isinstance(index, str) and is_clusters(index)
            kept = None if by_share else content.top_k
            backends = Backends(content.index if index is None else index, kept if top_k is None else top_k)
            content = replace(content, index=backends.name, top_k=backends.top_k)
            check_index(backends.index, content.head_dim)
            memory = Memory._of(content, backends, opened.folder)
        except BaseException:
            opened.folder.close()
            raise
        for number, layer in memory._indexed.items():
            layer.put_off(opened.learnt.get(number))
        if mode == "r" and any(layer.makes_clusters() for layer in memory._indexed.values()):
            logger.warning(
                "%s holds no clusters of its %s tokens: they are made at the first question, each time that it is "
                "opened; Memory.open(path, mode='a'), prepare() and flush() save them",
                path,
                f"{len(memory):,}",
            )
        return memory

    def save(self, path: str | Path) -> None:
        """Write all of it to a new folder, or in place of the memory in that folder; see ``memory.disk.save``."""
        disk.save(self._content, path, self._learnt())

    def flush(self) -> None:
        """Write the new tokens to the memory's folder: all of them or none. The memory must be open with ``mode="a"``.

        Raises:
            ValueError: The memory was not opened with ``mode="a"``.
            OSError: The folder cannot be written. It is as it was before, and the memory still holds everything.
        """
        built = any(layer.index is not None for layer in self._indexed.values())
        if built:  # a text that is read asks every layer but the last
            self.prepare()
        disk.flush(self._content, self._writable_folder(), self._learnt() if built else None)

    def compact(self, *, by_cluster: bool = False, progress: Callable[[int], object] = lambda tokens: None) -> None:
        """Flush, and write the folder anew to free the space of dropped documents. Needs ``mode="a"``.

        Args:
            by_cluster: write the vectors of each cluster behind one another, for a memory larger than RAM. A folder
                that was written so stays so. It takes 2 bytes more for each token and KV head.
            progress: called with the tokens of each segment that is written.

        Raises:
            ValueError: The same as for ``flush``, or there are no clusters to write by.
            OSError: The same as for ``flush``.
        """
        folder = self._writable_folder()
        asked, by_cluster = by_cluster, by_cluster or folder.manifest.by_cluster
        if by_cluster:
            self.prepare()
        learnt = self._learnt()
        if asked and not any(isinstance(one, LearntClusters) for one in learnt.values()):
            raise ValueError(
                f"this memory of {len(self):,} tokens has no clusters to write by: it needs {SEGMENT:,} tokens and the "
                "index clusters; open it with Memory.open(path, 'a', index='clusters')"
            )
        disk.compact(self._content, folder, learnt, by_cluster, progress)

    def prepare(self) -> None:
        """Build the indexes now and not at the first search. ``flush`` then saves what they learned."""
        for layer in self._indexed.values():
            layer.ready()

    def answer_by(self, indexes: Mapping[int, Index]) -> None:
        """Let these indexes of the user's own, layer -> index of all that is stored, answer in place of the layers'."""
        for number, index in indexes.items():
            self._indexed[number].answer_by(index)

    def close(self) -> None:
        """Release the lock on the folder. Tokens that were not flushed are only in this object, which cannot grow."""
        if self._folder is not None:
            self._folder.close()

    def __enter__(self) -> "Memory":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def append(
        self,
        keys: Mapping[int, Tensor],
        values: Mapping[int, Tensor],
        token_ids: Tensor | Sequence[int],
        *,
        document: str | None = None,
        spans: Sequence[tuple[int, int]] | np.ndarray | None = None,
    ) -> None:
        """Add T tokens to every layer, or to none: everything is checked before anything is written.

        Args:
            keys: layer -> (G, T, D), for every memory layer.
            values: likewise.
            token_ids: (T,) ids.
            document: name of the text that these tokens come from.
            spans: (T, 2) first and past-the-end character of each token in that text.

        Raises:
            ValueError: A shape or the layers do not fit; a key or a value is NaN, infinite, or too large for the dtype
                in which it is stored; or the memory was opened read-only.
        """
        self._check_open()
        ids = check_pairs(self._content, keys, values, token_ids)
        tokens, before = self._content.tokens, len(self)
        prepared = tokens.prepare(ids, document, spans)
        if not len(ids):  # nothing for an index to take in, and no document that would be listed
            return
        try:
            tokens.commit(prepared)  # first: an index may ask where documents start
            for number, layer in self._indexed.items():
                layer.append(self._place(keys[number]), self._place(values[number]))
        except BaseException:  # Ctrl-C or no memory left half-way: layers of different length would be garbage
            tokens.truncate(before)
            for layer in self._indexed.values():
                layer.truncate(before)
            raise

    def append_again(
        self,
        start: int,
        stop: int,
        *,
        document: str | None = None,
        spans: Sequence[tuple[int, int]] | np.ndarray | None = None,
    ) -> None:
        """Add copies of the tokens in slots start..stop-1, bit for bit, to every layer.

        Args:
            start: first slot.
            stop: past-the-end slot.
            document: as for ``append``.
            spans: likewise.

        Raises:
            ValueError: As for ``append``; or the slots are not stored.
        """
        if not 0 <= start <= stop <= len(self):
            raise ValueError(f"slots {start}..{stop - 1} are not all in this memory, which holds 0..{len(self) - 1}")
        # float32 holds every stored value exactly, and an int8 vector gets its own scale and integers back.
        keys, values = (
            {
                n: getattr(layer, name).take_range(start, stop, torch.float32)
                for n, layer in self._content.layers.items()
            }
            for name in ("keys", "values")
        )
        self.append(keys, values, torch.from_numpy(self.token_ids(slice(start, stop))), document=document, spans=spans)

    def drop_document(self, name: str) -> int:
        """Remove one document; see ``drop_documents``."""
        return self.drop_documents([name])

    def drop_documents(self, names: Collection[str]) -> int:
        """Remove documents, all at once. The slots after them move up, and indexes are built again.

        If the memory was opened from a folder, the documents are marked as dropped there at once. ``compact`` frees
        their space.

        Returns:
            The number of tokens that were removed.

        Raises:
            KeyError: No stored token belongs to a document of one of these names; nothing is removed.
            ValueError: The memory was opened read-only.
        """
        self._check_open()
        if not names:
            return 0
        slots = self._content.tokens.slots_outside(names)
        dropped, keep, saved = len(self) - len(slots), torch.from_numpy(slots), {}
        if self._folder is not None:
            saved = {number: one.kept(keep) for number, one in self._learnt().items()}
            disk.drop(self._folder, names, keep, saved)
        try:
            self._content.tokens = self._content.tokens.kept(slots)
            for number, layer in self._indexed.items():
                layer.keep(keep, saved.get(number))
        except BaseException:
            self.close()  # what is on disk is right; half of this object must not be written there
            raise
        for name in names:
            self.notes.pop(name, None)
        return dropped

    def rename_documents(self, names: Mapping[str, str]) -> None:
        """Give documents other names, all at once, so that two may swap theirs. In a folder they have them at once.

        Args:
            names: old name -> new name.

        Raises:
            KeyError: No stored token belongs to a document of an old name.
            ValueError: Two documents would have the same name, or the memory was opened read-only.
        """
        self._check_open()
        known = self._content.tokens.names
        for name in names:
            if name not in known:
                raise KeyError(f"no document {name!r} in this memory; it holds {', '.join(known) or 'none'}")
        after = [names.get(name, name) for name in known]
        if len(set(after)) < len(after):
            twice = next(name for name in after if after.count(name) > 1)
            raise ValueError(f"two documents would be named {twice!r}: choose another name, or drop one first")
        if self._folder is not None:
            disk.rename(self._folder, names)
        self._content.tokens.rename(names)
        self._content.notes = {names.get(name, name): note for name, note in self.notes.items()}

    def truncate(self, length: int) -> None:
        """Remove the tokens from slot ``length`` on, as if they had never been appended.

        Raises:
            ValueError: The memory was opened from a folder.
        """
        if length >= len(self):
            return
        if self._folder is not None:
            raise ValueError(
                f"{self._folder.path} was opened from a folder and cannot be truncated: drop documents from it instead"
            )
        for layer in self._indexed.values():
            layer.truncate(length)
        tokens = self._content.tokens
        tokens.truncate(length)
        self._content.notes = {name: note for name, note in self.notes.items() if name in tokens.names}

    def reset(self) -> None:
        """Remove everything.

        Raises:
            ValueError: The memory was opened from a folder.
        """
        if self._folder is not None:
            raise ValueError(
                f"{self._folder.path} was opened from a folder and cannot be reset: drop its documents, or "
                "create a new memory"
            )
        for layer in self._indexed.values():
            layer.reset()
        self._content.tokens, self._content.notes = TokenTable(), {}

    def clone(self) -> "Memory":
        """A copy in RAM that grows independently. It shares vectors that are mapped from a folder."""
        copy = Memory._of(self._content.kept(torch.arange(len(self))), self._backends)
        for number, layer in self._indexed.items():
            copy._indexed[number].follow(layer)
        return copy

    def kept(self, slots: Tensor, *, index: str | IndexFactory | None = None) -> "Memory":
        """A copy in RAM of the tokens in these slots, (M,) int64 ascending. It shares vectors mapped from a folder.

        ``index`` is as for ``Memory``; None keeps what was asked for, with its ``top_k``.
        """
        backends = self._backends if index is None else Backends(index, None)
        content = replace(self._content.kept(slots), index=backends.name, top_k=backends.top_k)
        copy = Memory._of(content, backends)
        learnt = self._learnt()
        for number, layer in copy._indexed.items():
            layer.put_off(learnt[number].kept(slots) if number in learnt else None)
        return copy

    def _place(self, vectors: Tensor) -> Tensor:
        return vectors if self.device is None else vectors.to(self.device)

    def _learnt(self) -> dict[int, Learnt]:
        """Layer -> what its index learnt, for layers whose index learns."""
        found = {number: layer.learnt() for number, layer in self._indexed.items()}
        return {number: one for number, one in found.items() if one is not None}

    def _writable_folder(self) -> Folder:
        if self._folder is None:
            raise ValueError("this memory has no folder yet: save(path), then Memory.open(path, mode='a')")
        self._folder.check_writable()
        return self._folder

    def _check_open(self) -> None:
        if self._folder is not None:
            self._folder.check_writable()
