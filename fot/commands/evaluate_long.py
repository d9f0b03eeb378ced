"""``fot eval ruler`` and ``fot eval few-shot``."""

import argparse
from typing import Any

from fot.commands.options import (
    about,
    add_memory_options,
    add_model_and_texts,
    add_outcome_options,
    check_writable,
    finish,
    load,
    named_path,
    positive,
    positive_list,
    whole_list,
)
from fot.tasks.ruler import TASKS


def add_ruler(kinds: Any) -> None:
    parser = kinds.add_parser(
        "ruler",
        help="ask about long texts in the forms of RULER, NoLiMa and BABILong",
        description="Read long texts into the memory and ask about them: needles with one key or several, variables, "
        "frequent words, facts that the question words differently, people who change rooms. The same questions are "
        "asked with the whole text in one context, where it fits, and without the text.",
    )
    add_model_and_texts(parser, "UTF-8 text to hide the facts in")
    parser.add_argument("--tasks", type=_tasks, default=list(TASKS), metavar="NAME,NAME,...",
                        help=f"some of {', '.join(TASKS)} (default: all)")  # fmt: skip
    parser.add_argument("--lengths", type=positive_list, default=[4096, 16384], metavar="N,N,...",
                        help="tokens of a text (default: 4096,16384)")  # fmt: skip
    parser.add_argument("--trials", type=positive, default=10, help="texts of each task and length (default: 10)")
    parser.add_argument("--chat", action="store_true", help="ask in the model's chat template, as fot ask does")
    add_outcome_options(parser, seed="seed for texts and questions", result="file to write every answer to")
    parser.set_defaults(command=_ruler)


def add_few_shot(kinds: Any) -> None:
    parser = kinds.add_parser(
        "few-shot",
        help="classify questions with more and more labelled examples in memory",
        description="Put labelled examples before questions, and measure how many of these the model labels correctly. "
        "The last examples stay in the local window, those before are in the memory. The same questions are asked "
        "without the memory, and with all examples in one context, where they fit.",
    )
    parser.add_argument("model", help="alias, folder, GGUF file or hub id")
    parser.add_argument(
        "examples", type=named_path, metavar="EXAMPLES", help="a label, a space and a text on each line"
    )
    parser.add_argument("questions", type=named_path, metavar="QUESTIONS", help="the same, of what is asked")
    add_memory_options(parser)
    parser.add_argument("--lengths", type=whole_list, default=[0, 1024, 4096, 16384], metavar="N,N,...",
                        help="tokens of examples (default: 0,1024,4096,16384)")  # fmt: skip
    parser.add_argument("--trials", type=positive, default=100, help="number of questions (default: 100)")
    parser.add_argument("--encoding", default="utf-8", help="encoding of the files, for TREC latin-1 (default: utf-8)")
    add_outcome_options(parser, seed="seed for questions and the order of examples", result="file for the results")
    parser.set_defaults(command=_few_shot)


def _ruler(args: argparse.Namespace) -> int:
    check_writable(args.json)
    model = load(args)
    from fot.evaluation import ruler
    from fot.evaluation.report import ruler_table
    from fot.evaluation.texts import read_texts
    from fot.progress import progress_bar

    texts = read_texts(args.files, model.tokenizer)
    total = len(args.tasks) * args.trials * sum(args.lengths)
    with progress_bar(total=total, unit="tok", desc="ruler") as bar:
        log = bar.write if args.verbose else lambda line: None
        found = ruler.run(
            model, texts, args.tasks, args.lengths, trials=args.trials, chat=args.chat, seed=args.seed, progress=bar,
            report=lambda trial: log(
                f"{trial.task}, {trial.length} tokens: {', '.join(trial.expected)}; got {trial.answers['memory']!r}"
            ),
        )  # fmt: skip
    files = [str(path) for path in args.files]
    result = {**about(model, args.model), "seed": args.seed, "chat": args.chat, "files": files, **found}
    return finish(ruler_table(result), result, args.json)


def _few_shot(args: argparse.Namespace) -> int:
    check_writable(args.json)
    from fot.evaluation.few_shot import read_examples, run

    examples, questions = (read_examples(path, args.encoding) for path in (args.examples, args.questions))
    model = load(args)
    from fot.evaluation.report import few_shot_table
    from fot.progress import progress_bar

    with progress_bar(total=max(args.lengths), unit="tok", desc="few-shot") as bar:
        log = bar.write if args.verbose else lambda line: None
        found = run(
            model, examples, questions, args.lengths, trials=args.trials, seed=args.seed, progress=bar,
            report=lambda length, text, label, answer: log(f"{length} tokens, {text} {label}; got {answer!r}"),
        )  # fmt: skip
    result = {**about(model, args.model), "seed": args.seed, "examples": str(args.examples), **found}
    return finish(few_shot_table(result), result, args.json)


def _tasks(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in TASKS:
            raise argparse.ArgumentTypeError(f"{name!r} is no task: choose from {', '.join(TASKS)}")
    return names
