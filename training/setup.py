"""From a recipe to what the loop needs: model, trained parameters, data."""

import json
import sysconfig
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from fot.adapter import has_unmerged
from fot.config import MemoryConfig
from fot.families import attention_modules
from fot.loading import load_config, load_model
from fot.model import detach_memory
from fot.quantized import nf4
from fot.tasks.dictionary import DictionaryTask
from fot.tasks.task import Task
from training.asked import find_asked, read_asked
from training.batches import DocumentLoader, TaskSource
from training.data import read_documents
from training.frozen import compute_in_float32, train_in_float32
from training.hiding import filler_from
from training.questions import PassageQuestions
from training.recipe import Recipe
from training.shares import LaneLoader
from training.sources import DataSource, describe, find_files
from training.tasks import SyntheticRetrieval

# Documents of a task's filler that are held in memory, tokenised.
FILLER_TOKENS = 4_000_000

# Where choose_trainable leaves the peft model that knows how to save what was trained.
PEFT_WRAPPER = "_peft_wrapper"


def build_model(recipe: Recipe) -> tuple[Any, MemoryConfig, Any]:
    """The plain model to train; its resolved memory settings; its tokenizer or None.

    If all of it is trained, it is in float32. Otherwise it is in the dtype in which frozen weights are held, and
    ``choose_trainable`` makes masters in float32 of what is trained.

    A recipe whose ``model`` is a dictionary starts a new model of these settings from random weights: of the family
    ``model_type``, Llama without one.

    Raises:
        ValueError: the checkpoint is in 4 bits, with a LoRA beside its packed weights.
    """
    if isinstance(recipe.model, dict):
        config = new_config(recipe.model)
        with entry("model"):
            model = AutoModelForCausalLM.from_config(config)
        stretch(model, recipe)
        return model, resolve_memory(recipe, config), None
    loaded: Any = load_model(recipe.model, **_loading_options(recipe))
    tokenizer = loaded.tokenizer
    model = detach_memory(loaded)
    if has_unmerged(model):
        raise ValueError(
            f"recipe: model is {recipe.model!r}, whose LoRA cannot be merged with weights in 4 bits, so nothing can be "
            f"trained over it: fot merge {recipe.model} FOLDER, and set model: FOLDER"
        )
    stretch(model, recipe)
    return model, resolve_memory(recipe, model.config), tokenizer


def stretch(model: Any, recipe: Recipe) -> None:
    """Give a plain model the positions of the recipe's method.

    Raises:
        ValueError: they do not fit the model, or its sequences are longer than they reach.
    """
    with entry("method"):
        recipe.tuning().stretch(model, recipe.factor)
    positions = model.config.max_position_embeddings
    if recipe.length is not None and recipe.length > positions:
        raise ValueError(
            f"recipe: length is {recipe.length}, but with factor {recipe.factor:g} it has {positions} positions: "
            "lower length, or raise factor"
        )


def _loading_options(recipe: Recipe) -> dict[str, Any]:
    """In which dtype the weights of the recipe's checkpoint are loaded, and quantised or not."""
    assert isinstance(recipe.model, str)
    if recipe.trainable == "all":
        return {"dtype": torch.float32}
    # A checkpoint in 16 bits is held so in a run in float32, too; see training.frozen.
    options: dict[str, Any] = {"dtype": torch.bfloat16 if recipe.precision() == torch.bfloat16 else "auto"}
    if recipe.quantization is None:
        return options
    spared: list[str] = []
    if recipe.trainable == "memory":  # what is trained cannot be in 4 bits
        config, _ = load_config(recipe.model, "float32")
        trained = resolve_memory(recipe, config).layers
        spared = [rf".*\.(layers|h)\.{layer}\.(self_attn|self_attention|attention)" for layer in trained]
    return options | {"quantization_config": nf4(recipe.precision(), spared)}


def new_config(settings: dict[str, Any]) -> Any:
    """The configuration of a new model.

    Raises:
        ValueError: a setting that its family does not have, or that does not fit.
    """
    family = settings.get("model_type", "llama")
    try:
        known = set(AutoConfig.for_model(family).to_dict())
    except (KeyError, ValueError):
        raise ValueError(
            f"recipe: model.model_type is {family!r}, which transformers does not know: use for instance llama"
        ) from None
    for key, value in settings.items():
        if key not in known:  # transformers would keep it and not use it
            raise ValueError(f"recipe: model.{key} is {value!r}; {family} models have no such setting: correct the key")
    with entry("model"):
        return AutoConfig.for_model(**({"model_type": "llama"} | settings))


@contextmanager
def entry(place: str) -> Iterator[None]:
    """Put the place in the recipe before what is found wrong with an entry.

    Raises:
        ValueError: whatever was raised within.
    """
    try:
        yield
    except Exception as error:  # transformers has many kinds
        message = str(error).removeprefix("recipe: ") or type(error).__name__
        joint = "." if isinstance(error, PlacedError) else ": "
        raise PlacedError(f"recipe: {place}{joint}{' '.join(message.split())}") from error


class PlacedError(ValueError):
    """Already says where in an entry; an outer entry comes before it."""


def choose_trainable(model: Any, recipe: Recipe, config: MemoryConfig) -> dict[str, Tensor]:
    """Add what the recipe's method adds, and freeze what is not trained; the rest by name, in float32."""
    if (prepare := recipe.tuning().prepare) is not None:
        prepare(model, config)
    if recipe.trainable == "lora":
        # Into the dictionary: as an attribute, the wrapper would become a submodule of what it wraps.
        model.__dict__[PEFT_WRAPPER] = with_lora(model, recipe)
        for name, parameter in model.named_parameters():
            if recipe.tuning().trains_besides(name):
                parameter.requires_grad_(True)
    elif recipe.trainable == "memory":
        model.requires_grad_(False)
        for number, attention in enumerate(attention_modules(model)):
            attention.requires_grad_(number in config.layers)
    train_in_float32(model)
    if recipe.trainable != "all" and recipe.precision() == torch.float32:
        compute_in_float32(model)
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def with_lora(model: Any, recipe: Recipe) -> Any:
    """Put the recipe's LoRA into a model, in place; peft's wrapper around it.

    Raises:
        ValueError: peft does not take the settings.
    """
    from peft import LoraConfig, get_peft_model

    settings: dict[str, Any] = {
        "r": 16,
        "lora_alpha": 32,
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
    } | recipe.lora
    with entry("lora"):
        return get_peft_model(model, LoraConfig(**settings))


def build_loader(
    recipe: Recipe, config: MemoryConfig, tokenizer: Any, *, shares: int = 1, process: int = 0, processes: int = 1
) -> LaneLoader:
    """Batches of a process.

    Args:
        shares: number of processes that began the run, each with ``recipe.lanes``.
        process: number of this process.
        processes: how many there are now.

    Raises:
        ValueError: an entry of the recipe does not fit, or the lanes cannot be divided evenly among the processes.
    """
    tasks = []
    for number, settings in enumerate(recipe.tasks):
        with entry(f"tasks[{number}]"):
            tasks.append(TaskSource(build_task(settings, recipe, config, tokenizer), settings.get("weight", 1.0)))
    sources: list[DataSource | TaskSource] = [*map(data_source, recipe.sources), *tasks]

    def share(number: int) -> DocumentLoader:
        return DocumentLoader(
            sources,
            tokenizer,
            lanes=recipe.lanes,
            windows=recipe.windows,
            window=config.window,
            seed=recipe.seed,
            rank=number,
            world_size=shares,
            align_documents=recipe.tuning().whole,
        )

    return LaneLoader(share, shares=shares, lanes=recipe.lanes, process=process, processes=processes)


def describe_data(recipe: Recipe) -> dict[str, Any]:
    """What a run reads: sources, tasks with their filler, held-out texts, each with its files."""

    def all_of(place: str, entries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        found = []
        for number, settings in enumerate(entries):
            with entry(f"{place}[{number}]"):
                # The path as the recipe has it: where {stdlib} lies differs from machine to machine.
                found.append(describe(data_source(settings)) | {"path": settings["path"]})
        return found

    tasks = []
    for number, task in enumerate(recipe.tasks):
        read: dict[str, Any] = {}
        if "filler" in task:
            read["filler"] = all_of(f"tasks[{number}].filler", task["filler"])
        if "path" in task:
            with entry(f"tasks[{number}]"):
                read["bytes"] = find_asked(task["path"]).stat().st_size
        tasks.append(task | read)
    return {
        "sources": all_of("sources", recipe.sources),
        "tasks": tasks,
        "held_out": all_of("held_out", recipe.held_out),
    }


def check_contexts(recipe: Recipe, shares: int = 1) -> None:
    """Refuse a number of contexts, if the recipe asks for one, that no window of a batch can have.

    Args:
        shares: number of processes that began the run, each with ``recipe.lanes``.

    Raises:
        ValueError: more than there are windows of other documents and earlier ones of its own.
    """
    if not recipe.contexts:
        return
    schedule = recipe.schedule()
    own = min(recipe.windows - 1, schedule.previous_windows)
    lanes = recipe.lanes * shares
    readable = recipe.windows - recipe.memory_config().isolated_windows  # the last window of a lane is read by none
    others = (lanes - 1) * max(1, readable)
    shape = f"{lanes} lanes of {recipe.windows} windows: add lanes or windows, or lower it"
    for number, (positives, negatives) in enumerate(schedule.segments):
        if positives > recipe.windows - 1 or negatives > others:
            raise ValueError(
                f"recipe: contexts.segments[{number}] is {[positives, negatives]}, but a window can have at most "
                f"{[recipe.windows - 1, others]} (positives, negatives) in {shape}"
            )
    for number, d in enumerate(() if schedule.segments else schedule.values):
        if d > own + others:
            raise ValueError(
                f"recipe: contexts.values[{number}] is {d}, but a window can attend to at most "
                f"{own + others} other windows in {shape}"
            )


def check_texts(recipe: Recipe, config: MemoryConfig, tokenizer: Any) -> None:
    """Refuse texts on this machine that do not fill a lane's windows once, or no held-out window.

    Raises:
        ValueError: too short a text.
    """
    for number, settings in enumerate(recipe.sources):
        _check_length(f"sources[{number}]", settings, recipe.windows * config.window + 1, config, tokenizer)
    for number, settings in enumerate(recipe.held_out):
        _check_length(f"held_out[{number}]", settings, config.window, config, tokenizer)


def _check_length(place: str, settings: dict[str, Any], needed: int, config: MemoryConfig, tokenizer: Any) -> None:
    with entry(place):
        if tokenizer is None:
            raise ValueError(f"{settings['path']!r} is text, but the model has no tokenizer: name a model that has one")
        source = data_source(settings)
        if find_files(source) is None:
            return  # on the hub, where looking costs a download
        total = 0
        for ids in read_documents(source, tokenizer):
            total += len(ids)
            if total >= needed:
                return
        raise ValueError(
            f"{settings['path']!r} has {total} tokens, and {needed} are needed for windows of {config.window}: add "
            "text, or lower memory.local_context or windows"
        )


def data_source(settings: dict[str, Any]) -> DataSource:
    """A ``DataSource`` from a recipe's entry; ``{stdlib}`` in its path is the folder of Python's own library."""
    path = str(settings["path"]).replace("{stdlib}", sysconfig.get_path("stdlib"))
    return DataSource.from_dict(settings | {"path": path})


def build_task(settings: dict[str, Any], recipe: Recipe, config: MemoryConfig, tokenizer: Any) -> Task:
    """A task from a recipe's entry: ``kind``, ``weight``, ``filler`` (sources), ``path``, and the task's own settings.

    Raises:
        ValueError: settings that do not fit, or a task of text for a model without a tokenizer.
    """
    own = {key: value for key, value in settings.items() if key not in ("kind", "weight", "filler")}
    shape = {"windows": recipe.windows, "window": config.window}
    if settings["kind"] == "dictionary":
        return DictionaryTask(**(shape | own))
    if tokenizer is None:
        raise ValueError(
            f"kind is {settings['kind']!r}, which is text, but the model has no tokenizer: name a model that has one"
        )
    texts: list[list[int]] = []
    for number, source in enumerate(settings["filler"]):
        with entry(f"filler[{number}]"):
            texts += filler_texts(json.dumps(source, sort_keys=True), tokenizer)
    filler = filler_from(texts, tokenizer)
    own |= {key: tuple(own[key]) for key in ("facts", "passages") if key in own}
    if settings["kind"] == "questions":
        return PassageQuestions(tokenizer, filler, read_asked(own.pop("path")), **(shape | own))
    return SyntheticRetrieval(tokenizer, filler, **(shape | own))


@lru_cache(maxsize=8)
def filler_texts(settings: str, tokenizer: Any) -> tuple[list[int], ...]:
    """``tokenised`` of an entry as JSON; once for all tasks with this filler, and for their evaluation."""
    return tuple(tokenised(json.loads(settings), tokenizer))


def tokenised(settings: dict[str, Any], tokenizer: Any) -> Iterator[list[int]]:
    """Documents of a source as token ids, up to ``FILLER_TOKENS`` in all."""
    total = 0
    for ids in read_documents(data_source(settings), tokenizer):
        total += len(ids)
        yield ids
        if total >= FILLER_TOKENS:
            return


def resolve_memory(recipe: Recipe, config: Any) -> MemoryConfig:
    """The recipe's memory settings, filled in for a model's configuration; a sequence is a window without memory."""
    if recipe.tuning().whole:
        assert recipe.length is not None, "the recipe was checked"
        settings = MemoryConfig(mem_layers=(), local_context=recipe.length, window_overlap=0)
        return settings.resolve(config.num_hidden_layers, recipe.length, "float32")
    with entry("memory"):
        return recipe.memory_config().resolve(config.num_hidden_layers, config.max_position_embeddings, "float32")


def optimizer_for(recipe: Recipe, trained: dict[str, Tensor]) -> torch.optim.Optimizer:
    """The recipe's optimiser of what is trained."""
    groups = [
        {"params": [p for p in trained.values() if p.ndim > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in trained.values() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if recipe.optimizer == "adafactor":
        return torch.optim.Adafactor(groups, lr=recipe.learning_rate)
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=recipe.betas)
