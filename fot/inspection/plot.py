"""A trace as a picture: attention mass by position in memory, by layer."""

import io
from pathlib import Path

import numpy as np

from fot.inspection.result import Trace
from memory.atomic import write_bytes


def position_plot(path: Path, trace: Trace) -> None:
    """Draw the attention to memory by position, a row a memory layer; on a logarithmic axis.

    Args:
        path: of the picture; its suffix names the format.
        trace: what to draw. Memories follow one another, that of the prompt itself comes last.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: nothing is in memory.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("drawing needs matplotlib: pip install 'fot[plot]'") from error
    filled = [number for number, memory in enumerate(trace.memories) if len(memory)]
    if not filled:
        raise ValueError("the memory is empty, so there is nothing to draw: ingest a text first")
    figure = Figure(figsize=(10, 1.5 + 1.2 * len(trace.layers)), layout="constrained")
    rows = figure.subplots(len(trace.layers), sharex=True, sharey=True, squeeze=False)[:, 0]
    queries = int(trace.found.chose.sum()) * trace.found.local.shape[2]
    offset = 0
    for number in filled:
        memory, strip = trace.memories[number], trace.strips[number]
        used = -(-len(memory) // strip.width)
        edges = offset + np.minimum(np.arange(used + 1) * strip.width, len(memory))
        for axes, name, mass in zip(rows, trace.layers, strip.bins, strict=True):
            axes.stairs(mass[:used] / queries, edges, fill=True, color="tab:blue")
            axes.set_ylabel(f"layer {name}")
            for _, start, _ in memory.document_runs():
                axes.axvline(offset + start, color="0.6", linewidth=0.8)
        offset += len(memory)
    rows[0].set(yscale="log", xlim=(0, offset))
    rows[-1].set_xlabel("token in memory (lines: where documents begin)")
    counted = "every stored token" if trace.complete else f"retrieved hits, {trace.coverage:.0%} of what went to memory"
    figure.suptitle(f"share of all attention while the answer was chosen; {counted}", fontsize="medium")
    buffer = io.BytesIO()
    figure.savefig(buffer, format=path.suffix.lstrip(".") or "png", dpi=120)
    write_bytes(path, buffer.getvalue())
