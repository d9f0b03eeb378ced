"""A question with passages in front of it, to be read again."""

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

# What a person would write who puts a text before another and asks about it.
SOURCE = "From {document}:\n{text}\n"
REQUEST = "{passages}\nAnswer in a few words. {question}"


def with_passages(question: str, passages: Sequence[tuple[str, str]]) -> str:
    """The text of a turn: passages with their sources, then the question.

    Args:
        question: what is asked.
        passages: (document, text) of each, best first. The best comes last, next to the question.
    """
    parts = [SOURCE.format(document=document, text=" ".join(text.split())) for document, text in reversed(passages)]
    return REQUEST.format(passages="\n".join(parts), question=question.strip())


def titles(names: Iterable[str]) -> Callable[[str], str]:
    """What to call documents to models and to others: their names, without what they tell of the machine's folders.

    Args:
        names: of all documents of a memory.

    Returns:
        a function of a name: for a path that is absolute, or leads up or home, its part below the folder that all such
        paths lie in; any other name as it is.
    """
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
