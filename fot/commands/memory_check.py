"""``fot memory check``."""

import argparse
from typing import Any

from fot.commands.options import about, add_memory_options, check_writable, named_path, open_memory, positive


def add(kinds: Any) -> None:
    parser = kinds.add_parser(
        "check",
        help="measure what the index loses of the attention",
        description="Read windows of the memory's own text, and compare the attention that its index gives with exact "
        "attention, by layer and head. With --index and --top-k, another index is measured.",
    )
    parser.add_argument("memory", type=named_path, metavar="MEMORY")
    parser.add_argument("--places", type=positive, default=4, help="windows of the text that are read (default: 4)")
    parser.add_argument("--queries", type=positive, default=64, help="tokens of each that count (default: 64)")
    parser.add_argument("--compare", type=positive, default=128, metavar="K",
                        help="the top-k to compare with (default: 128)")  # fmt: skip
    parser.add_argument("--json", type=named_path, metavar="OUT", help="also write it to this file")
    add_memory_options(parser)
    parser.add_argument("--model", metavar="NAME", help="model to use (default: the model that made the memory)")
    parser.set_defaults(command=_check)


def _check(args: argparse.Namespace) -> int:
    check_writable(args.json)
    memory, model = open_memory(args)
    from fot.evaluation.memory_check import check
    from memory.atomic import write_json

    with memory:
        found = check(model, memory, places=args.places, queries=args.queries, top_k=args.compare)
    _print(found)
    if args.json:
        write_json(args.json, {**about(model, args.model), **found})
    return 0


def _print(found: dict[str, Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    k, heads = found["top_k"], found["heads"]
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("layer", "KV head", f"mass of top-{k}", f"error, top-{k}", "error, index"):
        table.add_column(name, justify="right")
    for head in heads:
        table.add_row(str(head["layer"]), str(head["head"]), *_figures(head))
    table.add_section()
    names = ("mass", "top_k_error", "index_error")
    mean = {name: sum(head[name] for head in heads) / len(heads) for name in names}
    worst = {name: (min if name == "mass" else max)(head[name] for head in heads) for name in names}
    table.add_row("mean", "", *_figures(mean))
    table.add_row("worst", "", *_figures(worst))
    console = Console()
    console.print(table)
    console.print(
        f"index: {found['index']}; {found['tokens']:,} tokens, {found['queries']:,} tokens asked. A top-{k} drops "
        f"{1 - mean['mass']:.0%} of the attention to this memory, and its output is off by {mean['top_k_error']:.0%}; "
        f"the index's is off by {mean['index_error']:.1%}.",
        markup=False,
        highlight=False,
    )


def _figures(head: dict[str, float]) -> list[str]:
    return [f"{head['mass']:.3f}", f"{head['top_k_error']:.3f}", f"{head['index_error']:.3f}"]
