"""Perplexity of a text that is read on and on, as generation does, far past the local window.

    python benchmarks/past_the_window.py smollm2-135m-fot novels/persuasion.txt
    python benchmarks/past_the_window.py smollm2-135m-fot novels/persuasion.txt --tokens 20480 --places 1 --every 8

Tokens are fed a few at a time, so that the window overflows over and over. Beside it: plain attention of the same
weights over the ``--context`` tokens before, without a memory.
"""

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm

import fot
from fot.compat import CACHE
from fot.machine import describe_machine
from memory.atomic import write_json


@torch.no_grad()
def fed_losses(model: Any, ids: Tensor, step: int) -> Tensor:
    """Losses (T - 1,) of a text's tokens (T,) but the first, fed ``step`` at a time."""
    losses, cache, following = [], None, ids[1:].split(step)
    for part, targets in zip(tqdm(ids[:-1].split(step), desc="fed", leave=False, disable=None), following, strict=True):
        output = model(part[None], use_cache=True, **{CACHE: cache})
        cache = getattr(output, CACHE)
        losses.append(cross_entropy(output.logits[0].float(), targets, reduction="none"))
    return torch.cat(losses)


@torch.no_grad()
def plain_losses(plain: Any, ids: Tensor, start: int, stop: int, context: int) -> Tensor:
    """Losses of tokens start..stop-1 under plain attention to the ``context`` tokens before ``start`` and to them."""
    first = max(0, start - context)
    logits = plain(ids[None, first:stop]).logits[0, :-1].float()
    return cross_entropy(logits, ids[first + 1 : stop], reduction="none")[-(stop - start) :]


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("--tokens", type=int, default=1536, help="tokens read at each place")
    parser.add_argument("--places", type=int, default=3, help="places in the text, evenly spread")
    parser.add_argument("--step", type=int, default=16, help="tokens fed at once")
    parser.add_argument("--bucket", type=int, default=256, help="tokens to a column of the table")
    parser.add_argument("--every", type=int, default=1, help="show and compare only every so many columns")
    parser.add_argument("--context", type=int, default=1536, help="tokens that plain attention sees before a column")
    parser.add_argument("--keep", type=int, nargs="+", help="values of overflow_keep (default: the model's)")
    parser.add_argument("--local-context", type=int, help="tokens of the window (default: the model's)")
    parser.add_argument("--full-weight-tokens", type=int, help="see MemoryConfig (default: the model's)")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    given = {"local_context": args.local_context, "full_weight_tokens": args.full_weight_tokens}
    options = {name: value for name, value in given.items() if value is not None}
    model: Any = fot.FoTForCausalLM.from_pretrained(args.model, dtype=torch.float32, **options)
    ids = torch.tensor(model.tokenizer(args.text.read_text(encoding="utf-8"), verbose=False).input_ids)
    starts = [(number + 1) * (len(ids) - args.tokens) // (args.places + 1) for number in range(args.places)]
    edges = range(0, args.tokens, args.bucket * args.every)
    columns = [(start, start + args.bucket) for start in edges if start + args.bucket <= args.tokens]

    losses: dict[str, list[Tensor]] = {}
    settings = model.memory_config
    for keep in args.keep or [settings.overflow_keep]:
        fot.attach_memory(model, fot.MemoryConfig(**settings.to_dict() | {"overflow_keep": keep}))
        losses[f"keep {keep}"] = [
            torch.cat([torch.zeros(1), fed_losses(model, ids[start : start + args.tokens], args.step)])
            for start in starts
        ]
    rows = {name: [mean([one[max(1, a) : b] for one in found]) for a, b in columns] for name, found in losses.items()}
    plain = fot.detach_memory(model)
    rows["plain"] = [
        mean([plain_losses(plain, ids[start : start + args.tokens], max(1, a), b, args.context) for start in starts])
        for a, b in tqdm(columns, desc="plain", leave=False, disable=None)
    ]
    print("tokens read".ljust(14), *(f"{a}-{b}".rjust(11) for a, b in columns))
    for name, found in rows.items():
        print(name.ljust(14), *(f"{value:11.2f}" for value in found))
    if args.json:
        write_json(
            args.json,
            {"model": args.model, "text": args.text.name, "columns": columns, "perplexity": rows}
            | {"settings": vars(args) | {"json": None, "text": str(args.text)}, "machine": describe_machine()},
        )


def mean(losses: list[Tensor]) -> float:
    """Perplexity of tokens at several places together."""
    return math.exp(float(torch.cat(losses).mean()))


if __name__ == "__main__":
    main()
