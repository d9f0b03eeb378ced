"""How fast a model reads into its memory, and where the time goes.

    python benchmarks/ingest.py smollm2-135m --tokens 65536 --index exact --dtype bfloat16 --json OUT.json

Reads Python's own standard library as text. Prints tokens a second, peak memory, and the share of the time that each
part takes: local attention of all layers, memory attention, appending to the memory, and the rest, which is
projections, MLPs and norms.
"""

import argparse
import functools
import sysconfig
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import fot
import fot.attention
from fot.machine import describe_machine, peak_rss_bytes
from memory import Memory
from memory.atomic import write_json


def standard_library(tokenizer: Any, count: int) -> list[int]:
    """The first ``count`` tokens of the standard library's sources, in order of their names."""
    ids: list[int] = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        ids += tokenizer(path.read_text(encoding="utf-8"), add_special_tokens=False).input_ids
        if len(ids) >= count:
            return ids[:count]
    raise SystemExit(f"the standard library here has only {len(ids):,} tokens")


def timed(clock: dict[str, float], name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, with its time added to ``clock[name]``."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = function(*args, **kwargs)
        clock[name] += time.perf_counter() - start
        return result

    return run


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--local-context", type=int, default=1024)
    parser.add_argument("--index", default="exact")
    parser.add_argument("--top-k", type=int)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--decode", type=int, default=32, help="tokens to generate afterwards")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    model: Any = fot.FoTForCausalLM.from_pretrained(
        args.model,
        dtype=getattr(torch, args.dtype),
        local_context=args.local_context,
        index=args.index,
        top_k=args.top_k,
    )
    ids = standard_library(model.tokenizer, args.tokens)
    model.ingest(ids[: args.local_context], model.new_memory(), progress=False)  # warm up

    clock: dict[str, float] = defaultdict(float)
    fot.attention.attend_memory = timed(clock, "memory attention", fot.attention.attend_memory)
    fot.attention.attend_local = timed(clock, "local attention", fot.attention.attend_local)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    torch.nn.functional.scaled_dot_product_attention = timed(clock, "local attention", sdpa)
    Memory.append = timed(clock, "appending", Memory.append)  # type: ignore[method-assign]
    memory = model.new_memory()
    start = time.perf_counter()
    model.ingest(ids, memory, progress=True)
    seconds = time.perf_counter() - start
    shares = {name: value / seconds for name, value in clock.items()}
    shares["projections and MLP"] = 1 - sum(shares.values())
    print(memory.describe())
    print(f"{len(ids):,} tokens in {seconds:.1f} s: {len(ids) / seconds:,.0f} tokens/s")
    for name, share in sorted(shares.items(), key=lambda item: -item[1]):
        print(f"  {share:6.1%}  {name}")
    ingest_peak = peak_rss_bytes()

    prompt = torch.tensor([ids[:64]])
    model.generate(prompt, memory=memory, max_new_tokens=2, do_sample=False)
    step = time.perf_counter()
    model.generate(prompt, memory=memory, max_new_tokens=args.decode, do_sample=False, eos_token_id=None)
    step = (time.perf_counter() - step) / args.decode
    print(f"peak RSS {ingest_peak / 1e6:,.0f} MB; memory {sum(memory.nbytes().values()) / 1e6:,.0f} MB; "
          f"{step * 1e3:.0f} ms a generated token")  # fmt: skip
    if args.json:
        figures = {
            "arguments": {name: str(value) for name, value in vars(args).items()},
            "tokens_per_second": len(ids) / seconds,
            "shares": shares,
            "peak_rss_bytes": ingest_peak,
            "memory_bytes": memory.nbytes(),
            "seconds_a_generated_token": step,
            "machine": describe_machine(),
            "date": time.strftime("%Y-%m-%d"),
        }
        write_json(args.json, figures)


if __name__ == "__main__":
    main()
