"""What a backend loses of the attention to a real text's memory: relative error of the output, by layer and KV head.

    python benchmarks/real_keys.py smollm2-135m-fot novels/pride_and_prejudice.txt KEYS --tokens 65536
    python benchmarks/attention_error.py KEYS
    python benchmarks/attention_error.py KEYS --shares 0.02 --backends clusters,top --rows 3

A number is the mean over queries of ``|output - exact output| / |exact output|``. The shares are those of the keys that
a query attends to: ``top`` is the exact top-k, ``IVF`` FAISS's inverted file with so many hits, ``all`` everything.
``--rows`` queries are asked at once, those of the query heads of a KV head at one token beside one another: 1 is one
query alone, 3 a token of a model with 3 query heads a KV head, and more are those of a text read at once.
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from token_perplexity import part
from torch import Tensor

from fot.machine import describe_machine
from memory import Memory

QUERIES = "queries.safetensors"
WINDOWS = 2  # that real_keys.py lets ask


def named(backend: str, share: float, num_keys: int) -> dict[str, str | int | None]:
    """Arguments of ``Memory.open``."""
    if backend == "clusters":
        return {"index": f"clusters;share={share}", "top_k": None}
    if backend == "all":
        return {"index": "exact", "top_k": None}
    return {"index": "exact" if backend == "top" else backend, "top_k": max(1, int(share * num_keys))}


def errors(memory: Memory, layer: int, queries: Tensor, exact: Tensor, rows: int, scale: float) -> list[float]:
    """Mean relative error of each KV head for queries (G, T, D), so many at once, with these exact outputs."""
    output = torch.cat([memory[layer].attend(part, scale=scale)[0] for part in queries.split(rows, dim=1)], dim=1)
    return ((output - exact).norm(dim=-1) / exact.norm(dim=-1)).mean(1).tolist()


def chosen_queries(queries: Tensor, heads: int, count: int, rows: int) -> Tensor:
    """About ``count`` of queries (G, R, D) of some windows, in each head behind head, as ``--rows`` wants them."""
    by_token = queries.unflatten(1, (WINDOWS, heads, -1)).transpose(2, 3).flatten(1, 2)  # (G, T, heads, D)
    step = max(1, by_token.shape[1] * heads // count) if rows <= heads else 1
    chosen = by_token[:, ::step]
    if rows < heads:
        chosen = chosen[:, :, :rows]
    return chosen[:, : max(1, count // chosen.shape[2])].flatten(1, 2).contiguous()


def main() -> None:
    """Parse, measure, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("keys", type=Path, help="folder that real_keys.py made")
    parser.add_argument("--shares", default="0.01,0.02,0.05")
    parser.add_argument("--backends", default="clusters,top,IVF")
    parser.add_argument("--rows", type=int, default=1, help="queries asked at once")
    parser.add_argument("--query-heads", type=int, default=3, help="query heads of a KV head")
    parser.add_argument("--queries", type=int, default=384, help="of each KV head, about")
    parser.add_argument("--vectors", help="dtype to store keys and values in, such as int8 (default: as they are)")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    asked = load_file(args.keys / QUERIES)
    exact_memory = Memory.open(args.keys, index="exact")
    scale = exact_memory.head_dim**-0.5
    chosen = {
        layer: chosen_queries(asked[f"queries.{layer}"], args.query_heads, args.queries, args.rows)
        for layer in exact_memory.layers
    }
    exact = {layer: exact_memory[layer].attend(one, scale=scale)[0] for layer, one in chosen.items()}
    heads = [f"{layer}.{head}" for layer in exact_memory.layers for head in range(exact_memory.num_key_value_heads)]
    print(f"{'backend':<10}{'share':>7}" + "".join(f"{head:>7}" for head in heads) + f"{'mean':>8}{'most':>7}")
    table = []
    for backend in args.backends.split(","):
        for share in map(float, args.shares.split(",")):
            memory = Memory.open(args.keys, **named(backend, share, len(exact_memory)))
            if args.vectors:
                memory = part(exact_memory, 0, len(exact_memory), memory.index, args.vectors, memory.top_k)
            found = [e for n in memory.layers for e in errors(memory, n, chosen[n], exact[n], args.rows, scale)]
            table.append({"backend": backend, "share": share, "errors": dict(zip(heads, found, strict=True))})
            cells = "".join(f"{e:>7.3f}" for e in found)
            print(f"{backend:<10}{share:>7.3f}{cells}{sum(found) / len(found):>8.3f}{max(found):>7.3f}", flush=True)
    if args.json:
        report = {
            "machine": describe_machine(),
            "keys": args.keys.name,
            "rows": args.rows,
            "vectors": args.vectors,
            "table": table,
        }
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
