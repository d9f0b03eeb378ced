"""Make the keys, values and queries of a real text, once, for the measurements of backends.

    python benchmarks/real_keys.py smollm2-135m-fot novels/pride_and_prejudice.txt OUT --tokens 65536

OUT becomes a memory of the text's first tokens, with ``queries.safetensors`` beside its files: ``queries.<layer>``
(G, R, D), what the two windows of tokens behind them ask of this memory, the query heads of a KV head side by side.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

import fot
from fot.evaluation.memory_check import Listening
from memory import Memory, VectorBlocks

QUERIES = "queries.safetensors"


@torch.no_grad()
def ask(model: Any, ids: Tensor, folder: Path) -> dict[int, Tensor]:
    """Layer -> queries (G, R, D) of a window of tokens (T,) that read a memory."""
    made: list[Listening] = []

    def listen(keys: VectorBlocks, values: VectorBlocks) -> Listening:
        made.append(Listening(keys, values))
        return made[-1]

    memory = Memory.open(folder, index=listen)
    memory.prepare()
    model(ids[None], memory=memory)
    return {layer: torch.cat(index.asked, dim=1) for layer, index in zip(memory.layers, made, strict=True)}


def main() -> None:
    """Parse, read the text, ask, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokens", type=int, default=65536)
    args = parser.parse_args()

    model: Any = fot.FoTForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    ids = torch.tensor(model.tokenizer(args.text.read_text(encoding="utf-8"), verbose=False).input_ids)
    window = model.memory_config.window
    if len(ids) < args.tokens + 2 * window:
        parser.error(f"{args.text} has {len(ids):,} tokens; --tokens {args.tokens} needs {args.tokens + 2 * window:,}")
    memory = model.new_memory(index="exact")
    model.ingest(ids[: args.tokens], memory, source=args.text.name, progress=True)
    memory.save(args.out)
    windows = [ids[start : start + window] for start in (args.tokens, args.tokens + window)]
    asked = [ask(model, one, args.out) for one in windows]
    save_file(
        {f"queries.{layer}": torch.cat([one[layer] for one in asked], dim=1).contiguous() for layer in memory.layers},
        args.out / QUERIES,
    )


if __name__ == "__main__":
    main()
