"""Going on with a run by another recipe, in other folders, from nowhere; ends that are asked for."""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import accelerate.tracking
import forks
import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import LoggerType
from safetensors.torch import load_file
from train_helpers import SMALL, losses, train, write_recipe

import training.launch
import training.progress
from training.launch import asked_processes
from training.recipe import load_recipe
from training.resume import FREE, SAID, find_start
from training.train import train as train_run

FEW = {"steps": 2, "save_every": 1, "eval_every": 0}


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps."""
    folder = tmp_path_factory.mktemp("begun")
    assert train(write_recipe(folder / "recipe.yaml", **FEW), folder / "out") == 0
    return folder / "out"


def resumed(begun: Path, tmp_path: Path, *arguments: str, **changes: Any) -> tuple[int, Path]:
    out = tmp_path / "out"
    shutil.copytree(begun, out)
    recipe = write_recipe(tmp_path / "recipe.yaml", **(FEW | changes))
    return train(recipe, out, *arguments, "--resume"), out


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"memory": SMALL["memory"] | {"mem_layers": [2]}}, "memory.mem_layers[0] was 1 and is 2"),
        ({"memory": SMALL["memory"] | {"local_context": 30}}, "memory.local_context was 40 and is 30"),
        ({"optimizer": "adafactor"}, 'optimizer was "adamw" and is "adafactor"'),
        ({"lanes": 5}, "lanes was 4 and is 5"),
        ({"windows": 3}, "windows was 2 and is 3"),
        ({"seed": 1}, "seed was 0 and is 1"),
        ({"model": SMALL["model"] | {"hidden_size": 64}}, "model.hidden_size was 32 and is 64"),
        ({"tasks": [{"kind": "dictionary", "similar": 0.5}]}, "tasks[0].similar was not given and is 0.5"),
        ({"tasks": [{"kind": "dictionary"}, {"kind": "dictionary", "name": "b"}]}, "tasks was"),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_what_makes_another_run_is_refused(
    changes: dict[str, Any], words: str, begun: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    before = {path: path.read_bytes() for path in begun.rglob("*") if path.is_file()}
    status, out = resumed(begun, tmp_path, **changes)
    assert status == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert words in said[0]
    assert "Change that back, or start a new run in another --out" in said[0]
    assert {begun / path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("key", "value"),
    [("learning_rate", 0.001), ("contexts", {"values": [1]}), ("dtype", "bfloat16"), ("accumulation", 2),
     ("betas", [0.9, 0.99]), ("checkpointing", True), ("weight_decay", 0.1), ("lr_schedule", "linear")],
)  # fmt: skip
def test_what_changes_the_steps_has_to_be_said(
    key: str, value: Any, begun: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for name in "12":
        (tmp_path / name).mkdir()
    status, _ = resumed(begun, tmp_path / "1", **{key: value})
    assert status == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert f"the run was started with another recipe: {key}" in said[0]
    assert f"confirm the change on the command line: {key}=..." in said[0]
    AcceleratorState._reset_state(reset_partial_state=True)
    status, out = resumed(begun, tmp_path / "2", f"{key}={json.dumps(value)}", "steps=3")
    assert status == 0
    assert f"resuming with another recipe: {key}" in capsys.readouterr().err
    recipe = json.loads((out / "recipe.json").read_text())
    assert recipe[key] == (value if not isinstance(value, dict) else {"values": [1]} | recipe[key])


def test_what_may_change_is_told(begun: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    status, out = resumed(begun, tmp_path, steps=3, save_every=5, clip=0.5)
    assert status == 0
    said = capsys.readouterr().err
    for words in ("steps was 2 and is 3", "save_every was 1 and is 5", "clip was 1.0 and is 0.5"):
        assert f"resuming with another recipe: {words}" in said
    assert len(losses(out)) == 3


def test_every_entry_of_a_recipe_has_its_rule() -> None:
    entries = set(load_recipe("dictionary").to_dict())
    fixed = {
        "method",
        "length",
        "factor",
        "model",
        "memory",
        "sources",
        "tasks",
        "lanes",
        "windows",
        "trainable",
        "lora",
        "quantization",
        "optimizer",
        "seed",
    }
    assert not set(FREE) & set(SAID)
    assert {*FREE, *SAID} == entries - fixed


@pytest.mark.parametrize(
    ("lanes", "processes", "words"),
    [
        (4, 1, None),
        (4, 2, "the run began as 1 process of 4 lanes, and continues as 2 processes of 2 lanes"),
        (2, 2, "the run began as 1 process of 4 lanes, and continues as 2 processes of 2 lanes"),
        (1, 4, "the run began as 1 process of 4 lanes, and continues as 4 processes of 1 lane"),
    ],
)
def test_another_number_of_processes_is_told(
    lanes: int, processes: int, words: str | None, begun: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    recipe = load_recipe(write_recipe(tmp_path / "recipe.yaml", **(FEW | {"lanes": lanes})))
    found = find_start(begun, recipe, resume=True, changed=(), processes=processes)
    assert found is not None
    assert (found.path, found.shares, found.lanes) == (begun / "checkpoints/step-0000002", 1, 4)
    assert capsys.readouterr().err == ("" if words is None else f"fot: {words}\n")


@pytest.mark.parametrize(
    ("lanes", "processes", "words"),
    [
        (4, 3, "the run's batch has 4 lanes, which cannot be divided evenly among 3 processes: use .* out of 1, 2, 4$"),
        (4, 8, "the run's batch has 4 lanes, which cannot be divided evenly among 8 processes: use .* out of 1, 2, 4$"),
        (3, 2, "lanes is 3, but the run's batch has 4 lanes in all, .* set lanes=4 again, so that each of 2 .* has 2$"),
    ],
)
def test_lanes_that_do_not_fit_the_processes_are_refused(
    lanes: int, processes: int, words: str, begun: Path, tmp_path: Path
) -> None:
    recipe = load_recipe(write_recipe(tmp_path / "recipe.yaml", **(FEW | {"lanes": lanes})))
    with pytest.raises(ValueError, match=words):
        find_start(begun, recipe, resume=True, changed=(), processes=processes)


@pytest.mark.parametrize(("first", "then"), [(1, 2), (2, 1)])
def test_a_run_goes_on_with_another_number_of_processes(first: int, then: int, tmp_path: Path) -> None:
    """Losses, evaluations and weights are those of the run that was left alone, but for the order of sums."""
    recipe = write_recipe(tmp_path / "recipe.yaml", lanes=4 // first, steps=6, eval_every=2, eval_batches=4 * first)
    whole, parts = tmp_path / "whole", tmp_path / "parts"

    def run(processes: int, out: Path, *arguments: str) -> None:
        if processes > 1:
            forks.run_ranks(processes, "-m", "fot", "train", recipe, "--out", out, *arguments)
        else:
            assert train(recipe, out, *arguments) == 0

    run(first, whole)
    shutil.copytree(whole, parts)
    for past in ("checkpoints/step-0000006", "checkpoints/best", "model"):
        shutil.rmtree(parts / past)
    run(then, parts, "--resume")
    found, wanted = (
        [json.loads(text) for text in (out / "log.jsonl").read_text().splitlines()] for out in (parts, whole)
    )
    assert [line["step"] for line in found] == [1, 2, 3, 4, 5, 6]
    assert found[:4] == wanted[:4]
    for one, two in zip(found, wanted, strict=True):
        for name in {*one} - {"time", "memory_bytes", "tokens_per_second", "run_tokens_per_second"}:
            assert one[name] == pytest.approx(two[name], rel=1e-5), name
    state = json.loads((parts / "checkpoints/step-0000006/state.json").read_text())
    assert len(state["data"]) == first, "the shares of the data stay"
    assert state["recipe"]["lanes"] == 4 // first
    one, two = (load_file(out / "model/model.safetensors") for out in (parts, whole))
    for name in two:
        torch.testing.assert_close(one[name], two[name], atol=1e-5, rtol=1e-4)
    assert train(recipe, parts, "steps=7", "--resume") == 0, "and with the number before"


def test_callbacks_see_each_record_and_may_end_the_run(tmp_path: Path) -> None:
    recipe = load_recipe(write_recipe(tmp_path / "recipe.yaml"))
    seen: list[dict[str, Any]] = []

    def watch(record: dict[str, Any]) -> bool:
        seen.append(record)
        return record["step"] == 3

    line = train_run(recipe, tmp_path / "out", callbacks=[watch, lambda record: None])
    assert [record["step"] for record in seen] == [1, 2, 3]
    assert line["step"] == 3
    assert "eval_answer_accuracy" in line, "the last step is evaluated"
    assert len(losses(tmp_path / "out")) == 3
    assert (tmp_path / "out/model/model.safetensors").exists()
    line = train_run(recipe, tmp_path / "out", resume=True)
    assert line["step"] == 8


def test_patience_ends_a_run_that_gets_no_better(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", eval_every=1, patience=2, save_every=1, steps=20, result="best")
    scores = iter([0.1, 0.3, 0.2, 0.4, 0.4, 0.3, 0.9])
    monkeypatch.setattr("training.train.build_evaluation", lambda *_: lambda: {"eval_answer_accuracy": next(scores)})
    out = tmp_path / "out"
    assert train(recipe, out) == 0
    assert len(losses(out)) == 6, "two evaluations after the best, at step 4"
    assert json.loads((out / "checkpoints/best/evaluation.json").read_text())["step"] == 4
    # The count goes on where it was.
    scores = iter([0.1, 0.3, 0.2, 0.2, 0.1])
    parts = tmp_path / "parts"
    assert train(recipe, parts, "steps=3") == 0
    assert train(recipe, parts, "--resume") == 0
    assert len(losses(parts)) == 4


def test_a_line_now_and_then_where_there_is_no_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml")
    assert train(recipe, tmp_path / "one") == 0
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("step")]
    assert [line.split(":")[0] for line in said] == ["step 1 of 8", "step 8 of 8"]
    assert "loss 4." in said[0]
    assert "left" in said[0]
    monkeypatch.setattr(training.progress, "INTERVAL", 0.0)
    assert train(recipe, tmp_path / "two") == 0
    assert sum(line.startswith("step") for line in capsys.readouterr().err.splitlines()) == 8


@pytest.mark.parametrize(
    ("command", "count"),
    [
        ("python -m accelerate.commands.launch --num_processes 2 -m fot train x", 2),
        ("accelerate launch --num-processes=4 -m fot train x", 4),
        ("accelerate launch --config_file {config} -m fot train x", 3),
        ("bash", None),
    ],
)
def test_processes_that_accelerate_did_not_start(
    command: str, count: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("compute_environment: LOCAL_MACHINE\nnum_processes: 3\n")
    words = command.format(config=config).split()
    monkeypatch.setattr("accelerate.commands.config.config_args.default_config_file", str(tmp_path / "none.yaml"))
    assert asked_processes(words) == count
    monkeypatch.setattr(training.launch, "_launching_command", lambda: words)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert train(write_recipe(tmp_path / "recipe.yaml", **FEW), tmp_path / "out") == 0
    said = capsys.readouterr().err
    if count is None:
        assert "accelerate" not in said
    else:
        assert f"accelerate was asked for {count} processes but started only one" in said
        assert f"torchrun --nproc_per_node {count} -m fot train" in said


def test_weights_after_a_resume_are_those_of_an_undisturbed_run(begun: Path, tmp_path: Path) -> None:
    status, out = resumed(begun, tmp_path, steps=4)
    assert status == 0
    assert train(tmp_path / "recipe.yaml", tmp_path / "whole") == 0
    found, wanted = (load_file(place / "model/model.safetensors") for place in (out, tmp_path / "whole"))
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_trackers_of_accelerate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", **(FEW | {"trackers": ["wandb"]}))
    monkeypatch.setattr(accelerate.tracking, "_available_trackers", [])
    assert train(recipe, tmp_path / "out") == 2
    assert "trackers: wandb needs its package: pip install wandb" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    told: list[Any] = []

    class Wandb(accelerate.tracking.GeneralTracker):
        name, requires_logging_directory = "wandb", False

        def __init__(self, run_name: str, **_: Any) -> None:
            told.append(run_name)

        tracker = None

        def store_init_configuration(self, values: dict[str, Any]) -> None:
            told.append(values)

        def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
            told.append((step, values["loss"]))

        def finish(self) -> None:
            told.append("end")

    monkeypatch.setattr(accelerate.tracking, "_available_trackers", [LoggerType.WANDB])
    monkeypatch.setitem(accelerate.tracking.LOGGER_TYPE_TO_CLASS, "wandb", Wandb)
    assert train(recipe, tmp_path / "out") == 0
    assert told[0] == "fot"
    assert told[1]["steps"] == 2
    assert json.loads(told[1]["memory"])["mem_layers"] == [1]
    assert told[2:] == [*losses(tmp_path / "out"), "end"]


def test_warnings_come_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    import training.train as loop

    real, shown = loop.learning_rate_at, []

    def warning(*args: Any) -> float:
        with warnings.catch_warnings():  # resets what Python remembers
            pass
        warnings.warn("over and over", UserWarning, stacklevel=1)
        return real(*args)

    monkeypatch.setattr(loop, "learning_rate_at", warning)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, *_, **__: shown.append(str(message))
        assert train(write_recipe(tmp_path / "recipe.yaml"), tmp_path / "out") == 0
    assert shown.count("over and over") == 1


def test_mfu_is_the_share_of_the_peak(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", **FEW)
    assert train(recipe, tmp_path / "out", "--peak-tflops", "0.5") == 0
    lines = [json.loads(text) for text in (tmp_path / "out/log.jsonl").read_text().splitlines()]
    shape = SMALL["model"]
    weights = 3 * (4 * 32 * 32 + 3 * 32 * 64) + 64 * 32  # the table of embeddings is looked up, the head multiplied
    for line in lines:
        keys = 40 * (shape["num_hidden_layers"] + line["d"])
        flops = 6 * weights + 12 * 32 * keys
        assert line["mfu"] == pytest.approx(flops * line["tokens_per_second"] / 0.5e12)
    assert train(recipe, tmp_path / "none") == 0
    assert "mfu" not in json.loads((tmp_path / "none/log.jsonl").read_text().splitlines()[0])
