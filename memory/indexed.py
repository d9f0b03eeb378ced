"""The vectors of one memory layer and the index that searches them, kept in step."""

import logging
import threading

import torch
from torch import Tensor

from memory.backends import BackendChoice, Backends, is_clusters
from memory.clustered import SEGMENT, LearntClusters
from memory.content import LayerContent
from memory.index import Index, Learnt, Starts

logger = logging.getLogger(__name__)

# Threads may ask a memory that was just opened at once: one of them builds its index.
_BUILDING = threading.Lock()


class IndexedLayer:
    """Keys, values and the index of one memory layer, as the store changes them; people get a ``LayerMemory``.

    Args:
        content: the vectors; this object alone changes them.
        backends: makes the index.
        starts: says where documents start.

    Attributes:
        content: as given.
        index: None while nothing is stored, and before a layer that was read from disk is first asked.
        choice: the backend in use and why; None while nothing is stored.
    """

    def __init__(self, content: LayerContent, backends: Backends, starts: Starts) -> None:
        self.content = content
        self.index: Index | None = None
        self.choice: BackendChoice | None = None
        self._backends = backends
        self._starts = starts
        # A layer that was read from disk gets its index when it is first asked: opening stays quick.
        self._lazy = False
        self._saved: Learnt | None = None
        self._newest: tuple[Tensor, Tensor] | None = None  # last keys and values, as they were asked for

    def __len__(self) -> int:
        return len(self.content.keys)

    def ready(self) -> Index | None:
        """The index, built if it is not yet; None while nothing is stored."""
        if self._lazy:
            with _BUILDING:
                if self._lazy:
                    self._build()
        return self.index

    def newest(self, count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The last ``count`` keys and values, (G, count, D) each; kept, so that asking again costs nothing."""
        newest = self._newest
        if newest is None or newest[0].shape[1] != count or newest[0].dtype != dtype:
            bounds = len(self) - count, len(self)
            with torch.inference_mode(False):  # what is made in inference mode could not be used in training
                newest = self.content.keys.take_range(*bounds, dtype), self.content.values.take_range(*bounds, dtype)
            self._newest = newest
        return newest

    def answer_by(self, index: Index) -> None:
        """Take an index that was made elsewhere, of all that is stored."""
        if len(self):
            self.index, self.choice, self._lazy = index, BackendChoice("custom", "asked for"), False

    def learnt(self) -> Learnt | None:
        """What the index learnt, or what it will be built from."""
        return self._saved if self.index is None else self.index.learnt()

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add (G, T, D) keys and values."""
        self._newest = None
        self.content.keys.append(keys)
        self.content.values.append(values)
        choice = self._choose()
        if self._lazy:
            self.choice = choice
        elif self.index is None or self.choice is None or choice.name != self.choice.name:
            self._build()
        else:
            self.index.add(keys)

    def truncate(self, length: int) -> None:
        """Forget every pair from slot ``length`` on; keys and values may differ in number after an interrupt."""
        self._newest = None
        if len(self.content.keys) > length or len(self.content.values) > length:
            learnt = self.learnt()
            self.content.keys.truncate(length)
            self.content.values.truncate(length)
            known = learnt is not None and learnt.trained_on <= length
            self._rebuild(learnt.kept(torch.arange(length)) if known and learnt else None)

    def keep(self, slots: Tensor, saved: Learnt | None) -> None:
        """Forget every pair outside these slots, (M,) int64 ascending; ``saved`` is what is known of the others."""
        self._newest = None
        kept = self.content.kept(slots)
        self.content.keys, self.content.values = kept.keys, kept.values
        self._rebuild(saved)

    def reset(self) -> None:
        """Forget everything."""
        self._newest = None
        self.content.keys.reset()
        self.content.values.reset()
        self.index = self.choice = self._saved = None

    def put_off(self, saved: Learnt | None) -> None:
        """Build the index, from what it learnt before, only when it is needed."""
        self.index = None
        self.choice = self._choose() if len(self) else None
        self._lazy, self._saved = True, saved

    def follow(self, other: "IndexedLayer") -> None:
        """Get the index that another layer of the same content has, now if that has it already."""
        self._lazy = other._lazy
        self._rebuild(other.learnt())

    def makes_clusters(self) -> bool:
        """Whether the first question will make clusters of most keys, since none are known."""
        made = self._lazy and self.choice is not None and is_clusters(self.choice.name) and len(self) >= SEGMENT
        return made and not isinstance(self._saved, LearntClusters)

    def _rebuild(self, saved: Learnt | None) -> None:
        if self._lazy or saved is not None:
            self.put_off(saved)
        else:
            self._build()

    def _build(self) -> None:
        self.index = self.choice = None
        if len(self):
            choice = self._choose()
            keys, values = self.content.keys, self.content.values
            self.index = self._backends.make(choice.name, keys, values, self._saved, self._starts)
            self.choice = choice
            logger.info("memory backend %s: %s", choice.name, choice.reason)
        self._lazy, self._saved = False, None

    def _choose(self) -> BackendChoice:
        return self._backends.choose(len(self), self.content.device)
