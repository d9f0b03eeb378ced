"""fot.pretrained: names to checkpoints, tokenizers, clear errors. No network."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pretrained_helpers import make_complete, tiny_folder, tiny_gguf
from transformers import AutoModelForCausalLM

from fot import pretrained, smollm2
from fot.checkpoint import Checkpoint, CheckpointUnavailable, cache_dir, gguf_options
from fot.pretrained import load_tokenizer, resolve

# --- names -----------------------------------------------------------------------------------------------------------


def test_hub_aliases_give_id_and_memory_layers():
    assert resolve("open-llama-3b") == Checkpoint(
        "open-llama-3b", "openlm-research/open_llama_3b", mem_layers=(6, 12, 18)
    )
    assert resolve("long-llama-code-7b").mem_layers == (8, 16, 24)
    assert set(pretrained.aliases()) == {
        *("open-llama-3b", "open-llama-3b-v2", "open-llama-7b", "smollm2-135m"),
        *("long-llama-3b", "long-llama-3b-v1.1", "long-llama-code-7b"),
    }
    for name, source in pretrained.aliases().items():
        if name != "smollm2-135m":
            assert resolve(name).path == source
            assert resolve(source) == Checkpoint(source, source)


def test_folder_and_hub_id(tmp_path, monkeypatch):
    folder = tiny_folder(tmp_path / "tiny")
    assert resolve(folder) == resolve(str(folder)) == Checkpoint(str(folder), str(folder))
    monkeypatch.chdir(tmp_path)
    assert resolve("tiny").path == "tiny"  # a bare name, as it exists
    assert resolve("org/some_Model-1.5") == Checkpoint("org/some_Model-1.5", "org/some_Model-1.5")


def test_alias_wins_over_a_folder_of_that_name_unless_written_as_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_complete(tmp_path / "open-llama-3b")
    assert resolve("open-llama-3b").path == "openlm-research/open_llama_3b"
    assert resolve("./open-llama-3b").path == resolve(Path("open-llama-3b")).path == "open-llama-3b"


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    make_complete(tmp_path / "mine")
    assert resolve("~/mine") == Checkpoint("~/mine", str(tmp_path / "mine"))


def test_folder_without_config(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config\.json.*save_pretrained"):
        resolve(tmp_path)
    (tmp_path / "m.Q4.gguf").touch()
    with pytest.raises(FileNotFoundError, match=r"name the file itself: .*m\.Q4\.gguf"):
        resolve(tmp_path)


def test_gguf_file(tmp_path):
    path = tiny_gguf(tmp_path / "tiny.gguf")
    checkpoint = resolve(path)
    assert checkpoint == Checkpoint(str(path), str(tmp_path), gguf_file="tiny.gguf")
    assert len(load_tokenizer(checkpoint)) == 262
    model = AutoModelForCausalLM.from_pretrained(checkpoint.path, **gguf_options(checkpoint))
    assert type(model.model.layers[0].mlp.up_proj) is torch.nn.Linear
    assert gguf_options(Checkpoint("a", "a")) == {}


def test_other_file_is_refused(tmp_path):
    path = tmp_path / "model.bin"
    path.touch()
    with pytest.raises(ValueError, match=r"model\.bin' is a file but not a \.gguf"):
        resolve(path)


@pytest.mark.parametrize(
    "path", ["./no", "../no", "/no", "~/no", "no.gguf", "a/no.gguf", "runs/a/no", "runs/", Path("no"), Path("a/no")]
)
def test_missing_path_is_not_a_hub_id(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"no file or folder at '{path}'"):
        resolve(path)


@pytest.mark.parametrize(
    ("typo", "meant"),
    [("smollm-135m", "smollm2-135m"), ("open_llama_3b", "open-llama-3b"), ("LongLLaMA-3B", "long-llama-3b")],
)
def test_typo_is_answered_with_close_aliases(typo, meant, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"unknown model '{typo}'; did you mean .*{meant}") as caught:
        resolve(typo)
    assert all(name in str(caught.value) for name in pretrained.aliases())


@pytest.mark.parametrize("name", ["", "zzz", "two words", "org/with space"])
def test_unknown_name(name):
    with pytest.raises(ValueError, match=f"unknown model '{name}'; give an alias") as caught:
        resolve(name)
    assert "did you mean" not in str(caught.value)


def test_cache_dir_order(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("FOT_CACHE", raising=False)
    assert cache_dir() == Path("/home/someone/.cache/fot")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_dir() == Path("/xdg/fot")
    monkeypatch.setenv("FOT_CACHE", "~/own")
    assert cache_dir() == Path("/home/someone/own")


def test_import_is_light():
    code = "import sys\nfrom fot import pretrained\nprint([m for m in ('torch', 'transformers') if m in sys.modules])"
    source = f"import sys, types; p = types.ModuleType('fot'); p.__path__ = ['fot']; sys.modules['fot'] = p\n{code}"
    root = Path(pretrained.__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", source], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- tokenizer and hub errors ----------------------------------------------------------------------------------------

HUB = Checkpoint("org/name", "org/name")


def test_tokenizer_of_unreachable_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointUnavailable) as caught:
        load_tokenizer(Checkpoint("nobody/no-such-model", "nobody/no-such-model"))
    assert str(caught.value).startswith("cannot load 'nobody/no-such-model': the hub cannot be reached")
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value.__cause__, OSError)


@pytest.mark.parametrize(
    ("cause", "text"),
    [
        ("GatedRepoError", "it is gated; accept its terms at https://huggingface.co/org/name"),
        ("RepositoryNotFoundError", "no such model, or it is private"),
        ("LocalEntryNotFoundError", "cannot be reached"),
        (None, "org/name has no file named model.safetensors; connect once"),
    ],
)
def test_hub_errors_become_one_line(cause, text, tmp_path, monkeypatch):
    from huggingface_hub import errors

    monkeypatch.chdir(tmp_path)
    long = OSError("org/name has no file named model.safetensors.\nCheckout 'https://huggingface.co/org/name'\n")
    if cause is not None:
        kind = getattr(errors, cause)
        long.__cause__ = kind.__new__(kind)  # its __init__ wants an HTTP response
    with pytest.raises(CheckpointUnavailable) as caught, pretrained.hub_errors(HUB):
        raise long
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is long


def test_hub_errors_leave_local_and_own_errors_alone(tmp_path):
    error = OSError("disk")
    with pytest.raises(OSError, match=r"^disk$") as caught, pretrained.hub_errors(Checkpoint("x", str(tmp_path))):
        raise error
    assert caught.value is error
    own = CheckpointUnavailable("mine")
    with pytest.raises(CheckpointUnavailable, match=r"^mine$"), pretrained.hub_errors(HUB):
        raise own


def test_folder_without_tokenizer(tmp_path):
    with pytest.raises(ValueError, match=r"tiny' has no tokenizer: put its tokenizer\.json"):
        load_tokenizer(resolve(tiny_folder(tmp_path / "tiny")))


def test_tokenizer_never_runs_or_asks_about_remote_code(tmp_path, monkeypatch):
    """LongLLaMA's folder names its own modelling code; its tokenizer is a plain one."""
    smollm2._convert(tiny_gguf(tmp_path / "tiny.gguf"), tmp_path / "long")
    saved = json.loads((tmp_path / "long" / "config.json").read_text())
    saved |= {"model_type": "longllama", "auto_map": {"AutoConfig": "configuration_longllama.LongLlamaConfig"}}
    (tmp_path / "long" / "config.json").write_text(json.dumps(saved))
    (tmp_path / "long" / "configuration_longllama.py").write_text("raise SystemExit('ran')")
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("asked"))
    assert len(load_tokenizer(resolve(tmp_path / "long"))) == 262
