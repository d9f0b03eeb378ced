"""Frozen weights: held in 16 or 4 bits, computed with in the run's precision.

What is trained has masters in float32. What is frozen needs none: under autocast it is held in bfloat16, which is what
the layers compute with anyway. A run in float32 holds the frozen matrices in the 16 bits that their checkpoint has, and
turns each of them to float32 where it is used, one layer at a time: the numbers are those of a model in float32, at
half of its memory.
"""

import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

HALF = (torch.bfloat16, torch.float16)

# Numbers of a weight that are in float32 at once: 64 MiB.
SCRATCH = 1 << 24
_SCRATCH = threading.local()


class FrozenLinear(nn.Linear):
    """A linear layer whose frozen weight is held in 16 bits, and computed with in the dtype of its input."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features), in the dtype of ``input``."""
        product = _FrozenProduct.apply(input, self.weight)
        return product if self.bias is None else product + self.bias.to(input.dtype)


class FrozenEmbedding(nn.Embedding):
    """An embedding whose frozen weight is held in 16 bits and looked up in float32."""

    def forward(self, input: Tensor) -> Tensor:
        """(...) int64 -> (..., embedding_dim) float32."""
        return super().forward(input).float()


class _FrozenProduct(torch.autograd.Function):
    """x W^T. Only W in 16 bits is kept for the backward pass, where autograd would keep it in float32."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        rows = inputs.reshape(-1, weight.shape[1])
        product = rows.new_empty(len(rows), len(weight))
        for start, stop, block in _blocks(weight, inputs.dtype):
            product[:, start:stop] = rows @ block.mT
        return product.view(*inputs.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        grad = grads[0].reshape(-1, len(weight))
        total = grad.new_zeros(len(grad), weight.shape[1])
        for start, stop, block in _blocks(weight, grad.dtype):
            total.addmm_(grad[:, start:stop], block)
        return total.view(*grads[0].shape[:-1], weight.shape[1]), None


def _blocks(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[int, int, Tensor]]:
    """Rows of a weight in another dtype, a block at a time, all in the same piece of memory.

    A new piece for each would leave holes that an allocator cannot use for the next: half a gigabyte a layer of
    OpenLLaMA 3B was measured.
    """
    count = max(1, SCRATCH // weight.shape[1])
    scratch = getattr(_SCRATCH, "tensor", None)
    needed = min(count, len(weight)) * weight.shape[1]
    if scratch is None or scratch.numel() < needed or (scratch.device, scratch.dtype) != (weight.device, dtype):
        with torch.inference_mode(False):  # autograd could not write into a tensor of inference later
            scratch = _SCRATCH.tensor = torch.empty(needed, dtype=dtype, device=weight.device)
    for start in range(0, len(weight), count):
        rows = weight[start : start + count]
        yield start, start + len(rows), scratch[: rows.numel()].view(rows.shape).copy_(rows)


def forget_scratch() -> None:
    """Let the piece of memory go in which weights are turned to float32; the next to need one makes it anew."""
    _SCRATCH.tensor = None


def train_in_float32(model: nn.Module) -> None:
    """Turn what is trained into masters in float32, in place."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype in HALF:
            parameter.data = parameter.data.float()


def compute_in_float32(model: nn.Module) -> None:
    """Let a model with frozen weights in 16 bits compute in float32, in place.

    The matrices of plain linear layers and embeddings stay as they are. All else becomes float32: norms, biases, and
    what families have of their own.
    """
    classes = {nn.Linear: FrozenLinear, nn.Embedding: FrozenEmbedding}
    held = set()
    others = [module for module in model.modules() if type(module) not in classes]
    elsewhere = {id(parameter) for module in others for parameter in module.parameters(recurse=False)}  # tied
    for module in model.modules():
        if type(module) not in classes or module.weight.requires_grad or module.weight.dtype not in HALF:
            continue
        if id(module.weight) not in elsewhere:
            module.__class__ = classes[type(module)]
            held.add(id(module.weight))
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dtype in HALF and id(tensor) not in held:
            tensor.data = tensor.data.float()
