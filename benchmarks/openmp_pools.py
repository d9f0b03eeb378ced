"""Do the OpenMP threads of torch and of FAISS fight when their calls alternate, as in a memory layer?

Run ``python benchmarks/openmp_pools.py [--threads 2] [--json OUT]``. The unit of work is one torch bfloat16 matrix
product (1024 x 576 @ 576 x 1536, a linear layer of SmolLM2-135M) and one FAISS search (a batch of queries in an IVF
index). Each is timed alone, in a row with itself, and then in turn with the other; a penalty of 1.0 means that
taking turns costs nothing. Each row runs in a process of its own, since thread pools keep their history.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from itertools import product
from pathlib import Path
from typing import Any

HEAD_DIM = 64
NUM_KEYS = 65_536


def openmp_libraries() -> list[str]:
    """Names of the OpenMP runtimes mapped into this process (Linux; empty elsewhere)."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return []
    names = {Path(line.split()[-1]).name for line in maps.read_text().splitlines() if "/" in line}
    return sorted(name for name in names if "omp" in name and ".so" in name)


def median_ms(call: Callable[[], object], repeats: int) -> float:
    """Median wall time of a call in milliseconds, after a warm-up."""
    for _ in range(3):
        call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def alternating_ms(first: Callable[[], object], second: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Median time of each of two calls that take turns, in milliseconds."""
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(repeats + 3):
        for call, record in zip((first, second), times, strict=True):
            start = time.perf_counter()
            call()
            if turn >= 3:
                record.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times[0]), 1e3 * statistics.median(times[1])


def measure(torch_threads: int, faiss_threads: int, queries: int, repeats: int) -> dict[str, Any]:
    """Time both kinds of work alone and in turns, in this process."""
    import faiss
    import numpy as np
    import torch

    torch.set_num_threads(torch_threads)
    rng = np.random.default_rng(0)
    keys = rng.standard_normal((NUM_KEYS, HEAD_DIM), dtype=np.float32)
    index: Any = faiss.index_factory(HEAD_DIM, "IVF256,Flat", faiss.METRIC_INNER_PRODUCT)
    index.train(keys)
    index.add(keys)
    index.nprobe = 16
    faiss.omp_set_num_threads(faiss_threads)
    batch = rng.standard_normal((queries, HEAD_DIM), dtype=np.float32)
    left, right = torch.randn(1024, 576).bfloat16(), torch.randn(576, 1536).bfloat16()

    def multiply() -> object:
        return left @ right

    def search() -> object:
        return index.search(batch, 128)

    alone = median_ms(multiply, repeats), median_ms(search, repeats)
    turns = alternating_ms(multiply, search, repeats)
    return {
        "torch_threads": torch_threads,
        "faiss_threads": faiss_threads,
        "queries": queries,
        "torch_alone_ms": alone[0],
        "faiss_alone_ms": alone[1],
        "torch_in_turns_ms": turns[0],
        "faiss_in_turns_ms": turns[1],
        "torch_penalty": turns[0] / alone[0],
        "faiss_penalty": turns[1] / alone[1],
        "libraries": openmp_libraries(),
    }


def measure_in_process(*numbers: int) -> dict[str, Any]:
    """``measure`` in a fresh interpreter."""
    command = [sys.executable, __file__, "--one", *map(str, numbers)]
    result: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return result


def environment() -> dict[str, Any]:
    """What the numbers depend on."""
    import faiss
    import torch

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "faiss": faiss.__version__,
        "cpu": platform.processor() or platform.machine(),
        "cpus": os.cpu_count(),
        "openmp_variables": {name: value for name, value in os.environ.items() if name.startswith(("OMP_", "GOMP_"))},
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def main() -> None:
    """Parse, measure each combination, print, and write JSON if asked."""
    parser = argparse.ArgumentParser(description="Cost of alternating torch and FAISS calls.")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="most threads for either side")
    parser.add_argument("--repeats", type=int, default=60)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", type=int, nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(*arguments.one)))
        return
    rows = []
    head = ("torch ms: alone", "in turns", "faiss ms: alone", "in turns")
    print(f"{'queries':>8} {'threads':>12} {head[0]:>16} {head[1]:>9} {head[2]:>16} {head[3]:>9}")
    for queries in (3072, 64, 3):
        for torch_threads, faiss_threads in sorted({*product((1, arguments.threads), repeat=2)}):
            row = measure_in_process(torch_threads, faiss_threads, queries, arguments.repeats)
            rows.append(row)
            print(
                f"{queries:>8} {f'{torch_threads} + {faiss_threads}':>12} {row['torch_alone_ms']:>16.2f} "
                f"{row['torch_in_turns_ms']:>9.2f} {row['faiss_alone_ms']:>16.2f} {row['faiss_in_turns_ms']:>9.2f}",
                flush=True,
            )
    print("OpenMP runtimes in the process:", ", ".join(map(str, rows[0]["libraries"])))
    if arguments.json:
        arguments.json.write_text(json.dumps({"environment": environment(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
