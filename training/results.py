"""What a run leaves behind: a checkpoint for plain transformers, or an adapter, with all that made it."""

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fot import __version__
from fot.adapter import AdapterDescription, save_adapter, write_description
from fot.config import CONFIG_KEY, MemoryConfig
from fot.names import lasting_name
from training.files import whole_folder
from training.recipe import Recipe
from training.setup import PEFT_WRAPPER

# Folders of results: all weights, or an adapter.
RESULTS = ("model", "adapter")


def write_result(
    out: Path,
    recipe: Recipe,
    model: Any,
    tokenizer: Any,
    config: MemoryConfig,
    parameters: dict[str, Tensor],
    trained: Sequence[str],
    line: dict[str, Any],
) -> Path:
    """Write the result of a run.

    Args:
        out: the run's folder; the result goes to ``out/model``, or ``out/adapter`` if only a part was trained.
        recipe: of the run.
        model: as trained.
        tokenizer: of the model; None for a model started from random weights without one.
        config: resolved memory settings.
        parameters: all of the model's, or those that were trained; whole, by name.
        trained: names of those that were trained.
        line: last line of the log.

    Returns:
        the result's folder.
    """
    made_by = {
        "recipe": recipe.to_dict(),
        "result": line,
        "fot": __version__,
        "torch": torch.__version__,
        "python": sys.version.split()[0],
    }
    final = out / RESULTS[recipe.trainable != "all"]
    with whole_folder(final) as folder:
        if recipe.trainable == "all":
            setattr(model.config, CONFIG_KEY, recipe.memory_config().to_dict() | {"mem_layers": list(config.layers)})
            model.save_pretrained(folder, state_dict=parameters)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
        else:
            settings = MemoryConfig.from_dict(recipe.memory_config().to_dict() | {"mem_layers": config.layers})
            description = AdapterDescription(lasting_name(str(recipe.model)), settings, made_by)
            if recipe.trainable == "lora":
                wrapper = model.__dict__[PEFT_WRAPPER]
                wrapper.peft_config["default"].base_model_name_or_path = description.base
                named = {f"base_model.model.{name}": tensor for name, tensor in parameters.items()}  # as peft does
                wrapper.save_pretrained(folder, state_dict=named)
                write_description(folder, description)
            else:
                save_adapter(folder, {name: parameters[name] for name in trained}, description)
        for name in ("recipe.json", "data.json", "log.jsonl"):
            if (out / name).exists():
                shutil.copy(out / name, folder / name)
        for path in folder.glob("*.safetensors"):  # safetensors makes its files readable by the owner alone
            shutil.copymode(folder / "recipe.json", path)
    return final
