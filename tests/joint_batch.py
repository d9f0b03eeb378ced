"""Loss and gradients of one step over two fixed joint batches, on any number of processes (``ranks_run.py``)."""

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from transformers import LlamaConfig, LlamaForCausalLM

from fot.config import MemoryConfig
from training.batches import Batch
from training.crossbatch import enable_crossbatch
from training.recipe import Recipe
from training.step import Step, train_step

LANES, WINDOWS, WINDOW, D = 4, 2, 16, 5


def joint_batch(number: int) -> Batch:
    """Four lanes of two windows; the last lane's second window is half padding.

    The first batch has labels of random weights all over. The second has few: rows, processes and batches weigh
    differently, so that an average of averages would be wrong.
    """
    generator = torch.Generator().manual_seed(number)
    rows = LANES * WINDOWS
    ids = torch.randint(3, 90, (rows, WINDOW + 1), generator=generator)
    padding = torch.zeros(rows, WINDOW, dtype=torch.bool)
    padding[-1, WINDOW // 2 :] = True
    weights = torch.rand(rows, WINDOW, generator=generator).masked_fill(padding, 0.0)
    weights[0] = 0.0
    if number:
        weights[:, 1:] = weights[3:] = 0.0
    lane, index = torch.arange(rows) // WINDOWS, torch.arange(rows) % WINDOWS
    content = (lane + 100)[:, None].expand(rows, WINDOW).masked_fill(padding, -1)
    position = index[:, None] * WINDOW + torch.arange(WINDOW)
    nothing = torch.zeros_like(padding)
    return Batch(ids[:, :-1], ids[:, 1:].masked_fill(weights == 0, -100), weights, padding, lane, index, lane + 100,
                 content, position, nothing, nothing[:, 0])  # fmt: skip


def part_of(batch: Batch, rank: int, world: int) -> Batch:
    """The lanes of one process, counted from 0 there."""
    rows = LANES * WINDOWS // world
    fields = {name: getattr(batch, name)[rank * rows : (rank + 1) * rows] for name in batch.__dataclass_fields__}
    return Batch(**(fields | {"lane": fields["lane"] - rank * LANES // world}))


def tiny_model() -> tuple[LlamaForCausalLM, MemoryConfig]:
    """The same weights each time, memory in two layers."""
    set_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=90, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
                                         num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3,
                                         max_position_embeddings=64))  # fmt: skip
    return model, MemoryConfig(mem_layers=(1, 2), local_context=WINDOW).resolve(3, 64, "float32")


def one_step(
    accelerator: Accelerator, *, focus: float = 0.0, recomputed: bool = False
) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of a training step over both batches, as the change of the weights at a learning rate of 1."""
    rank, world = accelerator.process_index, accelerator.num_processes
    model, config = tiny_model()
    recipe = Recipe(
        tasks=[{"kind": "dictionary"}],
        lanes=LANES // world,
        windows=WINDOWS,
        contexts={"values": [D]},
        accumulation=2,
        clip=0,
        focus=focus,
    )
    if recomputed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    crossbatch = enable_crossbatch(model, config)
    module, optimizer = accelerator.prepare(Step(model, crossbatch).train(), optimizer)
    batches = (part_of(joint_batch(number), rank, world) for number in range(2))
    trained = dict(model.named_parameters())
    sums = train_step(recipe, 0, D, batches, module, crossbatch, optimizer, trained, accelerator)
    return sums["loss"], {name: before[name] - parameter.detach() for name, parameter in trained.items()}
