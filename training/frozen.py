"""Frozen weights: held in 16 or 4 bits, computed with in the run's precision.

What is trained has masters in float32. What is frozen needs none: under autocast it is held in bfloat16, which is what
the layers compute with anyway. A run in float32 holds the frozen matrices in the 16 bits that their checkpoint has, and
turns each of them to float32 where it is used, one layer at a time: the numbers are those of a model in float32, at
half of its memory.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

HALF = (torch.bfloat16, torch.float16)


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
        return functional.linear(inputs, weight.to(inputs.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        return grads[0] @ weight.to(grads[0].dtype), None


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
