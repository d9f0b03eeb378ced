"""``fot cost``."""

import argparse
from dataclasses import replace
from typing import Any

from fot.commands.options import add_memory_options, load, positive, positive_list
from fot.compare.catalogue import DEFAULT, find_methods


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "cost",
        help="say what a long text costs by each method: FLOPs, bytes, time",
        description="Say what it costs a model to read a text of a length, and to write a token after it, by each "
        "method: FLOPs of attention and bytes by formula; times measured at small sizes here, and extrapolated.",
    )
    parser.add_argument("model", nargs="?", default="smollm2-135m",
                        help="alias, folder, GGUF file or hub id (default: smollm2-135m)")  # fmt: skip
    parser.add_argument("--length", type=positive, default=32768, metavar="N",
                        help="tokens of the text (default: 32768)")  # fmt: skip
    parser.add_argument("--methods", default=",".join(DEFAULT), metavar="NAME,NAME,...",
                        help=f"all, or some of fot compare --list (default: {','.join(DEFAULT)})")  # fmt: skip
    parser.add_argument("--sizes", type=positive_list, default=[512, 1024, 2048], metavar="N,N,...",
                        help="tokens of the texts that are timed (default: 512,1024,2048)")  # fmt: skip
    parser.add_argument("--no-time", action="store_true", help="measure nothing")
    parser.add_argument("--window", type=positive, default=1020, metavar="N",
                        help="last tokens that window and streaming see (default: 1020)")  # fmt: skip
    add_memory_options(parser)
    parser.set_defaults(command=_cost)


def _cost(args: argparse.Namespace) -> int:
    methods = find_methods(args.methods)
    if len(set(args.sizes)) < 2 and not args.no_time:
        raise ValueError("--sizes: times are extrapolated from at least two sizes, such as 512,1024")
    model = load(args)
    from fot.compare.cost import Shape, cost, extrapolate, measure, read_powers, token_powers
    from fot.compare.methods import Setting, missing
    from fot.compare.show import cost_table
    from fot.progress import progress_bar

    setting, shape = Setting(args.length, args.window), Shape.of(model)
    without = missing([method.name for method in methods], model, setting)
    costs = {method: cost(method, shape, args.length, setting) for method in methods if method.name not in without}
    if not args.no_time:
        total = len(costs) * (min(args.sizes) + sum(args.sizes))
        with progress_bar(total=total, unit="tok", desc="timing") as bar:
            for method in costs:
                read, wrote = measure(method, model, args.sizes, setting, progress=bar.update)
                costs[method] = replace(
                    costs[method],
                    read_seconds=extrapolate(args.sizes, read, args.length, read_powers(method)),
                    token_seconds=extrapolate(args.sizes, wrote, args.length, token_powers(method)),
                )
    print(cost_table({method.name: found for method, found in costs.items()}, args.model, args.length, without))
    return 0
