"""The external store of (key, value) pairs. It knows vectors, not language models."""

from memory.index import BackendChoice, ExactIndex, Index, choose_backend
from memory.layer import LayerMemory
from memory.recall import attention_mass_recall
from memory.softmax import attend, merge
from memory.store import Memory
from memory.tokens import DocumentNote, Source
from memory.vectors import VectorBlocks

__all__ = [
    "BackendChoice",
    "DocumentNote",
    "ExactIndex",
    "Index",
    "LayerMemory",
    "Memory",
    "Source",
    "VectorBlocks",
    "attend",
    "attention_mass_recall",
    "choose_backend",
    "merge",
]
