"""From how many keys on does an approximate index beat exact attention, and what does it lose?

Run ``python benchmarks/memory_backends.py --sizes 16384,65536 --backends exact,Flat,IVF,HNSW32 [--json OUT]``.
``exact`` is dense attention over all of memory; the others attend to their top 128.

Per backend and size, for one memory layer of 3 KV heads of size 64 with 3 query heads each:
    append   ms to store a window of 1,024 tokens, the mean over the whole memory, index builds included
    ingest   ms of ``Memory[layer].attend`` for the queries of 1,024 tokens
    decode   ms of the same for one token
    recall   share of the exact attention mass that ``search(k=128)`` finds; recall_of_best: as a share of what the
             exact top 128 carry
    error    |output - exact output| / |exact output|, exact being dense attention

Keys are synthetic: per head, clusters of Zipf-like sizes whose centres share a large mean, as those of real models do,
and which come in runs, as topics do; values have a mean per cluster too; a query lies near the centre of a cluster.
``--keys FILE`` takes your own from a torch file: a dict of "keys" and "values" (3, N, 64) and of "queries"
(3, 3 * 1024, 64), the query heads side by side.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from memory import Memory, attention_mass_recall

LAYER = 0
KV_HEADS, QUERY_HEADS, HEAD_DIM = 3, 3, 64
WINDOW = 1024
K = 128
SCALE = HEAD_DIM**-0.5


def synthetic(num_keys: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values (G, N, D) and the queries of a window (G, 3 * WINDOW, D), float32; see the head of this file."""
    generator = torch.Generator().manual_seed(seed)
    heads = torch.arange(KV_HEADS).unsqueeze(1)
    mean = 1.5 * torch.randn(KV_HEADS, 1, HEAD_DIM, generator=generator)
    centres = mean + torch.randn(KV_HEADS, 1024, HEAD_DIM, generator=generator)
    weights = 1.0 / torch.arange(1, 1025)
    runs = torch.multinomial(weights, num_keys // 16 + 1, replacement=True, generator=generator)
    topics = runs.repeat_interleave(16)[:num_keys].expand(KV_HEADS, -1)
    keys = centres[heads, topics] + 0.7 * torch.randn(KV_HEADS, num_keys, HEAD_DIM, generator=generator)
    meanings = torch.randn(KV_HEADS, 1024, HEAD_DIM, generator=generator)
    values = meanings[heads, topics] + 0.7 * torch.randn(keys.shape, generator=generator)
    asked = torch.multinomial(weights, QUERY_HEADS * WINDOW, replacement=True, generator=generator)
    queries = centres[heads, asked.expand(KV_HEADS, -1)] - mean
    return keys, values, queries + torch.randn(queries.shape, generator=generator)


def median_ms(call: Callable[[], object], seconds: float) -> float:
    """Median time of a call in milliseconds, after a warm-up, over at least 3 calls and about ``seconds``."""
    call()
    times: list[float] = []
    while len(times) < 3 or (sum(times) < seconds and len(times) < 100):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def fill(memory: Memory, keys: Tensor, values: Tensor) -> float:
    """Append window by window; mean milliseconds a window."""
    start = time.perf_counter()
    for first in range(0, keys.shape[1], WINDOW):
        window = slice(first, first + WINDOW)
        ids = torch.zeros(keys[:, window].shape[1], dtype=torch.int64)
        memory.append({LAYER: keys[:, window]}, {LAYER: values[:, window]}, ids)
    return 1e3 * (time.perf_counter() - start) * WINDOW / keys.shape[1]


class Judge:
    """Exact answers to some of a window's queries, computed once for a size."""

    def __init__(self, keys: Tensor, values: Tensor, queries: Tensor) -> None:
        self.queries = queries[:, :: queries.shape[1] // 192]  # (G, 192, D)
        self.keys = keys
        exact = Memory([LAYER], KV_HEADS, HEAD_DIM, index="exact", key_dtype="bfloat16", value_dtype="bfloat16")
        fill(exact, keys, values)
        self.output = exact[LAYER].attend(self.queries, scale=SCALE)[0]
        self.best = self._recall(exact)

    def __call__(self, memory: Memory) -> dict[str, float]:
        output = memory[LAYER].attend(self.queries, scale=SCALE)[0]
        recall = self._recall(memory)
        return {
            "recall": recall,
            "recall_of_best": recall / self.best,
            "error": ((output - self.output).norm() / self.output.norm()).item(),
        }

    def _recall(self, memory: Memory) -> float:
        hits = memory[LAYER].search(self.queries, K)[1]
        return attention_mass_recall(self.queries, self.keys, hits, scale=SCALE).mean().item()


def measure(
    backend: str, keys: Tensor, values: Tensor, queries: Tensor, judge: Judge, seconds: float
) -> dict[str, Any]:
    """One row of the table. Queries are bfloat16, as in a model."""
    memory = Memory([LAYER], KV_HEADS, HEAD_DIM, index=backend, key_dtype="bfloat16", value_dtype="bfloat16")
    append = fill(memory, keys, values)
    window, layer = queries.bfloat16(), memory[LAYER]
    token = window[:, :QUERY_HEADS].contiguous()
    return {
        "backend": backend,
        "in_use": layer.describe(),
        "load": os.getloadavg()[0]
        if hasattr(os, "getloadavg")
        else None,  # above the number of threads: distrust the row
        "keys": len(memory),
        "append_ms": append,
        "ingest_ms": median_ms(lambda: layer.attend(window, scale=SCALE), seconds),
        "decode_ms": median_ms(lambda: layer.attend(token, scale=SCALE), seconds),
        **judge(memory),
        "vector_mib": (memory.nbytes()["keys"] + memory.nbytes()["values"]) / 2**20,
        "index_mib": memory.nbytes()["index"] / 2**20,
    }


def compare(
    sizes: Sequence[int], backends: Sequence[str], load: Callable[[int], tuple[Tensor, Tensor, Tensor]], seconds: float
) -> Iterator[dict[str, Any]]:
    """Rows for every size and backend, each with its times as multiples of ``exact``'s."""
    for size in sizes:
        keys, values, queries = load(size)
        keys = keys.bfloat16().float()  # what is stored, so that recall judges the index and not the dtype
        judge = Judge(keys, values, queries)
        exact: dict[str, Any] = {}
        for backend in backends:
            row = measure(backend, keys, values, queries, judge, seconds)
            exact = exact or row
            for name in ("ingest", "decode"):
                row[f"{name}_ratio"] = row[f"{name}_ms"] / exact[f"{name}_ms"]
            yield row


COLUMNS = {
    "keys": "9,d",
    "append_ms": "10.1f",
    "ingest_ms": "10.1f",
    "ingest_ratio": "13.2f",
    "decode_ms": "10.2f",
    "decode_ratio": "13.2f",
    "recall": "8.4f",
    "recall_of_best": "15.4f",
    "error": "8.4f",
    "index_mib": "10.1f",
}


def environment() -> dict[str, Any]:
    """What the numbers depend on."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        named = [line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = named[0] if named else model
    return {
        "packages": {name: version(name) for name in ("torch", "faiss-cpu", "numpy")},
        "python": platform.python_version(),
        "cpu": model,
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def main() -> None:
    """Parse, measure, print a row as soon as it is known, and write JSON if asked."""
    parser = argparse.ArgumentParser(description="Memory backends against exact attention.")
    parser.add_argument("--sizes", default="16384,65536,262144", help="numbers of keys")
    parser.add_argument(
        "--backends",
        default="exact,Flat,IVF,HNSW32",
        help="exact first; separated by , or, if one holds a comma, by blanks",
    )
    parser.add_argument("--seconds", type=float, default=2.0, help="per timing, about")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keys", type=Path, help="torch file with keys and queries; synthetic ones without")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    backends = arguments.backends.split() if " " in arguments.backends else arguments.backends.split(",")
    if backends[0] != "exact":
        parser.error(f"--backends begins with {backends[0]!r}; put exact first, the others are compared with it")

    def load(size: int) -> tuple[Tensor, Tensor, Tensor]:
        if arguments.keys is None:
            return synthetic(size, arguments.seed)
        own = torch.load(arguments.keys, weights_only=True)
        return own["keys"][:, :size].float(), own["values"][:, :size].float(), own["queries"].float()

    print(
        f"{'backend':<24}" + "".join(f"{name:>{spec.partition('.')[0].rstrip(',d')}}" for name, spec in COLUMNS.items())
    )
    rows = []
    for row in compare([int(size) for size in arguments.sizes.split(",")], backends, load, arguments.seconds):
        rows.append(row)
        print(f"{row['in_use']!s:<24}" + "".join(f"{row[name]:>{spec}}" for name, spec in COLUMNS.items()), flush=True)
    if arguments.json:
        keys = str(arguments.keys.name) if arguments.keys else f"synthetic, seed {arguments.seed}"
        report = {"environment": environment(), "data": keys, "rows": rows}
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
