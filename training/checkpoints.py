"""Checkpoints of a run: written whole or not at all, so that a run killed at any moment goes on from the last one."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

KEEP = 2


def save_checkpoint(
    folder: Path, step: int, tensors: dict[str, Tensor], optimizer: dict[str, Any], state: dict[str, Any]
) -> Path:
    """Write ``folder/step-N``; older checkpoints but the last ``KEEP`` are removed.

    Args:
        folder: of the run's checkpoints.
        step: steps done.
        tensors: trained parameters.
        optimizer: its state dictionary.
        state: anything JSON can hold: position in the data, best figures.
    """
    final = folder / f"step-{step:07d}"
    temporary = folder / f".{final.name}.{os.getpid()}"
    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary / "trained.safetensors")
    torch.save(optimizer, temporary / "optimizer.pt")
    torch.save(torch.get_rng_state(), temporary / "rng.pt")
    (temporary / "state.json").write_text(json.dumps(state | {"step": step}))
    for path in temporary.iterdir():  # on disk before the rename says that it is whole
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    shutil.rmtree(final, ignore_errors=True)
    os.replace(temporary, final)
    for old in list_checkpoints(folder)[:-KEEP]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def list_checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    return sorted(path for path in folder.glob("step-*") if (path / "state.json").is_file())


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    """Trained parameters, the optimiser's state dictionary, and the run's state; torch's random state is set."""
    optimizer = torch.load(path / "optimizer.pt", weights_only=True)
    torch.set_rng_state(torch.load(path / "rng.pt", weights_only=True))
    return load_file(path / "trained.safetensors"), optimizer, json.loads((path / "state.json").read_text())
