"""From a recipe to what the loop needs: model, trained parameters, data."""

import re
import sysconfig
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from fot.config import MemoryConfig
from fot.evaluation.dictionary_data import DictionaryTask
from fot.loading import load_model
from fot.model import detach_memory
from training.batches import DocumentLoader, TaskSource
from training.data import DataSource, describe, read_documents
from training.recipe import Recipe
from training.tasks import SyntheticRetrieval, Task, filler_from

# Documents of a task's filler that are held in memory, tokenised.
FILLER_TOKENS = 4_000_000

# Where choose_trainable leaves the peft model that knows how to save what was trained.
PEFT_WRAPPER = "_peft_wrapper"


def build_model(recipe: Recipe) -> tuple[Any, MemoryConfig, Any]:
    """The plain model to train, in float32 masters; its resolved memory settings; its tokenizer or None.

    A recipe whose ``model`` is a dictionary starts a new model of these settings from random weights: of the family
    ``model_type``, Llama without one.
    """
    if isinstance(recipe.model, dict):
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.for_model(**({"model_type": "llama"} | recipe.model))
        model = AutoModelForCausalLM.from_config(config)
        return model, _resolve(recipe, config), None
    loaded: Any = load_model(recipe.model, dtype=torch.float32)
    tokenizer = loaded.tokenizer
    model = detach_memory(loaded)
    return model, _resolve(recipe, model.config), tokenizer


def choose_trainable(model: Any, recipe: Recipe, config: MemoryConfig) -> dict[str, Tensor]:
    """Freeze what is not trained; the rest by name."""
    if recipe.trainable == "lora":
        from peft import LoraConfig, get_peft_model

        settings: dict[str, Any] = {
            "r": 16,
            "lora_alpha": 32,
            "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
        } | recipe.lora
        # Into the dictionary: as an attribute, the wrapper would become a submodule of what it wraps.
        model.__dict__[PEFT_WRAPPER] = get_peft_model(model, LoraConfig(**settings))
    elif recipe.trainable == "memory":
        pattern = re.compile(r"model\.layers\.(" + "|".join(map(str, config.layers)) + r")\.self_attn\.")
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(bool(pattern.match(name)))
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def build_loader(
    recipe: Recipe, config: MemoryConfig, tokenizer: Any, rank: int = 0, world_size: int = 1
) -> DocumentLoader:
    """Batches of this process."""
    tasks = [
        TaskSource(build_task(entry, recipe, config, tokenizer), entry.get("weight", 1.0)) for entry in recipe.tasks
    ]
    return DocumentLoader(
        [*(data_source(entry) for entry in recipe.sources), *tasks],
        tokenizer,
        lanes=recipe.lanes,
        windows=recipe.windows,
        window=config.window,
        seed=recipe.seed,
        rank=rank,
        world_size=world_size,
    )


def describe_data(recipe: Recipe) -> dict[str, Any]:
    """What a run reads: sources, tasks with their filler, held-out texts, each with its files."""

    def all_of(entries: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        # The path as the recipe has it: where {stdlib} lies differs from machine to machine.
        return [describe(data_source(entry)) | {"path": entry["path"]} for entry in entries]

    return {
        "sources": all_of(recipe.sources),
        "tasks": [task | ({"filler": all_of(task["filler"])} if "filler" in task else {}) for task in recipe.tasks],
        "held_out": all_of(recipe.held_out),
    }


def data_source(entry: dict[str, Any]) -> DataSource:
    """A ``DataSource`` from a recipe's entry; ``{stdlib}`` in its path is the folder of Python's own library."""
    path = str(entry.get("path", "")).replace("{stdlib}", sysconfig.get_path("stdlib"))
    return DataSource.from_dict(entry | {"path": path})


def build_task(entry: dict[str, Any], recipe: Recipe, config: MemoryConfig, tokenizer: Any) -> Task:
    """A task from a recipe's entry: ``kind``, ``weight``, ``filler`` (sources), and the task's own settings."""
    settings = {key: value for key, value in entry.items() if key not in ("kind", "weight", "filler")}
    shape = {"windows": recipe.windows, "window": config.window}
    if entry.get("kind") == "dictionary":
        return DictionaryTask(**(shape | settings))
    if entry.get("kind") == "retrieval":
        filler = filler_from([ids for source in entry["filler"] for ids in tokenised(source, tokenizer)])
        if "facts" in settings:
            settings["facts"] = tuple(settings["facts"])
        return SyntheticRetrieval(tokenizer, filler, **(shape | settings))
    raise ValueError(f"task: kind is {entry.get('kind')!r}; choose retrieval or dictionary")


def tokenised(entry: dict[str, Any], tokenizer: Any) -> Iterator[list[int]]:
    """Documents of a source as token ids, up to ``FILLER_TOKENS`` in all."""
    total = 0
    for ids in read_documents(data_source(entry), tokenizer):
        total += len(ids)
        yield ids
        if total >= FILLER_TOKENS:
            return


def _resolve(recipe: Recipe, config: Any) -> MemoryConfig:
    return recipe.memory_config().resolve(config.num_hidden_layers, config.max_position_embeddings, "float32")
