"""What a backend costs in perplexity as generation meets it: each token asks the memory alone, not with its window.

    fot memory build OUT persuasion.txt
    python benchmarks/token_perplexity.py OUT --sizes 8192,32768 --places 4 --backends exact,clusters

At each place of the memory's text, one window is read with the tokens right before it in memory, and the perplexity of
its tokens behind the first half is taken. Ratios are of one run, of the same windows. ``window:clusters`` asks with the
whole window at once, as a text that is read.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from fot import FoTForCausalLM
from fot.machine import describe_machine
from memory import ExactIndex, Index, Memory, VectorBlocks
from memory.clusters import ClusterIndex

WINDOW = "window:"


def text_start(start: int, stop: int) -> Tensor:
    """Slots of the first tokens of the text, of those in start..stop-1."""
    return torch.arange(4)[start:stop]


class ByToken(ClusterIndex):
    """Clusters that answer the query heads of one token at a time, as while a model generates."""

    def __init__(self, name: str, keys: VectorBlocks, values: VectorBlocks, heads: int) -> None:
        super().__init__(name, keys, values, text_start)
        self._query_heads = heads

    def attend(self, queries: Tensor, *, scale: float) -> tuple[Tensor, Tensor]:
        tokens = queries.unflatten(1, (self._query_heads, -1)).unbind(2)  # each (G, heads, D)
        found = [super(ByToken, self).attend(token, scale=scale) for token in tokens]
        output, lse = (torch.stack(parts, dim=2).flatten(1, 2) for parts in zip(*found, strict=True))
        return output, lse


def part(source: Memory, start: int, stop: int, index: Any, dtype: str, top_k: int | None = None) -> Memory:
    """A memory of these slots of another, in vectors of a dtype, searched by such an index."""
    made = Memory(
        source.layers,
        source.num_key_value_heads,
        source.head_dim,
        index=index,
        top_k=top_k,
        key_dtype=dtype,
        value_dtype=dtype,
        fingerprint=source.fingerprint,
    )
    made.metadata = source.metadata
    slots = torch.arange(start, stop).expand(source.num_key_value_heads, -1)
    keys = {layer: source[layer].keys(slots) for layer in source.layers}
    values = {layer: source[layer].values(slots) for layer in source.layers}
    made.append(keys, values, source.token_ids(slice(start, stop)))
    return made


@torch.no_grad()
def losses(model: Any, window: Tensor, memory: Memory) -> Tensor:
    """Of the second half of a window."""
    logits = model(window[None], memory=memory, use_cache=False).logits[0, :-1].float()
    return cross_entropy(logits, window[1:], reduction="none")[len(window) // 2 :]


def main() -> None:
    """Parse, measure, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("memory", type=Path, help="of one long text")
    parser.add_argument("--sizes", default="8192,32768")
    parser.add_argument("--places", type=int, default=4)
    parser.add_argument("--backends", default="exact,clusters")
    parser.add_argument("--vectors", default="float32", help="dtypes of keys and values, such as float32,int8")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    source = Memory.open(args.memory, index="exact")
    model: Any = FoTForCausalLM.from_pretrained(source.metadata["model"], dtype=torch.float32)
    heads = model.config.num_attention_heads // source.num_key_value_heads
    ids = torch.from_numpy(source.token_ids().copy()).long()
    window, sizes = model.memory_config.window, [int(size) for size in args.sizes.split(",")]
    room = len(source) - window - max(sizes)
    starts = [max(sizes) + room * number // max(1, args.places - 1) for number in range(args.places)]

    def index(name: str) -> Any:
        def make(keys: VectorBlocks, values: VectorBlocks) -> Index:
            if name == "exact":
                return ExactIndex(keys, values)
            if name.startswith(WINDOW):
                return ClusterIndex(name.removeprefix(WINDOW), keys, values, text_start)
            return ByToken(name, keys, values, heads)

        return make

    table = []
    for size in sizes:
        found: dict[str, list[Tensor]] = {}
        for start in starts:
            for dtype in args.vectors.split(","):
                for name in args.backends.split(","):
                    memory = part(source, start - size, start, index(name), dtype)
                    mine = losses(model, ids[start : start + window], memory)
                    found.setdefault(f"{name} {dtype}", []).append(mine)
        first = math.exp(torch.cat(next(iter(found.values()))).mean())
        for name, some in found.items():
            perplexity = math.exp(torch.cat(some).mean())
            difference = (torch.cat(some) - torch.cat(next(iter(found.values())))).abs().mean().item()
            table.append({"tokens": size, "backend": name, "perplexity": perplexity, "difference": difference})
            print(f"{size:>8,} {name:<24}{perplexity:>9.4f}{perplexity / first - 1:>+10.3%}   mean |difference| of a "
                  f"token's loss {difference:.4f}", flush=True)  # fmt: skip
    if args.json:
        args.json.write_text(json.dumps({"machine": describe_machine(), "table": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
