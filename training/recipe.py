"""A recipe: everything that decides a training run, as a YAML or JSON file and command-line overrides."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from fot.config import MemoryConfig
from training.schedule import ContextSchedule, schedule_from

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
        lr_schedule: ``constant``, ``cosine`` (to a hundredth) or ``inverse_sqrt``, after the warm-up.
        warmup_steps: linear, from 0.
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
        save_every: steps between checkpoints.
        tensorboard: write the log's numbers to ``tensorboard`` in the run's folder, too.
    """

    model: str | dict[str, Any] = "smollm2-135m"
    memory: dict[str, Any] = field(default_factory=dict)
    sources: Sequence[dict[str, Any]] = ()
    tasks: Sequence[dict[str, Any]] = ()
    held_out: Sequence[dict[str, Any]] = ()
    held_out_memory: Sequence[int] = ()
    lanes: int = 4
    windows: int = 2
    contexts: dict[str, Any] = field(default_factory=dict)
    trainable: Literal["all", "memory", "lora"] = "all"
    lora: dict[str, Any] = field(default_factory=dict)
    strength: float = 1.0
    result: Literal["last", "best"] = "last"
    best_by: str | None = None
    optimizer: Literal["adamw", "adafactor"] = "adamw"
    learning_rate: float = 2e-5
    lr_schedule: Literal["constant", "cosine", "inverse_sqrt"] = "constant"
    warmup_steps: int = 0
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.01
    clip: float = 1.0
    accumulation: int = 1
    steps: int = 1000
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    checkpointing: bool = False
    seed: int = 0
    log_every: int = 1
    eval_every: int = 0
    eval_batches: int = 4
    save_every: int = 50
    tensorboard: bool = False

    def __post_init__(self) -> None:
        self._check_numbers()
        object.__setattr__(self, "betas", tuple(self.betas))
        for name, least in (("lanes", 1), ("windows", 1), ("accumulation", 1), ("steps", 1), ("log_every", 1),
                            ("save_every", 1), ("warmup_steps", 0), ("eval_every", 0)):  # fmt: skip
            if getattr(self, name) < least:
                raise ValueError(f"recipe: {name} is {getattr(self, name)}; it must be at least {least}")
        choices = {
            "trainable": ("all", "memory", "lora"),
            "result": ("last", "best"),
            "optimizer": ("adamw", "adafactor"),
            "lr_schedule": ("constant", "cosine", "inverse_sqrt"),
            "dtype": ("auto", "float32", "bfloat16"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"recipe: {name} is {getattr(self, name)!r}; choose one of {', '.join(allowed)}")
        if not self.learning_rate > 0:
            raise ValueError(f"recipe: learning_rate is {self.learning_rate}; it must be above 0")
        if not 0 < self.strength <= 1:
            raise ValueError(f"recipe: strength is {self.strength}; it must be above 0 and at most 1")
        if self.strength < 1 and (self.trainable == "lora" or isinstance(self.model, dict)):
            raise ValueError(
                "recipe: strength below 1 needs weights to start with, and no lora: lower lora_alpha there"
            )
        if not self.sources and not self.tasks:
            raise ValueError("recipe: neither sources nor tasks are given, so there is nothing to train on")
        if any(not isinstance(size, int) or size < 1 for size in self.held_out_memory):
            raise ValueError(f"recipe: held_out_memory is {self.held_out_memory}; it takes numbers of at least 1 token")
        if self.schedule().kind == "accuracy" and not self.tasks:
            raise ValueError(
                "recipe: contexts of kind 'accuracy' wait until answers are right, and without tasks there are no "
                "answers: use kind 'steps', or add a task"
            )
        self.memory_config()

    def _check_numbers(self) -> None:
        """Numbers must be numbers; to YAML, 2e-5 without a point is a text, and here the number that was meant."""
        for entry in fields(self):
            value = getattr(self, entry.name)
            if entry.type is float and not isinstance(value, bool):
                try:
                    object.__setattr__(self, entry.name, float(value))
                except (TypeError, ValueError):
                    raise ValueError(f"recipe: {entry.name} is {value!r}; it must be a number") from None
            elif entry.type in (int, float) and (isinstance(value, bool) or not isinstance(value, int)):
                raise ValueError(f"recipe: {entry.name} is {value!r}; it must be a whole number")

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
    if not isinstance(settings, dict):
        raise ValueError(f"{path} holds no settings; a recipe is a mapping such as 'steps: 1000'")
    for override in overrides:
        _override(settings, override)
    known = {f.name for f in fields(Recipe)}
    unknown = sorted(set(settings) - known)
    if unknown:
        raise ValueError(f"{path}: unknown entry {unknown[0]!r}; known: {', '.join(sorted(known))}")
    return Recipe(**settings)


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
    place[last] = yaml.safe_load(value)
