"""What is measured during a run: answers on synthetic documents never trained on, and the loss of held-out text."""

import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from fot.config import MemoryConfig
from training.batches import Batch, batch_of
from training.contexts import choose_contexts, rows_of
from training.crossbatch import Crossbatch
from training.held_out import LOSS, build_held_out, held_out_losses
from training.pieces import task_span
from training.recipe import Recipe
from training.setup import build_task

# Its synthetic documents are drawn from another stream of random numbers than those trained on.
EVALUATION_SEED = "evaluation"

ANSWERS = "eval_answer_accuracy"


def build_evaluation(
    recipe: Recipe,
    config: MemoryConfig,
    tokenizer: Any,
    module: nn.Module,
    crossbatch: Crossbatch,
    accelerator: Accelerator,
) -> Callable[[], dict[str, float]]:
    """What measures answers to questions, if the recipe has tasks, and held-out text, if it names any.

    Raises:
        ValueError: held-out texts that are too short, or ``best_by`` something that will not be measured.
    """
    documents = list(evaluation_batches(recipe, config, tokenizer))
    held_out = build_held_out(recipe, config, tokenizer)
    names = [ANSWERS] * bool(documents) + (held_out.names if held_out else [])
    if recipe.best_by is not None and recipe.best_by not in names:
        raise ValueError(
            f"recipe: best_by is {recipe.best_by!r}, but this run measures "
            f"{', '.join(names) or 'nothing'}: choose one of these, or name held_out texts"
        )

    def answers() -> dict[str, float]:
        correct = asked = 0.0
        for number, batch in enumerate(documents):
            seed, rows = f"evaluation/{number}", rows_of(batch.to(accelerator.device))
            crossbatch.contexts = choose_contexts(
                recipe.schedule(),
                rows,
                range(len(batch.input_ids)),
                max(recipe.schedule().values),
                seed,
                isolated=config.isolated_windows,
            )
            with accelerator.autocast():
                sums = accelerator.unwrap_model(module)(batch.to(accelerator.device))
            correct, asked = correct + float(sums["correct_answers"]), asked + float(sums["answers"])
        return {ANSWERS: correct / asked} if asked else {}

    @torch.no_grad()
    def run() -> dict[str, float]:
        module.eval()
        with _alone(crossbatch):
            found = answers()
            if held_out is not None:
                found |= held_out_losses(held_out, recipe, accelerator.unwrap_model(module), crossbatch, accelerator)
        module.train()
        return found

    return run


def score(evaluation: dict[str, float], best_by: str | None) -> float | None:
    """Of an evaluation; higher is better. None if it was not measured, or is no number.

    Args:
        best_by: one of its names; None: the accuracy of answers, or else the loss of held-out text with the largest
            memory that was measured.
    """
    if best_by is None:
        losses = [name for name in evaluation if name.startswith(LOSS)]  # without a memory first, the largest last
        best_by = ANSWERS if ANSWERS in evaluation or not losses else losses[-1]
    found = evaluation.get(best_by, math.nan)
    if not math.isfinite(found):
        return None
    return found if best_by == ANSWERS else -found


def evaluation_batches(recipe: Recipe, config: MemoryConfig, tokenizer: Any) -> Iterator[Batch]:
    """Batches of synthetic documents that are never trained on; the same in every evaluation."""
    for entry in recipe.tasks[:1]:
        task = build_task(entry, recipe, config, tokenizer)
        pad = 0 if tokenizer is None else tokenizer.pad_token_id or 0
        for number in range(recipe.eval_batches):
            numbers = range(number * recipe.lanes, (number + 1) * recipe.lanes)
            seeds = [f"{EVALUATION_SEED}/{task.name}/{n}" for n in numbers]
            spans = [task_span(n, task.document(random.Random(seed))) for n, seed in zip(numbers, seeds, strict=True)]
            yield batch_of(spans, recipe.windows, config.window, pad)


@contextmanager
def _alone(crossbatch: Crossbatch) -> Iterator[None]:
    """Nothing is gathered: every process has all rows of an evaluation."""
    gather, crossbatch.gather = crossbatch.gather, lambda tensor: tensor
    try:
        yield
    finally:
        crossbatch.gather, crossbatch.contexts = gather, None
