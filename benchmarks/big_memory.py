"""A memory on disk that is larger than RAM: its clusters, keys and values stay on disk.

    python benchmarks/real_keys.py smollm2-135m-fot novels/pride_and_prejudice.txt KEYS --tokens 65536
    python benchmarks/big_memory.py KEYS --tokens 16777216 --by-cluster --folder DIR --json OUT.json

Writes the keys of a real text as int8 again and again, each copy to a file of its own, with their clusters, and asks in
a fresh process: seconds to open, of the first token and of later ones, all layers, and the largest resident set, of
which pages of mapped files are a part that the operating system takes back when it needs them. Clusters are made once,
since those of a copy are the same.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import load_file
from torch import Tensor

from fot.machine import describe_machine
from memory import Memory
from memory.cluster_table import GROUP, coarse_groups
from memory.clustered import SEGMENT, Clusters, LearntClusters
from memory.folder import commit, next_path
from memory.manifest import Manifest, read_manifest
from memory.parts import Stream, write_part
from memory.saved_index import learnt_streams, map_learnt

QUERIES = "queries.safetensors"
PERIOD = 8 * SEGMENT  # tokens of the text that are repeated: a segment of the folder, half a group of coarse clusters


def write(source: Path, folder: Path, tokens: int, vectors: str, by_cluster: bool) -> dict[str, float]:
    """Make the memory: its clusters from one copy, then copies of its files."""
    start = time.perf_counter()
    text = Memory.open(source, index="exact")
    first = Memory(text.layers, text.num_key_value_heads, text.head_dim, key_dtype=vectors, value_dtype=vectors,
                   index="clusters")  # fmt: skip
    slots = torch.arange(PERIOD).expand(text.num_key_value_heads, -1)
    keys = {layer: text[layer].keys(slots) for layer in text.layers}
    values = {layer: text[layer].values(slots) for layer in text.layers}
    first.append(keys, values, range(PERIOD), document="text")
    first.save(folder)
    if by_cluster:
        with Memory.open(folder, "a") as saved:
            saved.compact(by_cluster=True)
    clustered, times = time.perf_counter(), tokens // PERIOD
    manifest = read_manifest(folder)
    (segment,) = manifest.segments
    for _ in range(times - 1):
        path = next_path(folder, "segment")
        shutil.copyfile(folder / segment.file, path)
        manifest.segments.append(replace(segment, file=path.name))
    manifest.documents[0].tokens, manifest.documents[0].last = times * PERIOD, times * PERIOD - 1
    manifest.learnt = write_part(next_path(folder, "index"), learnt_again(folder, manifest, times), times * PERIOD)
    commit(folder, manifest)
    os.sync()  # so that the asking process does not wait for what is still being written
    return {"cluster_seconds": clustered - start, "write_seconds": time.perf_counter() - clustered}


def learnt_again(folder: Path, manifest: Manifest, times: int) -> dict[str, Stream]:
    """The tensors of the index part of so many copies of a memory: of one group of stretches again and again."""
    streams: dict[str, Stream] = {}
    for layer, one in map_learnt(folder, manifest).items():
        assert isinstance(one, LearntClusters)
        group = Clusters.join([one.clusters, shifted(one.clusters, PERIOD)])
        assert len(group.stretches) == GROUP
        coarse, copies = coarse_groups(group, None), times // 2
        of_group = learnt_streams({layer: replace(one, clusters=group, coarse=coarse)})
        for name, stream in of_group.items():
            if "stretches" in name:
                made = coarse if name.startswith("coarse") and coarse is not None else group
                step = int(made.stretches[:, 1].sum())
                moved = [shifted(made, step * copy).stretches for copy in range(copies)]
                streams[name] = Stream.of(torch.cat(moved))
            else:
                (tensor,) = stream.pieces
                shape = (len(tensor), copies * tensor.shape[1], *tensor.shape[2:])
                streams[name] = Stream(tensor.dtype, shape, again(tensor, copies))
    return streams


def shifted(clusters: Clusters, slots: int) -> Clusters:
    """The same, so many slots later."""
    stretches = clusters.stretches.clone()
    stretches[:, 0] += slots
    return replace(clusters, stretches=stretches)


def again(tensor: Tensor, copies: int) -> Iterator[Tensor]:
    """Pieces of a tensor (G, n, ...) that is repeated along n."""
    return (head for head in tensor for _ in range(copies))


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
    found |= {"rss_bytes": info.rss, "own_bytes": info.rss - info.shared}
    return found | {"backend": memory[memory.layers[0]].describe()}


def main() -> None:
    """Parse, write, ask in a fresh process, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("keys", type=Path, help="folder that real_keys.py made")
    parser.add_argument("--tokens", type=int, default=4_194_304, help=f"a multiple of {2 * PERIOD:,}")
    parser.add_argument("--asked", type=int, default=12, help="tokens that ask")
    parser.add_argument("--vectors", default="int8")
    parser.add_argument("--by-cluster", action="store_true", help="vectors of a cluster behind one another on disk")
    parser.add_argument("--folder", type=Path, help="where to write; it is deleted afterwards")
    parser.add_argument("--ask", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.ask:
        print(json.dumps(ask(args.ask, args.keys, args.asked)))
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as place:
        folder = Path(place) / "memory"
        figures: dict[str, Any] = write(args.keys, folder, args.tokens, args.vectors, args.by_cluster)
        figures["disk_bytes"] = sum(path.stat().st_size for path in folder.iterdir())
        command = [sys.executable, __file__, str(args.keys), "--ask", str(folder), "--asked", str(args.asked)]
        figures |= json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    print(f"{figures['tokens']:,} tokens, {figures['disk_bytes'] / 1e9:.1f} GB on disk; {figures['backend']}")
    for name in ("cluster", "write", "open", "first_token", "token"):
        print(f"  {figures[f'{name}_seconds']:8.3f} s  {name.replace('_', ' ')}")
    print(f"  {figures['rss_bytes'] / 1e9:8.2f} GB resident, {figures['own_bytes'] / 1e9:.2f} GB without mapped pages")
    if args.json:
        args.json.write_text(json.dumps(figures | {"machine": describe_machine()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
