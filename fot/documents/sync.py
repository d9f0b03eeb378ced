"""Bring a memory up to date with the files that it was made of.

First a plan is made, of names and texts alone; then it is carried out. A document is known by its text: one that is
there under another name is renamed, and nothing of it is read again.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from fot.documents.add import Added, add_documents, text_digest
from fot.documents.find import Documents, find_documents
from fot.documents.record import FILES, Source, State, files, note_file, sources
from memory import Memory


@dataclass
class Plan:
    """What is to be done.

    Attributes:
        found: files to read, per source, with their names.
        drop: documents of which no file is left, or whose text has changed.
        rename: old name -> new name.
        add: names of documents to read; those that are in ``drop``, too, have changed.
        notes: name -> state and SHA-256 of the text of every file that is there.
    """

    found: list[tuple[Documents, Callable[[Path], str]]] = field(default_factory=list)
    drop: list[str] = field(default_factory=list)
    rename: dict[str, str] = field(default_factory=dict)
    add: list[str] = field(default_factory=list)
    notes: dict[str, tuple[State, str]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.drop or self.rename or self.add)

    @property
    def changed(self) -> list[str]:
        """Documents to read anew."""
        return [name for name in self.drop if name in self.add]

    @property
    def gone(self) -> list[str]:
        """Documents to drop for good."""
        return [name for name in self.drop if name not in self.add]

    @property
    def new(self) -> list[str]:
        """Documents to read that the memory did not have."""
        return [name for name in self.add if name not in self.drop]

    def left_out(self) -> Documents:
        """Why files were left out, over all sources."""
        together = Documents()
        for found, _ in self.found:
            together.left_out += found.left_out
            together.named += found.named
        return together


def plan_sync(memory: Memory, folder: Path) -> Plan:
    """What to do for the memory in a folder to hold what its files hold now. Nothing is changed.

    Files whose size and time have not changed are not read, if the memory holds all of their text.

    Raises:
        ValueError: the memory does not say what it was made of.
        OSError: a folder that it was made of is not there, or holds no document any more: a disk that is not mounted
            must not empty a memory.
    """
    noted, plan = files(memory), Plan()
    held = {note.sha256 for note in memory.notes.values() if note.complete}
    for source in sources(memory, folder):
        naming = _naming(source)
        found = _find(source, noted, held, naming)
        plan.found.append((found, naming))
        for path in found.unchanged:
            plan.notes[naming(path)] = noted[naming(path)]
        for path in found.paths:
            plan.notes[naming(path)] = found.states[path], text_digest(found.text(path))
    _compare(plan, memory, noted)
    return plan


def carry_out(plan: Plan, model: Any, memory: Memory) -> Added:
    """Do what is planned. Interrupted, the memory holds whole documents, and the next plan does the rest.

    Args:
        plan: of ``plan_sync``.
        model: that made the memory, with its tokenizer.
        memory: opened with ``mode="a"``.
    """
    memory.drop_documents(plan.drop)
    for name in plan.drop:
        memory.metadata.get(FILES, {}).pop(name, None)
    if plan.rename:
        memory.rename_documents(plan.rename)
    tokens = same = 0
    wanted = set(plan.add)
    for name in wanted:
        memory.metadata.get(FILES, {}).pop(name, None)
    for found, naming in plan.found:
        keep = [place for place, path in enumerate(found.paths) if naming(path) in wanted]
        found.characters = [found.characters[place] for place in keep]
        found.paths = [found.paths[place] for place in keep]
        added = add_documents(model, memory, found, naming)
        tokens, same = tokens + added.tokens, same + added.same
    done = files(memory)  # without those that could be read no longer: the next plan has them again
    memory.metadata[FILES] = {}
    for name, note in plan.notes.items():
        if name not in wanted:
            note_file(memory, name, *note)
        elif name in done:
            note_file(memory, name, *done[name])
    memory.flush()
    return Added(tokens, same)


def _naming(source: Source) -> Callable[[Path], str]:
    """The names of documents of a source, as they were when it was given, wherever one is now."""
    return lambda path: (PurePosixPath(source.name) / path.relative_to(source.path).as_posix()).as_posix()


def _find(
    source: Source, noted: dict[str, tuple[State, str]], held: set[str], naming: Callable[[Path], str]
) -> Documents:
    """The documents of a source now; none, if it is a file that is gone.

    Args:
        source: to look at.
        noted: state and SHA-256 of the text of each file, by name.
        held: SHA-256 of the texts that the memory has whole. A file of another text is read, however old it is: its
            document was dropped.
        naming: of files.
    """
    if not source.path.exists() and source.path.parent.is_dir() and source.name in noted:
        return Documents()
    if not source.path.exists():
        raise FileNotFoundError(
            f"{source.name} is not there, so nothing was changed: put it back (mount its disk), or drop its documents "
            "with fot memory drop"
        )

    def known(path: Path, state: State) -> bool:
        noted_state, digest = noted.get(naming(path), (None, ""))
        return state.mtime_ns != 0 and noted_state == state and digest in held

    try:
        return find_documents([source.path], source.include, source.exclude, source.options, known)
    except ValueError as error:
        if source.path.is_dir():
            raise FileNotFoundError(
                f"{source.name} holds no document any more, so nothing was changed: put them back (mount its disk), or "
                "drop them with fot memory drop"
            ) from error
        gone = Documents(options=source.options)
        gone.leave_out(source.path, error)
        return gone


def _compare(plan: Plan, memory: Memory, noted: dict[str, tuple[State, str]]) -> None:
    """Decide what is to be dropped, renamed and read, by the texts that are there now."""
    names_of: dict[str, list[str]] = {}
    for name, (_, digest) in plan.notes.items():
        names_of.setdefault(digest, []).append(name)
    there = set()
    for name in memory.documents():
        digest = memory.notes[name].sha256 if name in memory.notes else ""
        names = names_of.get(digest, [])
        if digest and names and digest not in there:
            there.add(digest)
            if name not in names and (name in noted or name in plan.notes):
                plan.rename[name] = names[0]
            if memory.notes[name].complete:
                continue
            plan.add.append(plan.rename.get(name, name))  # to be continued
        elif name in noted or name in plan.notes:
            plan.drop.append(name)
    plan.add += [names[0] for digest, names in names_of.items() if digest not in there]
