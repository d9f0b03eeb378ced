"""Load a model by name and give it a memory."""

import logging
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from transformers import AutoConfig

import fot.longllama  # noqa: F401  registers the Auto classes
from fot import pretrained
from fot.adapter import apply_adapter, read_description, replaced_modules
from fot.auto import load_plain
from fot.checkpoint import Checkpoint, gguf_options
from fot.config import CONFIG_KEY, MemoryConfig, merged
from fot.families import resolve_settings
from fot.model import FoTForCausalLM, attach_memory
from fot.names import lasting_name
from fot.quantized import spare

logger = logging.getLogger(__name__)

SETTINGS = tuple(field.name for field in fields(MemoryConfig))
# What says where a checkpoint is to be had from: it holds for the weights and for the tokenizer beside them.
HUB_OPTIONS = ("revision", "cache_dir", "token", "subfolder", "local_files_only", "force_download", "proxies")


def load_model(name_or_path: str | Path, *args: Any, **kwargs: Any) -> FoTForCausalLM:
    """What ``FoTForCausalLM.from_pretrained`` does; see there."""
    settings = {name: kwargs.pop(name) for name in SETTINGS if name in kwargs}
    hub = {name: kwargs[name] for name in HUB_OPTIONS if name in kwargs}
    checkpoint = pretrained.find(name_or_path, **hub)
    if checkpoint.adapter is not None:
        if hub.get("subfolder"):
            raise ValueError(
                f"subfolder is {hub['subfolder']!r}, but {name_or_path} is an adapter: give the adapter's own folder, "
                "without a subfolder"
            )
        hub.pop("revision", None)  # the adapter's, not its base model's
        kwargs.pop("revision", None)
    adapters = [folder for folder in (*checkpoint.under, checkpoint.adapter) if folder is not None]
    options = {"trust_remote_code": False} | gguf_options(checkpoint) | kwargs
    if options.get("quantization_config") is not None:
        replaced = [module for folder in adapters for module in replaced_modules(folder)]
        options["quantization_config"] = spare(options["quantization_config"], replaced)
    with pretrained.hub_errors(checkpoint):
        plain = load_plain(checkpoint.path, *args, **options)
    for folder in adapters:
        apply_adapter(plain, folder)
    model: Any = attach_memory(plain, _merge(plain.config, checkpoint, settings))
    model.eval()
    model.tokenizer = _tokenizer_or_none(checkpoint, hub)
    model.loaded_as = lasting_name(name_or_path)
    return model


def load_config(name_or_path: str | Path, dtype: str, **settings: Any) -> tuple[Any, MemoryConfig]:
    """The configuration of a checkpoint and its memory settings, resolved, without its weights.

    Args:
        name_or_path: as for ``FoTForCausalLM.from_pretrained``.
        dtype: in which the model would be loaded (``bfloat16``).
        settings: settings of ``MemoryConfig`` that override the checkpoint's.
    """
    checkpoint = pretrained.find(name_or_path)
    options = {} if checkpoint.gguf_file is None else {"gguf_file": checkpoint.gguf_file}
    with pretrained.hub_errors(checkpoint):
        config = AutoConfig.from_pretrained(checkpoint.path, trust_remote_code=False, **options)
    return config, resolve_settings(_merge(config, checkpoint, settings), config, dtype, f"a {config.model_type} model")


def _merge(config: Any, checkpoint: Checkpoint, settings: dict[str, Any]) -> MemoryConfig:
    """Settings asked for, over those of an adapter or the checkpoint's config.json, over those known for its alias."""
    adapters = [folder for folder in (*checkpoint.under, checkpoint.adapter) if folder is not None]
    described = [memory for folder in adapters if (memory := read_description(folder).memory) is not None]
    if described:
        saved = described[-1]
    elif config.model_type == "longllama":
        saved = config.memory_config()
    else:
        saved = MemoryConfig.from_dict(getattr(config, CONFIG_KEY, None) or {})
    if saved.mem_layers is None:
        saved = replace(saved, mem_layers=checkpoint.mem_layers)
    return MemoryConfig(**merged(asdict(saved), settings))


def _tokenizer_or_none(checkpoint: Checkpoint, hub: dict[str, Any]) -> Any:
    try:
        return pretrained.load_tokenizer(checkpoint, **hub)
    except pretrained.NoTokenizer:
        return None  # a folder of weights alone; only ingesting text needs one, and says so
    except (OSError, ValueError) as error:
        logger.warning("%s is loaded without a tokenizer: %s", checkpoint.name, error)
        return None
