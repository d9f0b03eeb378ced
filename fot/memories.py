"""The folder in which a user keeps memories, and their names. Nothing here loads torch."""

import os
import re
from itertools import chain, count
from pathlib import Path

# Names of models end up in addresses and in configuration files.
ODD = re.compile(r"[^\w.-]+")
SUFFIXES = (".memory", ".mem")
MANIFEST = "manifest.json"  # as in memory.manifest, whose package loads torch


def memories_dir() -> Path:
    """``$FOT_MEMORIES``, else ``$XDG_DATA_HOME/fot/memories``, else ``~/.local/share/fot/memories``.

    The folder need not exist yet.
    """
    if own := os.environ.get("FOT_MEMORIES"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_DATA_HOME")
    return (Path(base) if base else Path.home() / ".local" / "share") / "fot" / "memories"


def kept_memories() -> dict[str, Path]:
    """Name -> folder of each memory, or link to one, in ``memories_dir()``; none if it cannot be read.

    Where several would have one name (``emma`` and ``emma.memory``), later ones bear the name of their folder, or a
    number.
    """
    try:
        folders = sorted(path for path in memories_dir().iterdir() if (path / MANIFEST).is_file())
    except OSError:
        return {}
    named: dict[str, Path] = {}
    for folder in folders:
        name = short_name(folder)
        names = chain((name, ODD.sub("-", folder.name)), (f"{name}-{number}" for number in count(2)))
        named[next(one for one in names if one not in named)] = folder
    return named


def short_name(path: Path | str) -> str:
    """What to call a memory's folder or a model: the last part of its path, without ``.memory``."""
    name = Path(path).name or Path(os.path.abspath(path)).name
    for suffix in SUFFIXES:
        name = name.removesuffix(suffix)
    return ODD.sub("-", name).strip("-.") or "memory"
