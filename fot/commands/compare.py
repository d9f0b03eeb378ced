"""``fot compare``."""

import argparse
import importlib
import json
from pathlib import Path
from typing import Any

from fot.commands.options import (
    about,
    above_zero,
    add_memory_options,
    load,
    named_path,
    positive,
    positive_list,
    whole,
)
from fot.compare.catalogue import DEFAULT, METHODS, TASKS, find_methods


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "compare",
        help="measure methods for long texts side by side: positions, windows, caches, memory, re-reading",
        description="Measure methods that let one checkpoint read long texts, without training or, with --tuned, after "
        "it, on the same texts: a table and a picture a task, and every trial in a file.",
    )
    parser.add_argument("model", nargs="?",
                        help="alias, folder, GGUF file or hub id (default: smollm2-135m)")  # fmt: skip
    parser.add_argument("files", nargs="*", type=named_path, metavar="TEXT",
                        help="UTF-8 texts, for all tasks but passkey")  # fmt: skip
    parser.add_argument("--methods", metavar="NAME,NAME,...",
                        help=f"all, or some of those that --list shows (default: {','.join(DEFAULT)}); with "
                        "--positions, kinds of positions (default: all)")  # fmt: skip
    parser.add_argument("--tuned", action="append", default=[], metavar="NAME=FOLDER",
                        help="a result of fot train as one more method, read as it was trained to be; may be repeated"
                        )  # fmt: skip
    parser.add_argument("--positions", action="store_true",
                        help="instead, train a small decoder with each kind of positions on short pieces of TEXT, and "
                        "read long ones; give texts alone, no MODEL")  # fmt: skip
    parser.add_argument("--steps", type=positive, default=600, metavar="N",
                        help="steps of training with --positions (default: 600)")  # fmt: skip
    parser.add_argument("--list", action="store_true", help="say what each method is and where it comes from, and end")
    parser.add_argument("--tasks", type=_tasks, metavar="NAME,NAME,...",
                        help=f"some of {', '.join(TASKS)} (default: passkey)")  # fmt: skip
    parser.add_argument("--lengths", type=positive_list, metavar="N,N,...",
                        help="tokens of the texts (default: 2048,10240); bytes with --positions (default: "
                        "512,1024,2048,4096,8192,16384)")  # fmt: skip
    parser.add_argument("--trials", type=positive, default=1, help="trials of each task and length (default: 1)")
    parser.add_argument("--out", type=named_path, default=Path("comparison"), metavar="FOLDER",
                        help="folder for results.jsonl and the pictures (default: comparison)")  # fmt: skip
    parser.add_argument("--resume", action="store_true", help="go on with the trials, or kinds of positions, in --out")
    parser.add_argument("--whole-up-to", type=positive, default=16384, metavar="N",
                        help="longest text for methods that attend to all of it (default: 16384)")  # fmt: skip
    parser.add_argument("--window", type=positive, default=1020, metavar="N",
                        help="last tokens that window and streaming see (default: 1020)")  # fmt: skip
    parser.add_argument("--longrope-factors", type=named_path, metavar="FILE",
                        help="JSON list of longrope's factors (default: those of YaRN)")  # fmt: skip
    parser.add_argument("--longrope-search", type=whole, metavar="ROUNDS",
                        help="search for longrope's factors on TEXT; 8 rounds read about 130 texts")  # fmt: skip
    parser.add_argument("--ssmax-scale", type=above_zero, metavar="S",
                        help="the s of ssmax (default: 1 / ln of the trained length)")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="seed for keys, facts and places (default: 0)")
    add_memory_options(parser)
    parser.set_defaults(command=_compare)


def _compare(args: argparse.Namespace) -> int:
    if args.list:
        print(_list())
        return 0
    _check_drawing()
    if args.positions and args.tuned:
        raise ValueError(f"--tuned {args.tuned[0]}: --positions trains decoders of its own: omit one")
    if args.positions:
        from fot.commands.compare_positions import compare_positions

        return compare_positions(args)
    methods, tasks = find_methods(args.methods or ",".join(DEFAULT)), args.tasks or ["passkey"]
    args.model, args.lengths = args.model or "smollm2-135m", args.lengths or [2048, 10240]
    if not args.files and (tasks != ["passkey"] or args.longrope_search is not None):
        raise ValueError("tasks other than passkey, and --longrope-search, need a text: name a file after the model")
    if args.longrope_search is not None and args.longrope_factors is not None:
        raise ValueError("--longrope-factors and --longrope-search exclude each other: omit one")
    if args.index is not None:
        raise ValueError("--index: methods have their own; choose among memory, memory-ivf and memory-clusters")
    lambdas = None if args.longrope_factors is None else _factors(args.longrope_factors)
    from fot.compare.methods import Setting, missing
    from fot.compare.results import open_folder, rows
    from fot.compare.rope import trained_length
    from fot.compare.run import plan, run, searched
    from fot.compare.show import picture_along, pictures, score_text, tables
    from fot.compare.tasks import Material, check_texts
    from fot.compare.tuned import find_tuned
    from fot.evaluation.texts import read_texts
    from fot.progress import progress_bar

    tuned = find_tuned(args.tuned)
    model = load(args)
    material = Material(model.tokenizer, read_texts(args.files, model.tokenizer), args.seed)
    setting = Setting(max(args.lengths), args.window, lambdas, args.ssmax_scale, tuned)
    without = missing([method.name for method in methods], model, setting)
    methods = [method for method in methods if method.name not in without]
    methods += [one.as_method() for one in tuned.values()]
    settings = {
        **about(model, args.model), "seed": args.seed, "files": [str(path) for path in args.files],
        "longest": setting.longest, "window": args.window, "longrope_factors": lambdas,
        "longrope_search": args.longrope_search, "ssmax_scale": args.ssmax_scale,
        "tuned": {name: str(one.folder) for name, one in tuned.items()} or None,
    }  # fmt: skip
    planned = plan(methods, tasks, args.lengths, args.trials, args.whole_up_to)
    search = args.longrope_search is not None and any(method.name == "longrope" for method in methods)
    check_texts(material, [(task, length, trial) for _, task, length, trial in planned])
    check_texts(material, [("perplexity", setting.longest, 0)] if search else [])
    done = open_folder(args.out, settings, resume=args.resume)
    if search:
        with progress_bar(unit="tok", desc="searching LongRoPE factors") as bar:
            setting = searched(model, setting, material, args.longrope_search, bar)
        print(f"longrope factors: {json.dumps([round(one, 4) for one in setting.lambdas or ()])}")
    with progress_bar(total=sum(length for _, _, length, _ in planned), unit="tok", desc="compare") as bar:

        def report(trial: dict[str, Any]) -> None:
            row = rows([trial])[0]
            if args.verbose:
                bar.write(f"{row.task}, {row.length} tokens, {row.method}: {score_text(row.task, row.score)}")

        found = run(model, planned, setting, material, args.out, done, report=report, progress=bar)
    summary, trained = rows(found["trials"]), trained_length(model)
    print(tables(summary, trained, without, args.whole_up_to, tuned))
    drawn = pictures(args.out, summary, args.model, trained)
    drawn += picture_along(args.out, found["trials"], args.model)
    print(f"every trial: {args.out / 'results.jsonl'}; pictures: {', '.join(path.name for path in drawn)}")
    if found["interrupted"]:
        print("interrupted: finished trials only; go on with --resume")
    return 130 if found["interrupted"] else 0


def _check_drawing() -> None:
    """Raise before the trials, not after, if their pictures could not be drawn."""
    try:
        importlib.import_module("matplotlib")
    except ImportError as error:
        raise ImportError("fot compare draws with matplotlib: pip install 'fot[plot]'") from error


def _list() -> str:
    width = max(len(method.name) for method in METHODS)
    return "\n".join(f"{method.name:<{width}}  {method.about} ({method.source})" for method in METHODS)


def _tasks(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in TASKS:
            raise argparse.ArgumentTypeError(f"{name!r} is no task: choose from {', '.join(TASKS)}")
    return list(dict.fromkeys(names))


def _factors(path: Path) -> tuple[float, ...]:
    try:
        found = json.loads(path.read_text("utf-8"))
        return tuple(float(one) for one in found)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is no JSON list of numbers such as [1.0, 1.2, 2.5]") from error
