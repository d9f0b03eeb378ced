"""A recipe: everything that decides a training run, as a YAML or JSON file and command-line overrides."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, Field, ValidationError

from fot.config import MemoryConfig
from fot.machine import default_dtype, find_device
from training.methods import METHODS, Method
from training.methods.fitting import check_method
from training.schedule import ContextSchedule, schedule_from
from training.schema import (
    AboveZeroShare,
    Contexts,
    Decay,
    Factor,
    Lora,
    Memory,
    Natural,
    NotNegative,
    Positive,
    Rate,
    Source,
    TaskEntry,
    Tracker,
    complaint,
    no_true_for_one,
    validator,
)

# Recipes shipped with the package; `fot train NAME` finds them.
SHIPPED = Path(__file__).parent / "recipes"


@dataclass(frozen=True)
class Recipe:
    """One training run.

    Attributes:
        method: how the model is trained for long texts, a name in ``training.methods``: ``crossbatch`` or
            ``memorizing`` on windows; ``interpolation`` of positions, ``yarn``, ``longlora`` or
            ``landmark`` on whole sequences.
        length: tokens of a sequence, for methods that train on whole ones.
        factor: by which these methods stretch the positions that the model was trained with; at least 1.
        model: name, folder or hub id of a model; or the settings of a new model with random weights.
        memory: settings of ``MemoryConfig``: ``mem_layers``, ``local_context``, ``mem_positionals``.
        sources: texts to train on, entries of ``training.sources.DataSource``.
        tasks: synthetic documents, entries of ``training.tasks``, each with ``kind``, ``weight`` and its settings.
        held_out: texts whose loss is measured, without a memory and with one; entries like those of ``sources``. They
            are never trained on.
        held_out_memory: sizes of the memories, in tokens, with which this loss is measured. If it is empty, the sizes
            are 2 and 8 windows, as far as the texts are long enough.
        lanes: number of documents that each process reads side by side.
        windows: number of consecutive windows of each document in a batch (k).
        contexts: settings of ``ContextSchedule``.
        focus: weight of a loss, added to that of the labels, that draws the attention to other windows to those of the
            own document; see ``training.focus``. 0 means none. Only ``crossbatch`` with negatives has it.
        trainable: what is trained: ``all`` parameters, the attention of the ``memory`` layers, or ``lora`` adapters.
        lora: settings of ``peft.LoraConfig`` for ``lora``.
        quantization: ``nf4`` holds the frozen weights in 4 bits (QLoRA, arXiv 2305.14314); it needs bitsandbytes. None
            holds them in 16 bits if ``dtype`` is ``bfloat16`` or the checkpoint has 16 bits, else in float32.
        strength: how far the weights of the result lie on the way from the initial to the trained weights (Wortsman et
            al., arXiv 2109.01903). A number a little below 1 keeps more of the model's abilities and most of what it
            learned. The figures in the log are those of the trained weights.
        result: which weights become the result: those of the ``last`` step or of the ``best`` evaluation.
        best_by: figure of the log that decides which evaluation is best, such as ``held_out_loss_memory_2048``. None
            takes the most right answers, or, without tasks, the lowest held-out loss with the largest memory.
        optimizer: ``adamw`` or ``adafactor``.
        learning_rate: highest learning rate of the run.
        lr_schedule: what follows the warm-up: ``constant``, ``linear`` (to 0), ``cosine`` (to a hundredth),
            ``inverse_sqrt``, or ``warmup_stable_decay`` (constant, then linear to 0 over the last ``decay_steps``).
        warmup_steps: number of steps in which the learning rate rises linearly from 0.
        decay_steps: number of decay steps of ``warmup_stable_decay``; 0 means a tenth of all steps.
        betas: coefficients of AdamW.
        weight_decay: weight decay of matrices; norms and biases have none.
        clip: largest norm of the gradient; 0 turns clipping off.
        accumulation: number of batches in a step (gradient accumulation).
        steps: number of optimiser steps.
        dtype: ``float32``, ``bfloat16`` (with masters in float32 of what is trained), or ``auto``, which takes the
            faster one.
        checkpointing: whether to use gradient checkpointing, memory layers included.
        seed: seed for data, contexts and new weights.
        log_every: number of steps between lines of the log.
        eval_every: number of steps between evaluations; 0 means only one, at the end.
        eval_batches: number of batches in an evaluation.
        patience: number of evaluations without a better one after which the run ends; 0 means never.
        save_every: number of steps between checkpoints.
        tensorboard: whether to write the log's figures to the folder ``tensorboard`` of the run, too.
        trackers: further trackers for the log's figures, by accelerate: ``wandb``, ``mlflow``, ``comet_ml``, ...
    """

    method: Literal["crossbatch", "memorizing", "interpolation", "yarn", "longlora", "landmark"] = "crossbatch"
    length: Positive | None = None
    factor: Factor = 1.0
    model: Annotated[str, Field(min_length=1)] | dict[str, Any] = "smollm2-135m"
    memory: Memory = field(default_factory=dict)
    sources: Sequence[Source] = ()
    tasks: Sequence[TaskEntry] = ()
    held_out: Sequence[Source] = ()
    held_out_memory: Sequence[Positive] = ()
    lanes: Positive = 4
    windows: Positive = 2
    contexts: Contexts = field(default_factory=dict)
    focus: NotNegative = 0.0
    trainable: Literal["all", "memory", "lora"] = "all"
    lora: Lora = field(default_factory=dict)
    quantization: Literal["nf4"] | None = None
    strength: AboveZeroShare = 1.0
    result: Literal["last", "best"] = "last"
    best_by: str | None = None
    optimizer: Literal["adamw", "adafactor"] = "adamw"
    learning_rate: Rate = 2e-5
    lr_schedule: Literal["constant", "linear", "cosine", "inverse_sqrt", "warmup_stable_decay"] = "constant"
    warmup_steps: Natural = 0
    decay_steps: Natural = 0
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    weight_decay: NotNegative = 0.01
    clip: NotNegative = 1.0
    accumulation: Positive = 1
    steps: Positive = 1000
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    checkpointing: bool = False
    seed: int = 0
    log_every: Positive = 1
    eval_every: Natural = 0
    eval_batches: Positive = 4
    patience: Natural = 0
    save_every: Positive = 50
    tensorboard: bool = False
    trackers: Sequence[Tracker] = ()

    def __post_init__(self) -> None:
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        try:
            checked = dict(_schema().model_validate(given))
            no_true_for_one(given, checked)
        except ValidationError as error:
            raise ValueError(complaint(error, list(given))) from None
        except ValueError as error:
            raise ValueError(f"recipe: {error}") from None
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        self._check_together()

    def _check_together(self) -> None:
        """What one entry alone does not show."""
        check_method(self)
        if not self.sources and not self.tasks:
            raise ValueError("recipe: neither sources nor tasks are given, so there is nothing to train on")
        if self.schedule().kind == "accuracy" and not self.tasks:
            raise ValueError(
                "recipe: contexts.kind is 'accuracy', which waits until answers are right, but a recipe without tasks "
                "has no answers: use kind 'steps', or add a task"
            )
        if self.strength < 1 and (self.trainable == "lora" or isinstance(self.model, dict)):
            raise ValueError(
                f"recipe: strength is {self.strength}; a strength below 1 needs a model with initial weights, and "
                "it does not work with lora: set strength: 1, and for lora lower lora_alpha instead"
            )
        if self.trainable != "all" and isinstance(self.model, dict):
            raise ValueError(
                f"recipe: trainable is {self.trainable!r}, which writes an adapter, but the base model would have "
                "random weights that are not saved: set trainable: all, or name a model"
            )
        if self.lora and self.trainable != "lora":
            raise ValueError(f"recipe: lora is {self.lora}, but trainable is {self.trainable!r}: set trainable: lora")
        if self.quantization and self.trainable == "all":
            raise ValueError(
                f"recipe: quantization is {self.quantization!r}, but trainable is 'all', and weights in 4 bits cannot "
                "be trained: set trainable: lora or memory"
            )
        if self.warmup_steps + self.decay_steps > self.steps:
            name = "warmup_steps" if self.warmup_steps > self.steps else "decay_steps"
            raise ValueError(
                f"recipe: {name} is {getattr(self, name)}, but the run has {self.steps} steps, warmup_steps and "
                "decay_steps included: lower it"
            )
        if self.decay_steps and self.lr_schedule != "warmup_stable_decay":
            raise ValueError(
                f"recipe: decay_steps is {self.decay_steps}, but lr_schedule is {self.lr_schedule!r}: only "
                "warmup_stable_decay uses decay_steps"
            )
        for name, on in (("result", self.result == "best"), ("patience", self.patience > 0)):
            if on and not self.tasks and not self.held_out:
                raise ValueError(
                    f"recipe: {name} is {getattr(self, name)!r}, but nothing is evaluated: add held_out or tasks"
                )
            if on and not 0 < self.eval_every < self.steps:
                raise ValueError(
                    f"recipe: eval_every is {self.eval_every} and {name} is {getattr(self, name)!r}, "
                    f"so the only evaluation would come after all {self.steps} steps: set eval_every "
                    "to a smaller number of steps"
                )

    def tuning(self) -> Method:
        """``method``, by its name."""
        return METHODS[self.method]

    def schedule(self) -> ContextSchedule:
        """``contexts``, checked. Whole sequences see no others, and memories of one document no negatives."""
        if self.tuning().whole:
            return ContextSchedule(values=(0,))
        found = schedule_from(self.contexts)
        return replace(found, segments=((found.previous_windows, 0),)) if self.method == "memorizing" else found

    def memory_config(self) -> MemoryConfig:
        """``memory``, checked."""
        return MemoryConfig.from_dict(self.memory)

    def precision(self) -> torch.dtype:
        """What the model computes in on this machine: float32 or bfloat16."""
        if self.dtype == "auto":  # torch's autocast would want float16 scaled, so that is no choice here
            return torch.bfloat16 if default_dtype(find_device(None)) == torch.bfloat16 else torch.float32
        return torch.bfloat16 if self.dtype == "bfloat16" else torch.float32

    def to_dict(self) -> dict[str, Any]:
        """For a recipe file."""
        return json.loads(json.dumps(asdict(self)))


def load_recipe(name: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe.

    Args:
        name: a ``.yaml``, ``.yml`` or ``.json`` file, or the name of a shipped recipe.
        overrides: ``key=value`` or ``key.inner=value``; values are YAML.

    Raises:
        ValueError: An entry is not known or out of range.
        FileNotFoundError: There is no such file or recipe.
    """
    import yaml

    path = Path(name)
    if not path.exists() and (SHIPPED / f"{name}.yaml").exists():
        path = SHIPPED / f"{name}.yaml"
    if not path.is_file():
        shipped = ", ".join(sorted(file.stem for file in SHIPPED.glob("*.yaml")))
        raise FileNotFoundError(f"no recipe {str(name)!r}: give a YAML or JSON file, or one of {shipped}")
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}): convert it") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} holds no settings; a recipe is a mapping such as 'steps: 1000'")
    for override in overrides:
        _override(settings, override)
    known = {f.name for f in fields(Recipe)}
    for key in settings:
        if key not in known:
            raise ValueError(
                f"{path}: unknown entry {key!r}, which is {settings[key]!r}; known: {', '.join(sorted(known))}"
            )
    return Recipe(**settings)


@cache
def _schema() -> type[BaseModel]:
    return validator(Recipe)


def _override(settings: dict[str, Any], override: str) -> None:
    import yaml

    key, separator, value = override.partition("=")
    if not separator or not key:
        raise ValueError(f"override {override!r} is not of the form key=value")
    *outer, last = key.split(".")
    place = settings
    for part in outer:
        place = place.setdefault(part, {})
        if not isinstance(place, dict):
            raise ValueError(f"override {override!r}: {part} is not a mapping")
    try:
        place[last] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ValueError(f"override {override!r}: the value is not YAML: {' '.join(str(error).split())}") from error
