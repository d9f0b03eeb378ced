"""How fast a memory opens from disk, and what it takes of RAM before it is asked.

    python benchmarks/open_memory.py --tokens 1000000 --index auto --json OUT.json

Writes a memory of random vectors (SmolLM2-135m's shape: 4 layers, 3 KV heads of 64, bfloat16), then opens it in a fresh
process: seconds to open, growth of the resident set, and seconds of the first and the second search of all layers, each
for the 9 query heads of one generated token. With an inverted file the first search builds it, from what was learnt
when the memory was written; *learn* is how long that took. Pages come from the page cache unless it is emptied.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch

from fot.machine import describe_machine
from memory import Memory
from memory.atomic import write_json

LAYERS, KV_HEADS, HEAD_DIM, GROUP = (8, 16, 24, 28), 3, 64, 3
STEP = 4096
K = 128


def write(folder: Path, tokens: int, index: str) -> dict[str, float]:
    """Make a memory of random vectors in a folder that is not there yet."""
    generator = torch.Generator().manual_seed(0)
    Memory(LAYERS, KV_HEADS, HEAD_DIM, key_dtype="bfloat16", value_dtype="bfloat16", index=index).save(folder)
    start, learning = time.perf_counter(), 0.0
    with Memory.open(folder, "a") as memory:
        for first in range(0, tokens, STEP):
            count = min(STEP, tokens - first)
            drawn = torch.randn(2, len(LAYERS), KV_HEADS, count, HEAD_DIM, generator=generator).bfloat16()
            keys, values = (dict(zip(LAYERS, part, strict=True)) for part in drawn)
            memory.append(keys, values, range(count), document=f"{first // 100_000}")
            if first % (16 * STEP) == 0:
                memory.flush()
        memory.flush()
        learning = -time.perf_counter()
        memory.prepare()
        learning += time.perf_counter()
        memory.flush()
    size = sum(path.stat().st_size for path in folder.iterdir())
    return {"write_seconds": time.perf_counter() - start - learning, "learn_seconds": learning, "bytes": size}


def measure(folder: Path) -> dict[str, Any]:
    """Open a memory and search it twice."""
    process = psutil.Process()
    queries = torch.randn(KV_HEADS, GROUP, HEAD_DIM, generator=torch.Generator().manual_seed(1))
    before, start = process.memory_info().rss, time.perf_counter()
    memory = Memory.open(folder)
    opened, resident = time.perf_counter() - start, process.memory_info().rss - before
    found: dict[str, Any] = {"tokens": len(memory), "open_seconds": opened, "open_rss_bytes": resident}
    for name in ("first", "second"):
        start = time.perf_counter()
        for layer in memory.layers:
            memory[layer].search(queries, K)
        found[f"{name}_search_seconds"] = time.perf_counter() - start
    found["searched_rss_bytes"] = process.memory_info().rss - before
    found["backend"] = memory[memory.layers[0]].describe()
    return found


def main() -> None:
    """Parse, write, measure in a fresh process, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--index", default="auto")
    parser.add_argument("--folder", type=Path, help="where to write; default: a temporary folder, deleted afterwards")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure)))
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as place:
        folder = Path(place) / "memory"
        figures = write(folder, args.tokens, args.index)
        command = [sys.executable, __file__, "--measure", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    figures |= json.loads(done.stdout)
    print(f"{figures['tokens']:,} tokens, {figures['bytes'] / 1e6:,.0f} MB, {figures['backend']}")
    for name in ("write", "learn", "open", "first_search", "second_search"):
        print(f"  {figures[f'{name}_seconds']:8.3f} s  {name.replace('_', ' ')}")
    for name in ("open", "searched"):
        print(f"  {figures[f'{name}_rss_bytes'] / 1e6:8.1f} MB resident, {name}")
    if args.json:
        figures |= {"index": args.index, "machine": describe_machine(), "date": time.strftime("%Y-%m-%d")}
        write_json(args.json, figures)


if __name__ == "__main__":
    main()
