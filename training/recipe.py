"""A recipe: everything that decides a training run, as a YAML or JSON file and command-line overrides."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, ValidationError

from fot.config import MemoryConfig
from training.schedule import ContextSchedule, schedule_from
from training.schema import (
    AboveZeroShare,
    Contexts,
    Decay,
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
        model: name, folder or hub id; or the settings of a new Llama model, started from random weights.
        memory: settings of ``MemoryConfig``: ``mem_layers``, ``local_context``, ``mem_positionals``.
        sources: texts to train on, entries of ``training.data.DataSource``.
        tasks: synthetic documents, entries of ``training.tasks``, each with ``kind``, ``weight`` and its settings.
        held_out: texts whose loss is measured, without a memory and with one, entries like those of ``sources``; never
            trained on.
        held_out_memory: sizes in tokens of the memories with which it is measured; none: 2 and 8 windows, as far as
            the texts are that long.
        lanes: documents side by side, on each process.
        windows: consecutive windows of each document in a batch (k).
        contexts: settings of ``ContextSchedule``.
        trainable: ``all`` parameters, the attention of ``memory`` layers, or ``lora`` adapters.
        lora: settings of ``peft.LoraConfig`` for ``lora``.
        strength: the result's weights lie so far from those it started with towards the trained ones (Wortsman et al.,
            arXiv 2109.01903): a little less than 1 keeps more of what the model could do, and most of what it learnt.
            The log's figures are of the trained weights.
        result: weights of the ``last`` step, or of the ``best`` evaluation.
        best_by: what the best evaluation is best by, a name from the log such as ``held_out_loss_memory_2048``; None:
            most answers right, or, without tasks, the lowest loss of held-out text with the largest memory.
        optimizer: ``adamw`` or ``adafactor``.
        learning_rate: its highest value.
        lr_schedule: after the warm-up ``constant``, ``linear`` (to 0), ``cosine`` (to a hundredth), ``inverse_sqrt``,
            or ``warmup_stable_decay``: constant, and over the last ``decay_steps`` linear to 0.
        warmup_steps: linear, from 0.
        decay_steps: of ``warmup_stable_decay``; 0 for a tenth of all steps.
        betas: of AdamW.
        weight_decay: of matrices; norms and biases have none.
        clip: largest norm of the gradient; 0 for none.
        accumulation: batches to a step.
        steps: optimiser steps.
        dtype: ``float32``, ``bfloat16`` (with float32 masters), or ``auto``: the faster here.
        checkpointing: make activations anew in the backward pass, memory layers included.
        seed: draws data, contexts and new weights.
        log_every: steps between lines of the log.
        eval_every: steps between evaluations; 0 for none but the last.
        eval_batches: batches of an evaluation.
        patience: end the run after so many evaluations without a better one; 0 for never.
        save_every: steps between checkpoints.
        tensorboard: write the log's numbers to ``tensorboard`` in the run's folder, too.
        trackers: where to log the numbers besides, by accelerate: ``wandb``, ``mlflow``, ``comet_ml``, ...
    """

    model: Annotated[str, Field(min_length=1)] | dict[str, Any] = "smollm2-135m"
    memory: Memory = field(default_factory=dict)
    sources: Sequence[Source] = ()
    tasks: Sequence[TaskEntry] = ()
    held_out: Sequence[Source] = ()
    held_out_memory: Sequence[Positive] = ()
    lanes: Positive = 4
    windows: Positive = 2
    contexts: Contexts = field(default_factory=dict)
    trainable: Literal["all", "memory", "lora"] = "all"
    lora: Lora = field(default_factory=dict)
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
        if not self.sources and not self.tasks:
            raise ValueError("recipe: neither sources nor tasks are given, so there is nothing to train on")
        if self.schedule().kind == "accuracy" and not self.tasks:
            raise ValueError(
                "recipe: contexts.kind is 'accuracy', which waits until answers are right, and without tasks there are "
                "no answers: use kind 'steps', or add a task"
            )
        if self.strength < 1 and (self.trainable == "lora" or isinstance(self.model, dict)):
            raise ValueError(
                f"recipe: strength is {self.strength}; below 1 it needs weights to start with, and no lora: lower "
                "lora_alpha there"
            )
        if self.trainable != "all" and isinstance(self.model, dict):
            raise ValueError(
                f"recipe: trainable is {self.trainable!r}, which leaves an adapter, but model is made from random "
                "weights that nobody could load it over: set trainable: all, or name a model"
            )
        if self.lora and self.trainable != "lora":
            raise ValueError(f"recipe: lora is {self.lora}, but trainable is {self.trainable!r}: set trainable: lora")
        if self.warmup_steps + self.decay_steps > self.steps:
            name = "warmup_steps" if self.warmup_steps > self.steps else "decay_steps"
            raise ValueError(
                f"recipe: {name} is {getattr(self, name)}, but the run has {self.steps} steps, warmup_steps and "
                "decay_steps included: lower it"
            )
        if self.decay_steps and self.lr_schedule != "warmup_stable_decay":
            raise ValueError(
                f"recipe: decay_steps is {self.decay_steps}, but lr_schedule is {self.lr_schedule!r}: only "
                "warmup_stable_decay has such steps"
            )
        for name, on in (("result", self.result == "best"), ("patience", self.patience > 0)):
            if on and not self.tasks and not self.held_out:
                raise ValueError(
                    f"recipe: {name} is {getattr(self, name)!r}, but nothing is evaluated: add held_out or tasks"
                )
            if on and not 0 < self.eval_every < self.steps:
                raise ValueError(
                    f"recipe: eval_every is {self.eval_every} and {name} is {getattr(self, name)!r}, but the only "
                    f"evaluation of {self.steps} steps would be the last: set eval_every to a part of the steps"
                )

    def schedule(self) -> ContextSchedule:
        """``contexts``, checked."""
        return schedule_from(self.contexts)

    def memory_config(self) -> MemoryConfig:
        """``memory``, checked."""
        return MemoryConfig.from_dict(self.memory)

    def to_dict(self) -> dict[str, Any]:
        """For a recipe file."""
        return json.loads(json.dumps(asdict(self)))


def load_recipe(name: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe.

    Args:
        name: a ``.yaml``, ``.yml`` or ``.json`` file, or the name of a shipped recipe.
        overrides: ``key=value`` or ``key.inner=value``; values are YAML.

    Raises:
        ValueError: an entry that is not known, or out of range.
        FileNotFoundError: no such file or recipe.
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
