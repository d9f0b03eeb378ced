"""Adapters: the few tensors that fine-tuning changed, for a base model that is loaded by its name.

A folder with ``fot_adapter.json`` (the base model's name, memory settings, and how the adapter was made), and either
``adapter.safetensors`` (tensors under the base model's own names, which replace its own) or what ``peft`` saves, which
is added to the base model's. A folder that peft alone wrote is an adapter, too; the memory settings are then the base
model's.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from fot.config import MemoryConfig
from fot.names import ADAPTER_DESCRIPTION, PEFT_CONFIG, aliases, shipped_models
from fot.quantized import is_quantised
from fot.weights import kept_tensor
from memory.atomic import write_json

TENSORS = "adapter.safetensors"
FORMAT = 1

# Of peft: its tensors, how their names end, and settings that say nothing about how B A is used. With any other setting
# that says something, an adapter is more than that.
LORA_TENSORS = "adapter_model.safetensors"
LORA_A, LORA_B = ".lora_A.weight", ".lora_B.weight"
NO_MATTER = frozenset({
    "auto_mapping", "base_model_name_or_path", "exclude_modules", "inference_mode", "layers_pattern",
    "layers_to_transform", "lora_alpha", "lora_dropout", "megatron_core", "peft_type", "peft_version",
    "qalora_group_size", "r", "revision", "target_modules", "task_type",
})  # fmt: skip
PLAIN: tuple[Any, ...] = (None, False, "none", {}, [])


@dataclass(frozen=True)
class AdapterDescription:
    """The description in an adapter folder.

    Attributes:
        base: name or absolute path of the base model. A relative path is searched for from the working folder, and from
            the folders above the adapter.
        memory: memory settings of the training; None for those of the base model.
        made_by: recipe, seed and figures, for people to read.
    """

    base: str
    memory: MemoryConfig | None
    made_by: dict[str, Any]


def save_adapter(
    folder: Path, tensors: dict[str, Tensor], description: AdapterDescription, dtype: torch.dtype = torch.bfloat16
) -> None:
    """Write an adapter folder; its description last, so that a folder without one is not taken for whole."""
    folder.mkdir(parents=True, exist_ok=True)
    stored = {name: tensor.detach().cpu().to(dtype).contiguous() for name, tensor in tensors.items()}
    save_file(stored, folder / TENSORS)
    write_description(folder, description)


def write_description(folder: Path, description: AdapterDescription) -> None:
    """Make a folder an adapter."""
    content = {
        "format": FORMAT,
        "base": description.base,
        "memory": None if description.memory is None else description.memory.to_dict(),
        "made_by": description.made_by,
    }
    write_json(folder / ADAPTER_DESCRIPTION, content)


def read_description(folder: Path) -> AdapterDescription:
    """The description in an adapter folder.

    Raises:
        ValueError: it is damaged, or of a newer format.
    """
    path = folder / ADAPTER_DESCRIPTION
    if not path.is_file():
        return _description_of_peft(folder / PEFT_CONFIG)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] > FORMAT:
            raise ValueError(
                f"{path} is of format {content['format']}, but this version of fot reads formats up to "
                f"{FORMAT}: upgrade fot"
            )
        settings = None if content["memory"] is None else MemoryConfig.from_dict(content["memory"])
        return AdapterDescription(content["base"], settings, content["made_by"])
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged ({error}): get the adapter again") from error


def _description_of_peft(path: Path) -> AdapterDescription:
    try:
        base = json.loads(path.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged ({error}): get the adapter again") from error
    if not base:
        raise ValueError(f"{path} names no base model: write its name or folder there, as base_model_name_or_path")
    return AdapterDescription(base, None, {})


def replaced_modules(folder: Path) -> list[str]:
    """Modules whose weights an adapter replaces, so that they cannot be packed; none for what peft adds."""
    if not (folder / TENSORS).is_file():
        return []
    with safe_open(folder / TENSORS, "pt") as tensors:
        return sorted({name.rpartition(".")[0] for name in tensors.keys()})  # noqa: SIM118  it is no dict


def find_base(folder: Path) -> str:
    """Name or path of the model that the adapter in ``folder`` belongs to.

    Raises:
        FileNotFoundError: a path at which nothing is.
    """
    base = read_description(folder).base
    if base in aliases() or base in shipped_models():
        return base
    places = [Path(base).expanduser(), *(parent / base for parent in folder.resolve().parents)]
    found = next((place for place in places if place.exists()), None)
    if found is None and Path(base).is_absolute():
        raise FileNotFoundError(
            f"the adapter in {folder} belongs to the base model at {base}, but nothing is there: put the model back, "
            f"or correct {place_of_base(folder)}"
        )
    return base if found is None else str(found)


def place_of_base(folder: Path) -> str:
    """Which entry of which file names an adapter's base model."""
    if (folder / ADAPTER_DESCRIPTION).is_file():
        return f'"base" in {folder / ADAPTER_DESCRIPTION}'
    return f'"base_model_name_or_path" in {folder / PEFT_CONFIG}'


def apply_adapter(model: Any, folder: Path) -> None:
    """Put an adapter's tensors into a loaded base model, in place.

    What peft made is merged with the weights, except in a quantised model: there it stays beside them, since packed
    weights would lose most of it.

    Raises:
        ValueError: tensors that the model does not have, or of another shape: an adapter of another base model;
            weights that are offloaded to the disk; a kind of peft that cannot be merged; or weights to replace over a
            LoRA that is not merged.
        ImportError: it was made by peft, which is not installed.
    """
    if not (folder / PEFT_CONFIG).is_file():
        _replace(model, load_file(folder / TENSORS), folder)
    elif (scale := _scale_of_plain_lora(folder)) is not None and not is_quantised(model):
        _merge_lora(model, scale, folder)
    else:
        _add_peft(model, folder)


def has_unmerged(model: Any) -> bool:
    """Whether a model's weights are packed, with an adapter of peft beside them."""
    return is_quantised(model) and bool(getattr(model, "peft_config", None))


def _add_peft(model: Any, folder: Path) -> None:
    try:
        from peft import PeftModel
    except ImportError as error:
        raise ImportError(f"the adapter in {folder} takes peft: pip install 'fot[train]'") from error
    before = sorted(getattr(model, "peft_config", {}))
    name = f"adapter{len(before)}"
    try:
        around = PeftModel.from_pretrained(model, folder, adapter_name=name)
        within = hasattr(around, "merge_and_unload")  # else it works in peft's wrapper alone
        if within and not is_quantised(model):
            around.merge_and_unload()
        elif within and before:
            around.base_model.set_adapter([*before, name])
    except (RuntimeError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"the adapter in {folder} does not fit its base model: {reason}") from error
    if not within:
        kind = around.peft_config[name].peft_type.value
        raise ValueError(
            f"the adapter in {folder} is of peft's kind {kind}, which cannot be merged with a model's weights: give "
            "one of another kind, such as LORA"
        )


def _scale_of_plain_lora(folder: Path) -> float | None:
    """The factor of B A, if an adapter of peft is LoRA of one rank and no more, which needs no peft; else None."""
    try:
        settings = json.loads((folder / PEFT_CONFIG).read_text(encoding="utf-8"))
        # Some other ways to begin (PiSSA) change the base weights, too.
        more = {key for key, value in settings.items() if value not in PLAIN} - NO_MATTER - {"init_lora_weights"}
        if settings["peft_type"] != "LORA" or more or settings.get("init_lora_weights", True) is not True:
            return None
        with safe_open(folder / LORA_TENSORS, "pt") as tensors:
            plain = all(name.endswith((LORA_A, LORA_B)) for name in tensors.keys())  # noqa: SIM118  it is no dict
        return settings["lora_alpha"] / settings["r"] if plain else None
    except (OSError, KeyError, TypeError, AttributeError, ValueError, SafetensorError):
        return None  # peft says what is wrong


@torch.no_grad()
def _merge_lora(model: Any, scale: float, folder: Path) -> None:
    """W + scale B A for each W that an adapter has A (r, in) and B (out, r) of (arXiv 2106.09685)."""
    tensors = load_file(folder / LORA_TENSORS)
    parameters = dict(model.named_parameters())
    merged = {}
    for key in sorted(tensors):
        if not key.endswith(LORA_A):
            continue
        name = key.removeprefix("base_model.model.").removesuffix(LORA_A) + ".weight"
        factors = tensors[key].float(), tensors[key.removesuffix(LORA_A) + LORA_B].float()
        shape = (factors[1].shape[0], factors[0].shape[1])
        if name not in parameters or parameters[name].shape != shape:
            raise ValueError(
                f"the adapter in {folder} does not fit its base model: it has a LoRA of {name} of shape {shape}, which "
                "the model has not: it belongs to another model"
            )
        weight = kept_tensor(model, name)
        delta = scale * (factors[1].to(weight.device) @ factors[0].to(weight.device))
        merged[name] = (weight.float() + delta).to(weight.dtype)
    _replace(model, merged, folder)


@torch.no_grad()
def _replace(model: Any, tensors: dict[str, Tensor], folder: Path) -> None:
    if has_unmerged(model):
        raise ValueError(
            f"the adapter in {folder} replaces weights over a LoRA that stays beside weights in 4 bits, so both cannot "
            f"hold: load it without quantization, or fot merge {folder} FOLDER and load FOLDER"
        )
    parameters = dict(model.named_parameters())
    for name, tensor in tensors.items():
        if name not in parameters or parameters[name].shape != tensor.shape:
            raise ValueError(
                f"the adapter in {folder} has {name} of shape {tuple(tensor.shape)}, which its base model has not: "
                "it belongs to another model"
            )
    for name, tensor in tensors.items():
        kept_tensor(model, name).copy_(tensor)
        kept = kept_tensor(model, name)  # from the disk it may come as a copy
        if not torch.equal(kept, tensor.to(kept.device, kept.dtype)):
            raise ValueError(
                f"the adapter in {folder} cannot be put into a model whose weights are offloaded to the disk ({name}): "
                "load the model with more memory, or save it with the adapter and load that"
            )
