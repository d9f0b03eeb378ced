"""From how many keys on does an approximate index beat exact attention, and what does it lose?

Run ``python benchmarks/memory_backends.py --sizes 16384,65536 --backends exact,Flat,IVF,HNSW32 [--json OUT]``.
``exact`` is dense attention over all of memory; the others attend to their top 128.

Per backend and size, for one memory layer of 3 KV heads of size 64 with 3 query heads each:
    append   ms to store a window of 1,024 tokens, the mean over the whole memory, index builds included
    ingest   ms of ``Memory[layer].attend`` for the queries of 1,024 tokens, the best of several
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
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timezone
from functools import partial
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


def best_ms(calls: dict[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """Best time of each call in milliseconds, after a warm-up; they take turns, so that what disturbs one disturbs all.

    At least 3 rounds, and about ``seconds`` for each call.
    """
    # With one thread, CPU time is what other programs disturb least.
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    for call in calls.values():
        call()
    best, rounds, spent = dict.fromkeys(calls, float("inf")), 0, 0.0
    while rounds < 3 or (spent < seconds * len(calls) and rounds < 100):
        for name, call in calls.items():
            start = clock()
            call()
            took = clock() - start
            best[name], spent = min(best[name], 1e3 * took), spent + took
        rounds += 1
    return best


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

    def __init__(self, keys: Tensor, values: Tensor, queries: Tensor, dtype: str) -> None:
        self.queries = queries[:, :: queries.shape[1] // 192]  # (G, 192, D)
        self.keys = keys
        exact = Memory([LAYER], KV_HEADS, HEAD_DIM, index="exact", key_dtype=dtype, value_dtype=dtype)
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


def compare(
    sizes: Sequence[int],
    backends: Sequence[str],
    load: Callable[[int], tuple[Tensor, Tensor, Tensor]],
    seconds: float,
    dtype: str,
) -> Iterator[dict[str, Any]]:
    """Rows for every size and backend, each with its times as multiples of ``exact``'s. Queries are of ``dtype``."""
    kind = getattr(torch, dtype)
    for size in sizes:
        keys, values, queries = load(size)
        keys = keys.to(kind).float()  # what is stored, so that recall judges the index and not the dtype
        judge, window = Judge(keys, values, queries, dtype), queries.to(kind)
        token = window.unflatten(1, (QUERY_HEADS, -1))[:, :, 0].contiguous()
        memories, appended = {}, {}
        for backend in backends:
            memory = Memory([LAYER], KV_HEADS, HEAD_DIM, index=backend, key_dtype=dtype, value_dtype=dtype)
            appended[backend], memories[backend] = fill(memory, keys, values), memory
        times = {
            name: best_ms({b: partial(m[LAYER].attend, asked, scale=SCALE) for b, m in memories.items()}, seconds)
            for name, asked in (("ingest", window), ("decode", token))
        }
        for backend, memory in memories.items():
            row: dict[str, Any] = {
                "backend": backend,
                "in_use": memory[LAYER].describe(),
                "keys": len(memory),
                "append_ms": appended[backend],
                **judge(memory),
                "vector_mib": (memory.nbytes()["keys"] + memory.nbytes()["values"]) / 2**20,
                "index_mib": memory.nbytes()["index"] / 2**20,
            }
            for name, found in times.items():
                row[f"{name}_ms"] = found[backend]
                row[f"{name}_ratio"] = found[backend] / found["exact"]
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
    parser.add_argument("--dtype", default="bfloat16", help="of vectors and queries")
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
    sizes = [int(size) for size in arguments.sizes.split(",")]
    for row in compare(sizes, backends, load, arguments.seconds, arguments.dtype):
        rows.append(row)
        print(f"{row['in_use']!s:<24}" + "".join(f"{row[name]:>{spec}}" for name, spec in COLUMNS.items()), flush=True)
    if arguments.json:
        keys = str(arguments.keys.name) if arguments.keys else f"synthetic, seed {arguments.seed}"
        report = {"environment": environment(), "data": keys, "dtype": arguments.dtype, "rows": rows}
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
