"""What a model and its memory cost, from their configuration alone."""

from typing import Any

import psutil
import torch
from rich import box
from rich.table import Table

from fot.config import MemoryConfig
from fot.evaluation.drawing import render
from fot.families import decoder_of, key_value_shape, layers_of
from fot.quantized import NF4_BYTES

# Bytes of one number.
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}
INT8_SCALE_BYTES = 2
# What a token's id and source take, whatever the model.
TOKEN_BYTES = 16
# Python, torch and one window.
PROCESS_BYTES = 1 << 30
# Of memories whose cost is told.
SIZES = {"8k": 8 << 10, "100k": 100 << 10, "256k": 256 << 10, "1M": 1 << 20}


def info_text(name: str, config: Any, settings: MemoryConfig, held: str) -> str:
    """What a model is, what it and its memory cost, and how much of it fits in this machine.

    Args:
        name: of the model, as the user typed it.
        config: of the model.
        settings: resolved.
        held: what the weights are held in: a dtype (``bfloat16``) or ``nf4``.
    """
    model = _without_weights(config)
    heads, head_dim = key_value_shape(model)
    weights = _weight_bytes(model)
    token = memory_bytes_per_token(settings, heads, head_dim)
    free = psutil.virtual_memory().available
    rows = {
        "model": f"{name} ({config.model_type})",
        "layers": f"{config.num_hidden_layers}, width {config.hidden_size}",
        "heads": f"{config.num_attention_heads} query, {heads} key-value, size {head_dim}",
        "positions": f"{config.max_position_embeddings:,}",
        "memory layers": ", ".join(map(str, settings.layers)) or "none",
        "local window": f"{settings.window:,} tokens",
        "stored as": f"{settings.key_dtype} keys, {settings.value_dtype} values, index {settings.index}",
        "weights": f"{_gigabytes(weights[held])} in {held}",
        "weights otherwise": ", ".join(f"{_gigabytes(size)} in {way}" for way, size in weights.items() if way != held),
        "memory a token": f"{token:,} bytes",
    }
    if settings.layers:
        for label, tokens in SIZES.items():
            whole = weights[held] + tokens * token + PROCESS_BYTES
            rows[f"memory of {label} tokens"] = f"{_gigabytes(tokens * token)}, with the weights {_gigabytes(whole)}"
    rows["free here"] = _gigabytes(free)
    rows["fits here"] = _what_fits(weights, held, token if settings.layers else 0, free - PROCESS_BYTES)
    table = Table(box=box.SIMPLE_HEAD, show_header=False)
    for key, value in rows.items():
        table.add_row(key, value)
    return render(table)


def _what_fits(weights: dict[str, int], held: str, token: int, room: int) -> str:
    """How large a memory fits beside the weights; or how these fit, if they do not."""
    if weights[held] > room:
        ways = [way for way, size in weights.items() if size <= room]
        option = {"nf4": "--quantization nf4"}
        cure = f"; they would with {option.get(ways[0], f'--dtype {ways[0]}')}" if ways else ""
        return f"no memory, since the weights do not fit in {held}{cure}"
    if not token:
        return "the weights; there are no memory layers"
    return f"a memory of about {(room - weights[held]) // token:,} tokens (exact index, CPU)"


def _gigabytes(number: int) -> str:
    return f"{number / 1e9:,.2f} GB"


def memory_bytes_per_token(settings: MemoryConfig, num_key_value_heads: int, head_dim: int) -> int:
    """Bytes that one stored token takes with the exact index."""
    pair = sum(
        head_dim * DTYPE_BYTES[dtype] + (INT8_SCALE_BYTES if dtype == "int8" else 0)
        for dtype in (settings.key_dtype, settings.value_dtype)
        if dtype is not None
    )
    return len(settings.layers) * num_key_value_heads * pair + TOKEN_BYTES


def _without_weights(config: Any) -> Any:
    """The model of a configuration, on the meta device."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def _weight_bytes(model: Any) -> dict[str, int]:
    """Bytes of a model's weights, by what they are held in.

    In ``nf4`` the decoder layers' matrices take 4 bits a number, and the others 16.
    """
    numbers = sum(parameter.numel() for parameter in model.parameters())
    modules = [module for layer in layers_of(decoder_of(model)) for module in layer.modules()]
    packed = sum(module.weight.numel() for module in modules if isinstance(module, torch.nn.Linear))
    found = {dtype: numbers * DTYPE_BYTES[dtype] for dtype in ("float32", "bfloat16", "float16")}
    return found | {"nf4": (numbers - packed) * DTYPE_BYTES["bfloat16"] + int(packed * NF4_BYTES)}
