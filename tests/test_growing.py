"""Perplexity by tokens of memory: what ``ingest`` and plain attention give for the same tokens, place by place."""

import json
import math
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import WINDOW, ModelMaker
from forks import Fork
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from fot.cli import main
from fot.evaluation import growing

Draw = Callable[..., torch.Tensor]
OVERLAP = 4
STEP = WINDOW - OVERLAP


def loss_of(model: Any, text: list[int], start: int, memory: Any) -> torch.Tensor:
    """Losses (WINDOW - 1,) of the window at ``start``."""
    window = torch.tensor(text[start : start + WINDOW])
    return cross_entropy(model(window[None], memory=memory).logits[0, :-1], window[1:], reduction="none")


@torch.no_grad()
@pytest.mark.parametrize("isolated", [True, False])
def test_memory_is_what_ingest_makes_of_the_text_before(make_model: ModelMaker, ids: Draw, isolated: bool) -> None:
    model = make_model(isolated_windows=isolated, window_overlap=OVERLAP)
    text, other = ids(200)[0].tolist(), ids(90, seed=1)[0].tolist()
    found = growing.run(
        model, {"text": text}, [0, 15, 40], places=3, others=[other], others_tokens=STEP + OVERLAP + 1, plain=False
    )
    rows = found["texts"]["text"]["rows"]
    assert [(row["tokens"], row["others"]) for row in rows] == [(0, 0), (16, 0), (16, 16), (40, 0), (40, 16)]
    first, last = -(-(40 - OVERLAP) // STEP), (200 - WINDOW - OVERLAP) // STEP
    starts = [OVERLAP + STEP * step for step in (first, (first + last) // 2, last)]
    for row in rows:
        losses = []
        for start in starts:
            memory = model.new_memory()
            if row["others"]:
                model.ingest(other[: row["others"]], memory)
            if row["tokens"]:
                model.ingest(text[start - row["tokens"] : start], memory)
            losses.append(loss_of(model, text, start, memory if len(memory) else None))
        joint = torch.stack(losses)
        half = (WINDOW - 1) // 2
        assert row["memory"]["inside"] == pytest.approx(math.exp(joint[:, half:].mean()), rel=1e-4)
        assert row["memory"]["start"] == pytest.approx(math.exp(joint[:, :half].mean()), rel=1e-4)
        assert row["losses"] == pytest.approx(joint[:, half:].mean(1).tolist(), rel=1e-4)
    assert len({round(row["memory"]["inside"], 3) for row in rows}) == len(rows)


@torch.no_grad()
@pytest.mark.parametrize("isolated", [True, False])
@pytest.mark.parametrize("places", [2, 9])
def test_the_bar_ends_at_its_total(make_model: ModelMaker, ids: Draw, isolated: bool, places: int) -> None:
    """With places so far apart that some windows are never read, and with places that share theirs."""
    model = make_model(isolated_windows=isolated, window_overlap=OVERLAP)
    text, other = ids(400)[0].tolist(), ids(90, seed=1)[0].tolist()
    for others in ([], [other, other]):
        bar = tqdm(disable=True)
        read: list[int] = []
        bar.update = read.append
        growing.run(model, {"text": text}, [0, 16, 40], places=places, others=others, others_tokens=60, progress=bar)
        assert sum(read) == bar.total


@torch.no_grad()
def test_plain_attention_and_weights(make_model: ModelMaker, make_plain: ModelMaker, ids: Draw) -> None:
    model, plain = make_model(isolated_windows=True, window_overlap=OVERLAP), make_plain()
    text = ids(200)[0].tolist()
    rows = growing.run(model, {"text": text}, [0, 40, 60], places=1)["rows"]
    assert [row["plain"] is None for row in rows] == [False, False, True]  # 64 positions
    start = OVERLAP + STEP * 5  # the first place behind 64 tokens of memory
    half, losses = (WINDOW - 1) // 2, []
    for row in rows[:2]:
        seen = torch.tensor(text[start - row["tokens"] : start + WINDOW])
        losses.append(cross_entropy(plain(seen[None]).logits[0, -WINDOW:-1], seen[-WINDOW + 1 :], reduction="none"))
        assert row["plain"]["inside"] == pytest.approx(math.exp(losses[-1][half:].mean()), rel=1e-4)
    weights = (losses[0] - losses[1])[half:].exp().clamp(max=5)
    expected = (losses[1][half:] * weights).sum() / weights.sum()
    assert rows[1]["plain"]["weighted"] == pytest.approx(math.exp(expected), rel=1e-4)
    assert rows[0]["plain"]["inside"] == pytest.approx(rows[0]["memory"]["inside"], rel=1e-4)


@torch.no_grad()
def test_memory_beside_the_best_plain_context(make_model: ModelMaker, ids: Draw) -> None:
    model = make_model(isolated_windows=True, window_overlap=OVERLAP)
    texts = {name: ids(200, seed=seed)[0].tolist() for seed, name in enumerate(("one", "other"))}
    found = growing.run(model, texts, [0, 40, 60], places=3)
    for text in found["texts"].values():
        best = min(row["plain"]["inside"] for row in text["rows"] if row["plain"])
        for row in text["rows"]:
            difference = math.log(row["memory"]["inside"] / best)
            assert row["beside_plain"][0] == pytest.approx(difference, abs=1e-5)
    # Plain attention over nothing before the window is what no memory is: so these pairs are known.
    found = growing.run(model, texts, [0, 60], places=3)
    pairs = [torch.tensor(text["rows"][1]["losses"]) - torch.tensor(text["rows"][0]["losses"])
             for text in found["texts"].values()]  # fmt: skip
    for text, pair in zip(found["texts"].values(), pairs, strict=True):
        expected = float(pair.mean()), float(pair.std()) / math.sqrt(3)
        assert text["rows"][1]["beside_plain"] == pytest.approx(expected, abs=1e-5)
    joint = found["rows"][1]["beside_plain"]
    assert joint[0] == pytest.approx(float(torch.cat(pairs).mean()), abs=1e-5)
    assert joint[1] == pytest.approx(math.hypot(*(float(pair.std()) for pair in pairs)) / math.sqrt(3) / 2, abs=1e-5)
    alone = growing.run(model, texts, [0, 40], places=1)
    assert [row["beside_plain"] for row in alone["rows"]] == [None, None]


@torch.no_grad()
def test_memory_beside_the_same_context_and_beside_memory_alone(make_model: ModelMaker, ids: Draw) -> None:
    model = make_model(isolated_windows=True, window_overlap=OVERLAP)
    texts = {name: ids(200, seed=seed)[0].tolist() for seed, name in enumerate(("one", "other"))}
    found = growing.run(model, texts, [0, 40, 60], places=3, others=[ids(90, seed=2)[0].tolist()], others_tokens=32)
    for text in found["texts"].values():
        none, some, with_others, long, _ = text["rows"]
        assert (some["tokens"], with_others["others"]) == (40, 28)
        assert [row["plain_losses"] is None for row in text["rows"]] == [False, False, True, True, True]
        assert math.log(some["plain"]["inside"]) == pytest.approx(float(torch.tensor(some["plain_losses"]).mean()))
        for name, row, plain in (
            ("beside_same", some, some["plain_losses"]), ("beside_alone", with_others, some["losses"])
        ):  # fmt: skip
            pairs = torch.tensor(row["losses"]) - torch.tensor(plain)
            expected = float(pairs.mean()), float(pairs.std()) / math.sqrt(3)
            assert row[name] == pytest.approx(expected, abs=1e-5)
        assert none["beside_same"] == pytest.approx((0, 0), abs=1e-5)
        assert (long["beside_same"], with_others["beside_same"], some["beside_alone"]) == (None, None, None)
    joint = found["rows"][1]["beside_same"][0]
    single = [text["rows"][1]["beside_same"][0] for text in found["texts"].values()]
    assert joint == pytest.approx(sum(single) / 2)


def test_text_that_is_too_short(make_model: ModelMaker, ids: Draw) -> None:
    with pytest.raises(ValueError, match=r"short has 50 tokens; a memory of 48 .* take 64: give a smaller --memory"):
        growing.run(make_model(), {"short": ids(50)[0].tolist()}, [48])
    texts, others = {"text": ids(200)[0].tolist()}, [ids(40)[0].tolist()]
    with pytest.raises(ValueError, match="another text has 40 tokens, but its share of --others-tokens is 48"):
        growing.run(make_model(), texts, [16], others=others, others_tokens=48)


def test_command(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out, plot = tmp_path / "out.json", tmp_path / "plot.png"
    texts = []
    for number in range(3):
        texts.append(tmp_path / f"{number}.txt")
        texts[-1].write_text(f"A sentence of text {number} that goes on for a while. " * 6)
    command = ["eval", "perplexity", str(checkpoint), str(texts[0]), str(texts[1]), "--mem-layers", "1,3"]
    command += ["--local-context", "16", "--window-overlap", "0", "--json", str(out)]
    options = ["--places", "2", "--others", str(texts[2]), "--others-tokens", "32", "--plot", str(plot)]
    assert main([*command, "--memory", "0,32", *options, "--base", str(checkpoint)]) == 0
    model, base = json.loads(out.read_text())["models"]
    assert model["rows"] == base["rows"]
    assert [(row["tokens"], row["others"]) for row in model["rows"]] == [(0, 0), (32, 0), (32, 32)]
    assert list(model["texts"]) == [str(path) for path in texts[:2]]
    said = capsys.readouterr().out
    assert f"{model['rows'][1]['memory']['inside']:.2f}" in said
    for number, name in ((1, "beside_plain"), (1, "beside_same"), (2, "beside_alone")):
        difference, error = model["rows"][number][name]
        assert f"{math.expm1(difference):+.2%} ± {error:.2%}" in " ".join(said.split())
    assert plot.stat().st_size > 1000
    assert main([*command, "--places", "2"]) == 2
    assert "--places needs --memory" in capsys.readouterr().err


def test_a_command_that_is_terminated_keeps_its_finished_places(checkpoint: Path, tmp_path: Path) -> None:
    """As after Ctrl-C, and whoever ended it sees that it was ended."""
    text, out, program = tmp_path / "text.txt", tmp_path / "out.json", tmp_path / "told.py"
    text.write_text("A sentence that goes on for a while. " * 200)
    program.write_text(
        "import sys, time\nfrom fot.cli import program\nfrom fot.evaluation import growing\n"
        "losses, places = growing._losses_at, []\n"
        "def told(*args):\n    places.append(losses(*args))\n"
        "    if len(places) == 3:\n        print('third', file=sys.stderr, flush=True)\n        time.sleep(60)\n"
        "    return places[-1]\n"
        "growing._losses_at = told\nprogram()\n"
    )
    command = ["eval", "perplexity", checkpoint, text, "--memory", "0,32", "--places", "50", "--json", out]
    process = Fork(program, *command, "--mem-layers", "1,3", "--local-context", "16", "--window-overlap", "0")
    while not any(line == "third" for line in process.stderr.splitlines()):
        assert process.poll() is None, process.stderr
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == -signal.SIGTERM, process.stderr
    result = json.loads(out.read_text())
    assert result["interrupted"]
    assert result["models"][0]["texts"][str(text)]["places"] == 2
