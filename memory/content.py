"""What a memory holds besides its indexes: the store fills it, the folder is written from it and read into it."""

from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from memory.tokens import DocumentNote, TokenTable
from memory.vectors import VECTOR_DTYPES, VectorBlocks

START_TOKENS = 4  # of a document: attention that finds nothing goes to them


@dataclass
class LayerContent:
    """Keys and values of one memory layer, in the order of the tokens."""

    keys: VectorBlocks
    values: VectorBlocks

    def kept(self, slots: Tensor) -> "LayerContent":
        """Those in these slots, (M,) int64 ascending; see ``VectorBlocks.kept``."""
        slots = slots.to(self.device)
        return LayerContent(self.keys.kept(slots), self.values.kept(slots))

    @property
    def device(self) -> torch.device:
        """Where the vectors lie."""
        return self.keys.device or torch.device("cpu")


@dataclass
class Content:
    """Settings, tokens, documents and vectors of one memory.

    Attributes:
        num_key_value_heads: G, KV heads of a layer.
        head_dim: D, size of a head.
        key_dtype: a name in ``VECTOR_DTYPES``.
        value_dtype: likewise.
        index: the name that a manifest keeps; ``auto`` for an index of the user's own.
        top_k: pairs that a query attends to; None as for ``Memory``.
        fingerprint: of the weights that made it.
        device: where vectors are put; None for where they come from.
        layers: keys and values of each memory layer.
        tokens: id and source of each token.
        metadata: whatever is kept beside the memory.
        notes: of documents, by name.

    Raises:
        ValueError: an unknown dtype, or a ``top_k`` below 1.
    """

    num_key_value_heads: int
    head_dim: int
    key_dtype: str
    value_dtype: str
    index: str
    top_k: int | None
    fingerprint: str
    device: torch.device | None
    layers: dict[int, LayerContent] = field(default_factory=dict)
    tokens: TokenTable = field(default_factory=TokenTable)
    metadata: dict[str, Any] = field(default_factory=dict)
    notes: dict[str, DocumentNote] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, dtype in (("key_dtype", self.key_dtype), ("value_dtype", self.value_dtype)):
            if dtype not in VECTOR_DTYPES:
                raise ValueError(f"{name} is {dtype!r}; choose one of {', '.join(VECTOR_DTYPES)}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(
                f"top_k is {self.top_k}; a query must retrieve at least 1 pair (None means all pairs with the exact "
                "index, 128 with FAISS)"
            )

    def __len__(self) -> int:
        """Stored tokens."""
        return len(self.tokens)

    def document_starts(self, start: int, stop: int) -> Tensor:
        """Slots of the first tokens of documents, of those in start..stop-1: (n,) int64 ascending."""
        return torch.from_numpy(self.tokens.starts(start, stop, START_TOKENS))

    def empty_layer(self) -> LayerContent:
        """Blocks for the vectors of one more layer."""
        heads, dim = self.num_key_value_heads, self.head_dim
        return LayerContent(
            VectorBlocks(heads, dim, VECTOR_DTYPES[self.key_dtype]),
            VectorBlocks(heads, dim, VECTOR_DTYPES[self.value_dtype]),
        )

    def kept(self, slots: Tensor) -> "Content":
        """A copy of the tokens in these slots, (M,) int64 ascending; of what is mapped from a folder, the mapping is
        shared. Documents that lose all their tokens are not in it."""
        tokens = self.tokens.kept(slots.numpy())
        gone = set(self.tokens.names).difference(tokens.names)
        return replace(
            self,
            layers={number: layer.kept(slots) for number, layer in self.layers.items()},
            tokens=tokens,
            metadata=deepcopy(self.metadata),
            notes={name: note for name, note in self.notes.items() if name not in gone},
        )
