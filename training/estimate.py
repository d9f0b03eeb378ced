"""What a run will take of memory, before anything is loaded: one step on tensors without content.

The model is made of torch's fake tensors, which have shapes, dtypes and autograd, but no numbers. The step that a run
does goes through it, the same code but for the data, and a dispatch mode counts what is alive. What this does not see
is what kernels need within themselves, and what an allocator loses between blocks.
"""

import contextlib
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

from fot.config import MemoryConfig
from fot.families import decoder_of, head, layers_of
from fot.loading import load_config
from fot.loss import token_losses
from fot.model import FoTForCausalLM, detach_memory
from fot.quantized import NF4_BYTES
from training.crossbatch import Contexts, Crossbatch, enable_crossbatch
from training.frozen import forget_scratch
from training.recipe import Recipe
from training.setup import choose_trainable, new_config, optimizer_for, resolve_memory

# Python, torch, transformers, a tokenizer and some text on a CPU; CUDA's context and libraries on a GPU.
PROCESS_BYTES = {"cpu": 500 * 2**20, "cuda": 800 * 2**20}
# What allocators hold in blocks that they cannot use: glibc's as a share of the activations, CUDA's of all.
CPU_LOSS = 0.5
GPU_LOSS = 1.05
GPUS = (24, 40, 80)


@dataclass(frozen=True)
class Estimate:
    """Bytes that one process takes, and what for.

    Attributes:
        trained: number of trained parameters.
        frozen: number of the others.
        weights: all parameters, as they are held.
        gradients: of the trained ones.
        optimizer: its state.
        kept: activations that the forward pass keeps for the backward pass.
        layer: what comes on top of them, at most, while the backward pass goes through the layers.
        loss: what comes on top of them while the loss and its gradient are computed.
        peak: most of all of this at once.
        tokens: tokens in a step of all processes.
        processes: how many there are.
    """

    trained: int
    frozen: int
    weights: int
    gradients: int
    optimizer: int
    kept: int
    layer: int
    loss: int
    peak: int
    tokens: int
    processes: int

    @property
    def activations(self) -> int:
        """Most bytes of activations at once."""
        return self.kept + max(self.layer, self.loss)

    def on_cpu(self) -> int:
        """Most bytes of a process on a CPU."""
        return PROCESS_BYTES["cpu"] + self.peak + int(CPU_LOSS * self.activations)

    def on_gpu(self, parts: int = 1) -> int:
        """Most bytes of a process on a GPU.

        Args:
            parts: number of GPUs over which FSDP spreads weights, gradients and the optimiser's state.
        """
        held = (self.weights + self.gradients + self.optimizer) // parts
        # On GPUs torch updates all parameters at once, which takes a number for each of them.
        peak = max(self.peak if parts == 1 else held + self.activations, held + self.gradients)
        return PROCESS_BYTES["cuda"] + int(GPU_LOSS * peak)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that operations have made and that are still alive.

    Attributes:
        now: bytes alive.
        peak: most of them at once.
        gradients: bytes of those that are gradients of parameters.
        peak_besides: most bytes at once of those that are not.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.gradients = self.peak_besides = 0
        self._alive: dict[int, tuple[int, Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        # A view, or what is written in place, is not made here: a real model's weights are older than this mode.
        given = [leaf.untyped_storage() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        older = set(map(id, given))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and id(leaf.untyped_storage()) not in older:
                self._count(leaf)
        return result

    def watch_gradients(self, parameters: dict[str, Tensor]) -> None:
        """Tell gradients from activations from now on."""

        def accumulated(parameter: Tensor) -> None:
            self.gradients += _bytes(parameter.grad)

        for parameter in parameters.values():
            parameter.register_post_accumulate_grad_hook(accumulated)

    @contextlib.contextmanager
    def phase(self) -> Iterator[None]:
        """Peaks count from here."""
        self.peak, self.peak_besides = self.now, self.now - self.gradients
        yield

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        if key not in self._alive:
            size = storage.nbytes()
            self._alive[key] = (size, weakref.ref(storage, lambda _: self._forget(key)))
            self.now += size
            self.peak = max(self.peak, self.now)
            self.peak_besides = max(self.peak_besides, self.now - self.gradients)

    def _forget(self, key: int) -> None:
        self.now -= self._alive.pop(key)[0]


def estimate(recipe: Recipe, processes: int = 1) -> Estimate:
    """What a process of a run takes.

    Args:
        recipe: of the run.
        processes: how many there are, each with the recipe's lanes.

    Raises:
        ValueError: an entry of the recipe does not fit its model.
        OSError: the model's configuration cannot be had.
    """
    live = LiveBytes()
    forget_scratch()  # of real tensors, and afterwards of fake ones
    with torch.device("meta"):
        model, config = _shape(recipe)
        names = list(choose_trainable(model, recipe, config))
    with FakeTensorMode(), live:
        _give_fake_tensors(model)
        parameters = dict(model.named_parameters())
        trained = {name: parameters[name] for name in names}
        crossbatch = enable_crossbatch(model, config)
        if recipe.checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        optimizer = optimizer_for(recipe, trained)
        rows = recipe.lanes * recipe.windows
        crossbatch.contexts = widest_contexts(recipe, rows, processes)
        crossbatch.gather = lambda tensor: tensor.repeat(processes, 1, 1, 1)
        live.watch_gradients(trained)
        weights = sum(map(_bytes, parameters.values()))
        kept, layer, loss, peak = forward_and_backward(model, crossbatch, recipe, (rows, config.window), live)
        gradients = sum(_bytes(parameter.grad) for parameter in trained.values())
        state = _optimizer_state(optimizer, trained)
    forget_scratch()
    saved = _saved_by_nf4(model) if recipe.quantization else 0
    number = sum(parameter.numel() for parameter in trained.values())
    return Estimate(
        trained=number,
        frozen=sum(parameter.numel() for parameter in parameters.values()) - number,
        weights=weights - saved,
        gradients=gradients,
        optimizer=state,
        kept=kept,
        layer=layer,
        loss=loss,
        # From the second step on, the optimiser's state is there while gradients are made.
        peak=max(weights + state + peak, weights + state + gradients) - saved,
        tokens=rows * config.window * recipe.accumulation * processes,
        processes=processes,
    )


def _shape(recipe: Recipe) -> tuple[Any, MemoryConfig]:
    """A recipe's model without its numbers, in the dtype that ``build_model`` would give it."""
    if isinstance(recipe.model, dict):
        config, dtype = new_config(recipe.model), torch.float32
    else:
        config, _ = load_config(recipe.model, "float32")
        held = torch.bfloat16 if recipe.precision() == torch.bfloat16 else config.dtype or torch.float32
        dtype = torch.float32 if recipe.trainable == "all" else held
    model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if isinstance(model, FoTForCausalLM):  # LongLLaMA
        model = detach_memory(model)
    return model, resolve_memory(recipe, config)


def _give_fake_tensors(model: nn.Module) -> None:
    """Put fake tensors of the CPU into a model on the meta device, which autocast passes by."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in made:  # else tied
                    empty = torch.empty(parameter.shape, dtype=parameter.dtype)
                    made[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
                module._parameters[key] = made[id(parameter)]
        for key, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[key] = torch.empty(buffer.shape, dtype=buffer.dtype)


def widest_contexts(recipe: Recipe, rows: int, processes: int) -> Contexts:
    """As many contexts as the recipe ever asks for, of whatever rows."""
    schedule = recipe.schedule()
    counts = [sum(segment) for segment in schedule.segments] or [max(schedule.values)]
    most = rows * processes - 1
    wanted = [min(counts[row * len(counts) // rows], most) for row in range(rows)]
    return Contexts([torch.zeros(count, dtype=torch.int64) for count in wanted])


def forward_and_backward(
    model: Any, crossbatch: Crossbatch, recipe: Recipe, shape: tuple[int, int], live: LiveBytes
) -> tuple[int, int, int, int]:
    """Activations kept, those on top of them in the layers and in the loss, and the peak with gradients."""
    ids = torch.zeros(shape, dtype=torch.int64)
    before = live.now
    half = torch.autocast("cpu", torch.bfloat16, enabled=recipe.precision() == torch.bfloat16)
    with live.phase(), half:
        hidden = decoder_of(model)(input_ids=ids, use_cache=False).last_hidden_state
        peak = live.peak
    kept = live.now - before
    with live.phase(), half:
        states = hidden.detach().requires_grad_()
        losses, _ = token_losses(states.flatten(0, 1), ids.flatten(), partial(head, model))
        losses.sum().backward()
        peak, loss = max(peak, live.peak), live.peak_besides - before - kept
    del losses
    with live.phase():
        gradient, states = states.grad, None
        hidden.backward(gradient)
        layer = live.peak_besides - before - kept
    return kept, max(0, layer), max(0, loss), max(peak, live.peak) - before


def _optimizer_state(optimizer: torch.optim.Optimizer, trained: dict[str, Tensor]) -> int:
    """Bytes of an optimiser's state after a step."""
    if isinstance(optimizer, torch.optim.Adafactor):  # its step reads numbers, which fake tensors do not have
        return sum(_adafactor_state(parameter) for parameter in trained.values())
    optimizer.step()
    return sum(_bytes(leaf) for leaf in tree_leaves(dict(optimizer.state)) if isinstance(leaf, Tensor))


def _adafactor_state(parameter: Tensor) -> int:
    """A mean for each row and each column of a matrix, or a number for each number; and the count of steps."""
    numbers = parameter.numel()
    if parameter.ndim > 1:
        numbers = numbers // parameter.shape[-1] + numbers // parameter.shape[-2]
    return numbers * parameter.element_size() + torch.float32.itemsize


def _saved_by_nf4(model: Any) -> int:
    """Bytes that the frozen linear layers of a decoder's layers take less in 4 bits."""
    modules = [module for layer in layers_of(decoder_of(model)) for module in layer.modules()]
    frozen = [m.weight for m in modules if isinstance(m, nn.Linear) and not m.weight.requires_grad]
    return sum(_bytes(weight) - int(weight.numel() * NF4_BYTES) for weight in frozen)


def _bytes(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.numel() * tensor.element_size()


def estimate_text(recipe: Recipe, found: Estimate) -> str:
    """The estimate as a table, and where the run fits."""

    def gigabytes(number: int) -> str:
        return f"{number / 1e9:,.2f} GB"

    rows = {
        "parameters": f"{found.trained + found.frozen:,}, of which {found.trained:,} are trained ({recipe.trainable})",
        "weights": gigabytes(found.weights),
        "gradients": gigabytes(found.gradients),
        f"optimiser ({recipe.optimizer})": gigabytes(found.optimizer),
        "activations, kept for the backward pass": gigabytes(found.kept),
        "activations, in the layers on top": gigabytes(found.layer),
        "activations, in the loss on top": gigabytes(found.loss),
        "tokens a step": f"{found.tokens:,}" + (f" in {found.processes} processes" if found.processes > 1 else ""),
    }
    here, free = found.on_cpu() * found.processes, psutil.virtual_memory().available
    rows["on this machine (CPU)"] = f"{gigabytes(here)}: {_fits(here, free)} {gigabytes(free)} that are free"
    for name, parts in {"on a GPU": 1, f"on each of {found.processes} GPUs with FSDP": found.processes}.items():
        needed = found.on_gpu(parts)
        rows[name] = f"{gigabytes(needed)}: " + ", ".join(f"{_fits(needed, size * 1e9)} {size} GB" for size in GPUS)
        if found.processes == 1:
            break
    width = max(map(len, rows))
    return "\n".join(f"{name:{width}}  {value}" for name, value in rows.items())


def _fits(needed: float, room: float) -> str:
    return "fits into" if needed <= room else "does not fit into"
