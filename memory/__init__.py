"""The external store of (key, value) pairs. It knows vectors, not language models."""

from memory.backends import BackendChoice, choose_backend
from memory.index import CustomIndex, ExactIndex, Index
from memory.layer import LayerMemory
from memory.recall import attention_mass_recall
from memory.softmax import attend, merge
from memory.store import Memory
from memory.tokens import DocumentNote, Source
from memory.vectors import VectorBlocks

__all__ = [
    "BackendChoice",
    "CustomIndex",
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
