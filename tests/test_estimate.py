"""``fot train --estimate`` beside what a step really takes."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import configuration
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

from fot.cli import main
from training.crossbatch import enable_crossbatch
from training.estimate import LiveBytes, estimate, forward_and_backward, widest_contexts
from training.recipe import Recipe
from training.setup import build_model, choose_trainable, optimizer_for


@pytest.fixture(scope="module")
def base(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A layer before that with a memory, and one after it."""
    folder = tmp_path_factory.mktemp("estimate")
    config = configuration("qwen2", use_sliding_window=False, num_hidden_layers=3)
    AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("trainable", "checkpointing", "dtype", "optimizer"),
    [
        ("lora", False, "float32", "adamw"), ("memory", False, "bfloat16", "adafactor"),
        ("all", True, "bfloat16", "adafactor"), ("lora", True, "float32", "adamw"),
        ("memory", True, "float32", "adamw"), ("lora", True, "bfloat16", "adamw"),
    ],
)  # fmt: skip
def test_the_estimate_is_what_real_tensors_take(
    trainable: str, checkpointing: bool, dtype: str, optimizer: Any, base: Path
) -> None:
    """The same count over tensors with content."""
    recipe = Recipe(model=str(base), memory={"mem_layers": [1], "local_context": 16}, trainable=trainable,
                    sources=[{"path": "text.txt"}], lanes=2, windows=3, contexts={"values": [2]}, dtype=dtype,
                    checkpointing=checkpointing, optimizer=optimizer)  # fmt: skip
    found = estimate(recipe)
    model, config, _ = build_model(recipe)
    trained = choose_trainable(model, recipe, config)
    live = LiveBytes()
    crossbatch = enable_crossbatch(model, config)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    crossbatch.contexts = widest_contexts(recipe, 6, 1)
    live.watch_gradients(trained)
    real_optimizer = optimizer_for(recipe, trained)
    with live:
        kept, layer, loss, _ = forward_and_backward(model, crossbatch, recipe, (6, 16), live)
    real_optimizer.step()
    parameters = list(model.parameters())
    assert found.weights == sum(p.numel() * p.element_size() for p in parameters)
    assert found.trained == sum(p.numel() for p in trained.values())
    assert found.trained + found.frozen == sum(p.numel() for p in parameters)
    assert found.gradients == sum(p.grad.numel() * p.grad.element_size() for p in trained.values())
    tensors = [leaf for leaf in tree_leaves(dict(real_optimizer.state)) if isinstance(leaf, torch.Tensor)]
    assert found.optimizer == sum(t.numel() * t.element_size() for t in tensors)
    for mine, real in ((found.kept, kept), (found.layer, layer), (found.loss, loss)):
        assert mine == pytest.approx(real, rel=0.15)
    assert found.tokens == 96


def test_what_is_older_than_the_count_is_not_in_it() -> None:
    """Weights were counted as activations at their first view; checkpointing, which keeps little, showed it."""
    weight, bias = torch.ones(4, 4), torch.ones(4)
    with LiveBytes() as live:
        view = weight[:2].mT
        weight.add_(1)
        assert live.now == 0
        product = view @ torch.ones(2, 3) + bias[:, None]
        assert live.now == product.numel() * product.element_size()


def test_what_the_estimate_depends_on(base: Path) -> None:
    def of(**changes: Any) -> Any:
        settings = {"model": str(base), "memory": {"mem_layers": [1], "local_context": 16}, "dtype": "float32",
                    "sources": [{"path": "text.txt"}], "lanes": 2, "windows": 3, "trainable": "memory"}  # fmt: skip
        return Recipe(**(settings | changes))

    plain = estimate(of())
    assert estimate(of(checkpointing=True)).kept < plain.kept
    assert estimate(of(quantization="nf4")).weights < plain.weights
    assert estimate(of(lanes=4)).activations > 1.8 * plain.activations
    assert estimate(of(optimizer="adafactor")).optimizer < plain.optimizer
    eight = estimate(of(trainable="all"), 8)
    assert eight.tokens == 8 * plain.tokens
    assert eight.on_gpu(8) < eight.on_gpu()


def test_the_command_prints_it_and_writes_nothing(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"model": str(base), "sources": [{"path": "text.txt"}], "trainable": "lora",
                                      "memory": {"mem_layers": [1], "local_context": 16}}))  # fmt: skip
    assert main(["train", str(recipe), "--estimate", "--processes", "8"]) == 0
    said = capsys.readouterr().out
    for words in ("are trained (lora)", "tokens a step", "on a GPU", "on each of 8 GPUs with FSDP", "fits into 24 GB"):
        assert words in said
    assert list(tmp_path.iterdir()) == [recipe]
    assert main(["train", str(recipe)]) == 2
    assert "give --out FOLDER" in capsys.readouterr().err


def test_processes_are_for_the_estimate_alone(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"model": str(base), "sources": [{"path": "text.txt"}], "trainable": "lora"}))
    assert main(["train", str(recipe), "--out", str(tmp_path / "out"), "--processes", "8"]) == 2
    assert "--processes 8 is for --estimate; to train on so many: torchrun" in capsys.readouterr().err
