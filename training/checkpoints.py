"""Checkpoints of a run: written whole or not at all, so that a run killed at any moment goes on from the last one."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

KEEP = 2
BEST = "best"
TENSORS = "trained.safetensors"


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
    with whole_folder(final) as temporary:
        _save_tensors(temporary, tensors)
        torch.save(optimizer, temporary / "optimizer.pt")
        torch.save(torch.get_rng_state(), temporary / "rng.pt")
        (temporary / "state.json").write_text(json.dumps(state | {"step": step}))
    for old in list_checkpoints(folder)[:-KEEP]:
        shutil.rmtree(old, ignore_errors=True)
    return final


@dataclass(frozen=True)
class Best:
    """Where a run's evaluation came out best.

    Attributes:
        step: steps done.
        evaluation: what was measured there.
        path: of the folder with the weights.
    """

    step: int
    evaluation: dict[str, float]
    path: Path

    def tensors(self) -> dict[str, Tensor]:
        """The trained parameters of that step."""
        return load_file(self.path / TENSORS)


def save_best(folder: Path, step: int, tensors: dict[str, Tensor], evaluation: dict[str, float]) -> None:
    """Write ``folder/best`` anew: trained parameters and what they were measured at; nothing to resume from."""
    with whole_folder(folder / BEST) as temporary:
        _save_tensors(temporary, tensors)
        (temporary / "evaluation.json").write_text(json.dumps(evaluation | {"step": step}))


def read_best(folder: Path) -> Best | None:
    """What ``save_best`` wrote; None if there is none."""
    path = folder / BEST
    if not path.is_dir():
        return None
    evaluation = json.loads((path / "evaluation.json").read_text())
    return Best(evaluation.pop("step"), evaluation, path)


@contextmanager
def whole_folder(final: Path) -> Iterator[Path]:
    """A folder that takes the place of ``final`` when the block ends, with all its files on disk; or never."""
    temporary = final.parent / f".{final.name}.{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    for path in temporary.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    shutil.rmtree(final, ignore_errors=True)
    os.replace(temporary, final)


def remove_leftovers(folder: Path) -> None:
    """Delete what a killed run had not finished writing."""
    for path in folder.glob(".*.*"):
        if path.is_dir() and path.suffix[1:].isdigit():
            shutil.rmtree(path, ignore_errors=True)


def _save_tensors(folder: Path, tensors: dict[str, Tensor]) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / TENSORS)


def list_checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    return sorted(path for path in folder.glob("step-*") if (path / "state.json").is_file())


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    """Trained parameters, the optimiser's state dictionary, and the run's state; torch's random state is set."""
    optimizer = torch.load(path / "optimizer.pt", weights_only=True)
    torch.set_rng_state(torch.load(path / "rng.pt", weights_only=True))
    return load_file(path / TENSORS), optimizer, json.loads((path / "state.json").read_text())
