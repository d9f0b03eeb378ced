"""Parameters that FSDP has spread over processes: whole for a checkpoint, spread again from one.

``fully_shard`` (FSDP2) leaves each parameter under its name, as a ``DTensor``. Everything here also takes the plain
tensors of a run without FSDP, and leaves them alone. What gathers has to be called on every process.
"""

import os
from collections.abc import Collection
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

# What accelerate launch sets for engines of which fot cannot gather parameters for a checkpoint.
OTHER_ENGINES = {"ACCELERATE_USE_DEEPSPEED": "DeepSpeed", "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM"}


def refuse_other_engines() -> None:
    """To be called before accelerate looks for them.

    Raises:
        ValueError: accelerate launch was told to use one.
    """
    for variable, name in OTHER_ENGINES.items():
        if os.environ.get(variable, "false").lower() in ("true", "1"):
            raise ValueError(
                f"accelerate was told to use {name}, which fot train does not support: shard with FSDP instead, as in "
                "accelerate launch --config_file examples/fsdp.yaml -m fot train ..."
            )


def check_sharding(accelerator: Accelerator) -> None:
    """Refuse FSDP where it would not be what runs.

    Raises:
        ValueError: FSDP on CPUs, where accelerate quietly takes DDP instead; or FSDP's first version, which joins
            parameters to flat ones without names.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return
    if accelerator.distributed_type != DistributedType.FSDP:
        raise ValueError(
            f"FSDP was asked for, but accelerate does not shard on {accelerator.device.type}: launch without FSDP "
            "(accelerate launch --multi_gpu), or use GPUs"
        )
    if accelerator.state.fsdp_plugin.fsdp_version != 2:
        raise ValueError("FSDP version 1 is not supported: set fsdp_version: 2, as in examples/fsdp.yaml")


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def spread_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor, the same on every process, spread as a parameter of its shape is."""
    if not isinstance(parameter, DTensor):
        return tensor
    return distribute_tensor(tensor.to(parameter.device), parameter.device_mesh, parameter.placements)


def whole_parameters(module: nn.Module, names: Collection[str] | None = None) -> dict[str, Tensor]:
    """Parameters by name, whole, on the CPU: all, or those of these names. Tied ones are one tensor under each name."""
    found: dict[int, Tensor] = {}
    wanted = {
        name: parameter
        for name, parameter in module.named_parameters(remove_duplicate=False)
        if names is None or name in names
    }
    for parameter in wanted.values():
        if id(parameter) not in found:
            found[id(parameter)] = whole(parameter.detach()).cpu()
    return {name: found[id(parameter)] for name, parameter in wanted.items()}


def whole_optimizer_state(optimizer: Any) -> dict[str, Any]:
    """The optimiser's state dictionary with whole tensors."""
    state = optimizer.state_dict()
    tensors = {
        number: {name: whole(value) if isinstance(value, Tensor) else value for name, value in entry.items()}
        for number, entry in state["state"].items()
    }
    return state | {"state": tensors}


def load_optimizer_state(optimizer: Any, state: dict[str, Any]) -> None:
    """Load what ``whole_optimizer_state`` gave."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    tensors = {
        number: {
            name: spread_like(value, parameters[number])
            if isinstance(value, Tensor) and value.shape == parameters[number].shape
            else value
            for name, value in entry.items()
        }
        for number, entry in state["state"].items()
    }
    optimizer.load_state_dict(state | {"state": tensors})


def clip_gradients(parameters: list[Tensor], largest: float) -> float:
    """Clip the gradients' joint norm; returns what it was before."""
    return float(whole(torch.nn.utils.clip_grad_norm_(parameters, largest)))
