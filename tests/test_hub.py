"""Adapters and memories by the ids of a hub, which is a folder here."""

import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

import fot
from fot import hub
from fot.cli import _parser, main
from fot.commands.serve import _library


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that holds repositories under their ids, in place of the hub."""
    shelf = tmp_path / "shelf"

    class Api:
        def __init__(self, token: str | None = None) -> None:
            pass

        def create_repo(self, repo_id: str, *, repo_type: str, private: bool, exist_ok: bool) -> None:
            (shelf / repo_type / repo_id).mkdir(parents=True, exist_ok=exist_ok)

        def upload_folder(self, *, repo_id: str, repo_type: str, folder_path: Path, ignore_patterns: list[str]) -> str:
            ignore = shutil.ignore_patterns(*ignore_patterns)
            shutil.copytree(folder_path, shelf / repo_type / repo_id, dirs_exist_ok=True, ignore=ignore)
            return f"https://hub/{repo_id}"

    def cached_file(repo_id: str, name: str, **options: Any) -> str | None:
        if not (shelf / "model" / repo_id).is_dir():
            raise OSError(f"{repo_id} is not a valid model identifier")
        place = shelf / "model" / repo_id / name
        return str(place) if place.is_file() else None

    def snapshot_download(repo_id: str, *, repo_type: str = "model", **options: Any) -> str:
        if not (shelf / repo_type / repo_id).is_dir():
            raise OSError(f"the hub has no {repo_id}")
        return str(shelf / repo_type / repo_id)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr("transformers.utils.cached_file", cached_file)
    return shelf


@pytest.fixture
def adapter(make_plain: Any, tokenizer: Any, tmp_path: Path) -> Path:
    """What peft alone writes, over a base with memory settings."""
    model = fot.attach_memory(make_plain("llama"), fot.MemoryConfig(mem_layers=(1, 3), local_context=64))
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "people" / "base")  # found from folders above an adapter by its id
    around = get_peft_model(make_plain("llama"), LoraConfig(r=2, target_modules=["q_proj"]))
    for name, parameter in around.named_parameters():
        if "lora_B" in name:
            torch.nn.init.constant_(parameter, 0.3)
    around.peft_config["default"].base_model_name_or_path = "people/base"
    around.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@torch.no_grad()
def test_an_adapter_goes_to_the_hub_and_comes_back(adapter: Path, shelf: Path, capsys: pytest.CaptureFixture) -> None:
    here = fot.FoTForCausalLM.from_pretrained(adapter)
    assert here.memory_config.layers == (1, 3), "of the base, since peft knows of no memory"
    assert main(["push", str(adapter), "someone/adapter"]) == 0
    assert "https://hub/someone/adapter" in capsys.readouterr().out
    there = fot.FoTForCausalLM.from_pretrained("someone/adapter")
    ids = torch.arange(3, 15)[None]
    assert torch.equal(there(ids).logits, here(ids).logits)
    assert there.fingerprint() == here.fingerprint()
    assert main(["info", "someone/adapter"]) == 0


@torch.no_grad()
def test_merge_writes_what_plain_transformers_loads(adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "merged"
    assert main(["merge", str(adapter), str(out)]) == 0
    ids = torch.arange(3, 15)[None]
    expected = fot.FoTForCausalLM.from_pretrained(adapter)(ids).logits
    torch.testing.assert_close(LlamaForCausalLM.from_pretrained(out)(ids).logits, expected)
    assert fot.FoTForCausalLM.from_pretrained(out).memory_config.layers == (1, 3)
    assert fot.FoTForCausalLM.from_pretrained(out).tokenizer is not None
    assert main(["merge", str(adapter), str(out)]) == 2, "it is there already"


def test_a_memory_goes_to_the_hub_and_answers_from_there(
    adapter: Path, shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("abcdefghi " * 20)
    assert main(["memory", "build", "own.memory", "text.txt", "--model", str(adapter)]) == 0
    assert main(["push", "own.memory", "someone/book"]) == 0
    assert (shelf / "dataset/someone/book/manifest.json").is_file()
    assert not (shelf / "dataset/someone/book/lock").exists()
    assert main(["ask", "someone/book", "a", "--plain", "--max-new-tokens", "2"]) == 0


@pytest.fixture
def book(adapter: Path, shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A memory on the hub, someone/book, made by a model there, someone/adapter."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("abcdefghi " * 80)
    assert main(["push", str(adapter), "someone/adapter"]) == 0
    assert main(["memory", "build", "own.memory", "text.txt", "--model", "someone/adapter"]) == 0
    assert main(["push", "own.memory", "someone/book"]) == 0
    return shelf / "dataset/someone/book"


def test_commands_that_read_take_ids_of_memories(book: Path, capsys: pytest.CaptureFixture) -> None:
    for command in (
        ["info", "someone/book"], ["verify", "someone/book"], ["check", "someone/book"],
        ["append", "someone/book", "text.txt", "--dry-run"], ["sync", "someone/book", "--dry-run"],
    ):  # fmt: skip
        assert main(["memory", *command]) == 0, capsys.readouterr().err
    library = _library(_parser().parse_args(["serve", "someone/book"]))
    assert "book" in library


def test_commands_that_write_refuse_ids_of_memories(book: Path, capsys: pytest.CaptureFixture) -> None:
    def state() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in book.iterdir()}

    before = state()
    for command in (
        ["append", "someone/book", "text.txt"], ["sync", "someone/book"], ["drop", "someone/book", "text.txt"],
        ["compact", "someone/book"],
    ):  # fmt: skip
        assert main(["memory", *command]) == 2
        said = capsys.readouterr().err
        assert "hf download someone/book --repo-type dataset --local-dir FOLDER" in said, command
    assert state() == before


def test_a_memory_that_is_nowhere_is_named(
    shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["ask", "someone/nothing", "a"]) == 2
    assert "no memory at someone/nothing, and none of this id from the hub" in capsys.readouterr().err
    (tmp_path / "runs").mkdir()
    assert hub.memory_folder(Path("runs/typo")) == Path("runs/typo"), "a folder of that name is here"


def test_an_adapter_whose_base_others_do_not_have_is_not_pushed(adapter: Path, shelf: Path) -> None:
    (adapter / "fot_adapter.json").write_text(json.dumps({"format": 1, "base": "/a/b", "memory": None, "made_by": {}}))
    with pytest.raises(ValueError, match=r'set "base" in .* to the id of that model on the hub'):
        hub.push(adapter, "someone/adapter")
    (adapter / "fot_adapter.json").unlink()
    peft = json.loads((adapter / "adapter_config.json").read_text())
    for base in (str(adapter.parent / "people/base"), "../people/base"):
        (adapter / "adapter_config.json").write_text(json.dumps(peft | {"base_model_name_or_path": base}))
        with pytest.raises(ValueError, match=r'set "base_model_name_or_path" in .* to the id of that model on the hub'):
            hub.push(adapter, "someone/adapter")
    assert not (shelf / "model").exists()
    with pytest.raises(ValueError, match="neither a model nor an adapter nor a memory"):
        hub.push(adapter.parent / "shelf", "someone/adapter")
    with pytest.raises(ValueError, match="give org/name"):
        hub.push(adapter, "adapter")
