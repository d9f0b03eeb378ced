"""Adapters: the few tensors that fine-tuning changed, over a base model that is loaded by name.

A folder with ``adapter.safetensors`` (tensors under the base model's own names, which replace its own) and
``fot_adapter.json`` (the base model's name, memory settings, and how the adapter was made).
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fot.config import MemoryConfig
from fot.pretrained import ADAPTER_DESCRIPTION

TENSORS = "adapter.safetensors"
FORMAT = 1


@dataclass(frozen=True)
class AdapterDescription:
    """What an adapter folder says of itself.

    Attributes:
        base: name or path of the model it belongs to.
        memory: memory settings it was trained with.
        made_by: recipe, seed and figures; for people.
    """

    base: str
    memory: MemoryConfig
    made_by: dict[str, Any]


def save_adapter(
    folder: Path, tensors: dict[str, Tensor], description: AdapterDescription, dtype: torch.dtype = torch.bfloat16
) -> None:
    """Write an adapter folder; its description last, so that a folder without one is not taken for whole."""
    folder.mkdir(parents=True, exist_ok=True)
    stored = {name: tensor.detach().cpu().to(dtype).contiguous() for name, tensor in tensors.items()}
    save_file(stored, folder / TENSORS)
    content = {
        "format": FORMAT,
        "base": description.base,
        "memory": description.memory.to_dict(),
        "made_by": description.made_by,
    }
    (folder / ADAPTER_DESCRIPTION).write_text(json.dumps(content, indent=1) + "\n")


def read_description(folder: Path) -> AdapterDescription:
    """The description in an adapter folder.

    Raises:
        ValueError: it is damaged, or of a newer format.
    """
    path = folder / ADAPTER_DESCRIPTION
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] > FORMAT:
            raise ValueError(f"{path} is of format {content['format']}, this version reads {FORMAT}: update fot")
        return AdapterDescription(content["base"], MemoryConfig.from_dict(content["memory"]), content["made_by"])
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged ({error}); fetch the adapter again") from error


@torch.no_grad()
def apply_adapter(model: Any, folder: Path) -> None:
    """Put an adapter's tensors into a loaded base model, in place.

    Raises:
        ValueError: tensors that the model does not have, or of another shape: an adapter of another base model.
    """
    parameters = dict(model.named_parameters())
    tensors = load_file(folder / TENSORS)
    for name, tensor in tensors.items():
        if name not in parameters or parameters[name].shape != tensor.shape:
            raise ValueError(
                f"the adapter in {folder} has {name} of shape {tuple(tensor.shape)}, which its base model has not: "
                "it belongs to another model"
            )
    for name, tensor in tensors.items():
        parameters[name].copy_(tensor)
