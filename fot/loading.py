"""Load a model by name and give it a memory."""

from dataclasses import fields
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM

import fot.longllama  # noqa: F401  registers the Auto classes
from fot import pretrained
from fot.config import CONFIG_KEY, MemoryConfig
from fot.model import FoTForCausalLM, attach_memory

SETTINGS = tuple(field.name for field in fields(MemoryConfig))

# LongLLaMA's own names for settings that have another name here.
LONGLLAMA_NAMES = {"local_context": "max_position_embeddings"}


def load_model(name_or_path: str | Path, *args: Any, **kwargs: Any) -> FoTForCausalLM:
    """What ``FoTForCausalLM.from_pretrained`` does; see there."""
    settings = {name: kwargs.pop(name) for name in SETTINGS if name in kwargs}
    checkpoint = pretrained.resolve(name_or_path)
    if checkpoint.gguf_file is not None:
        kwargs["gguf_file"] = checkpoint.gguf_file
    with pretrained.hub_errors(checkpoint):
        model = AutoModelForCausalLM.from_pretrained(checkpoint.path, *args, **kwargs)
    if isinstance(model, FoTForCausalLM):
        saved = model.config.memory_config()
    else:
        saved = saved_settings(model.config)
        if saved.mem_layers is None and checkpoint.mem_layers is not None:
            settings.setdefault("mem_layers", checkpoint.mem_layers)
    model = attach_memory(model, MemoryConfig(**(_as_dict(saved) | settings)))
    model.eval()
    model.tokenizer = _tokenizer_or_none(checkpoint)
    return model


def load_config(name_or_path: str | Path) -> tuple[Any, MemoryConfig]:
    """The configuration of a checkpoint and its memory settings, resolved, without its weights."""
    checkpoint = pretrained.resolve(name_or_path)
    options = {} if checkpoint.gguf_file is None else {"gguf_file": checkpoint.gguf_file}
    with pretrained.hub_errors(checkpoint):
        config = AutoConfig.from_pretrained(checkpoint.path, **options)
    saved = config.memory_config() if config.model_type == "longllama" else saved_settings(config)
    if saved.mem_layers is None and checkpoint.mem_layers is not None:
        saved = MemoryConfig(**(_as_dict(saved) | {"mem_layers": checkpoint.mem_layers}))
    dtype = str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")
    return config, saved.resolve(config.num_hidden_layers, config.max_position_embeddings, dtype)


def saved_settings(config: Any) -> MemoryConfig:
    """The memory settings that an earlier ``save_pretrained`` left in config.json, else the defaults."""
    return MemoryConfig.from_dict(getattr(config, CONFIG_KEY, None) or {})


def _as_dict(config: MemoryConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in SETTINGS}


def _tokenizer_or_none(checkpoint: pretrained.Checkpoint) -> Any:
    try:
        return pretrained.load_tokenizer(checkpoint)
    except (OSError, ValueError):
        return None  # a folder of weights alone; only ingesting text needs one, and says so
