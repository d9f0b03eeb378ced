"""``fot eval harness``."""

import argparse
from typing import Any

from fot.commands.options import (
    about,
    add_memory_options,
    check_writable,
    finish,
    load,
    named_path,
    positive,
    whole,
)


def add(kinds: Any) -> None:
    parser = kinds.add_parser(
        "harness",
        help="run tasks of the lm-evaluation-harness",
        description="Run tasks of EleutherAI's lm-evaluation-harness with the model in this process. What does not fit "
        "the window is read into a memory; the program lm_eval would load the weights alone.",
    )
    parser.add_argument("model", help="alias, folder, GGUF file or hub id")
    add_memory_options(parser)
    parser.add_argument("--tasks", type=_names, required=True, metavar="NAME,NAME,...",
                        help="tasks, groups or tags, as lm_eval ls tasks lists them")  # fmt: skip
    parser.add_argument(
        "--include-path", type=named_path, metavar="FOLDER", help="folder of further tasks, as YAML files"
    )
    parser.add_argument("--limit", type=positive, metavar="N", help="documents of each task (default: all)")
    parser.add_argument(
        "--shots", type=whole, metavar="N", help="examples before each document (default: what the task says)"
    )
    parser.add_argument("--batch-size", type=positive, default=1, metavar="N",
                        help="inputs at once; padding moves the windows of longer inputs (default: 1)")  # fmt: skip
    parser.add_argument("--max-length", type=positive, metavar="N",
                        help="most tokens of an input, its last (default: max_position_embeddings)")  # fmt: skip
    parser.add_argument("--json", type=named_path, metavar="OUT", help="file to write the results to")
    parser.set_defaults(command=_eval_harness)


def _eval_harness(args: argparse.Namespace) -> int:
    check_writable(args.json)
    from fot.evaluation import harness
    from fot.evaluation.report import harness_table

    if args.include_path is not None and not args.include_path.is_dir():
        raise ValueError(f"--include-path {args.include_path} is not a folder")
    manager = harness.find_tasks(args.tasks, args.include_path)
    model = load(args)
    found = harness.run(
        model,
        args.tasks,
        manager,
        limit=args.limit,
        shots=args.shots,
        batch_size=args.batch_size,
        max_length=args.max_length,
    )
    result = {**about(model, args.model), "limit": args.limit, "max_length": args.max_length, **found}
    return finish(harness_table(result), result, args.json)


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of names such as hellaswag,arc_easy")
    return names
