"""The search for memory layers."""

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PAPER, ModelMaker
from transformers import PreTrainedTokenizerFast

from fot.cli import main
from fot.evaluation import layers, needles

TEXT = "It was a dark evening in the old town, and nobody would have gone out without need. " * 5


@pytest.fixture
def model(make_model: ModelMaker, tokenizer: PreTrainedTokenizerFast) -> Any:
    model = make_model(local_context=64)
    model.tokenizer = tokenizer
    return model


def test_search_is_greedy_and_gives_settings_back(model: Any) -> None:
    texts, before = [model.tokenizer(TEXT).input_ids], model.memory_config
    found = layers.run(model, texts, count=3, windows=6, needles=2, trials=2)
    assert model.memory_config == before
    assert [len(choice.layers) for choice in found] == [0, 1, 2, 3]
    assert all(set(small.layers) < set(large.layers) for small, large in itertools.pairwise(found))
    alone = [_loss(model, texts, (layer,)) for layer in range(4)]
    assert found[1].layers == (min(range(4), key=lambda layer: alone[layer]),)
    assert found[1].loss == pytest.approx(min(alone), abs=1e-4)


@torch.no_grad()
def _loss(model: Any, texts: list[list[int]], chosen: tuple[int, ...]) -> float:
    """The same by reading the texts with this very set of memory layers."""
    from fot import MemoryConfig, attach_memory

    settings = {"local_context": 64, "isolated_windows": True, "index": "exact"} | PAPER
    attach_memory(model, MemoryConfig(mem_layers=chosen, **settings))
    rng, losses = random.Random(0), []
    for haystack in [needles.make_haystack(model.tokenizer, texts, 6 * 64, 2, rng) for _ in range(2)]:
        memory = model.new_memory()
        model.ingest(haystack.ids, memory)
        for needle in haystack.needles:
            prompt, target = needles.question_ids(model.tokenizer, needle)
            logits = model(torch.tensor([prompt + target[:-1]]), memory=memory).logits[0, len(prompt) - 1 :]
            losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(target), reduction="none"))
    return float(torch.cat(losses).mean())


def test_command(model: Any, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model.save_pretrained(tmp_path / "model")
    model.tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT)
    options = [
        "--count",
        "1",
        "--trials",
        "1",
        "--windows",
        "6",
        "--local-context",
        "64",
        "--device",
        "cpu",
        "--dtype",
        "float32",
    ]
    arguments = [str(tmp_path / "model"), str(tmp_path / "text.txt"), *options]
    assert main(["eval", "layers", *arguments, "--json", str(tmp_path / "out.json")]) == 0
    assert "none" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "out.json").read_text())["results"]) == 2
    assert main(["eval", "layers", *arguments, "--count", "5"]) == 2
    assert "5 memory layers are asked for, but the model has 4" in capsys.readouterr().err
