"""Whether a run may start or go on in a folder, and with which settings; and what it goes on from."""

import json
import shutil
import sys
from collections.abc import Callable, Collection, Iterator
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor

from training.checkpoints import (
    BEST,
    drop_broken_best,
    last_whole_checkpoint,
    list_checkpoints,
    load_checkpoint,
    read_best,
    read_state,
    remove_old,
    step_of,
)
from training.files import recover, write_file
from training.recipe import Recipe
from training.results import RESULTS
from training.sharding import load_optimizer_state, spread_like
from training.shares import lanes_of_a_process

# What may change when a run goes on, and is only told.
FREE = ("steps", "result", "strength", "clip", "patience", "log_every", "eval_every", "save_every", "tensorboard",
        "trackers")  # fmt: skip
# What may change if it is said on the command line, so that no edited or mistaken recipe file changes it.
SAID = ("learning_rate", "lr_schedule", "warmup_steps", "decay_steps", "betas", "weight_decay", "accumulation",
        "contexts", "focus", "dtype", "checkpointing", "held_out", "held_out_memory", "best_by",
        "eval_batches")  # fmt: skip

Result = TypeVar("Result")


@dataclass(frozen=True)
class Checkpoint:
    """What a run goes on from, and the shape of its batch, which stays.

    Attributes:
        path: of the checkpoint.
        shares: number of processes that began the run.
        lanes: number of lanes that each of them had.
    """

    path: Path
    shares: int
    lanes: int


@dataclass(frozen=True)
class Start:
    """What a run starts from.

    Attributes:
        step: steps done.
        best_accuracy: highest accuracy of a step's answers so far.
        waited: evaluations since the best one.
        data: positions of the shares of the data; None at the beginning.
    """

    step: int = 0
    best_accuracy: float = 0.0
    waited: int = 0
    data: Any = None


def on_main(accelerator: Accelerator, function: Callable[[], Result]) -> Result:
    """What a function gives on the main process, on all of them; so does the error that it raises."""
    outcome: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = function()
        except (ValueError, OSError) as error:
            outcome[1] = error
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def find_start(
    out: Path, recipe: Recipe, *, resume: bool, changed: Collection[str], processes: int = 1
) -> Checkpoint | None:
    """The checkpoint that a run in ``out`` goes on from; None for a new run.

    Args:
        out: the run's folder, which need not exist.
        recipe: what is to be done.
        resume: whether to go on with what is there.
        changed: entries of the recipe that were said to differ from the run's.
        processes: number of processes that are to go on.

    Raises:
        ValueError: the folder holds a run and ``resume`` is not set, or no checkpoint of it is whole, or it was made by
            another recipe, or its lanes cannot be divided evenly among the processes.
    """
    folder = out / "checkpoints"
    for place in (out, folder):
        recover(place)
    saved = list_checkpoints(folder)
    if saved and not resume:
        raise ValueError(
            f"{out} already holds a run ({saved[-1].name}): add --resume to continue it, or choose another --out"
        )
    results = [name for name in RESULTS if (out / name).exists()]
    if results and not saved:
        raise ValueError(f"{out} holds the result of a run ({results[0]}) but no checkpoint: choose another --out")
    if not saved:
        if resume:
            _say(f"{out} holds no checkpoint to resume from: starting from the beginning")
        return None
    path, broken = last_whole_checkpoint(folder)
    if path is None:
        raise ValueError(
            f"no checkpoint in {folder} is complete ({'; '.join(broken)}): restore one, or choose another --out"
        )
    for words in broken:
        _say(f"not resuming from {words}")
    state = read_state(path)
    found = Checkpoint(path, len(state["data"]), state["recipe"]["lanes"])
    recipe = with_lanes_of(found, recipe, processes)
    for words in check_same_run(state["recipe"], recipe, changed):
        _say(f"resuming with another recipe: {words}")
    if processes != found.shares:
        lanes = found.shares * found.lanes
        _say(
            f"the run began as {_lanes_each(found.shares, found.lanes)}, and continues as "
            f"{_lanes_each(processes, lanes // processes)}"
        )
    return found


def with_lanes_of(found: Checkpoint, recipe: Recipe, processes: int) -> Recipe:
    """The recipe with the lanes that the run began with, if it means the run's batch.

    It does if its ``lanes`` are those that each process began with, or those that each of ``processes`` has now.

    Raises:
        ValueError: the run's lanes cannot be divided evenly among the processes, or the recipe means other lanes.
    """
    if processes == found.shares:
        return recipe  # ``check_same_run`` compares the lanes
    lanes = found.shares * found.lanes
    each = lanes_of_a_process(lanes, processes)
    if recipe.lanes not in (found.lanes, each):
        raise ValueError(
            f"lanes is {recipe.lanes}, but the run's batch has {lanes} lanes in all, since it began as "
            f"{_lanes_each(found.shares, found.lanes)}: set lanes={found.lanes} again, so that each of {processes} "
            f"processes has {each}"
        )
    return replace(recipe, lanes=found.lanes)


def _lanes_each(processes: int, lanes: int) -> str:
    return f"{processes} process{'es' * (processes != 1)} of {lanes} lane{'s' * (lanes != 1)}"


def check_same_run(saved: dict[str, Any], recipe: Recipe, changed: Collection[str]) -> list[str]:
    """Compare the recipe of a run with the one to go on with.

    Args:
        saved: as ``Recipe.to_dict`` gave it; entries that were not known then have their defaults.
        recipe: the one to go on with.
        changed: entries that were said to differ.

    Returns:
        what differs and may, in words.

    Raises:
        ValueError: what differs and must not.
    """
    defaults = {f.name: f.default for f in fields(Recipe) if f.default is not MISSING}
    given = recipe.to_dict()
    allowed: list[str] = []
    unsaid: list[str] = []
    fixed: list[str] = []
    for key in given:
        for place, before, now in _differences(key, saved.get(key, defaults.get(key)), given[key]):
            words = f"{place} was {_short(before)} and is {_short(now)}"
            if key in FREE or (key in SAID and key in changed):
                allowed.append(words)
            else:
                (unsaid if key in SAID else fixed).append(words)
    if fixed:
        raise ValueError(
            f"the run cannot continue with this recipe: {'; '.join(fixed + unsaid)}. Change that back, "
            "or start a new run in another --out"
        )
    if unsaid:
        keys = " ".join(f"{words.split()[0].split('.')[0].split('[')[0]}=..." for words in unsaid)
        raise ValueError(
            f"the run was started with another recipe: {'; '.join(unsaid)}. Change that back, or confirm the change on "
            f"the command line: {keys}"
        )
    return allowed


def claim(out: Path, recipe: Recipe, data: dict[str, Any], start: Path | None) -> None:
    """Make ``out`` the folder of this run: its recipe and data; what another run left there goes.

    Args:
        out: the run's folder.
        recipe: of the run.
        data: what it reads.
        start: the checkpoint that it goes on from.

    Raises:
        OSError: it could not be written.
    """
    folder = out / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    if start is None:
        # Of a run that was killed before its first checkpoint; its best weights must not become this one's.
        for old in (folder / BEST, out / "tensorboard"):
            shutil.rmtree(old, ignore_errors=True)
        (out / "log.jsonl").unlink(missing_ok=True)
    else:
        remove_old(folder, start)
        if broken := drop_broken_best(folder):
            _say(
                f"the weights of the best evaluation so far are lost ({broken}). The run keeps the best "
                "weights from here on"
            )
        elif (kept := read_best(folder)) is not None and kept.step > step_of(start):
            shutil.rmtree(kept.path)  # of a future that will come again
    write_file(out / "recipe.json", json.dumps(recipe.to_dict(), indent=1) + "\n")
    write_file(out / "data.json", json.dumps(data, indent=1) + "\n")


def restore(path: Path, trained: dict[str, Tensor], optimizer: Any, accelerator: Accelerator) -> Start:
    """Load a checkpoint into parameters and optimiser.

    Raises:
        ValueError: it has other parameters than the model.
    """
    tensors, optimizer_state, state = load_checkpoint(path)
    if {n: t.shape for n, t in tensors.items()} != {n: p.shape for n, p in trained.items()}:
        raise ValueError(
            f"{path} does not have the parameters of the model, so the model has changed since the run "
            "began: restore the old model"
        )
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(spread_like(tensors[name], parameter))
    load_optimizer_state(optimizer, optimizer_state)
    if accelerator.is_main_process:
        _say(f"resuming at step {state['step']} of {path}")
    return Start(state["step"], state["best"], state.get("waited", 0), state["data"])


def _differences(place: str, before: Any, now: Any) -> Iterator[tuple[str, Any, Any]]:
    """Where two values of JSON differ: place, the one, the other."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in [*before, *(key for key in now if key not in before)]:
            yield from _differences(f"{place}.{key}", before.get(key), now.get(key))
    elif isinstance(before, list | tuple) and isinstance(now, list | tuple) and len(before) == len(now):
        for number, pair in enumerate(zip(before, now, strict=True)):
            yield from _differences(f"{place}[{number}]", *pair)
    elif before != now:
        yield place, before, now


def _short(value: Any) -> str:
    text = "not given" if value is None else json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _say(text: str) -> None:
    print(f"fot: {text}", file=sys.stderr, flush=True)
