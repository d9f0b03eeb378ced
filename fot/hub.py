"""Adapters and memories on the Hugging Face hub: found by their id, and put there.

Models need nothing of this: transformers finds them. A memory is a data set there (``repo_type="dataset"``).
"""

import re
from pathlib import Path
from typing import Any

from fot.names import ADAPTER_DESCRIPTION, PEFT_CONFIG, aliases, shipped_models

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# Options of ``from_pretrained`` that the hub's client takes under the same names.
_CLIENT_OPTIONS = ("revision", "cache_dir", "token", "local_files_only", "force_download")


def adapter_folder(hub_id: str, **options: Any) -> Path | None:
    """The folder in the hub's cache of the adapter that an id stands for; None if it stands for no adapter.

    A model has a config.json. Only where there is none does anyone look for an adapter.

    Args:
        hub_id: ``org/name``.
        options: of ``from_pretrained``: ``revision``, ``token``, ``cache_dir``, ...

    Raises:
        OSError: the hub has no such id.
    """
    from huggingface_hub import snapshot_download
    from transformers.utils import cached_file

    options = {name: value for name, value in options.items() if name in _CLIENT_OPTIONS}

    def has(name: str) -> bool:
        missing_is_none = {f"_raise_exceptions_for_{kind}": False for kind in ("missing_entries", "connection_errors")}
        return cached_file(hub_id, name, **missing_is_none, **options) is not None

    if has("config.json") or not (has(ADAPTER_DESCRIPTION) or has(PEFT_CONFIG)):
        return None
    return Path(snapshot_download(hub_id, allow_patterns=["*.json", "*.safetensors"], **options))


def memory_folder(path: Path, mode: str = "r") -> Path:
    """A memory's folder on this machine: the path itself, or what the hub has under it as an id.

    ``org/name`` is an id if neither it nor a folder ``org`` is here.

    Args:
        path: a folder or an id.
        mode: ``r`` to read it, ``a`` to change it, which takes a folder of the user's own.

    Raises:
        FileNotFoundError: the hub has no such memory, or it cannot be reached; or an id of what is to be changed.
    """
    name = str(path)
    if path.exists() or path.parent.exists() or not HUB_ID.fullmatch(name):
        return path
    if mode != "r":
        raise FileNotFoundError(
            f"no memory at {name}, and one on the hub cannot be changed: copy it first (hf download {name} --repo-type "
            "dataset --local-dir FOLDER), and change FOLDER"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    from memory.manifest import MANIFEST

    try:
        folder = Path(snapshot_download(name, repo_type="dataset"))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = " ".join(str(error).split())[:160]
        raise FileNotFoundError(f"no memory at {name}, and none of this id from the hub: {reason}") from error
    if not (folder / MANIFEST).is_file():
        raise FileNotFoundError(f"{name} on the hub is no memory: it has no {MANIFEST}")
    return folder


def push(folder: Path, hub_id: str, *, private: bool = False, token: str | None = None) -> str:
    """Put a model, an adapter or a memory on the hub.

    Args:
        folder: what ``save_pretrained``, ``fot train`` or ``fot memory build`` wrote.
        hub_id: ``org/name``; made if it is not there.
        private: whether others may not see it, if it is made.
        token: of the hub; None for the one that ``hf auth login`` has saved.

    Returns:
        the address of the upload.

    Raises:
        ValueError: the folder holds none of these, or an adapter whose base model is a folder of this machine.
        OSError: the hub refuses, or cannot be reached.
    """
    from huggingface_hub import HfApi

    from memory.manifest import LOCK

    if not HUB_ID.fullmatch(hub_id):
        raise ValueError(f"{hub_id!r} is no id of the hub: give org/name")
    kind = _kind(folder)
    api = HfApi(token=token)
    api.create_repo(hub_id, repo_type=kind, private=private, exist_ok=True)
    return str(api.upload_folder(repo_id=hub_id, repo_type=kind, folder_path=folder, ignore_patterns=[LOCK, ".*"]))


def _kind(folder: Path) -> str:
    """The hub's kind of repository for what a folder holds."""
    from memory.manifest import MANIFEST

    if (folder / MANIFEST).is_file():
        return "dataset"
    whole = (folder / "config.json").is_file()
    if (folder / ADAPTER_DESCRIPTION).is_file() or ((folder / PEFT_CONFIG).is_file() and not whole):
        _check_base(folder)
        return "model"
    if whole:
        return "model"
    raise ValueError(f"{folder} holds neither a model nor an adapter nor a memory: give a folder that fot wrote")


def _check_base(folder: Path) -> None:
    """Raise ValueError for an adapter whose base model others cannot have by its name."""
    from fot.adapter import place_of_base, read_description

    base = read_description(folder).base
    if not (base in aliases() or base in shipped_models() or HUB_ID.fullmatch(base)):
        raise ValueError(
            f"the adapter in {folder} belongs to the base model at {base}, which others do not have: set "
            f"{place_of_base(folder)} to the id of that model on the hub"
        )
