"""The training loop, on accelerate: one process, several, or a cluster, by the same command."""

import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object, set_seed
from torch import Tensor

from fot.machine import peak_memory_bytes
from training.allocator import keep_freed_memory
from training.batches import Batch
from training.checkpoints import list_checkpoints, read_best, save_best, save_checkpoint, set_aside
from training.crossbatch import enable_crossbatch
from training.deadline import Deadline
from training.evaluation import build_evaluation, score
from training.flops import flops_per_token
from training.launch import lone_process
from training.log import Log, check_trackers, end_trackers, finite, flat, numbers, summary_writer
from training.progress import Progress, each_warning_once
from training.rates import learning_rate_at
from training.recipe import Recipe
from training.results import write_result
from training.resume import Start, claim, find_start, on_main, restore
from training.setup import (
    build_loader,
    build_model,
    check_contexts,
    check_texts,
    choose_trainable,
    describe_data,
    optimizer_for,
)
from training.sharding import check_sharding, refuse_other_engines, whole, whole_optimizer_state, whole_parameters
from training.shares import all_shares
from training.signals import Signals, Stopped
from training.step import Step, accuracies, train_step

# Called with each record of the log; one that returns True ends the run, with a result.
Watcher = Callable[[dict[str, Any]], bool | None]


def train(
    recipe: Recipe,
    out: Path,
    *,
    resume: bool = False,
    max_hours: float | None = None,
    changed: Collection[str] = (),
    callbacks: Sequence[Watcher] = (),
    peak_tflops: float | None = None,
) -> dict[str, Any]:
    """Train as the recipe says. A process group of ``torch.distributed`` is left as it is, for the caller to end.

    Args:
        recipe: what to do.
        out: folder for checkpoints, ``log.jsonl`` and the result.
        resume: whether to continue from the last complete checkpoint in ``out``. The losses are then those of a run
            without interruption. If there is no checkpoint, the run starts from the beginning. The number of
            processes may have changed if it divides the run's lanes; losses then differ by rounding.
        max_hours: the run ends within this time, with a checkpoint and a result. If its learning rate will not have
            fallen to the end by then, a message says so as soon as the speed is known.
        changed: entries of the recipe that are meant to differ from those that the run in ``out`` was made with.
        callbacks: called on the main process with each record of the log before it is written; one that returns True
            ends the run after this step, with a checkpoint and a result.
        peak_tflops: peak TFLOP/s of one device at the run's precision. With it, the log has ``mfu``, the share of this
            peak that is used.

    Returns:
        The last line of the log.

    Raises:
        ValueError: The folder holds another run, the settings do not fit, or FSDP was asked for on a CPU, or DeepSpeed.
        FloatingPointError: The loss, a gradient or a weight is not finite. The checkpoints are from before that.
        OSError: A file could not be written. Everything that was saved before is complete.
        ImportError: A package that the recipe's logging needs is not installed.
        Stopped: SIGINT or SIGTERM arrived. The run finished its step and saved a checkpoint.
    """
    deadline = Deadline(max_hours)
    refuse_other_engines()
    if recipe.tensorboard:
        summary_writer()  # missing, it must be said before the work
    check_trackers(recipe.trackers)
    # Unless told of the CPU, accelerate takes processes that were launched together without a GPU for lone ones.
    cpu = not torch.accelerator.is_available()
    accelerator = Accelerator(
        cpu=cpu,
        gradient_accumulation_steps=1,
        mixed_precision="bf16" if recipe.precision() == torch.bfloat16 else "no",
        log_with=list(recipe.trackers) or None,
        project_dir=out,
    )
    check_sharding(accelerator)
    if accelerator.num_processes == 1 and (words := lone_process()):
        print(f"fot: {words}", file=sys.stderr)
    keep_freed_memory(accelerator.device.type, large=not recipe.checkpointing)
    set_seed(recipe.seed)
    processes = accelerator.num_processes
    checkpoint = on_main(
        accelerator, lambda: find_start(out, recipe, resume=resume, changed=changed, processes=processes)
    )
    shares = processes
    if checkpoint is not None:
        recipe, shares = replace(recipe, lanes=checkpoint.lanes), checkpoint.shares
    # What can be wrong with a recipe is found before anything is written.
    data = describe_data(recipe)
    check_contexts(recipe, shares)
    model, config, tokenizer = build_model(recipe)
    trained = choose_trainable(model, recipe, config)
    start_weights = {name: tensor.detach().clone() for name, tensor in trained.items()} if recipe.strength < 1 else {}
    crossbatch = enable_crossbatch(model, config, recipe.tuning().switch)
    if recipe.tuning().attention is not None:
        model.set_attn_implementation(recipe.tuning().attention)
    if recipe.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    loader = build_loader(
        recipe, config, tokenizer, shares=shares, process=accelerator.process_index, processes=processes
    )
    check_texts(recipe, config, tokenizer)
    step_module = Step(
        model, crossbatch, recipe.tuning().rows
    ).train()  # loaded models are in eval mode, where nothing is checkpointed
    optimizer = optimizer_for(recipe, trained)
    step_module, optimizer = accelerator.prepare(step_module, optimizer)
    trained = {name: parameter for name, parameter in model.named_parameters() if name in trained}  # FSDP replaces them
    evaluate = build_evaluation(recipe, config, tokenizer, step_module, crossbatch, accelerator)
    start = Start()
    if checkpoint is not None:
        start = restore(checkpoint.path, trained, optimizer, accelerator)
        loader.load_state_dict(start.data)
    on_main(accelerator, lambda: claim(out, recipe, data, checkpoint.path if checkpoint else None))
    if not recipe.held_out and config.layers and accelerator.is_main_process:
        print(
            "the recipe names no held_out texts, so the log will not show whether the memory helps on text",
            file=sys.stderr,
        )
    log = Log(out, start.step, active=accelerator.is_main_process, tensorboard=recipe.tensorboard)
    if recipe.trackers:
        accelerator.init_trackers("fot", config=flat(recipe.to_dict()))
    line, best, waited, step = log.last, start.best_accuracy, start.waited, start.step
    batches: Iterator[Batch] = iter(loader)
    tokens_done, clock = 0, time.perf_counter()

    def judge(done: int) -> dict[str, float]:
        nonlocal waited
        found = evaluate()
        waited = (
            0 if _keep_if_best(out / "checkpoints", done, found, recipe.best_by, trained, accelerator) else waited + 1
        )
        return found

    def save(done: int) -> None:
        log.sync()
        state = {"best": best, "waited": waited, "data": all_shares(gather_object([loader.state_dict()]))}
        tensors = _whole_tensors(trained, done)
        optimizer_state = whole_optimizer_state(optimizer)
        if accelerator.is_main_process:
            state["recipe"] = recipe.to_dict()
            save_checkpoint(out / "checkpoints", done, tensors, optimizer_state, state)
        accelerator.wait_for_everyone()

    try:
        main = accelerator.is_main_process
        with (
            each_warning_once(active=main),
            Signals() as signals,
            Progress(recipe.steps, start.step, active=main) as bar,
        ):
            for step in range(start.step, recipe.steps):
                d = recipe.schedule().contexts_at(step, best, recipe.seed)
                rate = learning_rate_at(recipe, step)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                began = time.perf_counter()
                sums = train_step(recipe, step, d, batches, step_module, crossbatch, optimizer, trained, accelerator)
                seconds, shares = time.perf_counter() - began, accuracies(sums)
                best = max(best, shares.get("answer_accuracy", 0.0))
                tokens_done += int(sums["tokens"])
                line = {"step": step + 1, "loss": sums["loss"], **shares, "d": d,
                        "learning_rate": rate, "gradient_norm": sums["norm"], "tokens": int(sums["tokens"]),
                        "tokens_per_second": sums["tokens"] / seconds,
                        "run_tokens_per_second": tokens_done / (time.perf_counter() - clock),
                        "memory_bytes": peak_memory_bytes(accelerator.device)}  # fmt: skip
                if sums["focus_rows"]:
                    line["focus_loss"] = sums["focus"] / sums["focus_rows"]
                if peak_tflops:
                    flops = flops_per_token(model, config.window, len(config.layers), d) * line["tokens_per_second"]
                    line["mfu"] = flops / (peak_tflops * 1e12 * accelerator.num_processes)
                evaluates = step + 1 == recipe.steps or bool(recipe.eval_every and (step + 1) % recipe.eval_every == 0)
                if evaluates:
                    line |= judge(step + 1)
                logs = evaluates or (step + 1) % recipe.log_every == 0
                ends = deadline.passed() or 0 < recipe.patience <= waited
                if words := deadline.warning(recipe, start.step, step + 1, time.perf_counter() - clock):
                    bar.say(words)
                if logs and accelerator.is_main_process:
                    ends |= any([callback(dict(line)) for callback in callbacks])
                ends, signum = agree(accelerator, ends, signals.received)
                last = step + 1 == recipe.steps or ends
                if last and not evaluates:
                    line |= judge(step + 1)
                if last or logs:
                    log(line)
                    accelerator.log(numbers(line), step=step + 1)
                if last or signum or (step + 1) % recipe.save_every == 0:
                    save(step + 1)
                right = {name.split("_")[0]: f"{value:.2f}" for name, value in shares.items()}
                bar.update(step + 1, ending=last, loss=f"{line['loss']:.3f}", **right, d=f"{d}")
                if last:
                    break
                if signum:
                    end_trackers(accelerator)
                    raise Stopped(signum, f"stopped after step {step + 1}, which is saved: continue with --resume")
    except FloatingPointError as error:
        raise FloatingPointError(f"{error}; {_way_on(out / 'checkpoints', step, accelerator)}") from error
    parameters = whole_parameters(model, None if recipe.trainable == "all" else trained)
    kept = read_best(out / "checkpoints") if recipe.result == "best" else None
    if kept is not None:
        line = line | {"best": kept.evaluation | {"step": kept.step}}
        for name, tensor in kept.tensors().items():
            parameters[name].copy_(tensor)
    for name, tensor in start_weights.items():  # in place: tied parameters are one tensor
        parameters[name].copy_(tensor.cpu().lerp(parameters[name], recipe.strength))
    if accelerator.is_main_process:
        write_result(out, recipe, model, tokenizer, config, parameters, list(trained), finite(line))
    accelerator.wait_for_everyone()
    end_trackers(accelerator)
    return finite(line)


def agree(accelerator: Accelerator, ends: bool, signum: int) -> tuple[bool, int]:
    """What any process wants, on all of them: whether the run ends, and the signal that came. All or none go on."""
    if accelerator.num_processes == 1:
        return ends, signum
    wanted = accelerator.gather(torch.tensor([[int(ends), signum]], device=accelerator.device)).amax(0)
    return bool(wanted[0]), int(wanted[1])


def _way_on(folder: Path, step: int, accelerator: Accelerator) -> str:
    """What to do after step ``step + 1`` came out not finite. The checkpoint that leads straight to it is set aside."""
    aside = set_aside(folder, step) if accelerator.is_main_process else None
    words = f"the checkpoint of step {step} leads to it, so it was renamed to {aside.name}; " if aside else ""
    whole_ones = list_checkpoints(folder)
    if not whole_ones:
        return f"{words}start a new run with a lower learning_rate, a longer warm-up, or dtype=float32"
    remedy = "a lower learning_rate=..., or with dtype=float32"
    return f"{words}continue from {whole_ones[-1].name} with --resume and {remedy}"


def _keep_if_best(
    folder: Path,
    step: int,
    evaluation: dict[str, float],
    best_by: str | None,
    trained: dict[str, Tensor],
    accelerator: Accelerator,
) -> bool:
    """Keep the weights of an evaluation that came out better than all before it; returns whether it did."""
    kept, found = read_best(folder), score(evaluation, best_by)
    before = None if kept is None else score(kept.evaluation, best_by)
    better = [found is not None and (before is None or found > before)]
    broadcast_object_list(better)  # one process decides: gathering the weights takes all of them
    if better[0]:
        tensors = _whole_tensors(trained, step)
        if accelerator.is_main_process:
            save_best(folder, step, tensors, evaluation)
        accelerator.wait_for_everyone()
    return better[0]


def _whole_tensors(trained: dict[str, Tensor], step: int) -> dict[str, Tensor]:
    """What is trained, whole, on the CPU.

    Raises:
        FloatingPointError: a weight is not finite, and not worth keeping.
    """
    tensors = {name: whole(parameter.detach()).cpu() for name, parameter in trained.items()}
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise FloatingPointError(f"{name} is not finite after step {step}")
    return tensors
