"""Adapters load over their base model by every command, from wherever, and over one another."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate import cpu_offload, disk_offload
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from train_helpers import train
from transformers import LlamaConfig, LlamaForCausalLM

import fot
from fot.adapter import apply_adapter
from fot.cli import main


@pytest.fixture(scope="module")
def project(make_plain: Any, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base model in runs/base, and adapters trained over it and over one another."""
    folder = tmp_path_factory.mktemp("project")
    make_plain("llama").save_pretrained(folder / "runs" / "base")
    tokenizer.save_pretrained(folder / "runs" / "base")
    (folder / "text.txt").write_text("abcdefghi " * 300)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for trainable, model, out in [
            ("lora", "runs/base", "runs/lora"),
            ("memory", "runs/base", "runs/memory"),
            ("lora", "runs/memory/adapter", "runs/both"),
        ]:
            recipe = {
                "model": model, "memory": {"mem_layers": [1, 3], "local_context": 16, "mem_positionals": False},
                "sources": [{"path": "text.txt"}], "trainable": trainable, "steps": 2, "learning_rate": 0.01,
                "dtype": "float32",
            }  # fmt: skip
            (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
            assert train(folder / "recipe.yaml", Path(out)) == 0
    return folder


def logits(model: Any) -> torch.Tensor:
    return model.eval()(torch.arange(3, 15)[None]).logits


@pytest.mark.parametrize("name", ["lora", "memory", "both"])
def test_an_adapter_whose_base_was_a_relative_path_loads_from_another_folder(
    name: str, project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = fot.FoTForCausalLM.from_pretrained(project / "runs" / name / "adapter")
    assert model.memory_config.layers == (1, 3)
    assert model.memory_config.mem_positionals is False
    assert model.tokenizer is not None
    base = fot.FoTForCausalLM.from_pretrained(project / "runs" / "base", mem_layers=(1, 3))
    assert model.fingerprint() != base.fingerprint()
    assert list(model.state_dict()) == list(base.state_dict())


def test_lora_gives_what_peft_gives(project: Path) -> None:
    with torch.no_grad():
        plain = LlamaForCausalLM.from_pretrained(project / "runs" / "base")
        tuned = logits(PeftModel.from_pretrained(plain, project / "runs/lora/adapter").merge_and_unload())
        settings = {"mem_layers": (1, 3), "local_context": 16, "mem_positionals": False}
        wrapped = fot.FoTForCausalLM.from_pretrained(project / "runs/lora/adapter")
        plain = LlamaForCausalLM.from_pretrained(project / "runs" / "base")
        merged = PeftModel.from_pretrained(plain, project / "runs/lora/adapter").merge_and_unload()
        torch.testing.assert_close(logits(wrapped), logits(fot.attach_memory(merged, fot.MemoryConfig(**settings))))
        assert not torch.equal(tuned, logits(LlamaForCausalLM.from_pretrained(project / "runs" / "base")))


def test_plain_lora_needs_no_peft(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = project / "runs/lora/adapter"
    expected = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(project / "runs/base"), adapter)
    merged = expected.merge_and_unload().state_dict()
    monkeypatch.setitem(sys.modules, "peft", None)
    model = LlamaForCausalLM.from_pretrained(project / "runs/base")
    apply_adapter(model, adapter)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, merged[name]), name


@pytest.mark.parametrize("more", [{"use_dora": True}, {"init_lora_weights": "pissa"}, {"alpha_pattern": {"q_proj": 3}}])
def test_more_than_lora_needs_peft(
    project: Path, tmp_path: Path, more: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(project / "runs/lora/adapter", tmp_path / "adapter")
    settings = tmp_path / "adapter/adapter_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | more))
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match="takes peft: pip install"):
        apply_adapter(LlamaForCausalLM.from_pretrained(project / "runs/base"), tmp_path / "adapter")


def test_lora_of_another_model_is_refused(project: Path, tmp_path: Path) -> None:
    other = LlamaForCausalLM(LlamaConfig(vocab_size=16, hidden_size=24, intermediate_size=8, num_attention_heads=2))
    around = get_peft_model(other, LoraConfig(target_modules=["q_proj"]))
    around.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has a LoRA of model\.layers\.\d\.self_attn\.q_proj\.weight of shape"):
        apply_adapter(LlamaForCausalLM.from_pretrained(project / "runs/base"), tmp_path)


def test_lora_over_an_adapter_keeps_both(project: Path) -> None:
    both, memory = (
        fot.FoTForCausalLM.from_pretrained(project / "runs" / name / "adapter") for name in ("both", "memory")
    )
    base = fot.FoTForCausalLM.from_pretrained(project / "runs" / "base", mem_layers=(1, 3))
    weight = "model.layers.1.self_attn.o_proj.weight"
    change = {name: model.state_dict()[weight] - base.state_dict()[weight] for name, model in
              (("both", both), ("memory", memory))}  # fmt: skip
    assert change["memory"].norm() > 0.01
    assert (change["both"] - change["memory"]).norm() < change["both"].norm(), "what the first adapter changed is there"
    assert not torch.equal(change["both"], change["memory"])


@pytest.mark.parametrize("name", ["lora", "memory"])
def test_commands_take_adapters(name: str, project: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    adapter = str(project / "runs" / name / "adapter")
    assert main(["info", adapter]) == 0
    text = tmp_path / "text.txt"
    text.write_text("abcdefghi " * 10)
    memory = str(tmp_path / "memory")
    assert main(["memory", "build", memory, str(text), "--model", adapter, "--local-context", "64"]) == 0, (
        capsys.readouterr()
    )
    assert main(["ask", memory, "a", "--plain", "--max-new-tokens", "2"]) == 0, capsys.readouterr()


def test_relative_bases_are_found_from_the_adapters_folders(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Adapters of earlier versions name them so."""
    shutil.copytree(project, tmp_path / "moved")
    description = tmp_path / "moved/runs/memory/adapter/fot_adapter.json"
    content = json.loads(description.read_text())
    assert Path(content["base"]).is_absolute()
    description.write_text(json.dumps(content | {"base": "runs/base"}))
    monkeypatch.chdir(tmp_path)
    model = fot.FoTForCausalLM.from_pretrained(description.parent)
    assert model.config._name_or_path == str(tmp_path / "moved/runs/base")


def test_a_base_that_is_gone_is_named(project: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(project / "runs/memory/adapter", adapter)
    description = adapter / "fot_adapter.json"
    description.write_text(json.dumps(json.loads(description.read_text()) | {"base": str(tmp_path / "gone")}))
    with pytest.raises(
        FileNotFoundError, match=r"belongs to the base model at .*gone, but nothing is there: .* correct \"base\" in"
    ):
        fot.FoTForCausalLM.from_pretrained(adapter)


@torch.no_grad()
def test_an_adapter_for_weights_that_lie_elsewhere(project: Path, tmp_path: Path) -> None:
    """accelerate keeps the content of offloaded weights; a copy to the meta device would be lost in silence."""
    adapter = project / "runs/memory/adapter"
    expected, before = (LlamaForCausalLM.from_pretrained(project / "runs/base") for _ in range(2))
    apply_adapter(expected, adapter)
    assert not torch.equal(logits(expected), logits(before))
    offloaded = LlamaForCausalLM.from_pretrained(project / "runs/base")
    cpu_offload(offloaded, execution_device=torch.device("cpu"))
    apply_adapter(offloaded, adapter)
    torch.testing.assert_close(logits(offloaded), logits(expected))
    disk_offload(before, tmp_path, execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match="weights are offloaded to the disk"):
        apply_adapter(before, adapter)
    with pytest.raises(ValueError, match="load the model's weights first"):
        apply_adapter(LlamaForCausalLM.from_pretrained(project / "runs/base").to("meta"), adapter)


def test_kinds_of_peft_that_cannot_be_merged_are_named(project: Path, make_plain: Any, tmp_path: Path) -> None:
    around = get_peft_model(make_plain("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    around.peft_config["default"].base_model_name_or_path = str(project / "runs/base")
    around.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"peft's kind PROMPT_TUNING, which cannot be merged"):
        fot.FoTForCausalLM.from_pretrained(tmp_path)


def test_adapters_have_no_subfolders(project: Path) -> None:
    with pytest.raises(ValueError, match=r"subfolder is 'inner', but .* is an adapter: give the adapter's own folder"):
        fot.FoTForCausalLM.from_pretrained(project / "runs/lora/adapter", subfolder="inner")
