"""What is served: memories and the models that made them, by the names that clients use."""

import logging
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fot.ask import Conversation
from fot.retrieval.prompt import titles
from memory import Memory
from memory.manifest import MANIFEST

logger = logging.getLogger(__name__)


class OnDisk:
    """A memory's folder, which another process may change (``fot memory sync``).

    Args:
        folder: of the memory.
        options: of ``Memory.open``.
    """

    def __init__(self, folder: Path, **options: Any) -> None:
        self.folder = folder
        self._options = options
        self._seen = self._look()

    def open(self) -> Memory:
        """The memory as it is now, read-only."""
        self._seen = self._look()  # first: a change while it is being opened is seen the next time
        return Memory.open(self.folder, **self._options)

    def has_changed(self) -> bool:
        """Whether the memory is not what ``open`` found. Each change writes a new manifest."""
        return self._look() != self._seen

    def _look(self) -> tuple[int, int, int] | None:
        try:
            found = os.stat(self.folder / MANIFEST)
        except OSError:
            return None
        return found.st_ino, found.st_size, found.st_mtime_ns


@dataclass
class Entry:
    """A model of the interface: a memory with the model that made it, or that model alone.

    Attributes:
        name: by which clients ask for it.
        model: a ``FoTForCausalLM`` with its tokenizer.
        memory: opened read-only; None for the bare model.
        place: where the memory lies; None for the bare model.
        created: when it was served first, in seconds since 1970.
        blank: a conversation that has not begun; others are made from it.
    """

    name: str
    model: Any
    memory: Memory | None
    place: OnDisk | None = None
    created: int = field(default_factory=lambda: int(time.time()))
    blank: Conversation = field(init=False)

    def __post_init__(self) -> None:
        self.blank = Conversation(self.model, self.memory, title=titles(self.memory.documents() if self.memory else ()))

    @property
    def tokens(self) -> int:
        """Tokens in its memory."""
        return 0 if self.memory is None else len(self.memory)

    def documents(self) -> dict[str, int]:
        """Title -> tokens of each document."""
        if self.memory is None:
            return {}
        shown = titles(self.memory.documents())
        return {shown(name): count for name, count in self.memory.documents().items()}


class Library:
    """All that is served, by name."""

    def __init__(self) -> None:
        self._entries: dict[str, Entry] = {}

    def add(self, name: str, model: Any, memory: Memory | None, place: OnDisk | None = None) -> Entry:
        """One more. If a place is given, the memory was opened there, and is opened again when it has changed.

        Raises:
            ValueError: the name is taken, or other weights made the memory.
        """
        if name in self._entries:
            raise ValueError(f"two memories are named {name!r}: name one of them otherwise, as in OTHER={name}.memory")
        self._entries[name] = Entry(name, model, memory, place)
        return self._entries[name]

    def __getitem__(self, name: str) -> Entry:
        """One of them, its memory as it is on disk now.

        Raises:
            KeyError: with the names that there are.
        """
        if name not in self._entries:
            raise KeyError(f"the model {name!r} does not exist; there are {', '.join(self._entries)}")
        entry = self._entries[name]
        if entry.place is not None and entry.place.has_changed():
            self._entries[name] = entry = _opened_again(entry, entry.place)
        return entry

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def entries(self) -> list[Entry]:
        """Everything, in the order of its coming."""
        return [self[name] for name in list(self._entries)]


def _opened_again(entry: Entry, place: OnDisk) -> Entry:
    """The same entry with its memory as it is now; as it was, if that cannot be served."""
    try:
        return Entry(entry.name, entry.model, place.open(), place, entry.created)
    except (ValueError, OSError) as error:
        logger.warning("the memory %s has changed, and is served as it was before: %s", entry.name, error)
        return entry
