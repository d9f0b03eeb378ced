"""``fot train`` on several processes of this machine, which begin as copies of one that has imported everything.

python tests/forked_run.py 2 '[["train", "recipe.yaml", "--out", "out"], ...]'
"""

import json
import os
import socket
import sys

import peft  # noqa: F401
import transformers.models.llama.modeling_llama  # noqa: F401

import training.train  # noqa: F401
from fot.cli import program


def main(world: int, commands: list[list[str]]) -> None:
    """Each command in turn. A process ends as that of ``python -m fot`` does."""
    for command in commands:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        children = []
        for rank in range(world):
            child = os.fork()
            if not child:
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
                               "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip
                sys.argv = ["fot", *command]
                program()
            children.append(child)
        statuses = [os.waitpid(child, 0)[1] for child in children]
        if any(statuses):
            sys.exit(f"fot {' '.join(command)}: {statuses}")


if __name__ == "__main__":
    main(int(sys.argv[1]), json.loads(sys.argv[2]))
