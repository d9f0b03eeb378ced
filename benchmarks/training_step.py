"""What crossbatch adds to a training step: wall time and peak memory with it and without, on the same tokens.

And, on a CPU, what keeping freed memory saves (``training.allocator``): the step with crossbatch, once more without it.

    python benchmarks/training_step.py smollm2-135m lanes=6 windows=2 memory.local_context=512 --json OUT.json

Takes a recipe and overrides as ``fot train`` does; tokens are random, and the number of contexts is what the recipe
comes to at its end. Each runs in a process of its own, with one step to warm up. Memory is what the
process has held at most on a CPU, and what torch has allocated at most on a GPU.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fot.machine import default_dtype, describe_machine, find_device, peak_rss_bytes
from memory.atomic import write_json
from training.allocator import keep_freed_memory
from training.batches import Batch
from training.contexts import choose_contexts, rows_of
from training.crossbatch import disable_crossbatch, enable_crossbatch
from training.recipe import Recipe, load_recipe
from training.setup import build_model, choose_trainable
from training.step import Step


def random_batch(recipe: Recipe, window: int, vocabulary: int) -> Batch:
    """A batch in which every token counts."""
    rows = recipe.lanes * recipe.windows
    ids = torch.randint(vocabulary, (rows, window + 1), generator=torch.Generator().manual_seed(recipe.seed))
    lane = torch.arange(rows) // recipe.windows
    nothing = torch.zeros(rows, window, dtype=torch.bool)
    index = torch.arange(rows) % recipe.windows
    position = index[:, None] * window + torch.arange(window)
    content = lane[:, None].expand(rows, window)
    weights = torch.ones(rows, window)
    return Batch(
        ids[:, :-1], ids[:, 1:], weights, nothing, lane, index, lane, content, position, nothing, nothing[:, 0]
    )


# What is measured: (with crossbatch, keeping freed memory).
PARTS = {"without": (False, True), "with": (True, True), "with, memory given back": (True, False)}


def measure(recipe: Recipe, steps: int, *, with_crossbatch: bool, keep: bool) -> dict[str, Any]:
    """Seconds of each step, and peak memory."""
    device = find_device(None)
    if keep:
        keep_freed_memory(device.type, large=not recipe.checkpointing)
    model, config, _ = build_model(recipe)
    trained = list(choose_trainable(model, recipe, config).values())
    model.to(device).train()
    crossbatch = enable_crossbatch(model, config)
    if recipe.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    batch = random_batch(recipe, config.window, model.config.vocab_size).to(device)
    rows = rows_of(batch)
    d = recipe.schedule().contexts_at(recipe.steps, 1.0, recipe.seed)
    crossbatch.contexts = choose_contexts(
        recipe.schedule(), rows, range(len(batch.lane)), d, "0", isolated=config.isolated_windows
    )
    if not with_crossbatch:
        disable_crossbatch(model, crossbatch)
    optimizer = torch.optim.AdamW(trained, lr=recipe.learning_rate)
    dtype = default_dtype(device) if recipe.dtype == "auto" else getattr(torch, recipe.dtype)
    module, seconds = Step(model, crossbatch), []
    for _ in range(steps + 1):
        start = time.perf_counter()
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            sums = module(batch)
        (sums["loss"] / sums["weight"]).backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else peak_rss_bytes()
    seen = sum(map(len, crossbatch.contexts.rows)) / len(batch.lane) if with_crossbatch else 0
    return {"seconds": seconds[1:], "peak_bytes": peak, "contexts_a_row": seen, "tokens": batch.input_ids.numel()}


def main() -> None:
    """Measure both in processes of their own, print, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="smollm2-135m", help="recipe file or name")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--steps", type=int, default=3, help="timed steps (default: 3)")
    parser.add_argument("--json", type=Path, metavar="OUT")
    parser.add_argument("--only", choices=PARTS, help="one of them, in this process, as JSON")
    args = parser.parse_intermixed_args()
    recipe = load_recipe(args.recipe, args.overrides)
    if args.only:
        with_crossbatch, keep = PARTS[args.only]
        print(json.dumps(measure(recipe, args.steps, with_crossbatch=with_crossbatch, keep=keep)))
        return
    found = {}
    for part in PARTS:
        command = [sys.executable, __file__, args.recipe, *args.overrides, "--steps", str(args.steps), "--only", part]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found[part] = json.loads(done.stdout.splitlines()[-1])
        seconds, peak = statistics.median(found[part]["seconds"]), found[part]["peak_bytes"] / 1e6
        print(f"crossbatch: {part:<24} {seconds:8.3f} s a step, {found[part]['tokens'] / seconds:8,.0f} tokens/s, "
              f"peak {peak:8,.0f} MB, {found[part]['contexts_a_row']:.1f} contexts a row")  # fmt: skip
    for one, other in (("with", "without"), ("with, memory given back", "with")):
        time_ratio = statistics.median(found[one]["seconds"]) / statistics.median(found[other]["seconds"])
        memory_ratio = found[one]["peak_bytes"] / found[other]["peak_bytes"]
        print(f"{one} : {other} = {time_ratio:.2f} in time, {memory_ratio:.2f} in memory")
    if args.json:
        write_json(args.json, {"recipe": recipe.to_dict(), "machine": describe_machine(), **found})


if __name__ == "__main__":
    main()
