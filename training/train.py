"""The training loop, on accelerate: one process, several, or a cluster, by the same command."""

import json
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object, set_seed
from torch import Tensor, nn
from tqdm import tqdm

from fot.evaluation.machine import default_dtype, find_device, peak_memory_bytes
from fot.loss import token_losses
from training.allocator import keep_freed_memory
from training.batches import Batch
from training.checkpoints import (
    list_checkpoints,
    load_checkpoint,
    read_best,
    remove_leftovers,
    save_best,
    save_checkpoint,
    score,
)
from training.crossbatch import Crossbatch, enable_crossbatch
from training.log import Log, summary_writer
from training.recipe import Recipe
from training.results import write_result
from training.schedule import Rows, choose_contexts
from training.setup import (
    build_loader,
    build_model,
    choose_trainable,
    describe_data,
    evaluation_batches,
    held_out_windows,
    text_batch,
)
from training.sharding import (
    check_sharding,
    clip_gradients,
    load_optimizer_state,
    spread_like,
    whole,
    whole_optimizer_state,
    whole_parameters,
)

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


def train(recipe: Recipe, out: Path, *, resume: bool = False, max_hours: float | None = None) -> dict[str, Any]:
    """Train as the recipe says.

    Args:
        recipe: what to do.
        out: folder for checkpoints, ``log.jsonl`` and the result.
        resume: go on from the last checkpoint in ``out``, to the same losses as an undisturbed run.
        max_hours: stop in time, with a checkpoint.

    Returns:
        the last line of the log.

    Raises:
        ValueError: nothing to resume, a folder that holds another run, settings that do not fit, or FSDP on a CPU.
        FloatingPointError: the loss is not finite; names step and documents.
        ImportError: TensorBoard is wanted and not installed.
    """
    started = time.monotonic()
    if recipe.tensorboard:
        summary_writer()  # missing, it must be said before the work
    # Unless told of the CPU, accelerate takes processes that were launched together without a GPU for lone ones.
    cpu = not torch.accelerator.is_available()
    accelerator = Accelerator(cpu=cpu, gradient_accumulation_steps=1, mixed_precision=_precision(recipe))
    check_sharding(accelerator)
    keep_freed_memory(accelerator.device.type)
    set_seed(recipe.seed)
    _prepare_folder(out, recipe, resume, accelerator)
    model, config, tokenizer = build_model(recipe)
    trained = choose_trainable(model, recipe, config)
    start = {name: tensor.detach().clone() for name, tensor in trained.items()} if recipe.strength < 1 else {}
    crossbatch = enable_crossbatch(model, config)
    if recipe.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    loader = build_loader(recipe, config, tokenizer, accelerator.process_index, accelerator.num_processes)
    step_module = Step(model, crossbatch)
    optimizer = _optimizer(recipe, trained)
    step_module, optimizer = accelerator.prepare(step_module, optimizer)
    trained = {name: parameter for name, parameter in model.named_parameters() if name in trained}  # FSDP replaces them
    first, best, data_state = 0, 0.0, None
    if resume:
        first, best, data_state = _resume(out, trained, optimizer, accelerator)
        loader.load_state_dict(data_state)
    log = Log(out, first, active=accelerator.is_main_process, tensorboard=recipe.tensorboard)
    evaluate = _evaluation(recipe, config, tokenizer, step_module, crossbatch, accelerator)
    line = log.last
    batches: Iterator[Batch] = iter(loader)
    tokens_done, clock = 0, time.perf_counter()
    with tqdm(total=recipe.steps, initial=first, unit="step", disable=None) as bar:
        for step in range(first, recipe.steps):
            d = recipe.schedule().contexts_at(step, best, recipe.seed)
            rate = learning_rate_at(recipe, step)
            for group in optimizer.param_groups:
                group["lr"] = rate
            sums = _one_step(recipe, step, d, batches, step_module, crossbatch, optimizer, trained, accelerator)
            accuracy = sums["correct"] / sums["answers"] if sums["answers"] else 0.0
            best = max(best, accuracy)
            tokens_done += int(sums["tokens"])
            line = {"step": step + 1, "loss": sums["loss"], "answer_accuracy": accuracy, "d": d,
                    "learning_rate": rate, "gradient_norm": sums["norm"], "tokens": int(sums["tokens"]),
                    "tokens_per_second": tokens_done / (time.perf_counter() - clock),
                    "memory_bytes": peak_memory_bytes(accelerator.device)}  # fmt: skip
            out_of_time = max_hours is not None and time.monotonic() - started > max_hours * 3600
            last = step + 1 == recipe.steps or out_of_time
            if last or (recipe.eval_every and (step + 1) % recipe.eval_every == 0):
                found = evaluate()
                line |= found
                _keep_if_best(out / "checkpoints", step + 1, found, trained, accelerator)
            if last or (step + 1) % recipe.log_every == 0:
                log(line)
            if last or (step + 1) % recipe.save_every == 0:
                state = {"best": best, "data": gather_object([loader.state_dict()]), "recipe": recipe.to_dict()}
                tensors = _whole_tensors(trained)
                optimizer_state = whole_optimizer_state(optimizer)
                if accelerator.is_main_process:
                    save_checkpoint(out / "checkpoints", step + 1, tensors, optimizer_state, state)
                accelerator.wait_for_everyone()
            bar.set_postfix(loss=f"{line['loss']:.3f}", answers=f"{accuracy:.2f}", d=d)
            bar.update()
            if last:
                break
    parameters = whole_parameters(model)
    kept = read_best(out / "checkpoints") if recipe.result == "best" else None
    if kept is not None:
        line = line | {"best": kept.evaluation | {"step": kept.step}}
        for name, tensor in kept.tensors().items():
            parameters[name].copy_(tensor)
    for name, tensor in start.items():  # in place: tied parameters are one tensor
        parameters[name].copy_(tensor.cpu().lerp(parameters[name], recipe.strength))
    if accelerator.is_main_process:
        write_result(out, recipe, model, tokenizer, config, parameters, list(trained), line)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return line


def _keep_if_best(
    folder: Path, step: int, evaluation: dict[str, float], trained: dict[str, Tensor], accelerator: Accelerator
) -> None:
    """Keep the weights of an evaluation that came out better than all before it."""
    kept, found = read_best(folder), score(evaluation)
    before = None if kept is None else score(kept.evaluation)
    better = [found is not None and (before is None or found > before)]
    broadcast_object_list(better)  # one process decides: gathering the weights takes all of them
    if better[0]:
        tensors = _whole_tensors(trained)
        if accelerator.is_main_process:
            save_best(folder, step, tensors, evaluation)
        accelerator.wait_for_everyone()


def _whole_tensors(trained: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: whole(parameter.detach()).cpu() for name, parameter in trained.items()}


def learning_rate_at(recipe: Recipe, step: int) -> float:
    """Learning rate of a step (0, 1, ...): linear warm-up, then the recipe's schedule."""
    if step < recipe.warmup_steps:
        return recipe.learning_rate * (step + 1) / recipe.warmup_steps
    if recipe.lr_schedule == "cosine":
        share = (step - recipe.warmup_steps) / max(1, recipe.steps - recipe.warmup_steps)
        return recipe.learning_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * share)))
    if recipe.lr_schedule == "inverse_sqrt":
        return recipe.learning_rate * math.sqrt(max(1, recipe.warmup_steps) / max(1, step + 1))
    return recipe.learning_rate


def _one_step(
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


def _evaluation(
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


def _precision(recipe: Recipe) -> str:
    if recipe.dtype == "auto":
        return "bf16" if default_dtype(find_device(None)) == torch.bfloat16 else "no"
    return "bf16" if recipe.dtype == "bfloat16" else "no"


def _prepare_folder(out: Path, recipe: Recipe, resume: bool, accelerator: Accelerator) -> None:
    data = describe_data(recipe)
    found = list_checkpoints(out / "checkpoints")
    if found and not resume:
        raise ValueError(f"{out} holds a run already ({found[-1].name}): add --resume to go on, or give another --out")
    if resume and not found:
        raise ValueError(f"{out} holds no checkpoint to resume from; start without --resume")
    if accelerator.is_main_process:
        out.mkdir(parents=True, exist_ok=True)
        for folder in (out, out / "checkpoints"):
            remove_leftovers(folder)
        (out / "recipe.json").write_text(json.dumps(recipe.to_dict(), indent=1) + "\n")
        (out / "data.json").write_text(json.dumps(data, indent=1) + "\n")
    accelerator.wait_for_everyone()


def _resume(out: Path, trained: dict[str, Tensor], optimizer: Any, accelerator: Accelerator) -> tuple[int, float, Any]:
    path = list_checkpoints(out / "checkpoints")[-1]
    tensors, optimizer_state, state = load_checkpoint(path)
    if set(tensors) != set(trained):
        raise ValueError(f"{path} has other trained parameters than this recipe: resume with the recipe it was made by")
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(spread_like(tensors[name], parameter))
    load_optimizer_state(optimizer, optimizer_state)
    if len(state["data"]) != accelerator.num_processes:
        raise ValueError(
            f"{path} was made by {len(state['data'])} processes, this run has {accelerator.num_processes}: "
            "resume with as many"
        )
    if accelerator.is_main_process:
        kept = read_best(path.parent)
        if kept is not None and kept.step > state["step"]:
            shutil.rmtree(kept.path)  # of a future that will come again
        tqdm.write(f"resuming at step {state['step']} of {path}", file=sys.stderr)
    return state["step"], state["best"], state["data"][accelerator.process_index]


def _optimizer(recipe: Recipe, trained: dict[str, Tensor]) -> torch.optim.Optimizer:
    groups = [
        {"params": [p for p in trained.values() if p.ndim > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in trained.values() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if recipe.optimizer == "adafactor":
        return torch.optim.Adafactor(groups, lr=recipe.learning_rate)
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=recipe.betas)
