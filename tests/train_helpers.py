"""A model so small that a run takes a quarter of a second, and what its tests look at."""

import json
from pathlib import Path
from typing import Any

import forks
import yaml

from fot.cli import main

SMALL: dict[str, Any] = {
    "model": {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
              "num_attention_heads": 4, "max_position_embeddings": 64, "pad_token_id": 0},
    "memory": {"mem_layers": [1], "local_context": 40, "mem_positionals": False},
    "tasks": [{"kind": "dictionary"}],
    "contexts": {"kind": "ramp", "values": [1, 5], "at": [4]},
    "learning_rate": 0.003,
    "steps": 8,
    "save_every": 2,
    "eval_every": 4,
    "eval_batches": 1,
    "dtype": "float32",
}  # fmt: skip


def write_recipe(path: Path, **changes: Any) -> Path:
    path.write_text(yaml.safe_dump(SMALL | changes))
    return path


def train(recipe: Path, out: Path, *arguments: str) -> int:
    return main(["train", str(recipe), "--out", str(out), *arguments])


def on_processes(count: int, recipe: Path, out: Path, *arguments: str) -> None:
    """``fot train`` on several processes of this machine, as the documentation starts them."""
    command = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(count), "-m", "fot", "train"]
    done = forks.run("-m", *command, recipe, "--out", out, *arguments)
    assert done.returncode == 0, done.stderr[-2000:]


def losses(out: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines]
