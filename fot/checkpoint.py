"""Where a model lies, and what went wrong if it cannot be had."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class CheckpointUnavailable(OSError):  # noqa: N818 - says what is so, as FileNotFoundError's "NotFound" does
    """A checkpoint could not be fetched or stored; the message is one line and ends with what to do."""


@dataclass(frozen=True)
class Checkpoint:
    """Where a model lies.

    Attributes:
        name: what the user typed.
        path: hub id or folder, as ``from_pretrained`` takes it.
        gguf_file: name of a GGUF file in the folder ``path``, or None for safetensors.
        mem_layers: memory layers that go with an alias (0-based), else None.
        adapter: folder of an adapter (``fot.adapter``) over the model at ``path``, or None.
        under: adapters that come before it, if it was trained over one.
    """

    name: str
    path: str
    gguf_file: str | None = None
    mem_layers: tuple[int, ...] | None = None
    adapter: Path | None = None
    under: tuple[Path, ...] = ()


def cache_dir() -> Path:
    """``$FOT_CACHE``, else ``$XDG_CACHE_HOME/fot``, else ``~/.cache/fot``; the folder need not exist yet."""
    if own := os.environ.get("FOT_CACHE"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "fot"


def gguf_options(checkpoint: Checkpoint) -> dict[str, Any]:
    """Arguments for a model's ``from_pretrained``: the GGUF file, unpacked to dense weights; none without a GGUF.

    Newer transformers keep the weights packed where they find kernels for that; a packed model cannot be saved, and
    its layers are no ``nn.Linear``, so they are always unpacked here, as older versions do unasked.
    """
    if checkpoint.gguf_file is None:
        return {}
    options: dict[str, Any] = {"gguf_file": checkpoint.gguf_file}
    try:
        from transformers import GgufConfig
    except ImportError:  # an older version: always unpacks
        return options
    return options | {"quantization_config": GgufConfig(dequantize=True)}
