"""One optimiser step: batches, the contexts of their rows, loss and gradients over all processes."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from fot.loss import token_losses
from training.batches import Batch
from training.crossbatch import Crossbatch
from training.recipe import Recipe
from training.schedule import Rows, choose_contexts
from training.sharding import clip_gradients

# An answer's tokens count in full; text around them counts for less or not at all.
ANSWER_WEIGHT = 1.0

# What one batch is summed up to, over all processes.
SUMS = ("loss", "weight", "correct", "answers")


class Step(nn.Module):
    """What is done with one batch; a module, so that DDP and FSDP see every forward pass."""

    def __init__(self, model: Any, crossbatch: Crossbatch) -> None:
        super().__init__()
        self.model = model
        self.crossbatch = crossbatch

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Sums over this batch: ``loss`` (weighted), ``weight``, ``correct`` and ``answers`` (answer tokens)."""
        hidden = self.model.model(input_ids=batch.input_ids, use_cache=False).last_hidden_state
        counts = (batch.weights > 0) & (batch.labels != -100)
        targets, weights = batch.labels[counts], batch.weights[counts]
        losses, correct = token_losses(hidden[counts], targets, self.model.lm_head)
        answers = weights >= ANSWER_WEIGHT
        return {
            "loss": (losses * weights).sum(),
            "weight": weights.sum(),
            "correct": (correct & answers).sum().float(),
            "answers": answers.sum().float(),
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
    """One optimiser step over ``accumulation`` batches; sums over all processes."""
    total = dict.fromkeys((*SUMS, "tokens"), 0.0)
    for part in range(recipe.accumulation):
        batch = next(batches).to(accelerator.device)
        set_contexts(crossbatch, recipe, batch, d, f"{recipe.seed}/{step}/{part}", accelerator)
        with accelerator.autocast():
            sums = module(batch)
        mine = torch.stack([sums[name].detach() for name in SUMS])
        found = dict(zip(SUMS, accelerator.reduce(mine).tolist(), strict=True))
        if not math.isfinite(found["loss"]):
            raise FloatingPointError(
                f"the loss is {found['loss']} at step {step + 1}, batch {part + 1}, documents "
                f"{batch.document.tolist()}: "
                "lower learning_rate or use dtype float32, and go on with --resume from the last checkpoint"
            )
        # DDP averages gradients over processes, the loss is a sum over all of them divided by all weights.
        scale = accelerator.num_processes / max(found["weight"], 1e-8) / recipe.accumulation
        accelerator.backward(sums["loss"] * scale)
        for name in SUMS:
            total[name] += found[name]
        total["tokens"] += batch.input_ids.numel() * accelerator.num_processes
    norm = clip_gradients(list(trained.values()), recipe.clip or math.inf)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total | {"loss": total["loss"] / max(total["weight"], 1e-8), "norm": norm}


def set_contexts(
    crossbatch: Crossbatch, recipe: Recipe, batch: Batch, d: int, seed: str, accelerator: Accelerator
) -> None:
    """Choose what each row of this process sees, among the rows of all processes."""
    rank, world, count = accelerator.process_index, accelerator.num_processes, len(batch.input_ids)
    lane = batch.lane + rank * recipe.lanes
    table = [lane, batch.index, batch.document]
    padding = batch.padding
    if world > 1:
        table = [accelerator.gather(column) for column in table]
        padding = accelerator.gather(padding)
    rows = Rows(table[0], table[1], table[2], padding if bool(padding.any()) else None)
    mine = range(rank * count, (rank + 1) * count)
    crossbatch.contexts = choose_contexts(
        recipe.schedule(), rows, mine, d, seed, isolated=crossbatch.config.isolated_windows
    )
