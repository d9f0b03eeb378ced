"""Results as tables, plots and files."""

import io
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import psutil
import torch
from rich import box
from rich.console import Console
from rich.table import Table

from fot.config import MemoryConfig

# Bytes of one number.
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}
INT8_SCALE_BYTES = 4
# What a token's id and source take, whatever the model.
TOKEN_BYTES = 16


def passkey_table(result: dict[str, Any]) -> str:
    """The passkey results as a table: one row a length, the plain model on the right."""
    table = Table(box=box.SIMPLE_HEAD, title=f"passkey, {result['model']} ({result['dtype']}), seed {result['seed']}")
    for name in ("tokens", "accuracy", "ingest tok/s", "s/trial", "memory MB", "peak RSS MB"):
        table.add_column(name, justify="right")
    table.add_column("without memory", justify="right")
    table.add_column("s/trial", justify="right")
    with_memory = {entry["length"]: entry for entry in result["results"]}
    without = {entry["length"]: entry for entry in result["baseline"]}
    for length in sorted(with_memory | without):
        ours, plain = with_memory.get(length), without.get(length)
        table.add_row(
            f"{length:,}",
            _accuracy(ours),
            _number(ours and ours["ingest_tokens_per_second"], "{:,.0f}"),
            _number(ours and ours["seconds_per_trial"], "{:.1f}"),
            _number(ours and ours["memory_bytes"] / 1e6, "{:,.1f}"),
            _number(ours and ours["peak_rss_bytes"] / 1e6, "{:,.0f}"),
            _accuracy(plain),
            _number(plain and plain["seconds_per_trial"], "{:.1f}"),
        )
    note = "\ninterrupted: finished trials only" if result["interrupted"] else ""
    return _render(table) + note


def passkey_plot(path: Path, result: dict[str, Any]) -> None:
    """Accuracy by length, and every trial by length and depth, as a picture.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("drawing needs matplotlib: pip install 'fot[plot]'") from error
    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2, sharex=True)
    for part, label, colour in (("results", "with memory", "tab:blue"), ("baseline", "without", "tab:grey")):
        entries = result[part]
        if entries:
            lengths = [entry["length"] for entry in entries]
            left.plot(lengths, [entry["accuracy"] for entry in entries], "o-", label=label, color=colour)
    left.set(xscale="log", xlabel="tokens", ylabel="accuracy", ylim=(-0.05, 1.05), title=f"passkey, {result['model']}")
    left.legend()
    trials = [trial for entry in result["results"] or result["baseline"] for trial in entry["trials"]]
    for correct, marker, colour in ((True, "o", "tab:green"), (False, "x", "tab:red")):
        chosen = [trial for trial in trials if trial["correct"] == correct]
        right.scatter(
            [trial["length"] for trial in chosen],
            [trial["depth"] for trial in chosen],
            marker=marker,
            color=colour,
            label="right" if correct else "wrong",
        )
    right.set(xlabel="tokens", ylabel="depth of the key", ylim=(1.05, -0.05), title="each trial")
    right.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format=path.suffix.lstrip(".") or "png", dpi=120)
    write_bytes(path, buffer.getvalue())


def dictionary_table(result: dict[str, Any]) -> str:
    """Dictionary lookup as a table: one row a length."""
    table = Table(box=box.SIMPLE_HEAD, title=f"dictionary lookup, {result['model']}, seed {result['seed']}")
    for name in ("tokens", "answer tokens right", "answers right", "answers", "seconds", "memory MB", "peak RSS MB"):
        table.add_column(name, justify="right")
    for entry in result["results"]:
        table.add_row(
            f"{entry['length']:,}",
            f"{entry['accuracy']:.1%}",
            f"{entry['exact']:.1%}",
            str(entry["answers"]),
            f"{entry['seconds']:.0f}",
            f"{entry['memory_bytes'] / 1e6:,.0f}",
            f"{entry['peak_rss_bytes'] / 1e6:,.0f}",
        )
    return _render(table)


def info_text(name: str, config: Any, settings: MemoryConfig, dtype: torch.dtype) -> str:
    """What a model is, what its memory costs, and how much of it fits in this machine."""
    heads, head_dim = config.num_key_value_heads, config.head_dim
    weights = weight_bytes(config, dtype)
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
    return _render(table)


def memory_bytes_per_token(settings: MemoryConfig, num_key_value_heads: int, head_dim: int) -> int:
    """Bytes that one stored token takes with the exact index."""
    pair = sum(
        head_dim * DTYPE_BYTES[dtype] + (INT8_SCALE_BYTES if dtype == "int8" else 0)
        for dtype in (settings.key_dtype, settings.value_dtype)
        if dtype is not None
    )
    return len(settings.layers) * num_key_value_heads * pair + TOKEN_BYTES


def weight_bytes(config: Any, dtype: torch.dtype) -> int:
    """Bytes of the model's weights, from its configuration alone."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize


def write_json(path: Path, result: dict[str, Any]) -> None:
    """Write a result whole or not at all."""
    write_bytes(path, (json.dumps(result, indent=1) + "\n").encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    handle, temporary = tempfile.mkstemp(dir=path.absolute().parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _accuracy(entry: dict[str, Any] | None) -> str:
    if entry is None:
        return "-"
    trials = entry["trials"]
    return f"{entry['accuracy']:.0%} ({sum(trial['correct'] for trial in trials)}/{len(trials)})"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _render(table: Table) -> str:
    console = Console(file=io.StringIO(), width=120)
    console.print(table)
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue().rstrip("\n")
