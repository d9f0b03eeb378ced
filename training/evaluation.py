"""What is measured during a run: answers on synthetic documents never trained on, and the loss of held-out text."""

import math
import random
from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from fot.config import MemoryConfig
from training.batches import IGNORED, Batch, Span, batch_of
from training.crossbatch import Crossbatch
from training.recipe import Recipe
from training.schedule import Rows, choose_contexts
from training.setup import build_task, tokenised
from training.tasks import Task

# Its synthetic documents are drawn from another stream of random numbers than those trained on.
EVALUATION_SEED = "evaluation"


def build_evaluation(
    recipe: Recipe, config: Any, tokenizer: Any, module: nn.Module, crossbatch: Crossbatch, accelerator: Accelerator
) -> Callable[[], dict[str, float]]:
    """Accuracy on synthetic documents never trained on, and perplexity of held-out text within one window."""
    documents = list(evaluation_batches(recipe, config, tokenizer))
    windows = held_out_windows(recipe, config, tokenizer)
    widest = max(recipe.schedule().values)

    def perplexity() -> float:
        crossbatch.contexts = None
        total = count = 0.0
        for rows in windows.split(recipe.lanes * recipe.windows):
            sums = accelerator.unwrap_model(module)(text_batch(rows).to(accelerator.device))
            total, count = total + float(sums["loss"]), count + float(sums["weight"])
        return math.exp(total / count)

    @torch.no_grad()
    def run() -> dict[str, float]:
        module.eval()
        correct = answers = 0.0
        for number, batch in enumerate(documents):
            batch = batch.to(accelerator.device)
            rows = Rows(batch.lane, batch.index, batch.document, batch.padding if bool(batch.padding.any()) else None)
            crossbatch.contexts = choose_contexts(
                recipe.schedule(),
                rows,
                range(len(batch.input_ids)),
                widest,
                f"evaluation/{number}",
                isolated=config.isolated_windows,
            )
            gather, crossbatch.gather = crossbatch.gather, lambda tensor: tensor  # every process has all of it
            with accelerator.autocast():
                sums = accelerator.unwrap_model(module)(batch)
            crossbatch.gather = gather
            correct, answers = correct + float(sums["correct"]), answers + float(sums["answers"])
        found = {"eval_answer_accuracy": correct / answers} if answers else {}
        if len(windows):
            found["eval_perplexity"] = perplexity()
        module.train()
        return found

    return run


def evaluation_batches(recipe: Recipe, config: MemoryConfig, tokenizer: Any) -> Iterator[Batch]:
    """Batches of synthetic documents that are never trained on; the same in every evaluation."""
    for entry in recipe.tasks[:1]:
        task = build_task(entry, recipe, config, tokenizer)
        pad = 0 if tokenizer is None else tokenizer.pad_token_id or 0
        for number in range(recipe.eval_batches):
            spans = [_span(task, number * recipe.lanes + lane) for lane in range(recipe.lanes)]
            yield batch_of(spans, recipe.windows, config.window, pad)


def held_out_windows(recipe: Recipe, config: MemoryConfig, tokenizer: Any) -> Tensor:
    """(rows, window) of held-out text, cut from its documents' starts; none if the recipe names none."""
    rows: list[list[int]] = []
    wanted = recipe.eval_batches * recipe.lanes * recipe.windows
    for entry in recipe.held_out:
        for ids in tokenised(entry, tokenizer):
            whole = len(ids) // config.window * config.window
            rows += [ids[start : start + config.window] for start in range(0, whole, config.window)]
            if len(rows) >= wanted:
                break
    return torch.tensor(rows[:wanted], dtype=torch.int64).reshape(-1, config.window)


def text_batch(windows: Tensor) -> Batch:
    """(R, T) windows of text, each alone, as a batch in which every token but the first of a window counts once."""
    rows = torch.arange(len(windows))
    labels = torch.nn.functional.pad(windows[:, 1:], (0, 1), value=IGNORED)
    nothing = torch.zeros_like(windows, dtype=torch.bool)
    return Batch(windows, labels, (labels != IGNORED).float(), nothing, rows, torch.zeros_like(rows), rows)


def _span(task: Task, number: int) -> Span:
    import numpy as np

    ids, weights = task.document(random.Random(f"{EVALUATION_SEED}/{task.name}/{number}"))
    count = len(ids) - 1
    return Span(
        np.asarray(ids[:-1], np.int32),
        np.asarray(ids[1:], np.int32),
        np.asarray(weights[1:], np.float32),
        np.full(count, number, np.int64),
    )
