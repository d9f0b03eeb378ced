"""One optimiser step: batches, the contexts of their rows, loss and gradients over all processes."""

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

from fot.families import decoder_of, head
from fot.loss import token_losses
from training.batches import Batch
from training.contexts import Rows, choose_all, held_by, rows_of
from training.crossbatch import Crossbatch
from training.focus import draw_queries
from training.groups import Contexts
from training.recipe import Recipe
from training.sharding import clip_gradients, whole

# What one batch is summed up to, over all processes.
SUMS = ("loss", "weight", "correct", "labels", "correct_answers", "answers", "focus")


class Step(nn.Module):
    """What is done with one batch; a module, so that DDP and FSDP see every forward pass."""

    def __init__(self, model: Any, crossbatch: Crossbatch, rows: Callable[[Batch, Any], Batch] | None = None) -> None:
        """
        Args:
            model: to train.
            crossbatch: its switch.
            rows: see ``training.methods.method.Method``.
        """
        super().__init__()
        self.model = model
        self.crossbatch = crossbatch
        self.rows = rows

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Sums over this batch, by the names in ``SUMS``: ``loss`` is weighted and ``weight`` what it is divided by;
        ``labels`` count tokens with loss and ``answers`` those that are answers, of which so many are ``correct``;
        ``focus`` is the loss of ``training.focus``, a mean over layers and a sum over rows, 0 if none is asked for."""
        if self.rows is not None:
            batch = self.rows(batch, self.model)
        with self.crossbatch.collecting() as focus:
            hidden = decoder_of(self.model)(input_ids=batch.input_ids, use_cache=False).last_hidden_state
        counts = (batch.weights > 0) & (batch.labels != -100)
        targets, weights = batch.labels[counts], batch.weights[counts]
        losses, correct = token_losses(hidden[counts], targets, partial(head, self.model))
        answers = batch.answers[counts]
        return {
            "loss": (losses * weights).sum(),
            "weight": weights.sum(),
            "correct": correct.sum().float(),
            "labels": counts.sum().float(),
            "correct_answers": (correct & answers).sum().float(),
            "answers": answers.sum().float(),
            "focus": torch.stack(focus).mean() if focus else losses.new_zeros(()),
        }


def train_step(
    recipe: Recipe,
    step: int,
    d: int,
    batches: Iterator[Batch],
    module: nn.Module,
    crossbatch: Crossbatch,
    optimizer: Any,
    trained: dict[str, Tensor],
    accelerator: Accelerator,
) -> dict[str, float]:
    """One optimiser step over ``accumulation`` batches, on the mean loss over all their labels, of all processes.

    With ``focus``, the mean of its loss over all their rows that have one is added.

    Args:
        step: 0, 1, ...
        d: contexts of a row.
        batches: gives the next ones of this process.
        module: a prepared ``Step``.
        trained: parameters by name.

    Returns:
        sums over all batches and processes by the names in ``SUMS``, but ``loss`` is their weighted mean; rows that
        have a ``focus``, ``focus_rows``; ``tokens`` read; ``norm`` of the gradient before clipping.

    Raises:
        FloatingPointError: the loss, or the gradient, is not finite; no weight has changed.
    """
    parts = [next(batches).to(accelerator.device) for _ in range(recipe.accumulation)]
    # Of all parts, before the first backward pass: a mean of their means would favour those with few labels.
    weight = float(accelerator.reduce(torch.stack([part.weights[part.labels != -100].sum() for part in parts]).sum()))
    seen = [
        contexts_of(crossbatch, recipe, part, d, f"{recipe.seed}/{step}/{number}", accelerator)
        for number, part in enumerate(parts)
    ]
    focus_rows = sum(count for _, count in seen)
    total = dict.fromkeys((*SUMS, "tokens"), 0.0)
    for number, (part, (contexts, _)) in enumerate(zip(parts, seen, strict=True)):
        crossbatch.contexts = contexts
        with accelerator.autocast():
            sums = module(part)
        mine = torch.stack([sums[name].detach() for name in SUMS])
        found = dict(zip(SUMS, accelerator.reduce(mine).tolist(), strict=True))
        if not math.isfinite(found["loss"]):
            raise FloatingPointError(
                f"the loss is {found['loss']} at step {step + 1}, batch {number + 1}, documents "
                f"{part.document.tolist()}"
            )
        # DDP averages gradients over processes; the loss is a sum over all of them, divided by all weights.
        objective = sums["loss"] * (accelerator.num_processes / max(weight, 1e-8))
        if focus_rows:
            objective = objective + sums["focus"] * (recipe.focus * accelerator.num_processes / focus_rows)
        accelerator.backward(objective)
        for name in SUMS:
            total[name] += found[name]
        total["tokens"] += part.input_ids.numel() * accelerator.num_processes
    norm = clip_gradients(list(trained.values()), recipe.clip or math.inf)
    check_gradients(norm, trained, step)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total | {"loss": total["loss"] / max(total["weight"], 1e-8), "norm": norm, "focus_rows": float(focus_rows)}


def check_gradients(norm: float, trained: dict[str, Tensor], step: int) -> None:
    """Stop before a step that would spoil the weights.

    Raises:
        FloatingPointError: the gradient's norm is not finite.
    """
    if not math.isfinite(norm):
        names = (n for n, p in trained.items() if p.grad is not None and not bool(torch.isfinite(whole(p.grad)).all()))
        raise FloatingPointError(f"the gradient is {norm} at step {step + 1} (first in {next(names, 'their sum')})")


def accuracies(sums: dict[str, float]) -> dict[str, float]:
    """The shares of likeliest tokens that were right, for the log: of all labels, and of answers if there were any."""
    found = {"token_accuracy": sums["correct"] / max(sums["labels"], 1.0)}
    if sums["answers"]:
        found["answer_accuracy"] = sums["correct_answers"] / sums["answers"]
    return found


def contexts_of(
    crossbatch: Crossbatch, recipe: Recipe, batch: Batch, d: int, seed: str, accelerator: Accelerator
) -> tuple[Contexts | None, int]:
    """Choose what each row of this process sees, among the rows of all processes.

    Every process chooses for all rows, so all know whether any row has contexts, and then all of them gather.

    Returns:
        the contexts, None if no row has any; how many rows of all processes have the loss of ``training.focus``.
    """
    rank, count = accelerator.process_index, len(batch.input_ids)
    rows = gathered_rows(batch, accelerator)
    choice = choose_all(recipe.schedule(), rows, d, seed, isolated=crossbatch.config.isolated_windows)
    mine = range(rank * count, (rank + 1) * count)
    found = choice.of(mine, rows.padding)
    if recipe.focus:
        real = batch.input_ids.shape[1] - batch.padding.sum(1)
        found = replace(found, asked=draw_queries(real.tolist(), mine.start, seed))
    if choice.wanted and not choice.found and not crossbatch.warned:
        crossbatch.warned = True
        if accelerator.is_main_process:
            lanes, texts = len(set(rows.lane.tolist())), len({name for held in rows.held or () for name, _, _ in held})
            tqdm.write(
                f"no window has a negative, though contexts ask for {choice.wanted} in this batch. Its {lanes} lanes "
                f"read {texts} different text(s): give more documents, or more lanes",
                file=sys.stderr,
            )
    return (found if any(choice.rows) else None), choice.mixed() if recipe.focus else 0


def gathered_rows(batch: Batch, accelerator: Accelerator) -> Rows:
    """The rows of all processes, in the order of their ranks; all have as many lanes, which are numbered through."""
    if accelerator.num_processes == 1:
        return rows_of(batch)
    lane = batch.lane + accelerator.process_index * (int(batch.lane[-1]) + 1)
    singles = torch.stack([lane, batch.index, batch.document, batch.whole], dim=1)
    table = torch.cat([singles, batch.padding, batch.content, batch.position], dim=1)
    table = accelerator.gather(table)
    width = batch.input_ids.shape[1]
    singles, padding, content, position = table.split([singles.shape[1], width, width, width], dim=1)
    padding = padding.bool()
    lane, index, document, whole = singles.unbind(1)
    held = held_by(content, position)
    return Rows(lane, index, document, padding if bool(padding.any()) else None, held, whole.bool())
