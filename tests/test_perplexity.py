"""Perplexity: transformers' own loss within a window, and a memory that is read, by every window and not written."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import WINDOW, ModelMaker
from transformers import PreTrainedTokenizerFast

from fot.cli import main
from fot.evaluation import perplexity

Draw = Callable[..., torch.Tensor]


@torch.no_grad()
def test_within_windows_is_the_plain_models_loss(make_model: ModelMaker, make_plain: ModelMaker, ids: Draw) -> None:
    windows = ids(WINDOW, rows=11)
    expected = math.exp(float(make_plain()(windows, labels=windows).loss))
    assert perplexity.within_windows(make_model(), windows) == pytest.approx(expected, rel=1e-4)


def test_windows_are_spread_over_the_text() -> None:
    ids = range(1000)
    rows = perplexity.spread_windows(ids, 10, 5)
    assert [row[0] for row in rows.tolist()] == [0, 200, 400, 600, 800]
    assert all(row == list(range(row[0], row[0] + 10)) for row in rows.tolist())
    assert perplexity.spread_windows(ids, 300, 99).shape == (3, 300)
    with pytest.raises(ValueError, match="9 tokens is shorter than a window of 10"):
        perplexity.spread_windows(range(9), 10, 1)


def test_bound_on_tokens_and_joint_perplexity(make_model: ModelMaker, ids: Draw) -> None:
    texts = {name: ids(count, seed=count)[0].tolist() for name, count in (("long", 300), ("short", 40))}
    found = perplexity.run(make_model(), texts, tokens=10 * WINDOW)
    assert [text["tokens"] for text in found["texts"].values()] == [5 * WINDOW, 2 * WINDOW]
    one, two = (math.log(text["perplexity"]) for text in found["texts"].values())
    assert found["perplexity"] == pytest.approx(math.exp((5 * one + 2 * two) / 7))


@pytest.fixture
def checkpoints(make_plain: ModelMaker, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> list[str]:
    for seed in (0, 1):
        make_plain(seed=seed).save_pretrained(tmp_path / f"m{seed}")
        tokenizer.save_pretrained(tmp_path / f"m{seed}")
    return [str(tmp_path / "m0"), str(tmp_path / "m1")]


def test_command(checkpoints: list[str], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "out.json"
    text.write_text("A sentence of a text that goes on for a while. " * 20)
    options = ["--mem-layers", "1,3", "--local-context", "16", "--tokens", "64", "--json", str(out)]
    command = ["eval", "perplexity", checkpoints[0], str(text), *options]
    assert main([*command, "--base", checkpoints[0]]) == 0
    assert "+0.00%" in capsys.readouterr().out
    assert main([*command, "--base", checkpoints[1]]) == 0
    shown = capsys.readouterr().out
    model, base = json.loads(out.read_text())["models"]
    assert f"{model['perplexity'] / base['perplexity'] - 1:+.2%}" in shown
    assert "+0.00%" not in shown


def test_bad_input(checkpoints: list[str], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    empty, binary = tmp_path / "empty.txt", tmp_path / "binary.txt"
    empty.write_text("")
    binary.write_bytes(b"\xff\xfe\x00\x01")
    for path, message in ((empty, "empty.txt is empty"), (binary, "binary.txt is not UTF-8"), (tmp_path / "no", "no")):
        assert main(["eval", "perplexity", checkpoints[0], str(path), "--local-context", "16"]) == 2
        assert message in capsys.readouterr().err
