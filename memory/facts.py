"""What a memory says of itself. Nothing here changes what is stored."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from memory.backends import Backends, IndexFactory
from memory.content import Content
from memory.folder import Folder
from memory.indexed import IndexedLayer
from memory.layer import LayerMemory
from memory.tokens import DocumentNote, Source


class MemoryFacts:
    """The part of ``memory.Memory`` that reads.

    Attributes:
        metadata: anything that JSON can hold. It is saved with the memory. A model's ``new_memory`` writes into it what
            the memory was made with.
        notes: name -> facts about a document as a whole. They are saved for documents with stored tokens.
    """

    _content: Content
    _backends: Backends
    _folder: Folder | None  # what it was opened from
    _indexed: dict[int, IndexedLayer]
    _layers: dict[int, LayerMemory]

    @property
    def num_key_value_heads(self) -> int:
        """G, KV heads of a layer."""
        return self._content.num_key_value_heads

    @property
    def head_dim(self) -> int:
        """D, size of a head."""
        return self._content.head_dim

    @property
    def key_dtype(self) -> str:
        """How keys are stored."""
        return self._content.key_dtype

    @property
    def value_dtype(self) -> str:
        """How values are stored."""
        return self._content.value_dtype

    @property
    def index(self) -> str | IndexFactory:
        """What was asked for."""
        return self._backends.index

    @property
    def top_k(self) -> int | None:
        """Pairs that a query attends to; None for all of them where the backend can, 128 elsewhere."""
        return self._content.top_k

    @property
    def device(self) -> torch.device | None:
        """Where the vectors are kept; None for where they come from."""
        return self._content.device

    @property
    def fingerprint(self) -> str:
        """Names the weights that the keys were made with."""
        return self._content.fingerprint

    @property
    def metadata(self) -> dict[str, Any]:
        """Whatever is kept beside the memory."""
        return self._content.metadata

    @metadata.setter
    def metadata(self, metadata: dict[str, Any]) -> None:
        self._content.metadata = metadata

    @property
    def notes(self) -> dict[str, DocumentNote]:
        """By name, what is known of documents as a whole."""
        return self._content.notes

    def __len__(self) -> int:
        """Stored tokens."""
        return len(self._content.tokens)

    def __bool__(self) -> bool:
        """True, of an empty memory as well: ``if memory`` asks whether there is one, ``len(memory)`` what it holds."""
        return True

    def __contains__(self, document: object) -> bool:
        """Whether tokens of a document of this name are stored."""
        return document in self._content.tokens.names

    __iter__ = None  # not over ``memory[0]``, ``memory[1]``, ...: layers and tokens are both numbered

    def __repr__(self) -> str:
        layers = ", ".join(map(str, self.layers))
        documents = len(self._content.tokens.names)
        index = self._backends.name if isinstance(self.index, str) else "custom"
        place = "" if self._folder is None else f", in {self._folder.path}"
        return f"<Memory: {len(self):,} tokens, {documents:,} documents, layers {layers}, index {index}{place}>"

    def __getitem__(self, layer: int) -> LayerMemory:
        """Keys and values of one memory layer."""
        if layer not in self._layers:
            raise KeyError(f"layer {layer} has no memory; memory layers are {list(self._layers)}")
        return self._layers[layer]

    @property
    def layers(self) -> tuple[int, ...]:
        """Indices of the memory layers."""
        return tuple(self._layers)

    def token_ids(self, slots: "np.ndarray | Sequence[int] | slice" = slice(None)) -> np.ndarray:
        """Ids of the tokens in these slots (all by default), int32."""
        return self._content.tokens.ids[slots]

    def source(self, slot: int) -> Source:
        """Where the token in this slot came from."""
        if not 0 <= slot < len(self):
            raise IndexError(f"slot {slot} is outside 0..{len(self) - 1}, what this memory holds")
        return self._content.tokens.source(slot)

    def documents(self) -> dict[str, int]:
        """Name -> number of stored tokens, for each named document."""
        return self._content.tokens.documents()

    def document_runs(self) -> list[tuple[str | None, int, int]]:
        """(document, first slot, past-the-end slot) of each run of tokens of one document, in slot order."""
        return self._content.tokens.runs()

    def nbytes(self) -> dict[str, int]:
        """Bytes held, by part: ``keys``, ``values``, ``index`` and ``tokens``."""
        layers = self._indexed.values()
        return {
            "keys": sum(layer.content.keys.nbytes() for layer in layers),
            "values": sum(layer.content.values.nbytes() for layer in layers),
            "index": sum(layer.index.nbytes() for layer in layers if layer.index is not None),
            "tokens": self._content.tokens.nbytes(),
        }

    def describe(self) -> str:
        """One line: tokens, size, the index of each layer."""
        mib = sum(self.nbytes().values()) / 2**20
        kinds = ", ".join(f"layer {number}: {layer.describe()}" for number, layer in self._layers.items())
        return f"{len(self):,} tokens, {mib:,.1f} MiB; {kinds}"
