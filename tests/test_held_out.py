"""Loss of held-out text with a memory and without: what inference gives, in the log and for the best weights."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate import Accelerator
from conftest import FAMILIES, WINDOW, ModelMaker

from fot.cli import main
from fot.config import MemoryConfig
from training.crossbatch import enable_crossbatch
from training.evaluation import score
from training.held_out import build_held_out, held_out_losses
from training.recipe import Recipe
from training.step import Step


def write_text(folder: Path, count: int, name: str = "a.txt") -> str:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("".join(chr(97 + (n * n + n // 7) % 26) for n in range(count)))
    return str(folder)


# How families differ has nothing to do with how windows are cut.
CUTS = [("llama", isolated, overlap) for isolated in (False, True) for overlap in (0, 5)]
CUTS += [(family, False, 5) for family in FAMILIES if family != "llama"]


@pytest.mark.parametrize(("family", "isolated", "overlap"), CUTS)
def test_losses_are_those_of_a_model_with_memory_attached(
    family: str, isolated: bool, overlap: int, make_plain: ModelMaker, make_model: ModelMaker, tokenizer: Any,
    tmp_path: Path,
) -> None:  # fmt: skip
    """Each scored window after ingesting what precedes it, sizes that are whole windows and others."""
    settings = {"isolated_windows": isolated, "window_overlap": overlap, "full_weight_tokens": 4 * overlap}
    settings["newest_full_weight"] = 2 * overlap
    recipe = Recipe(
        tasks=[{"kind": "dictionary"}],
        held_out=[{"path": write_text(tmp_path / "texts", 400)}],
        lanes=2,
        windows=2,
        eval_batches=2,
        held_out_memory=[WINDOW, 3 * WINDOW + 3],
    )
    config = MemoryConfig(mem_layers=(1, 3), local_context=WINDOW, **settings).resolve(5, 64, "float32")
    held_out = build_held_out(recipe, config, tokenizer)
    assert held_out is not None
    assert len(held_out.texts) == 4
    assert held_out.names == ["held_out_loss", "held_out_loss_memory_16", "held_out_loss_memory_51"]
    model = make_plain(family)
    crossbatch = enable_crossbatch(model, config)
    with torch.no_grad():
        found = held_out_losses(held_out, recipe, Step(model, crossbatch), crossbatch, Accelerator(cpu=True))
    reader = make_model(family, **settings)
    for size, name in zip((0, *held_out.sizes), held_out.names, strict=True):
        losses = []
        for text in held_out.texts:
            memory = reader.new_memory()
            if size:
                reader.ingest(text[-WINDOW - size : -WINDOW], memory, progress=False)
            last = text[None, -WINDOW:]
            losses.append(reader(last, labels=last, memory=memory if size else None).loss.item())
        assert found[name] == pytest.approx(sum(losses) / len(losses), abs=1e-4), name
    assert len({round(loss, 3) for loss in found.values()}) == 3


def test_sizes_fit_the_texts_or_are_refused(tokenizer: Any, tmp_path: Path) -> None:
    def of(count: int, **settings: Any) -> Any:
        recipe = Recipe(
            tasks=[{"kind": "dictionary"}], held_out=[{"path": write_text(tmp_path / "texts", count)}], **settings
        )
        return build_held_out(recipe, MemoryConfig(mem_layers=(1,), local_context=8), tokenizer)

    assert of(200).sizes == (16, 64)
    assert of(40).sizes == (16,)
    assert of(10).sizes == ()
    assert (
        build_held_out(
            Recipe(tasks=[{"kind": "dictionary"}]), MemoryConfig(mem_layers=(1,), local_context=8), tokenizer
        )
        is None
    )
    with pytest.raises(ValueError, match="the longest text has 7 tokens, but a window of 8 needs 8"):
        of(7)
    with pytest.raises(ValueError, match="a window of 8 after a memory of 64 needs 72: give longer texts, or smaller"):
        of(60, held_out_memory=[16, 64])
    with pytest.raises(ValueError, match=r"held_out_memory\[0\] is 0; it must be at least 1"):
        of(60, held_out_memory=[0])


def test_the_best_is_best_by_answers_or_by_the_largest_memory_or_as_told() -> None:
    losses = {"held_out_loss": 3.0, "held_out_loss_memory_64": 2.0, "held_out_loss_memory_512": 2.5}
    assert score(losses, None) == -2.5
    assert score(losses | {"eval_answer_accuracy": 0.5}, None) == 0.5
    assert score(losses | {"eval_answer_accuracy": 0.5}, "held_out_loss_memory_64") == -2.0
    assert score({"held_out_loss": 3.0}, None) == -3.0
    assert score({}, None) is None
    assert score(losses, "eval_answer_accuracy") is None


@pytest.fixture
def text_recipe(tmp_path: Path, make_plain: ModelMaker, tokenizer: Any) -> Path:
    """Plain text alone: one text to train on, one held out."""
    make_plain().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    path = tmp_path / "recipe.yaml"
    settings = {
        "model": str(tmp_path / "base"), "memory": {"mem_layers": [1, 3], "local_context": WINDOW},
        "sources": [{"path": write_text(tmp_path / "texts", 3000)}],
        "held_out": [{"path": write_text(tmp_path / "held", 400)}],
        "contexts": {"values": [3]}, "steps": 4, "eval_every": 2, "eval_batches": 1, "dtype": "float32",
    }  # fmt: skip
    path.write_text(yaml.safe_dump(settings))
    return path


def test_a_run_on_text_says_what_it_measures(text_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Losses with memory and without beside each other; no answers; no negatives in one text, which is said once."""
    out = tmp_path / "out"
    best = ["result=best", "best_by=held_out_loss_memory_32"]
    assert main(["train", str(text_recipe), *best, "--out", str(out)]) == 0
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    losses = {"held_out_loss", "held_out_loss_memory_32", "held_out_loss_memory_128"}
    assert [losses <= set(line) for line in lines] == [False, True, False, True]
    assert all(0 <= line["token_accuracy"] < 1 and "answer_accuracy" not in line for line in lines)
    said = capsys.readouterr().err
    assert said.count("no window has a negative") == 1
    assert "4 lanes read 1 different" in said
    kept = json.loads((out / "checkpoints/best/evaluation.json").read_text())
    evaluated = {line["step"]: line["held_out_loss_memory_32"] for line in lines if "held_out_loss" in line}
    assert kept["step"] == min(evaluated, key=lambda step: evaluated[step])


def test_what_would_mean_nothing_is_refused(text_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    def told(*overrides: str) -> str:
        assert main(["train", str(text_recipe), *overrides, "--out", str(tmp_path / "out")]) == 2
        return capsys.readouterr().err

    assert "a recipe without tasks has no answers" in told("contexts={kind: accuracy, values: [1, 4], at: [0.9]}")
    assert "best_by is 'eval_answer_accuracy', but this run measures held_out_loss" in told(
        "best_by=eval_answer_accuracy"
    )
    assert main(["train", str(text_recipe), "held_out=[]", "steps=1", "--out", str(tmp_path / "none")]) == 0
    assert "names no held_out texts" in capsys.readouterr().err


def test_tokens_per_second_are_of_the_step_alone_and_of_the_run(
    text_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An evaluation between two steps slows the run, and no step."""
    import time

    from training import train

    real = train.build_evaluation

    def slow(*args: Any) -> Any:
        evaluate = real(*args)

        def run() -> dict[str, float]:
            time.sleep(0.8)
            return evaluate()

        return run

    monkeypatch.setattr(train, "build_evaluation", slow)
    assert main(["train", str(text_recipe), "eval_every=1", "steps=3", "--out", str(tmp_path / "out")]) == 0
    lines = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    for number, line in enumerate(lines[1:], start=1):
        assert line["run_tokens_per_second"] < line["tokens"] * (number + 1) / (0.8 * number)
        assert line["tokens_per_second"] > 2 * line["run_tokens_per_second"]
