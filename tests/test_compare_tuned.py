"""``fot compare --tuned``: results of training beside methods without, each read in its own way."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from train_helpers import train

import fot
from fot.cli import main
from fot.compare.methods import Setting, opened
from fot.compare.readers import CachedReader, MemoryReader
from fot.compare.results import read_trials
from fot.compare.tuned import find_tuned


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"{number} bottles hang on the wall of room {number * 7 % 91}.\n" for number in range(60)))
    return path


@pytest.fixture(scope="module")
def results(checkpoint: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """name -> NAME=FOLDER of a run with memory, and of one with YaRN."""
    folder = tmp_path_factory.mktemp("runs")
    shared: dict[str, Any] = {"model": str(checkpoint), "trainable": "lora", "lora": {"r": 4}, "lanes": 1,
                              "sources": [{"path": str(text)}], "steps": 1, "learning_rate": 0.01,
                              "dtype": "float32"}  # fmt: skip
    own: dict[str, dict[str, Any]] = {
        "remembers": {"memory": {"mem_layers": [1, 3], "local_context": 32}, "windows": 2},
        "yarn-tuned": {"method": "yarn", "length": 64, "factor": 8, "windows": 1},
    }
    for name, settings in own.items():
        recipe = folder / f"{name}.yaml"
        recipe.write_text(yaml.safe_dump(shared | settings))
        assert train(recipe, folder / name) == 0
    return {"remembers": f"remembers={folder}/remembers/adapter", "yarn-tuned": f"yarn-tuned={folder}/yarn-tuned/model"}


def test_compare_tuned(checkpoint: Path, text: Path, results: dict[str, str], tmp_path: Path,
                       capsys: pytest.CaptureFixture) -> None:  # fmt: skip
    out = tmp_path / "out"
    command = ["compare", str(checkpoint), str(text), "--methods", "plain", "--tasks", "perplexity", "--lengths",
               "200,450", "--whole-up-to", "400", "--local-context", "32", "--out", str(out), "--dtype", "float32",
               "--device", "cpu", "--tuned", results["remembers"], "--tuned", results["yarn-tuned"]]  # fmt: skip
    assert main(command) == 0
    shown = capsys.readouterr().out
    lines = [line.split() for line in shown.splitlines()]
    assert [line[1:5] for line in lines if line[:1] == ["yarn-tuned"]] == [["yes,", "yarn", "64", "200"]]
    assert [line[1:4] for line in lines if line[:1] == ["remembers"]] == [["yes,", "crossbatch", "64"]] * 2
    assert [line[1:3] for line in lines if line[:1] == ["plain"]] == [["no", "64"]]
    losses = {(trial["method"], trial["length"]): trial["figures"]["loss_sum"] for trial in
              read_trials(out / "results.jsonl")}  # fmt: skip
    assert len({loss for (_, length), loss in losses.items() if length == 200}) == 3
    assert json.loads((out / "settings.json").read_text())["tuned"].keys() == {"remembers", "yarn-tuned"}
    assert main([*command[:-2], "--resume"]) == 2
    assert "tuned" in capsys.readouterr().err


@torch.no_grad()
def test_each_is_read_as_it_was_trained_to_be(checkpoint: Path, results: dict[str, str], ids: Any) -> None:
    base: Any = fot.FoTForCausalLM.from_pretrained(checkpoint, dtype="float32")
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    setting, asked = Setting(200, tuned=find_tuned(list(results.values()))), ids(100)[0].tolist()
    found = {}
    for name, kind in (("remembers", MemoryReader), ("yarn-tuned", CachedReader)):
        with opened(name, base, setting) as reader:
            assert isinstance(reader, kind)
            found[name] = reader.feed(reader.read(asked[:-4], lambda tokens: None), asked[-4:], 1)
    folder = results["yarn-tuned"].partition("=")[2]
    plain = fot.detach_memory(fot.FoTForCausalLM.from_pretrained(folder, dtype="float32"))
    torch.testing.assert_close(found["yarn-tuned"][0], plain(torch.tensor([asked])).logits[0, -1])
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())


@pytest.mark.parametrize(("asked", "words"), [
    ("folder", ["NAME=FOLDER", "'folder'"]),
    ("plain=folder", ["'plain' is the name of another method"]),
    ("mine=folder", ["recipe.json", "mine=folder"]),
])  # fmt: skip
def test_wrong_tuned_is_one_line(asked: str, words: list[str], checkpoint: Path, tmp_path: Path,
                                 capsys: pytest.CaptureFixture) -> None:  # fmt: skip
    assert main(["compare", str(checkpoint), "--tuned", asked, "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert all(word in said[0] for word in words)


def test_tuned_is_not_for_positions(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["compare", str(text), "--positions", "--tuned", "a=b", "--out", str(tmp_path / "out")]) == 2
    assert "--tuned" in capsys.readouterr().err
