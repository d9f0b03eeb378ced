"""Runs over bases in 4 bits (bitsandbytes on the CPU), and their adapters on quantised and on dense bases."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import FAMILIES
from peft import LoraConfig, PeftModel, get_peft_model
from train_helpers import losses, train
from transformers import AutoModelForCausalLM

import fot
from fot.cli import main
from fot.quantized import is_quantised, nf4, spare
from training.recipe import Recipe
from training.setup import build_model, choose_trainable

pytest.importorskip("bitsandbytes")


def make_base() -> Any:
    """A plain model whose rows are whole blocks of 64, as those of trained models are.

    On processors with AVX-512 BF16, bitsandbytes takes no others for inference.
    """
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(FAMILIES["llama"](hidden_size=64, intermediate_size=128)).eval()


@pytest.fixture(scope="module")
def folder(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and adapters trained over it in 4 bits: of lora, of the memory layers, and of lora over the latter."""
    folder = tmp_path_factory.mktemp("quantized")
    make_base().bfloat16().save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    (folder / "text.txt").write_text("abcdefghi " * 300)
    for trainable, model, out in [
        ("lora", "base", "lora"),
        ("memory", "base", "memory"),
        ("lora", "memory/adapter", "both"),
    ]:
        recipe = {
            "model": str(folder / model), "memory": {"mem_layers": [1, 3], "local_context": 16}, "steps": 2,
            "sources": [{"path": str(folder / "text.txt")}], "trainable": trainable, "quantization": "nf4",
            "learning_rate": 0.01, "dtype": "float32", "checkpointing": True, "save_every": 1,
        }  # fmt: skip
        (folder / f"{out}.yaml").write_text(yaml.safe_dump(recipe))
        assert train(folder / f"{out}.yaml", folder / out) == 0
    return folder


def packed(model: Any) -> set[str]:
    return {name for name, parameter in model.named_parameters() if not parameter.is_floating_point()}


def test_runs_over_four_bits_resume_exactly(folder: Path, tmp_path: Path) -> None:
    for out in ("lora", "memory"):
        assert train(folder / f"{out}.yaml", tmp_path / out, "steps=1") == 0
        assert train(folder / f"{out}.yaml", tmp_path / out, "--resume") == 0
        assert losses(tmp_path / out) == losses(folder / out)
        assert len(losses(tmp_path / out)) == 2


def test_positions_are_tuned_over_four_bits_and_merged_without(folder: Path, tmp_path: Path) -> None:
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "out"
    recipe.write_text(yaml.safe_dump({
        "method": "longlora", "model": str(folder / "base"), "length": 64, "factor": 2, "windows": 1, "lanes": 1,
        "sources": [{"path": str(folder / "text.txt")}], "trainable": "lora", "quantization": "nf4", "steps": 2,
        "learning_rate": 0.01, "dtype": "float32",
    }))  # fmt: skip
    assert train(recipe, out) == 0
    base, tuned = (AutoModelForCausalLM.from_pretrained(place) for place in (folder / "base", out / "model"))
    assert not packed(tuned)
    assert tuned.config.rope_parameters["rope_type"] == "linear"
    assert (tuned.dtype, getattr(tuned.config, "quantization_config", None)) == (torch.float32, None)
    before, after = base.state_dict(), tuned.state_dict()
    changed = {name for name in before if not torch.equal(before[name].float(), after[name])}
    assert changed == {name for name in before if "mlp" not in name}, "LoRA in attention, embeddings and norms"


def load(place: Path, **options: Any) -> Any:
    return fot.FoTForCausalLM.from_pretrained(place, dtype=torch.float32, **options)


@pytest.mark.parametrize("name", ["lora", "memory", "both"])
@torch.no_grad()
def test_an_adapter_loads_over_both_kinds_of_base(name: str, folder: Path) -> None:
    ids = torch.arange(3, 15)[None]
    dense = load(folder / name / "adapter")
    quantised = load(folder / name / "adapter", quantization_config=nf4(torch.float32))
    assert not packed(dense)
    assert packed(quantised)
    assert (is_quantised(quantised), is_quantised(dense)) == (True, False)
    assert quantised.memory_config.layers == dense.memory_config.layers == (1, 3)
    before = load(folder / "base", quantization_config=nf4(torch.float32), mem_layers=(1, 3))
    assert quantised.fingerprint() != before.fingerprint()
    if name != "memory":
        under = folder / ("memory/adapter" if name == "both" else "base")
        before = load(under, quantization_config=nf4(torch.float32))
        expected = PeftModel.from_pretrained(before, folder / name / "adapter")(ids).logits
        torch.testing.assert_close(quantised(ids).logits, expected, atol=0, rtol=0)
    if name != "lora":  # what the adapter replaces has no counterpart in 4 bits
        weights, others = (dict(model.named_parameters()) for model in (load(folder / "memory/adapter"), quantised))
        for layer in (1, 3):
            for part in ("q_proj", "o_proj"):
                path = f"model.layers.{layer}.self_attn.{part}"
                found = others.get(f"{path}.weight", others.get(f"{path}.base_layer.weight"))
                assert torch.equal(found, weights[f"{path}.weight"])


def test_two_lora_adapters_count_together_over_four_bits(folder: Path, tmp_path: Path) -> None:
    for number in (1, 2):
        around = get_peft_model(make_base(), LoraConfig(r=2, target_modules=["q_proj"]))
        for parameter_name, parameter in around.named_parameters():
            if "lora_B" in parameter_name:
                torch.nn.init.constant_(parameter, 0.2 * number)
        around.peft_config["default"].base_model_name_or_path = str(folder / "base" if number == 1 else tmp_path / "1")
        around.save_pretrained(tmp_path / str(number))
    model = load(tmp_path / "2", quantization_config=nf4(torch.float32))
    assert model.model.layers[0].self_attn.q_proj.active_adapters == ["adapter0", "adapter1"]


def test_what_is_trained_is_spared_where_the_base_has_other_layers(
    tokenizer: Any, folder: Path, tmp_path: Path
) -> None:
    fot.attach_memory(make_base(), fot.MemoryConfig(mem_layers=(1, 3))).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    sources = [{"path": str(folder / "text.txt")}]
    recipe = Recipe(model=str(tmp_path / "base"), memory={"local_context": 16}, sources=sources, trainable="memory",
                    quantization="nf4", dtype="float32")  # fmt: skip
    model, config, _ = build_model(recipe)
    assert config.layers != (1, 3), "those of a recipe that names none"
    trained = choose_trainable(model, recipe, config)
    assert {int(name.split(".")[2]) for name in trained} == set(config.layers)


@pytest.mark.parametrize("trainable", ["lora", "memory"])
def test_nothing_is_trained_over_lora_in_four_bits(
    trainable: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """The first LoRA would be switched off, or its tensors would stand beside those that replace them."""
    changes = [f"model={folder / 'lora/adapter'}", f"trainable={trainable}"]
    assert train(folder / "lora.yaml", tmp_path / "out", *changes) == 2
    assert f"fot merge {folder / 'lora/adapter'} FOLDER, and set model: FOLDER" in capsys.readouterr().err


def test_weights_that_replace_others_do_not_go_over_lora_in_four_bits(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "memory/adapter", tmp_path / "adapter")
    description = tmp_path / "adapter/fot_adapter.json"
    content = json.loads(description.read_text()) | {"base": str(folder / "lora/adapter")}
    description.write_text(json.dumps(content))
    assert not packed(load(tmp_path / "adapter"))
    with pytest.raises(ValueError, match=r"replaces weights over a LoRA .* load it without quantization"):
        load(tmp_path / "adapter", quantization_config=nf4(torch.float32))


def test_commands_take_adapters_over_four_bits(folder: Path, tmp_path: Path) -> None:
    memory, model = str(tmp_path / "memory"), str(folder / "lora/adapter")
    options = ["--quantization", "nf4", "--dtype", "float32"]
    assert (
        main(["memory", "build", memory, str(folder / "text.txt"), "--model", model, *options, "--local-context", "64"])
        == 0
    )
    assert main(["ask", memory, "a", "--plain", "--max-new-tokens", "2", *options]) == 0


def test_modules_that_an_adapter_replaces_are_spared() -> None:
    config = nf4(torch.float32)
    assert spare(config, []) is config
    assert spare(config, ["a.b"]).llm_int8_skip_modules == [*config.llm_int8_skip_modules, "a.b"]
    assert "a.b" not in config.llm_int8_skip_modules


def test_without_bitsandbytes_the_remedy_is_named(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("fot.quantized.find_spec", lambda name: None)
    assert train(folder / "lora.yaml", tmp_path / "out") == 2
    assert "pip install 'fot[quantization]'" in capsys.readouterr().err


def test_all_weights_cannot_be_trained_in_four_bits(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert train(folder / "lora.yaml", tmp_path / "out", "trainable=all") == 2
    said = capsys.readouterr().err
    assert "quantization is 'nf4'" in said
    assert "set trainable: lora or memory" in said
