"""The training loop, on accelerate: one process, several, or a cluster, by the same command."""

import json
import math
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object, set_seed
from torch import Tensor
from tqdm import tqdm

from fot.evaluation.machine import default_dtype, find_device, peak_memory_bytes
from training.allocator import keep_freed_memory
from training.batches import Batch
from training.checkpoints import (
    list_checkpoints,
    load_checkpoint,
    read_best,
    remove_leftovers,
    save_best,
    save_checkpoint,
)
from training.crossbatch import enable_crossbatch
from training.evaluation import build_evaluation, score
from training.log import Log, summary_writer
from training.recipe import Recipe
from training.results import write_result
from training.setup import build_loader, build_model, choose_trainable, describe_data
from training.sharding import (
    check_sharding,
    load_optimizer_state,
    on_any_process,
    spread_like,
    whole,
    whole_optimizer_state,
    whole_parameters,
)
from training.step import Step, accuracies, train_step


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
    evaluate = build_evaluation(recipe, config, tokenizer, step_module, crossbatch, accelerator)
    line = log.last
    batches: Iterator[Batch] = iter(loader)
    tokens_done, clock = 0, time.perf_counter()
    with tqdm(total=recipe.steps, initial=first, unit="step", disable=None) as bar:
        for step in range(first, recipe.steps):
            d = recipe.schedule().contexts_at(step, best, recipe.seed)
            rate = learning_rate_at(recipe, step)
            for group in optimizer.param_groups:
                group["lr"] = rate
            began = time.perf_counter()
            sums = train_step(recipe, step, d, batches, step_module, crossbatch, optimizer, trained, accelerator)
            seconds = time.perf_counter() - began
            tokens_done += int(sums["tokens"])
            line = {"step": step + 1, "loss": sums["loss"], **accuracies(sums), "d": d,
                    "learning_rate": rate, "gradient_norm": sums["norm"], "tokens": int(sums["tokens"]),
                    "tokens_per_second": sums["tokens"] / seconds,
                    "run_tokens_per_second": tokens_done / (time.perf_counter() - clock),
                    "memory_bytes": peak_memory_bytes(accelerator.device)}  # fmt: skip
            best = max(best, line.get("answer_accuracy", 0.0))
            out_of_time = max_hours is not None and time.monotonic() - started > max_hours * 3600
            last = step + 1 == recipe.steps or on_any_process(out_of_time, accelerator)
            if last or (recipe.eval_every and (step + 1) % recipe.eval_every == 0):
                found = evaluate()
                line |= found
                _keep_if_best(out / "checkpoints", step + 1, found, recipe.best_by, trained, accelerator)
            if last or (step + 1) % recipe.log_every == 0:
                log(line)
            if last or (step + 1) % recipe.save_every == 0:
                state = {"best": best, "data": gather_object([loader.state_dict()]), "recipe": recipe.to_dict()}
                tensors = _whole_tensors(trained)
                optimizer_state = whole_optimizer_state(optimizer)
                if accelerator.is_main_process:
                    save_checkpoint(out / "checkpoints", step + 1, tensors, optimizer_state, state)
                accelerator.wait_for_everyone()
            right = {name.split("_")[0]: f"{value:.2f}" for name, value in accuracies(sums).items()}
            bar.set_postfix({"loss": f"{line['loss']:.3f}", **right, "d": d})
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
    folder: Path,
    step: int,
    evaluation: dict[str, float],
    best_by: str | None,
    trained: dict[str, Tensor],
    accelerator: Accelerator,
) -> None:
    """Keep the weights of an evaluation that came out better than all before it."""
    kept, found = read_best(folder), score(evaluation, best_by)
    before = None if kept is None else score(kept.evaluation, best_by)
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
