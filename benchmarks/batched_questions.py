"""Tokens per second of answers to 1, 2, 4, ... questions at once, about one memory.

    fot memory build OUT persuasion.txt
    OMP_NUM_THREADS=1 python benchmarks/batched_questions.py OUT --rows 1,2,4,8 --json OUT.json

Each prompt is what ``fot serve`` reads: a question behind the passages that it is about, in the chat template. Prompts
of one batch are padded on the left. ``whole`` counts reading the prompts, ``decode`` the tokens after the first alone.
Batch sizes take turns, so that what disturbs one disturbs all; the best of each counts, and ratios are of this run
alone. With one thread, CPU time is measured, which other programs disturb least.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fot import FoTForCausalLM
from fot.ask import Conversation
from fot.chat import prompt_ids
from fot.greedy import one_greedy_answer
from fot.machine import describe_machine
from fot.retrieval.prompt import with_passages
from memory import Memory

QUESTIONS = (
    "Who is Sir Walter's agent?",
    "Where does the family move to?",
    "Who rents the house?",
    "Who falls at Lyme?",
    "What does Sir Walter like to read?",
    "Who is Lady Russell?",
    "Whom did Anne once refuse to marry?",
    "Who is Mrs Smith?",
)


def padded(prompts: list[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Ids and mask (B, T) of prompts, padded on the left."""
    length = max(map(len, prompts))
    ids = torch.tensor([[pad] * (length - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return ids, mask


@torch.no_grad()
def main() -> None:
    """Parse, measure, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("memory", type=Path, help="of any text")
    parser.add_argument("--index", help="another than the memory's own")
    parser.add_argument("--rows", default="1,2,4,8", help="questions at once")
    parser.add_argument("--tokens", type=int, default=32, help="of each answer")
    parser.add_argument("--passages", type=int, default=3, help="in front of each question")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    memory = Memory.open(args.memory, index=args.index)
    model: Any = FoTForCausalLM.from_pretrained(memory.metadata["model"], dtype=torch.float32)
    conversation = Conversation(model, memory)
    prompts = []
    for question in QUESTIONS:
        found = [(passage.document, passage.text) for passage in conversation.find(question, args.passages)]
        content = with_passages(question, found) if found else question
        prompts.append(prompt_ids(model.tokenizer, [{"role": "user", "content": content}]))
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter

    def seconds(rows: int, tokens: int) -> float:
        ids, mask = padded(prompts[:rows], model.tokenizer.eos_token_id)
        start = clock()
        model.generate(
            ids,
            attention_mask=mask,
            memory=memory,
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            **one_greedy_answer(model),
        )
        return clock() - start

    sizes = [int(rows) for rows in args.rows.split(",")]
    first, whole = ({rows: float("inf") for rows in sizes} for _ in range(2))
    for _ in range(args.repeats):
        for rows in sizes:
            first[rows] = min(first[rows], seconds(rows, 1))
            whole[rows] = min(whole[rows], seconds(rows, args.tokens))
    table = [
        {
            "rows": rows,
            "prompt_tokens": sum(map(len, prompts[:rows])) / rows,
            "first_token_s": first[rows],
            "whole_tokens_per_s": rows * args.tokens / whole[rows],
            "decode_tokens_per_s": rows * (args.tokens - 1) / (whole[rows] - first[rows]),
        }
        for rows in sizes
    ]
    print(
        f"{'rows':>4} {'prompt':>7} {'first s':>8} {'whole tok/s':>12} {'ratio':>6} {'decode tok/s':>13} {'ratio':>6}"
    )
    for row in table:
        ratios = {name: row[name] / table[0][name] for name in ("whole_tokens_per_s", "decode_tokens_per_s")}
        print(
            f"{row['rows']:>4} {row['prompt_tokens']:>7.0f} {row['first_token_s']:>8.2f} "
            f"{row['whole_tokens_per_s']:>12.2f} {ratios['whole_tokens_per_s']:>6.2f} "
            f"{row['decode_tokens_per_s']:>13.2f} {ratios['decode_tokens_per_s']:>6.2f}"
        )
    if args.json:
        report = {"machine": describe_machine(), "threads": torch.get_num_threads(), "table": table}
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
