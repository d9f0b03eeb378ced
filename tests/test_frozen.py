"""Frozen weights are held in 16 or 4 bits; what is trained has masters in float32; nothing else changes."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from train_helpers import losses, train

import fot
from training.frozen import (
    FrozenEmbedding,
    FrozenLinear,
    _FrozenProduct,
    compute_in_float32,
    forget_scratch,
    train_in_float32,
)
from training.recipe import Recipe
from training.setup import build_model, choose_trainable
from training.step import Step

SETTINGS: dict[str, Any] = {
    "memory": {"mem_layers": [1, 3], "local_context": 16},
    "steps": 3,
    "save_every": 1,
    "learning_rate": 0.01,
    "dtype": "float32",
}


@pytest.fixture(scope="module")
def folder(make_plain: Any, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights, all of them exact in bfloat16, as a checkpoint in bfloat16 and one in float32; and a text."""
    folder = tmp_path_factory.mktemp("frozen")
    model = make_plain("qwen2").bfloat16()
    for name in ("bfloat16", "float32"):
        model.to(getattr(torch, name)).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / "text.txt").write_text("abcdefghi " * 300)
    return folder


def recipe_of(folder: Path, base: str, **changes: Any) -> dict[str, Any]:
    return SETTINGS | {"model": str(folder / base), "sources": [{"path": str(folder / "text.txt")}]} | changes


def prepared(settings: dict[str, Any]) -> tuple[Any, dict[str, torch.Tensor]]:
    recipe = Recipe(**settings)
    model, config, _ = build_model(recipe)
    return model, choose_trainable(model, recipe, config)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("trainable", ["lora", "memory"])
def test_what_is_frozen_takes_two_bytes_and_what_is_trained_four(trainable: str, dtype: str, folder: Path) -> None:
    model, trained = prepared(recipe_of(folder, "bfloat16", trainable=trainable, dtype=dtype))
    assert trained
    assert {tensor.dtype for tensor in trained.values()} == {torch.float32}
    frozen = {name: p for name, p in model.named_parameters() if name not in trained}
    assert {p.dtype for p in frozen.values() if p.ndim > 1} == {torch.bfloat16}
    expected = "lora_" if trainable == "lora" else "self_attn"
    assert all(expected in name for name in trained)
    if trainable == "memory":
        assert {name.split(".")[2] for name in trained} == {"1", "3"}


def test_a_float32_checkpoint_is_held_as_the_recipe_says(folder: Path) -> None:
    for dtype in ("float32", "bfloat16"):
        model, trained = prepared(recipe_of(folder, "float32", trainable="memory", dtype=dtype))
        held = {p.dtype for name, p in model.named_parameters() if name not in trained and p.ndim > 1}
        assert held == {getattr(torch, dtype)}


def test_float32_runs_do_not_depend_on_how_frozen_weights_are_held(folder: Path, tmp_path: Path) -> None:
    """To the last digit, through resuming, checkpointing and the result."""
    found = {}
    for base in ("bfloat16", "float32"):
        settings = recipe_of(folder, base, trainable="memory", checkpointing=base == "bfloat16")
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(settings))
        out = tmp_path / base
        assert train(tmp_path / "recipe.yaml", out, "steps=2") == 0
        assert train(tmp_path / "recipe.yaml", out, "--resume") == 0
        found[base] = losses(out)
    assert len(found["float32"]) == 3
    assert found["bfloat16"] == found["float32"]
    models = [fot.FoTForCausalLM.from_pretrained(tmp_path / base / "adapter", dtype=torch.float32) for base in found]
    for a, b in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("trainable", ["lora", "memory"])
def test_gradients_do_not_depend_on_how_frozen_weights_are_held(trainable: str, folder: Path) -> None:
    ids = torch.arange(3, 19)[None]
    models = [prepared(recipe_of(folder, base, trainable=trainable)) for base in ("bfloat16", "float32")]
    with torch.no_grad():  # peft draws its first weights in the dtype of the base
        for name, tensor in models[0][1].items():
            tensor.add_(0.1)
            models[1][1][name].copy_(tensor)
    for model, _ in models:
        model(ids).logits.square().mean().backward()
    for name, tensor in models[0][1].items():
        assert tensor.grad.norm() > 0
        torch.testing.assert_close(tensor.grad, models[1][1][name].grad, atol=0, rtol=1e-5)


def test_checkpointing_begins_with_the_first_step(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Models come in eval mode, in which transformers keeps all activations."""
    modes = []
    plain = Step.forward

    def forward(self: Step, batch: Any) -> Any:
        modes.append(self.model.training)
        return plain(self, batch)

    monkeypatch.setattr(Step, "forward", forward)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe_of(folder, "float32", checkpointing=True)))
    assert train(tmp_path / "recipe.yaml", tmp_path / "out", "steps=2") == 0
    assert modes == [True, True]


@pytest.mark.parametrize("tied", [False, True])
def test_a_frozen_layer_computes_as_in_float32(tied: bool) -> None:
    """Gradients of its input included, and nothing but its 16-bit weight is kept for them."""
    torch.manual_seed(0)
    inner = torch.nn.Sequential(torch.nn.Embedding(7, 6), torch.nn.Linear(6, 7), torch.nn.LayerNorm(7)).bfloat16()
    if tied:
        inner[1].weight = inner[0].weight
    plain = torch.nn.Sequential(torch.nn.Embedding(7, 6), torch.nn.Linear(6, 7), torch.nn.LayerNorm(7))
    plain.load_state_dict(inner.state_dict())
    inner.requires_grad_(False)
    compute_in_float32(inner)
    assert [type(module) for module in inner][:2] == [FrozenEmbedding, FrozenLinear]
    assert inner[0].weight.dtype == inner[1].weight.dtype == torch.bfloat16
    assert (inner[0].weight is inner[1].weight) == tied
    assert inner[2].weight.dtype == torch.float32
    found, expected = inner(torch.arange(5)), plain(torch.arange(5))
    torch.testing.assert_close(found, expected)
    x, y = (torch.randn(3, 6, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2))
    inner[1](x).square().sum().backward()
    plain[1](y).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    kept = inner[1](x).grad_fn.next_functions[0][0].saved_tensors
    assert [tensor.dtype for tensor in kept] == [torch.bfloat16]


def test_a_weight_that_another_kind_of_layer_shares_becomes_float32() -> None:
    class Scaled(torch.nn.Embedding):
        """As Gemma's: it would give its own dtype to everything after it."""

    inner = torch.nn.Sequential(Scaled(7, 6), torch.nn.Linear(6, 7, bias=False)).bfloat16().requires_grad_(False)
    inner[1].weight = inner[0].weight
    compute_in_float32(inner)
    assert inner[1].weight is inner[0].weight
    assert inner(torch.arange(3)).dtype == torch.float32


def test_masters_are_made_of_what_is_trained_alone() -> None:
    inner = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)).half()
    inner[0].requires_grad_(False)
    train_in_float32(inner)
    assert (inner[0].weight.dtype, inner[1].weight.dtype) == (torch.float16, torch.float32)


def test_memory_layers_of_families_with_other_names_are_trained(tmp_path: Path, tokenizer: Any) -> None:
    """GPT-NeoX calls its attention so; with a pattern of Llama's names, nothing was trained."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
                           num_attention_heads=4, max_position_embeddings=64)  # fmt: skip
    GPTNeoXForCausalLM(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    settings = SETTINGS | {"model": str(tmp_path / "base"), "sources": [{"path": "text.txt"}]}
    settings |= {"memory": {"mem_layers": [1], "local_context": 16}, "trainable": "memory"}
    _, trained = prepared(settings)
    assert trained
    assert all("layers.1.attention" in name for name in trained)


def test_what_ran_in_inference_mode_does_not_hinder_training() -> None:
    torch.manual_seed(0)
    weight = torch.randn(4, 6).bfloat16()
    inputs = torch.randn(3, 6, requires_grad=True)
    forget_scratch()
    with torch.inference_mode():
        _FrozenProduct.apply(inputs.detach(), weight)
    _FrozenProduct.apply(inputs, weight).sum().backward()
    torch.testing.assert_close(inputs.grad, weight.float().sum(0).expand(3, 6))
