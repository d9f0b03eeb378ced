"""Memory: everything stored for one logical context.

Per memory layer and KV head, keys and values in append order; once per token, its id and where it came from.
"""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from memory.index import BackendChoice, ExactIndex, Index, LearntIndex, choose_backend
from memory.layer import LayerMemory
from memory.tokens import DocumentNote, Source, TokenTable
from memory.vectors import VECTOR_DTYPES, VectorBlocks, as_stored

if TYPE_CHECKING:
    from memory.folder import Folder

IndexFactory = Callable[[VectorBlocks, VectorBlocks], Index]


class Memory:
    """An external memory of (key, value) pairs for the memory layers of one model.

    Args:
        layers: indices of the memory layers.
        num_key_value_heads: G, KV heads of a layer.
        head_dim: D, size of a head.
        key_dtype: dtype in which keys are stored: float32, bfloat16, float16 or int8 (with one scale for each vector).
        value_dtype: dtype in which values are stored, likewise.
        index: ``exact``, ``auto``, a FAISS factory string for inner product such as ``IVF1024,Flat``,
            ``IVF1024,SQ8`` or ``HNSW32`` (see ``memory.faiss_index``; ``gpu:`` in front puts it on a GPU), or a
            function of (key blocks, value blocks) that makes an ``Index``.
        top_k: number of pairs that a query attends to. None means all pairs with ``exact``, and 128 with FAISS.
        device: device of the vectors. None keeps them on the device that they come from.
        fingerprint: identifies the weights that made the keys. A model refuses a memory that other weights made.

    Attributes:
        metadata: anything that JSON can hold. It is saved with the memory. A model's ``new_memory`` writes into it what
            the memory was made with.
        notes: name -> facts about a document as a whole. They are saved for documents with stored tokens.

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
        for name, dtype in (("key_dtype", key_dtype), ("value_dtype", value_dtype)):
            if dtype not in VECTOR_DTYPES:
                raise ValueError(f"{name} is {dtype!r}; choose one of {', '.join(VECTOR_DTYPES)}")
        if top_k is not None and top_k < 1:
            raise ValueError(
                f"top_k is {top_k}; a query must retrieve at least 1 pair (None means all pairs with the "
                "exact index, 128 with FAISS)"
            )
        check_index(index, head_dim)
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.key_dtype = key_dtype
        self.value_dtype = value_dtype
        self.index = index
        self.top_k = top_k
        self.device = None if device is None else torch.device(device)
        self.fingerprint = fingerprint
        self._layers = {layer: LayerMemory(self) for layer in layers}
        self._tokens = TokenTable()
        self.metadata: dict[str, Any] = {}
        self.notes: dict[str, DocumentNote] = {}
        self._folder: Folder | None = None  # what it was opened from

    @staticmethod
    def open(
        path: str | Path,
        mode: str = "r",
        *,
        index: "str | IndexFactory | None" = None,
        top_k: int | None = None,
        device: str | torch.device = "cpu",
    ) -> "Memory":
        """A memory that ``save`` wrote, mapped from disk; see ``memory.disk.open_memory``."""
        from memory.disk import open_memory

        return open_memory(path, mode, index=index, top_k=top_k, device=device)

    def save(self, path: str | Path) -> None:
        """Write all of it to a new folder, or in place of the memory in that folder; see ``memory.disk.save``."""
        from memory.disk import save

        save(self, path)

    def flush(self) -> None:
        """Write the new tokens to the memory's folder: all of them or none. The memory must be open with ``mode="a"``.

        Raises:
            ValueError: The memory was not opened with ``mode="a"``.
            OSError: The folder cannot be written. It is as it was before, and the memory still holds everything.
        """
        from memory.disk import flush, writable_folder

        flush(self, writable_folder(self))

    def compact(self) -> None:
        """Flush, and write the folder anew to free the space of dropped documents. Needs ``mode="a"``.

        Raises:
            ValueError, OSError: The same as for ``flush``.
        """
        from memory.disk import compact, writable_folder

        compact(self, writable_folder(self))

    def prepare(self) -> None:
        """Build the indexes now and not at the first search. ``flush`` then saves what they learned."""
        for layer in self._layers.values():
            layer._ready()

    def close(self) -> None:
        """Release the lock on the folder. Tokens that were not flushed are only in this object, which cannot grow."""
        if self._folder is not None:
            self._folder.close()

    def __enter__(self) -> "Memory":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __len__(self) -> int:
        """Stored tokens."""
        return len(self._tokens)

    def __getitem__(self, layer: int) -> LayerMemory:
        """Keys and values of one memory layer."""
        if layer not in self._layers:
            raise KeyError(f"layer {layer} has no memory; memory layers are {list(self._layers)}")
        return self._layers[layer]

    @property
    def layers(self) -> tuple[int, ...]:
        """Indices of the memory layers."""
        return tuple(self._layers)

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
        ids = np.asarray(token_ids.cpu() if isinstance(token_ids, Tensor) else token_ids, dtype=np.int32)
        self._check(keys, values, len(ids))
        prepared = self._tokens.prepare(ids, document, spans)
        try:
            for number, layer in self._layers.items():
                layer._append(self._place(keys[number]), self._place(values[number]))
            self._tokens.commit(prepared)
        except BaseException:  # Ctrl-C or no memory left half-way: layers of different length would be garbage
            for layer in self._layers.values():
                layer._truncate(len(self))
            raise

    def token_ids(self, slots: "np.ndarray | Sequence[int] | slice" = slice(None)) -> np.ndarray:
        """Ids of the tokens in these slots (all by default), int32."""
        return self._tokens.ids[slots]

    def source(self, slot: int) -> Source:
        """Where the token in this slot came from."""
        if not 0 <= slot < len(self):
            raise IndexError(f"slot {slot} is outside 0..{len(self) - 1}, what this memory holds")
        return self._tokens.source(slot)

    def documents(self) -> dict[str, int]:
        """Name -> number of stored tokens, for each named document."""
        return self._tokens.documents()

    def document_runs(self) -> list[tuple[str | None, int, int]]:
        """(document, first slot, past-the-end slot) of each run of tokens of one document, in slot order."""
        return self._tokens.runs()

    def drop_document(self, name: str) -> int:
        """Remove one document. The slots after it move up, and indexes are built again.

        If the memory was opened from a folder, the document is marked as dropped there at once. ``compact`` frees its
        space.

        Returns:
            The number of tokens that were removed.

        Raises:
            KeyError: No stored token belongs to a document of this name.
            ValueError: The memory was opened read-only.
        """
        self._check_open()
        slots = self._tokens.slots_outside(name)
        dropped, keep, saved = len(self) - len(slots), torch.from_numpy(slots), {}
        if self._folder is not None:
            from memory.disk import drop

            saved = drop(self, self._folder, name, keep)
        try:
            for number, layer in self._layers.items():
                layer._keep(keep, saved.get(number))
            self._tokens.keep(slots, name)
        except BaseException:
            self.close()  # what is on disk is right; half of this object must not be written there
            raise
        self.notes.pop(name, None)
        return dropped

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
        for layer in self._layers.values():
            layer._truncate(length)
        self._tokens.truncate(length)
        self.notes = {name: note for name, note in self.notes.items() if name in self._tokens.names}

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
        for layer in self._layers.values():
            layer._reset()
        self._tokens, self.notes = TokenTable(), {}

    def clone(self) -> "Memory":
        """A copy in RAM that grows independently. It shares vectors that are mapped from a folder."""
        copy = Memory(
            self.layers,
            self.num_key_value_heads,
            self.head_dim,
            key_dtype=self.key_dtype,
            value_dtype=self.value_dtype,
            index=self.index,
            top_k=self.top_k,
            device=self.device,
            fingerprint=self.fingerprint,
        )
        everything = torch.arange(len(self))
        for number, layer in self._layers.items():
            mine = copy._layers[number]
            mine._keys, mine._values, mine._lazy = layer._keys, layer._values, layer._lazy
            mine._keep(everything, layer._learnt())
        copy._tokens = self._tokens.clone()
        copy.metadata, copy.notes = deepcopy(self.metadata), dict(self.notes)
        return copy

    def nbytes(self) -> dict[str, int]:
        """Bytes held, by part: ``keys``, ``values``, ``index`` and ``tokens``."""
        layers = self._layers.values()
        return {
            "keys": sum(layer._keys.nbytes() for layer in layers),
            "values": sum(layer._values.nbytes() for layer in layers),
            "index": sum(layer._index.nbytes() for layer in layers if layer._index is not None),
            "tokens": self._tokens.nbytes(),
        }

    def describe(self) -> str:
        """One line: tokens, size, the index of each layer."""
        mib = sum(self.nbytes().values()) / 2**20
        kinds = ", ".join(f"layer {number}: {layer.describe()}" for number, layer in self._layers.items())
        return f"{len(self):,} tokens, {mib:,.1f} MiB; {kinds}"

    def _place(self, vectors: Tensor) -> Tensor:
        return vectors if self.device is None else vectors.to(self.device)

    def _choose(self, num_keys: int, device: torch.device) -> BackendChoice:
        if self.index == "auto":
            return choose_backend(num_keys, device)
        return BackendChoice(self.index if isinstance(self.index, str) else "custom", "asked for")

    def _make_index(self, name: str, keys: VectorBlocks, values: VectorBlocks, saved: LearntIndex | None) -> Index:
        """An index of all that is stored."""
        if not isinstance(self.index, str):
            custom = self.index(keys, values)
            custom.add(keys.take_range(0, len(keys), keys.dtype))
            return custom
        if name == "exact":
            return ExactIndex(keys, values, self.top_k)
        from memory.faiss_index import FaissIndex  # faiss is loaded only where it is used

        index = FaissIndex(name, keys, values, self.top_k)
        index.fill(saved)
        return index

    def _check_open(self) -> None:
        if self._folder is not None:
            self._folder.check_writable()

    def _check(self, keys: Mapping[int, Tensor], values: Mapping[int, Tensor], count: int) -> None:
        finite = []
        for what, vectors, dtype in (("keys", keys, self.key_dtype), ("values", values, self.value_dtype)):
            if set(vectors) != set(self._layers):
                raise ValueError(
                    f"{what} belong to layers {sorted(vectors)}, but this memory has layers {sorted(self._layers)}"
                )
            for number, tensor in vectors.items():
                self._layers[number]._check_shape(tensor, f"{what} of layer {number}")
                if tensor.shape[1] != count:
                    raise ValueError(
                        f"{what} of layer {number} have {tensor.shape[1]} tokens, but there are {count} token ids"
                    )
                finite.append(torch.isfinite(as_stored(tensor, VECTOR_DTYPES[dtype])).all())
        # One transfer to the host for a whole window, not one a tensor.
        if not all(torch.stack([flag.to(finite[0].device) for flag in finite]).tolist()):
            raise ValueError(self._not_finite(keys, values))

    def _not_finite(self, keys: Mapping[int, Tensor], values: Mapping[int, Tensor]) -> str:
        """Why vectors cannot be stored of which one is NaN or infinite, or would be in the dtype that stores it."""
        kinds = (("key", keys, "key_dtype", self.key_dtype), ("value", values, "value_dtype", self.value_dtype))
        for what, vectors, setting, dtype in kinds:
            for number, tensor in vectors.items():
                lost = torch.isfinite(tensor) & ~torch.isfinite(as_stored(tensor, VECTOR_DTYPES[dtype]))
                if lost.any():
                    return (
                        f"a {what} of layer {number} is {tensor[lost][0].item():.4g}, more than {dtype} can hold, so "
                        f"nothing was stored: use a memory with {setting}='bfloat16' or 'float32'"
                    )
        return (
            "a key or value is NaN or infinite, so nothing was stored: the model overflows in this dtype or its "
            "weights are damaged; try dtype float32 or check the checkpoint"
        )


def check_index(index: "str | IndexFactory", head_dim: int | None = None) -> None:
    """Raise ValueError if no backend can be made from this, so that a typo shows before hours of work.

    Args:
        index: as for ``Memory``.
        head_dim: D; None if it is not known yet.
    """
    if isinstance(index, str) and index not in ("auto", "exact"):
        from memory.faiss_factory import check_factory

        check_factory(index, head_dim)
