"""One rank of a memory shared out over two, for tests/test_sharded_memory.py.

python tests/shared_memory_run.py RANK MEMORY OUT
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from memory import clusters, sharded

SEGMENT = 64


def answers(memory: sharded.Memory, queries: torch.Tensor) -> dict[str, torch.Tensor]:
    """What a memory says to these queries (G, T, D)."""
    found = {}
    for layer in memory.layers:
        found[f"output.{layer}"], found[f"lse.{layer}"] = memory[layer].attend(queries, scale=0.3)
        found[f"scores.{layer}"], found[f"slots.{layer}"] = memory[layer].search(queries, 7)
    return found


def main() -> None:
    """Answer with two indexes; then rank 1 dies in the middle of an answer."""
    rank, path, out = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    sharded.SEGMENT = clusters.SEGMENT = SEGMENT
    dist.init_process_group("gloo", init_method=f"file://{out}/meeting", rank=rank, world_size=2)
    for index in ("exact", "clusters;share=0.9999"):
        with sharded.open_sharded(path, index=index) as memory:
            if memory is not None:
                torch.save(answers(memory, torch.load(out / "queries.pt")), out / f"{index[:5]}.pt")
    if rank == 1:
        sharded._serve = lambda *_: os._exit(3)
    try:
        with sharded.open_sharded(path) as memory:
            assert memory is not None
            answers(memory, torch.load(out / "queries.pt"))
    except sharded.RankLostError as error:
        (out / "error").write_text(str(error))
    os._exit(0)


if __name__ == "__main__":
    main()
