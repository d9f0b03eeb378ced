"""Training steps with every shipped recipe's contexts, one lane a process, on several processes.

python tests/ranks_run.py OUT.json 2 3
"""

import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from joint_batch import one_step
from transformers import LlamaConfig, LlamaForCausalLM

from fot.config import MemoryConfig
from training import crossbatch as cb
from training.batches import Batch
from training.recipe import SHIPPED, Recipe, load_recipe
from training.step import Step, train_step

WINDOW = 8


def with_windows() -> list[str]:
    """Names of the shipped recipes whose rows see others; whole sequences see none."""
    names = sorted(path.stem for path in SHIPPED.glob("*.yaml"))
    return [name for name in names if not load_recipe(name).tuning().whole]


def as_told(name: str) -> str:
    """All that a step here takes from a shipped recipe."""
    shipped = load_recipe(name)
    return repr((shipped.windows, shipped.contexts, shipped.checkpointing, shipped.memory_config().isolated_windows))


def lane_of(rank: int, windows: int, step: int) -> Batch:
    """A document of its own on each process."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    ids = torch.randint(3, 90, (windows * WINDOW + 1,), generator=generator)
    rows = (windows, WINDOW)
    nothing = torch.zeros(rows, dtype=torch.bool)
    index, document = torch.arange(windows), torch.full((windows,), rank)
    content, position = document[:, None].expand(rows), torch.arange(windows * WINDOW).reshape(rows)
    return Batch(ids[:-1].reshape(rows), ids[1:].reshape(rows), torch.ones(rows), nothing, torch.zeros_like(index),
                 index, document, content, position, nothing, nothing[:, 0])  # fmt: skip


def step_of(name: str, fused: bool, accelerator: Accelerator) -> dict[str, Any]:
    """Loss of a step of two batches, and how many lanes their future reaches. Some ranks have no contexts."""
    shipped = load_recipe(name)
    recipe = Recipe(
        tasks=[{"kind": "dictionary"}], lanes=1, windows=shipped.windows, contexts=shipped.contexts, accumulation=2
    )
    set_seed(0)
    settings = {"vocab_size": 90, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2,
                "num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.3}  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(**settings))
    isolated = shipped.memory_config().isolated_windows
    crossbatch = cb.enable_crossbatch(model, MemoryConfig((0, 1), WINDOW, isolated_windows=isolated))
    if shipped.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    cb.fused_backward_fits = (lambda queries: True) if fused else (lambda queries: False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    module, optimizer = accelerator.prepare(Step(model, crossbatch), optimizer)
    batches = (lane_of(accelerator.process_index, recipe.windows, step) for step in range(2))
    trained = dict(model.named_parameters())
    d = max(recipe.schedule().values)
    sums = train_step(recipe, 0, d, batches, module, crossbatch, optimizer, trained, accelerator)
    return {"loss": sums["loss"], "leaks": leaks(model, recipe.windows, accelerator)}


@torch.no_grad()
def leaks(model: LlamaForCausalLM, windows: int, accelerator: Accelerator) -> int:
    """Lanes whose first window changes with their later ones, in the contexts of the last step."""
    ids = torch.randint(3, 90, (windows, WINDOW), generator=torch.Generator().manual_seed(0))
    before, found = model(ids, use_cache=False).logits, 0.0
    for rank in range(accelerator.num_processes):  # all run, one has another future
        changed = ids.clone()
        if rank == accelerator.process_index:
            changed[1:] = 3 + (changed[1:] - 2) % 87
        after = model(changed, use_cache=False).logits
        if rank == accelerator.process_index:
            found = float((after[0] != before[0]).any())
            assert (after[1:] != before[1:]).any()
    return int(accelerator.reduce(torch.tensor(found)))


def process(rank: int, world: int, port: int, out: Path) -> None:
    """What one of ``world`` processes does."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port)}  # fmt: skip
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == world
    found: dict[str, Any] = {}
    of_steps: dict[str, tuple[Any, ...]] = {}  # some recipes differ in nothing that matters here
    for name in with_windows():
        steps = as_told(name)
        if steps not in of_steps:
            fused = step_of(name, True, accelerator)
            # as on devices without the fused kernels
            of_steps[steps] = fused, step_of(name, False, accelerator) if world == 3 else None
        found[name], recomputed = of_steps[steps]
        if recomputed:
            found[f"{name}, recomputed"] = recomputed
    joint = [one_step(accelerator, focus=focus) for focus in (0.0, 2.0)] if world == 2 else []
    if rank == 0:
        out.write_text(json.dumps(found))
        torch.save(joint, out.with_suffix(".pt"))
    accelerator.wait_for_everyone()


def main(out: Path, worlds: list[int]) -> None:
    """Each number of processes in turn; forked, so that packages are imported once."""
    for world in worlds:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        children = []
        for rank in range(world):
            child = os.fork()
            if child:
                children.append(child)
                continue
            code = 1
            try:
                process(rank, world, port, out.with_suffix(f".{world}.json"))
                code = 0
            finally:
                # Taking gloo down can deadlock: its destructor, with Python's lock, waits for a thread that wants it.
                os._exit(code)
        statuses = [os.waitpid(child, 0)[1] for child in children]
        assert not any(statuses), statuses


if __name__ == "__main__":
    main(Path(sys.argv[1]), [int(world) for world in sys.argv[2:]])
