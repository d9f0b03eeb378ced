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
from fot.loading import load_model
from fot.model import detach_memory
from fot.names import lasting_name
from training.files import whole_folder
from training.recipe import Recipe
from training.setup import PEFT_WRAPPER, resolve_memory, stretch, with_lora

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
        out: the run's folder; the result goes to ``out/model``, or ``out/adapter`` if only a part was trained and the
            model's positions are its own.
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
    memory = recipe.memory_config().to_dict() | {"mem_layers": list(config.layers)}
    if (settings := recipe.tuning().settings) is not None:
        memory |= settings(parameters, config)
        trained = [name for name in trained if name in parameters]
    # Positions are in the configuration, which an adapter has none of.
    as_model = recipe.trainable == "all" or recipe.tuning().whole
    final = out / RESULTS[not as_model]
    with whole_folder(final) as folder:
        if as_model:
            if not recipe.tuning().whole:
                setattr(model.config, CONFIG_KEY, memory)
            if recipe.trainable == "lora":
                merged_model(recipe, parameters).save_pretrained(folder)
            else:
                model.save_pretrained(folder, state_dict=parameters)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
        else:
            from_recipe = MemoryConfig.from_dict(memory)
            description = AdapterDescription(lasting_name(str(recipe.model)), from_recipe, made_by)
            if recipe.trainable == "lora":
                wrapper = model.__dict__[PEFT_WRAPPER]
                wrapper.peft_config["default"].base_model_name_or_path = description.base
                named = {f"base_model.model.{name}": tensor for name, tensor in parameters.items()}  # as peft does
                # else peft asks the hub for the base model, by a name that may be ours, to see if its vocabulary grew
                wrapper.save_pretrained(folder, state_dict=named, save_embedding_layers=False)
                write_description(folder, description)
            else:
                save_adapter(folder, {name: parameters[name] for name in trained}, description)
        for name in ("recipe.json", "data.json", "log.jsonl"):
            if (out / name).exists():
                shutil.copy(out / name, folder / name)
        for path in folder.glob("*.safetensors"):  # safetensors makes its files readable by the owner alone
            shutil.copymode(folder / "recipe.json", path)
    return final


@torch.no_grad()
def merged_model(recipe: Recipe, parameters: dict[str, Tensor]) -> Any:
    """The recipe's model, loaded anew and not quantised, with what was trained merged into it.

    Args:
        recipe: of a run that trained a LoRA.
        parameters: what was trained, whole, by name.

    Returns:
        a plain model in the run's precision.
    """
    model = detach_memory(load_model(str(recipe.model), dtype=recipe.precision()))
    stretch(model, recipe)
    if (prepare := recipe.tuning().prepare) is not None:
        prepare(model, resolve_memory(recipe, model.config))
    wrapper = with_lora(model, recipe)
    for name, tensor in parameters.items():
        model.get_parameter(name).copy_(tensor)
    return wrapper.merge_and_unload()
