"""What is served: memories and the models that made them, by the names that clients use."""

import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fot.ask import Conversation
from memory import Memory


@dataclass
class Entry:
    """A model of the interface: a memory with the model that made it, or that model alone.

    Attributes:
        name: by which clients ask for it.
        model: a ``FoTForCausalLM`` with its tokenizer.
        memory: opened read-only; None for the bare model.
        created: when it was served first, in seconds since 1970.
        blank: a conversation that has not begun; others are made from it.
    """

    name: str
    model: Any
    memory: Memory | None
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

    def add(self, name: str, model: Any, memory: Memory | None) -> Entry:
        """One more.

        Raises:
            ValueError: the name is taken, or other weights made the memory.
        """
        if name in self._entries:
            raise ValueError(f"two memories are named {name!r}: name one of them otherwise, as in OTHER={name}.memory")
        self._entries[name] = Entry(name, model, memory)
        return self._entries[name]

    def __getitem__(self, name: str) -> Entry:
        """Raises KeyError, with the names that there are."""
        if name not in self._entries:
            raise KeyError(f"the model {name!r} does not exist; there are {', '.join(self._entries)}")
        return self._entries[name]

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def entries(self) -> list[Entry]:
        """Everything, in the order of its coming."""
        return list(self._entries.values())


def titles(names: Iterable[str]) -> Callable[[str], str]:
    """What to call documents in public: their names, without what they tell of the machine's folders."""
    names = list(names)
    placed = [name for name in names if os.path.isabs(name) or ".." in Path(name).parts or name.startswith("~")]
    top = _common_folder(placed)
    shown = dict.fromkeys(names, "") | {name: name for name in names}
    for name in placed:
        shown[name] = Path(os.path.relpath(os.path.normpath(name), top)).as_posix() if top else Path(name).name
    return lambda name: shown.get(name, name)


def _common_folder(names: list[str]) -> str:
    """The folder that all of these lie in; empty if there is none that says nothing."""
    if not names:
        return ""
    try:
        return os.path.commonpath([os.path.dirname(os.path.normpath(name)) for name in names])
    except ValueError:  # some are relative, or on other drives
        return ""
