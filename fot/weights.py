"""Samples of the weights that decide which keys and values a model stores, wherever those weights lie.

They are the weights that the layers compute with: those that accelerate keeps elsewhere are read there, and PEFT
adapters count as they are switched on or off, merged or not.
"""

import functools
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fot.families import layers_of

# Numbers looked at in each tensor. Thousands in all: no training step leaves every one of them as it was.
SAMPLES = 32

# Of the last memory layer, what its keys and values come from.
_LAST_LAYER = (
    *("input_layernorm", "self_attn.k_proj", "self_attn.v_proj", "self_attn.k_norm"),
    *("self_attn.qkv_proj", "attention.query_key_value", "self_attention.query_key_value"),  # with the queries, in one
    "ln_attn",
)

# Where else accelerate keeps tensors that are on the meta device: maps, each with the name there so far.
_Elsewhere = tuple[tuple[Any, str], ...]


@dataclass(frozen=True)
class WeightSamples:
    """What was looked at.

    Attributes:
        digest: of names and shapes, and of the codes in quantised tensors, hexadecimal.
        values: (n,) float32 on the CPU, by the name of each other tensor, in order of the names.
    """

    digest: str
    values: dict[str, Tensor]


@dataclass(frozen=True)
class _Weight:
    """A tensor that layers compute with, and the PEFT layer around it, if that changes it."""

    name: str
    tensor: Tensor
    tuner: Any = None


@torch.no_grad()
def sample_weights(decoder: Any, last_layer: int) -> WeightSamples:
    """Samples of what decides the keys and values up to those of a layer.

    Args:
        decoder: of a supported family.
        last_layer: the last memory layer; -1 for none.

    Raises:
        ValueError: weights on the meta device that nothing keeps elsewhere.
    """
    digest, values = hashlib.sha256(), {}
    for weight in sorted(_deciding(decoder, last_layer), key=lambda weight: weight.name):
        digest.update(f"{weight.name} {tuple(weight.tensor.shape)}\n".encode())
        sample = _sample(weight)
        if sample.is_floating_point():
            values[weight.name] = sample.float()
        else:
            digest.update(sample.to(torch.int64).cpu().numpy().tobytes())
    return WeightSamples(digest.hexdigest(), _to_cpu(values))


def _deciding(decoder: Any, last_layer: int) -> Iterator[_Weight]:
    embedding = decoder.get_input_embeddings()
    name = next(name for name, module in decoder.named_children() if module is embedding)
    yield from _walk(embedding, name, _kept_elsewhere(decoder, f"{name}."))
    for number, layer in enumerate(layers_of(decoder)[: last_layer + 1]):
        name = f"layers.{number}"
        for weight in _walk(layer, name, _kept_elsewhere(decoder, f"{name}.")):
            inside = weight.name.removeprefix(f"{name}.")
            if number < last_layer or inside.startswith(tuple(f"{part}." for part in _LAST_LAYER)):
                yield weight
    rotary = decoder.rotary_emb
    # Some kinds of scaling change the first of these in long inputs, longer than any window.
    fixed = getattr(rotary, "rope_type", "default") not in ("dynamic", "longrope")
    for name, buffer in rotary.named_buffers():  # one, or one for each kind of layer
        if name.endswith("inv_freq") and "original" not in name:
            frequencies = buffer if fixed else getattr(rotary, f"original_{name}", buffer)
            yield _Weight(f"rotary_emb.{name}", frequencies)


def _walk(module: Any, path: str, elsewhere: _Elsewhere) -> Iterator[_Weight]:
    """The weights of a module and those within it, named as without adapters."""
    elsewhere += _kept_elsewhere(module, "")
    parts = module._modules  # this runs at every generation, and named_modules() takes several times as long
    if "modules_to_save" in parts and "original_module" in parts:  # PEFT, of a whole module
        active = [] if module.disable_adapters else [a for a in module.active_adapters if a in module.modules_to_save]
        inside = f"modules_to_save.{active[0]}" if active else "original_module"
        yield from _walk(module.get_submodule(inside), path, _within(elsewhere, inside))
    elif "base_layer" in parts and hasattr(module, "active_adapters"):  # PEFT, around a layer
        yield from _walk_tuned(module, path, elsewhere)
    else:
        saved = (item for item in module._buffers.items() if item[0] not in module._non_persistent_buffers_set)
        for name, tensor in (*module._parameters.items(), *saved):
            if tensor is not None:
                yield _Weight(f"{path}.{name}", _find(tensor, name, f"{path}.{name}", elsewhere))
        for name, child in parts.items():
            if child is not None:
                yield from _walk(child, f"{path}.{name}", _within(elsewhere, name))


def _walk_tuned(module: Any, path: str, elsewhere: _Elsewhere) -> Iterator[_Weight]:
    off = module.disable_adapters or module.merged  # merged weights are in the base layer's
    active = [] if off else list(module.active_adapters)
    low_rank = bool(active) and all(_is_low_rank(module, adapter) for adapter in active)
    for weight in _walk(module.base_layer, path, _within(elsewhere, "base_layer")):
        dense = weight.tensor.is_floating_point() and weight.tensor.element_size() > 1
        added = low_rank and dense and weight.name == f"{path}.weight"
        yield _Weight(weight.name, weight.tensor, module if added else None)
        low_rank = low_rank and (added or weight.name != f"{path}.weight")
    if low_rank:
        return
    for name, child in module.named_children():
        if name == "base_layer":
            continue
        for weight in _walk(child, f"{path}.{name}", _within(elsewhere, name)):
            parts = weight.name.split(".")
            for number, adapter in enumerate(active):
                if adapter in parts:  # the name that a user gave it decides nothing
                    scaling = getattr(module, "scaling", {}).get(adapter, 1.0)
                    plain = ".".join(part for part in parts if part != adapter)
                    yield _Weight(f"{plain}[{number}] x {scaling:.6g}", weight.tensor)


def _is_low_rank(module: Any, adapter: str) -> bool:
    """Whether an adapter adds scaling * B A to a weight, and does nothing else."""
    plain = adapter in getattr(module, "lora_A", {}) and module.lora_A[adapter].weight.ndim == 2
    more = getattr(module, "lora_variant", {}).get(adapter) or getattr(module, "use_dora", {}).get(adapter)
    return plain and not more and not module.fan_in_fan_out and not getattr(module, "lora_bias", {}).get(adapter)


def _sample(weight: _Weight) -> Tensor:
    """(n,) numbers of a weight: what layers multiply with, or the codes of a quantised one."""
    tensor = weight.tensor.detach()
    if hasattr(tensor, "full_tensor"):  # sharded over processes
        tensor = tensor.full_tensor()
    if tensor.is_floating_point() and tensor.element_size() == 1:
        tensor = tensor.view(torch.uint8)
    places = _places(tensor.numel(), tensor.device)
    sample = tensor.reshape(-1)[places]
    if weight.tuner is None:
        return sample
    rows, columns = places // tensor.shape[1], places % tensor.shape[1]
    sample = sample.float()
    for adapter in weight.tuner.active_adapters:
        up, down = (getattr(weight.tuner, f"lora_{name}")[adapter] for name in "BA")
        up, down = (_find(m.weight, "weight", weight.name, _kept_elsewhere(m, "")) for m in (up, down))
        added = (up[rows.to(up.device)].float() * down[:, columns.to(down.device)].float().mT.to(up.device)).sum(1)
        sample = sample + weight.tuner.scaling[adapter] * added.to(sample.device)
    return sample


@functools.lru_cache(maxsize=256)
def _places(count: int, device: torch.device) -> Tensor:
    """At most ``SAMPLES`` places in 0..count-1, one in each of as many equal parts, in no regular step."""
    if count <= SAMPLES:
        return torch.arange(count, device=device)
    within = [number * 2654435761 % 2**32 for number in range(1, SAMPLES + 1)]  # Knuth's multiplicative hash
    return torch.tensor([((n << 32) + part) * count // SAMPLES >> 32 for n, part in enumerate(within)], device=device)


def _to_cpu(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """One transfer a device, not one a tensor."""
    found = dict(values)
    for device in {value.device for value in values.values()}:
        here = {name: value for name, value in values.items() if value.device == device}
        together = torch.cat(list(here.values())).cpu()
        found |= zip(here, together.split([len(value) for value in here.values()]), strict=True)
    return found


def _kept_elsewhere(module: Any, name: str) -> _Elsewhere:
    """The map from which accelerate's hook on a module takes its tensors, and a name in it."""
    hook = module.__dict__.get("_hf_hook")
    if hook is None:
        return ()
    hooks = getattr(hook, "hooks", [hook])  # several in a row
    return tuple((found, name) for one in hooks if (found := getattr(one, "weights_map", None)) is not None)


def kept_tensor(model: nn.Module, name: str) -> Tensor:
    """A model's parameter, or the tensor that accelerate keeps elsewhere for it.

    Raises:
        ValueError: it is on the meta device, and nothing keeps it elsewhere.
    """
    *path, last = name.split(".")
    module, elsewhere = model, _kept_elsewhere(model, "")
    for part in path:
        module = module.get_submodule(part)
        elsewhere = _within(elsewhere, part) + _kept_elsewhere(module, "")
    return _find(getattr(module, last), last, name, elsewhere)


def _within(elsewhere: _Elsewhere, name: str) -> _Elsewhere:
    return tuple((found, f"{before}{name}.") for found, before in elsewhere) if elsewhere else ()


def _find(tensor: Tensor, name: str, full_name: str, elsewhere: _Elsewhere) -> Tensor:
    """A tensor, or its content where it lies elsewhere."""
    if tensor.device.type != "meta":
        return tensor
    for found, before in reversed(elsewhere):
        try:
            return found[f"{before}{name}"]
        except KeyError:
            continue
    raise ValueError(f"{full_name} is on the meta device, so it has no values: load the model's weights first")
