"""A run survives kills and full disks in every file operation, torn files, signals, and figures that are not finite.

Each fault is followed by ``--resume``, which must give the losses and the weights of an undisturbed run.
"""

import errno
import io
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from train_helpers import SMALL, losses, train, write_recipe

import training.checkpoints
import training.log
import training.step
import training.train
from training.checkpoints import BEST, list_checkpoints
from training.files import damage

SHALLOW = {"model": SMALL["model"] | {"num_hidden_layers": 2}}
STEPS = SHALLOW | {"steps": 4, "save_every": 1, "eval_every": 2, "result": "best", "eval_batches": 1}


class Killed(BaseException):
    """Stands for SIGKILL: from it on, nothing that touches a file works, so no cleaning up does."""


class Disk:
    """Fails at the n-th file operation, once (a full disk) or for good (a kill); counts them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fault: Callable[[], BaseException], moment: int = -1) -> None:
        self.fault, self.left = fault, moment
        self.operations: list[str] = []
        self.failed = False
        for place, name in ((os, "replace"), (os, "fsync"), (os, "unlink"), (os, "mkdir"), (os, "rmdir"),
                            (torch, "save"), (training.checkpoints, "save_file")):  # fmt: skip
            monkeypatch.setattr(place, name, self.wrapped(name, getattr(place, name)))
        opened = self.wrapped("open", open)

        def choosing(file: Any, mode: str = "r", *rest: Any, **options: Any) -> Any:
            return (opened if set(mode) & set("wa") else real)(file, mode, *rest, **options)

        real = open
        monkeypatch.setattr("builtins.open", choosing)
        monkeypatch.setattr(io, "open", choosing)

    def wrapped(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            inside = name != "open" or "/out" in str(args[0])
            if inside:
                file = args[1 if name in ("replace", "save", "save_file") else 0]
                self.operations.append(f"{name} {Path(str(file)).name}")
                dead = self.failed and self.fault is Killed
                if dead or self.left == 0:
                    self.failed = True
                    self.left = -1
                    raise self.fault()
                self.left -= 1
            return function(*args, **kwargs)

        return call


def full() -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A recipe and the folder of its run."""
    folder = tmp_path_factory.mktemp("undisturbed")
    recipe = write_recipe(folder / "recipe.yaml", **STEPS)
    assert train(recipe, folder / "out") == 0
    return recipe, folder / "out"


@pytest.fixture(scope="module")
def halfway(undisturbed: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed in step 4, before it was saved, with half a line in its log."""
    out = tmp_path_factory.mktemp("halfway") / "out"
    real = training.train.save_checkpoint

    def saving(folder: Path, step: int, *rest: Any) -> Path:
        if step == 4:
            raise Killed
        return real(folder, step, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.train, "save_checkpoint", saving)
        with pytest.raises(Killed):
            train(undisturbed[0], out)
    text = (out / "log.jsonl").read_text()
    (out / "log.jsonl").write_text(text[:-20])
    return out


def assert_resumes(recipe: Path, out: Path, expected: Path) -> None:
    assert train(recipe, out, "--resume") == 0
    assert losses(out) == losses(expected)
    for file in ("model/model.safetensors", "checkpoints/best/trained.safetensors"):
        found, wanted = load_file(out / file), load_file(expected / file)
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in expected.iterdir())
    names = [sorted(path.name for path in (place / "checkpoints").iterdir()) for place in (out, expected)]
    assert names[0] == names[1], "nothing is left over"


def start(out: Path, halfway: Path | None) -> list[str]:
    """Prepare a run's folder; returns the options that it goes on with."""
    if halfway is None:
        return []
    shutil.copytree(halfway, out)
    return ["--resume"]


def moments_of(operations: list[str], begun: bool, every: bool) -> list[int]:
    """All operations, or, for speed, a third of their kinds; of a resumed run, those before its next checkpoint."""
    if begun:
        operations = operations[: operations.index("save_file trained.safetensors")]
    last = {name: number for number, name in enumerate(operations)}
    return list(range(len(operations))) if every else sorted(last.values())[::3]


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["some", "every"])
@pytest.mark.parametrize("begun", [False, True], ids=["new", "resumed"])
@pytest.mark.parametrize("fault", [Killed, full])
def test_a_fault_in_any_file_operation(
    fault: Callable[[], BaseException],
    begun: bool,
    every: bool,
    undisturbed: tuple[Path, Path],
    halfway: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    recipe, expected = undisturbed
    with monkeypatch.context() as patch:
        disk = Disk(patch, fault)
        out = tmp_path / "counted" / "out"
        assert train(recipe, out, *start(out, halfway if begun else None)) == 0
    moments = moments_of(disk.operations, begun, every)
    assert len(moments) >= (4 if begun else 10)
    for moment in moments:
        out = tmp_path / str(moment) / "out"
        options = start(out, halfway if begun else None)
        with monkeypatch.context() as patch:
            failing = Disk(patch, fault, moment)
            try:
                status = train(recipe, out, *options)
            except Killed:
                status = 9
        assert failing.failed
        said = capsys.readouterr().err
        if fault is full:
            assert status in (0, 2), disk.operations[moment]
            assert status == 0 or "No space left on device" in said.splitlines()[-1]
            assert "Traceback" not in said
        assert_resumes(recipe, out, expected)


def damaged(out: Path, *steps: int, how: str) -> None:
    for step in steps:
        file = out / f"checkpoints/step-{step:07d}" / how.split()[1]
        content = file.read_bytes()
        half = len(content) // 2
        changed = {
            "cut": content[:half],
            "zeroed": content[:half] + bytes(64) + content[half + 64 :],
            "emptied": b"",
        }
        if how.startswith("removed"):
            file.unlink()
        else:
            file.write_bytes(changed[how.split()[0]])


@pytest.mark.parametrize(
    "how",
    ["cut trained.safetensors", "zeroed trained.safetensors", "cut optimizer.pt", "zeroed optimizer.pt",
     "emptied rng.pt", "cut state.json", "cut sha256.json", "removed sha256.json", "removed optimizer.pt"],
)  # fmt: skip
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    how: str, undisturbed: tuple[Path, Path], halfway: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    recipe, expected = undisturbed
    out = tmp_path / "out"
    shutil.copytree(halfway, out)
    damaged(out, 3, how=how)
    assert_resumes(recipe, out, expected)
    said = capsys.readouterr().err
    assert "not resuming from step-0000003: " in said
    assert how.split()[1] in said
    assert "resuming at step 2" in said


def test_no_whole_checkpoint(
    undisturbed: tuple[Path, Path], halfway: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "out"
    shutil.copytree(halfway, out)
    damaged(out, 2, 3, how="zeroed trained.safetensors")
    before = sorted(out.rglob("*"))
    assert train(undisturbed[0], out, "--resume") == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert "no checkpoint in" in said[0]
    assert "step-0000003: the content of trained.safetensors has changed" in said[0]
    assert "another --out" in said[0]
    assert sorted(out.rglob("*")) == before


@pytest.mark.parametrize("file", ["evaluation.json", "trained.safetensors"])
def test_a_broken_best_is_named_and_left(
    file: str, undisturbed: tuple[Path, Path], halfway: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "out"
    shutil.copytree(halfway, out)
    (out / "checkpoints" / BEST / file).unlink()
    assert train(undisturbed[0], out, "--resume") == 0
    assert f"best evaluation so far are lost ({file} is missing)" in capsys.readouterr().err
    assert json.loads((out / "checkpoints" / BEST / "evaluation.json").read_text())["step"] == 4
    assert damage(out / "checkpoints" / BEST) is None
    assert losses(out) == losses(undisturbed[1])


@pytest.mark.parametrize("left", ["best", "checkpoint"])
def test_a_run_killed_before_its_first_checkpoint_leaves_nothing_to_the_next(
    left: str, undisturbed: tuple[Path, Path], tmp_path: Path
) -> None:
    """Its best weights were the result of the next run in the folder."""
    recipe, expected = undisturbed
    out = tmp_path / "out"
    (out / "checkpoints").mkdir(parents=True)
    shutil.copytree(expected / "checkpoints" / BEST, out / "checkpoints" / BEST)
    (out / "checkpoints/.step-0000001.4711").mkdir()
    shutil.copy(expected / "log.jsonl", out / "log.jsonl")
    evaluation = out / "checkpoints" / BEST / "evaluation.json"
    evaluation.write_text(json.dumps(json.loads(evaluation.read_text()) | {"eval_answer_accuracy": 1.0}))
    assert train(recipe, out, *(["--resume"] if left == "checkpoint" else [])) == 0
    assert losses(out) == losses(expected)
    assert json.loads(evaluation.read_text()) == json.loads(
        (expected / "checkpoints" / BEST / "evaluation.json").read_text()
    )


def test_a_result_without_checkpoints_is_not_written_over(
    undisturbed: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "out"
    shutil.copytree(undisturbed[1], out)
    shutil.rmtree(out / "checkpoints")
    assert train(undisturbed[0], out) == 2
    assert "holds the result of a run (model) but no checkpoint: choose another --out" in capsys.readouterr().err


def test_torn_lines_of_the_log(undisturbed: tuple[Path, Path], halfway: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(halfway, out)
    lines = (out / "log.jsonl").read_text().splitlines()
    (out / "log.jsonl").write_text("\n".join([*lines[:3], "\0" * 30, '{"loss": 3}', "17", lines[3]]))
    assert_resumes(undisturbed[0], out, undisturbed[1])


class HalfWritten(io.StringIO):
    """A file on a full disk: takes half of what is written."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def write(self, text: str) -> int:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(text[: len(text) // 2])
        raise full()


def test_full_disk_in_the_log(
    undisturbed: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    recipe, expected = undisturbed
    out = tmp_path / "out"

    def opening(path: Path, mode: str = "r", **options: Any) -> Any:
        third = mode == "a" and len(path.read_text().splitlines() if path.exists() else []) == 2
        return HalfWritten(path) if third else open(path, mode, **options)

    with monkeypatch.context() as patch:
        patch.setattr(training.log, "open", opening, raising=False)
        assert train(recipe, out) == 2
    said = capsys.readouterr().err
    assert (
        "log.jsonl could not be written (No space left on device): free some space, and continue with --resume" in said
    )
    assert not (out / "log.jsonl").read_text().endswith("\n")
    assert_resumes(recipe, out, expected)


@pytest.fixture(params=["480k", "560k"])  # full at the weights, at the state of the optimiser
def tiny_disk(tmp_path: Path, request: pytest.FixtureRequest) -> Any:
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={request.param}", "tmpfs", place]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def test_a_disk_that_is_really_full(
    undisturbed: tuple[Path, Path], tiny_disk: Path, capsys: pytest.CaptureFixture
) -> None:
    recipe, expected = undisturbed
    out = tiny_disk / "out"
    assert train(recipe, out) == 2
    said = capsys.readouterr().err.splitlines()
    assert sum("could not be written" in line for line in said) == 1
    assert "No space left" in said[-1]
    assert "Traceback" not in "".join(said)
    kept = list_checkpoints(out / "checkpoints")
    assert kept
    assert [damage(path) for path in kept] == [None] * len(kept)
    subprocess.run(["mount", "-o", "remount,size=10m", tiny_disk], check=True)
    assert_resumes(recipe, out, expected)


def spoilt(monkeypatch: pytest.MonkeyPatch, at: int, value: float, what: str) -> None:
    """From optimiser step ``at`` (1, 2, ...) on, the loss, a gradient or a weight is not finite."""
    steps = [0]
    real = training.step.clip_gradients

    def clipping(parameters: list[torch.Tensor], largest: float) -> float:
        steps[0] += 1
        if steps[0] >= at and what == "gradient":
            parameters[0].grad[0] = value
        return real(parameters, largest)

    monkeypatch.setattr(training.step, "clip_gradients", clipping)
    losses_of = training.step.token_losses

    def losing(*args: Any) -> Any:
        found, *rest = losses_of(*args)
        return (found * value if steps[0] + 1 >= at and what == "loss" else found), *rest

    monkeypatch.setattr(training.step, "token_losses", losing)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("what", ["gradient", "loss"])
def test_what_is_not_finite_changes_no_weights(
    what: str,
    value: float,
    undisturbed: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    recipe, expected = undisturbed
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        spoilt(patch, 4, value, what)
        assert train(recipe, out) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"the {what} is" in said
    assert "at step 4" in said
    assert "step 3 leads to it, so it was renamed to failed-step-0000003" in said
    assert "continue from step-0000002 with --resume and a lower learning_rate=..." in said
    for line in (out / "log.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)
    for path in list_checkpoints(out / "checkpoints"):
        assert damage(path) is None
        assert all(tensor.isfinite().all() for tensor in load_file(path / "trained.safetensors").values())
    assert_resumes(recipe, out, expected)


def test_weights_that_are_not_finite_are_not_saved(
    undisturbed: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    recipe, expected = undisturbed
    out = tmp_path / "out"

    def spoiling(norm: float, trained: dict[str, torch.Tensor], step: int) -> None:
        if step == 2:
            next(iter(trained.values())).data[0] = float("inf")

    with monkeypatch.context() as patch:
        patch.setattr(training.step, "check_gradients", spoiling)
        assert train(recipe, out) == 2
    assert "is not finite after step 3" in capsys.readouterr().err
    assert_resumes(recipe, out, expected)
