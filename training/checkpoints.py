"""Checkpoints of a run: written whole or not at all, so that a run killed at any moment goes on from the last one.

A checkpoint is a folder ``step-N`` with the sums of its files, written last: one that was cut short, or whose bytes
have changed since, is noticed, and the one before it is taken. ``best`` holds the weights of the best evaluation.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from training.files import damage, whole_folder, write_sums

KEEP = 2
BEST = "best"
TENSORS = "trained.safetensors"
SET_ASIDE = "failed-"
ASKED = 1 << 20  # bytes that are written to hear why a file could not be


def save_checkpoint(
    folder: Path, step: int, tensors: dict[str, Tensor], optimizer: dict[str, Any], state: dict[str, Any]
) -> Path:
    """Write ``folder/step-N``; of those up to it the last ``KEEP`` stay, later ones belong to a past given up.

    Args:
        folder: of the run's checkpoints.
        step: steps done.
        tensors: trained parameters.
        optimizer: its state dictionary.
        state: anything JSON can hold: position in the data, best figures.

    Raises:
        OSError: it could not be written; the checkpoints before it are whole.
    """
    final = folder / f"step-{step:07d}"
    with _sealed_folder(final) as temporary:
        _save_tensors(temporary, tensors)
        _save_any(temporary / "optimizer.pt", optimizer)
        _save_any(temporary / "rng.pt", torch.get_rng_state())
        (temporary / "state.json").write_text(json.dumps(state | {"step": step}))
    remove_old(folder, final)
    for later in list_checkpoints(folder):
        if later > final:
            shutil.rmtree(later, ignore_errors=True)
    for failed in folder.glob(f"{SET_ASIDE}*"):
        if failed.name.removeprefix(SET_ASIDE) < final.name:  # the run has come past it
            shutil.rmtree(failed, ignore_errors=True)
    return final


def _save_any(path: Path, value: Any) -> None:
    """``torch.save``, which says of a full disk only where it stopped ("unexpected pos").

    Raises:
        OSError: what the disk says.
    """
    try:
        torch.save(value, path)
    except RuntimeError:
        with path.open("ab") as file:
            file.write(bytes(ASKED))
            os.fsync(file.fileno())
        raise


def remove_old(folder: Path, newest: Path) -> None:
    """Of the checkpoints up to one, leave the last ``KEEP``."""
    saved = [path for path in list_checkpoints(folder) if path <= newest]
    for old in saved[:-KEEP]:
        shutil.rmtree(old, ignore_errors=True)


def list_checkpoints(folder: Path) -> list[Path]:
    """All checkpoints, oldest first; ``training.files.damage`` says which are whole."""
    return sorted(path for path in folder.glob("step-*") if path.is_dir())


def step_of(path: Path) -> int:
    """Steps done at a checkpoint."""
    return int(path.name.removeprefix("step-"))


def last_whole_checkpoint(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose files are as they were written, and what is wrong with those after it."""
    broken: list[str] = []
    for path in reversed(list_checkpoints(folder)):
        found = damage(path)
        if found is None:
            return path, broken
        broken.append(f"{path.name}: {found}")
    return None, broken


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    """Trained parameters, the optimiser's state dictionary, and the run's state; torch's random state is set."""
    optimizer = torch.load(path / "optimizer.pt", weights_only=True)
    torch.set_rng_state(torch.load(path / "rng.pt", weights_only=True))
    return load_file(path / TENSORS), optimizer, read_state(path)


def read_state(path: Path) -> dict[str, Any]:
    """The run's state in a checkpoint."""
    return json.loads((path / "state.json").read_text(encoding="utf-8"))


def set_aside(folder: Path, step: int) -> Path | None:
    """Take the checkpoint of ``step`` out of those to resume from: what comes after it is not finite.

    Returns:
        where it lies now; None if there is no checkpoint of that step.
    """
    path = folder / f"step-{step:07d}"
    if not path.is_dir():
        return None
    for old in folder.glob(f"{SET_ASIDE}*"):
        shutil.rmtree(old, ignore_errors=True)
    aside = folder / f"{SET_ASIDE}{path.name}"
    os.replace(path, aside)
    return aside


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
    """Write ``folder/best`` anew: trained parameters and what they were measured at; nothing to resume from.

    Raises:
        OSError: it could not be written; the one before it is whole.
    """
    with _sealed_folder(folder / BEST) as temporary:
        _save_tensors(temporary, tensors)
        (temporary / "evaluation.json").write_text(json.dumps(evaluation | {"step": step}))


def read_best(folder: Path) -> Best | None:
    """What ``save_best`` wrote; None if there is none. ``drop_broken_best`` comes first, once a start."""
    path = folder / BEST
    if not path.is_dir():
        return None
    evaluation = json.loads((path / "evaluation.json").read_text(encoding="utf-8"))
    return Best(evaluation.pop("step"), evaluation, path)


def drop_broken_best(folder: Path) -> str | None:
    """Remove ``folder/best`` if it is not as it was written; returns what was wrong with it."""
    path = folder / BEST
    found = damage(path) if path.is_dir() else None
    if found is not None:
        shutil.rmtree(path, ignore_errors=True)
    return found


@contextmanager
def _sealed_folder(final: Path) -> Iterator[Path]:
    """``whole_folder`` with the sums of its files; whatever keeps it from being written is an OSError of one line."""
    try:
        with whole_folder(final) as temporary:
            yield temporary
            write_sums(temporary)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors have errors of their own
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).splitlines()[0]
        raise OSError(
            f"{final} could not be written ({reason}). Everything that was saved before is complete: "
            "free some space, and continue with --resume"
        ) from error


def _save_tensors(folder: Path, tensors: dict[str, Tensor]) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / TENSORS)
