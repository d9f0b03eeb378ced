"""A memory backend of your own: a class with five methods, under 40 lines, judged against exact attention.

    python examples/custom_index.py emma.txt
    python examples/custom_index.py emma.txt --blocks 32 --prompt "The vicar of Highbury"

``HeavyBlocks`` keeps the mean key of every 16 tokens. A query attends to all keys of the blocks whose means it likes
best, and to the newest tokens, which fill no block yet.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import pad

import fot
from memory import ExactIndex, VectorBlocks
from memory.index import attend_hits

BLOCK = 16  # tokens
ROWS = 256  # queries at once: the keys of each are copied for it


class HeavyBlocks:
    """Attends to the blocks of largest mean inner product. Shapes as in ``memory.index.Index``."""

    def __init__(self, keys: VectorBlocks, values: VectorBlocks, num_blocks: int) -> None:
        self.keys, self.values, self.num_blocks = keys, values, num_blocks
        self.means = torch.empty(keys.num_heads, 0, keys.head_dim, device=keys.device)  # (G, full blocks, D)

    def add(self, keys: Tensor) -> None:
        full = len(self.keys) // BLOCK * BLOCK
        new = self.keys.take_range(self.means.shape[1] * BLOCK, full, torch.float32)
        self.means = torch.cat([self.means, new.unflatten(1, (-1, BLOCK)).mean(2)], dim=1)

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        scores, slots = zip(*(self.search_some(rows.float(), k) for rows in queries.split(ROWS, dim=1)), strict=True)
        return torch.cat(scores, dim=1), torch.cat(slots, dim=1)

    def search_some(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        best = (queries @ self.means.mT).topk(min(self.num_blocks, self.means.shape[1])).indices  # (G, T, blocks)
        inside = torch.arange(BLOCK, device=best.device)
        newest = torch.arange(self.means.shape[1] * BLOCK, len(self.keys), device=best.device)
        slots = torch.cat([(best.unsqueeze(-1) * BLOCK + inside).flatten(2), newest.expand(*best.shape[:2], -1)], dim=2)
        scores = torch.einsum("gtd,gtnd->gtn", queries, self.keys.gather(slots, torch.float32))
        scores, order = scores.topk(min(k, slots.shape[2]))
        missing = (0, k - order.shape[2])
        return pad(scores, missing, value=-torch.inf), pad(slots.gather(2, order), missing, value=-1)

    def attend(self, queries: Tensor, *, scale: float) -> tuple[Tensor, Tensor]:
        scores, slots = self.search(queries, (self.num_blocks + 1) * BLOCK)
        return attend_hits(queries, scores, slots, self.values, scale=scale)

    def nbytes(self) -> int:
        return self.means.nbytes

    def describe(self) -> str:
        return f"{self.num_blocks} of {self.means.shape[1]:,} blocks"


class Judge(HeavyBlocks):
    """The same; besides, compares what the model's own queries get with what exact attention gives them."""

    def __init__(self, keys: VectorBlocks, values: VectorBlocks, num_blocks: int) -> None:
        super().__init__(keys, values, num_blocks)
        self.exact = ExactIndex(keys, values)
        self.recalls: list[float] = []
        self.errors: list[float] = []

    def attend(self, queries: Tensor, *, scale: float) -> tuple[Tensor, Tensor]:
        output, lse = super().attend(queries, scale=scale)
        expected, _ = self.exact.attend(queries, scale=scale)
        _, hits = self.search(queries, (self.num_blocks + 1) * BLOCK)
        keys = self.keys.take_range(0, len(self.keys), torch.float32)
        self.recalls.append(float(fot.attention_mass_recall(queries, keys, hits, scale=scale).mean()))
        self.errors.append(float((output - expected).float().norm() / expected.float().norm()))
        return output, lse


def main() -> None:
    """Read a text, continue a prompt, tell how good the backend was at it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--model", default="smollm2-135m-fot")
    parser.add_argument("--blocks", type=int, default=8, help="that a query attends to (default: 8)")
    parser.add_argument("--prompt", default="In the end")
    parser.add_argument("--tokens", type=int, default=16, help="longest continuation")
    args = parser.parse_args()

    model = fot.FoTForCausalLM.from_pretrained(args.model)
    judges: list[Judge] = []  # one a memory layer

    def make_index(keys: VectorBlocks, values: VectorBlocks) -> Judge:
        judges.append(Judge(keys, values, args.blocks))
        return judges[-1]

    memory = model.new_memory(index=make_index)
    model.ingest(args.text, memory)
    print(memory.describe())
    prompt = model.tokenizer(args.prompt, return_tensors="pt").input_ids
    output = model.generate(prompt, memory=memory, max_new_tokens=args.tokens, do_sample=False)
    print(repr(model.tokenizer.decode(output[0])))
    for layer, judge in zip(memory.layers, judges, strict=True):
        recall, error = (sum(numbers) / len(numbers) for numbers in (judge.recalls, judge.errors))
        print(f"layer {layer}: {recall:.1%} of the attention mass kept, output off by {error:.1%}")


if __name__ == "__main__":
    main()
