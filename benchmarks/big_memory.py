"""A memory on disk that is larger than RAM: its clusters lie in RAM, its keys and values stay on disk.

    python benchmarks/real_keys.py smollm2-135m-fot novels/pride_and_prejudice.txt KEYS --tokens 65536
    python benchmarks/big_memory.py KEYS --tokens 4194304 --folder DIR --json OUT.json

Writes the keys of a real text again and again, as int8, with their clusters, and asks in a fresh process: seconds to
open, of the first token (which lays out the clusters) and of later ones, all layers, and the largest resident set. A
stretch that came before has the same clusters, so that each is clustered once.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import load_file
from torch import Tensor

from fot.machine import describe_machine
from memory import Memory, clusters
from memory.clustered import SEGMENT, Clusters

QUERIES = "queries.safetensors"


def cluster_once(of: Any) -> Any:
    """The function that clusters a stretch, which knows those that it saw."""
    known: dict[bytes, Clusters] = {}

    def cluster(keys: Tensor, values: Tensor, start: int, always: Tensor) -> Clusters:
        name = keys[:, 0].numpy().tobytes() + always.numpy().tobytes()
        if name not in known:
            known[name] = of(keys, values, start, always)
        stretches = known[name].stretches.clone()
        stretches[0, 0] = start
        return replace(known[name], stretches=stretches)

    return cluster


def write(source: Path, folder: Path, tokens: int, vectors: str) -> dict[str, float]:
    """Make the memory; nothing of it but the newest stretches is in RAM before its clusters are made."""
    start = time.perf_counter()
    text = Memory.open(source, index="exact")
    period = len(text) // SEGMENT
    made = Memory(text.layers, text.num_key_value_heads, text.head_dim, key_dtype=vectors, value_dtype=vectors,
                  index="exact")  # fmt: skip
    made.save(folder)
    with Memory.open(folder, "a") as memory:
        for number in range(tokens // SEGMENT):
            slots = torch.arange(SEGMENT) + number % period * SEGMENT
            heads = slots.expand(text.num_key_value_heads, -1)
            keys = {layer: text[layer].keys(heads) for layer in text.layers}
            values = {layer: text[layer].values(heads) for layer in text.layers}
            memory.append(keys, values, range(SEGMENT), document="text")
            if number % 8 == 7:
                memory.flush()
        memory.flush()
    written = time.perf_counter()
    clusters.cluster = cluster_once(clusters.cluster)
    with Memory.open(folder, "a", index="clusters") as memory:
        memory.prepare()
        memory.flush()
    return {"write_seconds": written - start, "cluster_seconds": time.perf_counter() - written}


@torch.no_grad()
def ask(folder: Path, source: Path, tokens: int) -> dict[str, Any]:
    """Open the memory and ask it for so many tokens, one by one."""
    asked, start = load_file(source / QUERIES), time.perf_counter()
    memory = Memory.open(folder)
    found: dict[str, Any] = {"tokens": len(memory), "open_seconds": time.perf_counter() - start}
    times = []
    for token in range(tokens):
        start = time.perf_counter()
        for layer in memory.layers:
            window = asked[f"queries.{layer}"].shape[1] // 6  # two windows of three query heads
            queries = asked[f"queries.{layer}"][:, token % window :: window][:, :3].contiguous()
            memory[layer].attend(queries, scale=memory.head_dim**-0.5)
        times.append(time.perf_counter() - start)
    found |= {"first_token_seconds": times[0], "token_seconds": statistics.median(times[1:])}
    info = psutil.Process().memory_info()
    return found | {"rss_bytes": info.rss, "backend": memory[memory.layers[0]].describe()}


def main() -> None:
    """Parse, write, ask in a fresh process, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("keys", type=Path, help="folder that real_keys.py made")
    parser.add_argument("--tokens", type=int, default=4_194_304)
    parser.add_argument("--asked", type=int, default=12, help="tokens that ask")
    parser.add_argument("--vectors", default="int8")
    parser.add_argument("--folder", type=Path, help="where to write; it is deleted afterwards")
    parser.add_argument("--ask", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.ask:
        print(json.dumps(ask(args.ask, args.keys, args.asked)))
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as place:
        folder = Path(place) / "memory"
        figures: dict[str, Any] = write(args.keys, folder, args.tokens, args.vectors)
        figures["disk_bytes"] = sum(path.stat().st_size for path in folder.iterdir())
        command = [sys.executable, __file__, str(args.keys), "--ask", str(folder), "--asked", str(args.asked)]
        figures |= json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    print(f"{figures['tokens']:,} tokens, {figures['disk_bytes'] / 1e9:.1f} GB on disk; {figures['backend']}")
    for name in ("write", "cluster", "open", "first_token", "token"):
        print(f"  {figures[f'{name}_seconds']:8.3f} s  {name.replace('_', ' ')}")
    print(f"  {figures['rss_bytes'] / 1e9:8.2f} GB resident")
    if args.json:
        args.json.write_text(json.dumps(figures | {"machine": describe_machine()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
