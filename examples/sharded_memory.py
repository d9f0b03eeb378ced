"""Ask a memory that several processes hold together: each attends to its share, and one model answers.

    fot memory build emma.memory emma.txt
    torchrun --nproc_per_node 2 examples/sharded_memory.py emma.memory "Who is the vicar of Highbury?"

Over several machines, start torchrun on each as its manual says (--nnodes, --rdzv-endpoint); each needs the folder, or
a copy of it. A process reads the vectors of its own share alone. If one ends, the others say so and end, too.
"""

import argparse
from datetime import timedelta

import torch.distributed as dist

import fot
from fot.ask import ask
from memory.sharded import open_sharded


def main() -> None:
    """Join the others; then serve, or ask and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("memory", help="folder that fot memory build made")
    parser.add_argument("questions", nargs="+", metavar="QUESTION")
    parser.add_argument("--index", help="of each share: auto, exact, clusters, ...")
    parser.add_argument("--tokens", type=int, default=64, help="longest answer")
    parser.add_argument("--minutes", type=float, default=10, help="after which a process that is silent counts as gone")
    args = parser.parse_args()

    # A process that serves waits for as long as the model is loaded, and between questions.
    dist.init_process_group("gloo", timeout=timedelta(minutes=args.minutes))
    with open_sharded(args.memory, index=args.index) as memory:
        if memory is not None:
            settings = memory.metadata.get("memory", {})
            model = fot.FoTForCausalLM.from_pretrained(memory.metadata["model"], **settings)
            print(memory.describe())
            for question in args.questions:
                print(f"\n> {question}\n{ask(model, memory, question, max_new_tokens=args.tokens).text}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
