"""A model so small that a run takes a quarter of a second, and what its tests look at."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
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


def on_processes(count: int, recipe: Path, out: Path, *arguments: str) -> str:
    """``fot train`` on several processes of this machine, as the documentation starts them; returns their stderr."""
    command = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(count), "-m", "fot", "train"]
    done = subprocess.run([sys.executable, "-m", *command, str(recipe), "--out", str(out), *arguments],
                          env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
                          timeout=600)  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stderr


def on_forks(count: int, commands: list[list[str]], timeout: float) -> None:
    """Commands of ``fot`` one after another, each on several processes; see ``forked_run.py``.

    Packages are imported once for all, which takes most of the time of a short run.
    """
    command = [sys.executable, str(Path(__file__).parent / "forked_run.py"), str(count), json.dumps(commands)]
    process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True, text=True,
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)  # fmt: skip
    try:
        _, errors = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail("a process waits for ever")
    assert process.returncode == 0, errors[-2000:]


def losses(out: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines]
