"""``fot passkey``."""

import argparse
from typing import Any

from fot.commands.options import (
    about,
    add_model_options,
    add_outcome_options,
    check_plot,
    check_writable,
    finish,
    load,
    named_path,
    positive,
    positive_list,
)


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "passkey",
        help="hide a number in a long text and ask for it",
        description="Run the passkey test. It hides a number in long texts and asks for it, with the memory and "
        "without it.",
    )
    add_model_options(parser)
    parser.add_argument("--lengths", type=positive_list, default=[1024, 2048, 4096], metavar="N,N,...",
                        help="lengths of the prompts in tokens (default: 1024,2048,4096)")  # fmt: skip
    parser.add_argument("--trials", type=positive, default=4, help="number of prompts of each length (default: 4)")
    parser.add_argument("--no-memory", action="store_true", help="test only the plain model, without a memory")
    parser.add_argument("--no-baseline", action="store_true", help="do not test the plain model")
    add_outcome_options(
        parser, seed="seed for keys and depths", result="file to write the results to, with every trial"
    )
    parser.add_argument(
        "--plot", type=named_path, metavar="OUT.png", help="file to draw the accuracy by length and depth in"
    )
    parser.set_defaults(command=_passkey)


def _passkey(args: argparse.Namespace) -> int:
    if args.no_memory and args.no_baseline:
        raise ValueError("--no-memory and --no-baseline leave nothing to test: omit one of them")
    check_writable(args.json)
    check_plot(args.plot)
    model = load(args)
    from fot.evaluation import passkey
    from fot.evaluation.plots import passkey_plot
    from fot.evaluation.report import passkey_table
    from fot.progress import progress_bar

    parts = (not args.no_memory) + (not args.no_baseline)
    with progress_bar(total=parts * args.trials * sum(args.lengths), unit="tok", desc="passkey") as bar:
        log = bar.write if args.verbose else lambda line: None
        found = passkey.run(
            model,
            args.lengths,
            args.trials,
            args.seed,
            with_memory=not args.no_memory,
            baseline=not args.no_baseline,
            report=lambda trial: log(
                f"{trial.length} tokens, depth {trial.depth:.2f}: {trial.key}, got {trial.answer!r}"
            ),
            progress=bar,
        )
    result = {**about(model, args.model), "trials": args.trials, "seed": args.seed, **found}
    status = finish(passkey_table(result), result, args.json)
    if args.plot:
        passkey_plot(args.plot, result)
    return status
