"""What a model and its memory cost, from their configuration alone."""

from typing import Any

import psutil
import torch
from rich import box
from rich.table import Table

from fot.config import MemoryConfig
from fot.evaluation.drawing import render
from fot.families import key_value_shape

# Bytes of one number.
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}
INT8_SCALE_BYTES = 4
# What a token's id and source take, whatever the model.
TOKEN_BYTES = 16


def info_text(name: str, config: Any, settings: MemoryConfig, dtype: torch.dtype) -> str:
    """What a model is, what its memory costs, and how much of it fits in this machine."""
    model = _without_weights(config)
    heads, head_dim = key_value_shape(model)
    weights = sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize
    token = memory_bytes_per_token(settings, heads, head_dim)
    free = psutil.virtual_memory().available
    room = max(0, free - weights - (1 << 30))  # 1 GiB for Python, torch and one window
    table = Table(box=box.SIMPLE_HEAD, show_header=False)
    rows = {
        "model": f"{name} ({config.model_type})",
        "layers": f"{config.num_hidden_layers}, width {config.hidden_size}",
        "heads": f"{config.num_attention_heads} query, {heads} key-value, size {head_dim}",
        "positions": f"{config.max_position_embeddings:,}",
        "memory layers": ", ".join(map(str, settings.layers)) or "none",
        "local window": f"{settings.window:,} tokens",
        "stored as": f"{settings.key_dtype} keys, {settings.value_dtype} values, index {settings.index}",
        "weights": f"{weights / 1e6:,.0f} MB in {str(dtype).removeprefix('torch.')}",
        "memory a token": f"{token:,} bytes",
        "memory of 1M tokens": f"{token * 1e6 / 1e9:,.2f} GB",
        "free here": f"{free / 1e9:,.1f} GB",
        "fits here": f"a memory of about {room // token:,} tokens (exact index, CPU)" if token else "no memory layers",
    }
    for key, value in rows.items():
        table.add_row(key, value)
    return render(table)


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
