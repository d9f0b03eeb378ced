"""Loss and gradients of one fixed joint batch, on however many processes this is started.

accelerate launch --multi_gpu --num_processes 2 tests/joint_batch.py OUT.pt
"""

import os
import sys
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from transformers import LlamaConfig, LlamaForCausalLM

from fot.config import MemoryConfig
from training.batches import Batch
from training.crossbatch import enable_crossbatch
from training.recipe import Recipe
from training.step import Step, set_contexts

LANES, WINDOWS, WINDOW, D = 4, 2, 16, 5


def joint_batch() -> Batch:
    """Four lanes of two windows; the last lane's second window is half padding."""
    generator = torch.Generator().manual_seed(0)
    rows = LANES * WINDOWS
    ids = torch.randint(3, 90, (rows, WINDOW + 1), generator=generator)
    padding = torch.zeros(rows, WINDOW, dtype=torch.bool)
    padding[-1, WINDOW // 2 :] = True
    weights = torch.rand(rows, WINDOW, generator=generator).masked_fill(padding, 0.0)
    weights[0] = 0.0  # rows weigh differently, so that an average of averages would be wrong
    lane = torch.arange(rows) // WINDOWS
    return Batch(ids[:, :-1], ids[:, 1:].masked_fill(weights == 0, -100), weights, padding, lane,
                 torch.arange(rows) % WINDOWS, lane + 100)  # fmt: skip


def part_of(batch: Batch, rank: int, world: int) -> Batch:
    """The lanes of one process, counted from 0 there."""
    rows = LANES * WINDOWS // world
    fields = {name: getattr(batch, name)[rank * rows : (rank + 1) * rows] for name in batch.__dataclass_fields__}
    return Batch(**(fields | {"lane": fields["lane"] - rank * LANES // world}))


def main(out: str) -> None:
    """One forward and backward pass; rank 0 saves loss and gradients."""
    accelerator = Accelerator(cpu=True)
    rank, world = accelerator.process_index, accelerator.num_processes
    set_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=90, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
                                         num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3,
                                         max_position_embeddings=64))  # fmt: skip
    config = MemoryConfig(mem_layers=(1, 2), local_context=WINDOW).resolve(3, 64, "float32")
    crossbatch = enable_crossbatch(model, config)
    recipe = Recipe(tasks=[{"kind": "dictionary"}], lanes=LANES // world, windows=WINDOWS, contexts={"values": [D]})
    module: Any = accelerator.prepare(Step(model, crossbatch))
    batch = part_of(joint_batch(), rank, world)
    set_contexts(crossbatch, recipe, batch, D, "seed", accelerator)
    sums = module(batch)
    total = accelerator.reduce(torch.stack([sums["loss"], sums["weight"]]).detach())
    accelerator.backward(sums["loss"] * world / total[1])
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    if accelerator.is_main_process:
        torch.save({"world": world, "loss": total[0] / total[1], "gradients": gradients}, out)
    # A process that leaves while another still talks to it makes that one abort.
    accelerator.wait_for_everyone()
    # Taking gloo down can deadlock: its destructor waits, with Python's lock, for a thread that waits for that lock.
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
