"""``fot eval``."""

import argparse
from typing import Any

from fot.commands import evaluate_harness, evaluate_heads, evaluate_questions
from fot.commands.ask import REREAD
from fot.commands.evaluate_long import add_few_shot, add_ruler
from fot.commands.options import (
    about,
    add_memory_options,
    add_model_and_texts,
    add_outcome_options,
    check_plot,
    check_writable,
    finish,
    load,
    named_path,
    positive,
    positive_list,
    whole_list,
)


def add(commands: Any) -> None:
    parser = commands.add_parser("eval", help="measure a model", description="Measure a model.")
    kinds = parser.add_subparsers(title="measurements", required=True, metavar="WHAT")
    for add_kind in (
        _add_dictionary,
        _add_needles,
        add_ruler,
        add_few_shot,
        _add_perplexity,
        _add_distraction,
        _add_layers,
    ):
        add_kind(kinds)
    evaluate_heads.add(kinds)
    evaluate_questions.add(kinds)
    evaluate_harness.add(kinds)


def _add_dictionary(kinds: Any) -> None:
    parser = kinds.add_parser(
        "dictionary",
        help="measure dictionary lookup for several sizes of the dictionary",
        description="Read records into the memory, and measure how many questions about them the model answers "
        "correctly. The model must have been trained on such records.",
    )
    parser.add_argument(
        "model",
        nargs="?",
        default="dictionary-fot",
        help="alias or folder of a model trained by the dictionary recipes (default: dictionary-fot)",
    )
    add_memory_options(parser)
    parser.add_argument("--lengths", type=positive_list, default=[16_000, 256_000, 1_000_000], metavar="N,N,...",
                        help="tokens of records in memory (default: 16000,256000,1000000)")  # fmt: skip
    parser.add_argument("--windows", type=positive, default=4, help="number of windows that ask questions (default: 4)")
    add_outcome_options(parser, seed="seed for the dictionary and the questions", result="file to write the results to")
    parser.set_defaults(command=_eval_dictionary)


def _add_needles(kinds: Any) -> None:
    parser = kinds.add_parser(
        "needles",
        help="ask for facts hidden in a long text, in words that no shipped model was trained on",
        description="Hide facts in a long text and read the text into the memory. Then ask for each fact, with "
        "the memory and without it.",
    )
    add_model_and_texts(parser, "UTF-8 text to hide the facts in")
    parser.add_argument("--lengths", type=positive_list, default=[4096, 16384, 65536], metavar="N,N,...",
                        help="tokens of the text with its facts (default: 4096,16384,65536)")  # fmt: skip
    parser.add_argument("--needles", type=positive, default=8, help="number of facts in each text (default: 8)")
    parser.add_argument("--trials", type=positive, default=4, help="number of texts of each length (default: 4)")
    parser.add_argument("--chat", action="store_true", help="ask in the model's chat template, as fot ask does")
    parser.add_argument("--reread", choices=REREAD, default="off",
                        help="with --chat: how to find passages that are read again with the question; auto is what "
                        "fot ask does (default: off: answers come from the memory alone)")  # fmt: skip
    add_outcome_options(
        parser, seed="seed for facts, texts and depths", result="file to write the results to, with every answer"
    )
    parser.set_defaults(command=_eval_needles)


def _add_perplexity(kinds: Any) -> None:
    parser = kinds.add_parser(
        "perplexity",
        help="measure the perplexity of texts, within a window or with a memory",
        description="Measure perplexity within single windows. With --memory, measure the perplexity of the same "
        "tokens at many places of each text, with more and more of the text before them in memory. Plain attention to "
        "as much text is shown beside it.",
    )
    add_model_and_texts(parser, "UTF-8 text")
    parser.add_argument("--base", metavar="NAME", help="model to compare with, for example the one before training")
    parser.add_argument("--tokens", type=positive, metavar="N",
                        help="number of tokens to measure within windows, in all texts (default: 32768)")  # fmt: skip
    parser.add_argument("--memory", type=whole_list, metavar="N,N,...",
                        help="tokens of memory, rounded to whole windows, for example 0,512,4096,32768")  # fmt: skip
    parser.add_argument("--places", type=positive, metavar="N",
                        help="with --memory: number of places in each text (default: 30)")  # fmt: skip
    parser.add_argument("--others", nargs="+", type=named_path, metavar="FILE",
                        help="with --memory: measure again with these texts in the memory, too")  # fmt: skip
    parser.add_argument("--others-tokens", type=positive, metavar="N",
                        help="with --others: number of tokens of them (default: 32768)")  # fmt: skip
    parser.add_argument("--no-plain", action="store_true", help="with --memory: do not measure plain attention")
    parser.add_argument("--plot", type=named_path, metavar="OUT.png",
                        help="with --memory: file to draw the perplexities in")  # fmt: skip
    parser.add_argument("--json", type=named_path, metavar="OUT", help="file to write the results to")
    parser.set_defaults(command=_eval_perplexity)


def _add_distraction(kinds: Any) -> None:
    parser = kinds.add_parser(
        "distraction",
        help="measure how much attention goes to the right window, as the memory grows",
        description="Measure the positive attention mass. The memory holds the window before the current one and "
        "windows of other texts. The positive attention mass is the share of the attention to memory "
        "that goes to the window before. It is 1/contexts for a model without a preference. It is measured twice: if "
        "all of the memory weighs alike, and as the model weighs it, the window before stored last.",
    )
    parser.add_argument("models", nargs="+", metavar="MODEL", help="alias, folder, GGUF file or hub id")
    data = parser.add_mutually_exclusive_group(required=True)
    data.add_argument("--text", nargs="+", type=named_path, metavar="FILE", help="at least two UTF-8 texts")
    data.add_argument("--task", choices=["dictionary"], help="use windows of dictionary records instead of texts")
    add_memory_options(parser)
    parser.add_argument("--contexts", type=positive_list, default=[1, 2, 4, 8, 16, 32, 64, 128], metavar="N,N,...",
                        help="numbers of windows in memory (default: 1,2,4,...,128)")  # fmt: skip
    parser.add_argument(
        "--trials", type=positive, default=8, help="number of windows that read the memory (default: 8)"
    )
    add_outcome_options(parser, seed="seed for the windows", result="file to write the results to, for each layer")
    parser.add_argument(
        "--plot", type=named_path, metavar="OUT.png", help="file to draw the shares in, by number of contexts"
    )
    parser.set_defaults(command=_eval_distraction)


def _add_layers(kinds: Any) -> None:
    parser = kinds.add_parser(
        "layers",
        help="find out which layers of a model should have the memory",
        description="Search for the memory layers with which a model that was not trained for a memory finds the most "
        "facts in it. The search is greedy: it adds one layer at a time.",
    )
    add_model_and_texts(parser, "UTF-8 text to hide the facts in")
    parser.add_argument("--count", type=positive, default=4, metavar="N", help="most memory layers (default: 4)")
    parser.add_argument("--windows", type=positive, default=2, help="number of windows of text in memory (default: 2)")
    parser.add_argument("--trials", type=positive, default=4, help="number of texts (default: 4)")
    add_outcome_options(parser, seed="seed for facts and texts", result="file to write the results to")
    parser.set_defaults(command=_eval_layers)


def _eval_dictionary(args: argparse.Namespace) -> int:
    check_writable(args.json)
    model = load(args, tokenizer=False)
    from fot.evaluation import dictionary
    from fot.evaluation.report import dictionary_table
    from fot.progress import progress_bar

    with progress_bar(total=sum(args.lengths), unit="tok", desc="dictionary") as bar:
        found = dictionary.run(model, args.lengths, windows=args.windows, seed=args.seed, progress=bar)
    result = {**about(model, args.model), "seed": args.seed, **found}
    return finish(dictionary_table(result), result, args.json)


def _eval_needles(args: argparse.Namespace) -> int:
    check_writable(args.json)
    model = load(args)
    from fot.evaluation import needles
    from fot.evaluation.report import needles_table
    from fot.evaluation.texts import read_texts
    from fot.progress import progress_bar

    texts = read_texts(args.files, model.tokenizer)
    with progress_bar(total=args.trials * sum(args.lengths), unit="tok", desc="needles") as bar:
        log = bar.write if args.verbose else lambda line: None
        found = needles.run(
            model, texts, args.lengths, needles=args.needles, trials=args.trials, chat=args.chat,
            reread=args.reread, seed=args.seed, progress=bar,
            report=lambda length, answer: log(
                f"{length} tokens, depth {answer.depth:.2f}: {answer.expected}, got {answer.answer!r}"
            ),
        )  # fmt: skip
    result = {
        **about(model, args.model),
        "trials": args.trials,
        "chat": args.chat,
        "reread": args.reread,
        "seed": args.seed,
        "files": _names(args),
        **found,
    }
    return finish(needles_table(result), result, args.json)


def _eval_perplexity(args: argparse.Namespace) -> int:
    check_writable(args.json)
    check_plot(args.plot)
    _check_perplexity_options(args)
    model = load(args)
    from fot.evaluation.plots import growing_plot
    from fot.evaluation.report import growing_table, perplexity_table
    from fot.evaluation.texts import read_texts

    texts = dict(zip(_names(args), read_texts(args.files, model.tokenizer), strict=True))
    others = read_texts(args.others or [], model.tokenizer)
    models = [about(model, args.model) | _perplexity(model, texts, others, args)]
    settings = model.memory_config
    if args.base and not models[0]["interrupted"]:
        from fot import attach_memory

        args.model = args.base
        base = attach_memory(load(args), settings)
        if read_texts(args.files, base.tokenizer) != list(texts.values()):
            raise ValueError(
                f"{args.base} has another tokenizer, and perplexities of different tokens cannot be "
                "compared: choose a model with the same tokenizer"
            )
        models.append(about(base, args.base) | _perplexity(base, texts, others, args))
    result = {"sizes": args.memory, "window": settings.window, "models": models}
    result["interrupted"] = any(entry["interrupted"] for entry in models)
    status = finish((growing_table if args.memory else perplexity_table)(result), result, args.json)
    if args.plot:
        growing_plot(args.plot, result)
    return status


def _check_perplexity_options(args: argparse.Namespace) -> None:
    if args.memory and args.tokens:
        raise ValueError("--tokens is of perplexity within windows: with --memory, give --places instead")
    given = {"--places": args.places, "--others": args.others, "--no-plain": args.no_plain, "--plot": args.plot}
    for name, value in given.items():
        if value and not args.memory:
            raise ValueError(f"{name} needs --memory, for example --memory 0,512,4096")
    if args.others_tokens and not args.others:
        raise ValueError("--others-tokens needs --others: name the texts that join the memory")


def _perplexity(model: Any, texts: dict[str, Any], others: list[Any], args: argparse.Namespace) -> dict[str, Any]:
    from fot.evaluation import growing, perplexity
    from fot.progress import progress_bar

    with progress_bar(unit="tok", desc="perplexity") as bar:
        if not args.memory:
            return perplexity.run(model, texts, tokens=args.tokens or 32768, progress=bar)
        return growing.run(
            model, texts, args.memory, places=args.places or 30, others=others,
            others_tokens=args.others_tokens or 32768, plain=not args.no_plain, progress=bar,
        )  # fmt: skip


def _eval_distraction(args: argparse.Namespace) -> int:
    check_writable(args.json)
    check_plot(args.plot)
    from fot.evaluation.plots import distraction_plot
    from fot.evaluation.report import distraction_table

    models = []
    for name in args.models:
        args.model = name
        model = load(args, tokenizer=args.task is None)
        models.append(about(model, name) | _distraction(model, args))
        if models[-1]["interrupted"]:
            break
    result = {"what": args.task or "texts", "contexts": args.contexts, "trials": args.trials, "seed": args.seed,
              "models": models, "interrupted": models[-1]["interrupted"]}  # fmt: skip
    status = finish(distraction_table(result), result, args.json)
    if args.plot:
        distraction_plot(args.plot, result)
    return status


def _distraction(model: Any, args: argparse.Namespace) -> dict[str, Any]:
    from fot.evaluation import distraction
    from fot.evaluation.texts import read_texts
    from fot.progress import progress_bar

    drawn = (model.memory_config.window, max(args.contexts), args.trials, args.seed)
    if args.task:
        sample = distraction.dictionary_sample(*drawn)
    else:
        sample = distraction.text_sample(read_texts(args.text, model.tokenizer), *drawn)
    with progress_bar(total=sample.tokens(), unit="tok", desc="distraction") as bar:
        return distraction.run(model, sample, args.contexts, progress=bar)


def _eval_layers(args: argparse.Namespace) -> int:
    check_writable(args.json)
    model = load(args)
    from dataclasses import asdict

    from fot.evaluation import layers
    from fot.evaluation.report import layers_table
    from fot.evaluation.texts import read_texts
    from fot.progress import progress_bar

    texts = read_texts(args.files, model.tokenizer)
    sets = layers.sets_tried(model.config.num_hidden_layers, args.count)
    with progress_bar(total=sets, unit="set", desc="layers") as bar:
        found = layers.run(
            model, texts, count=args.count, windows=args.windows, trials=args.trials, seed=args.seed, progress=bar
        )
    result = {**about(model, args.model), "trials": args.trials, "seed": args.seed, "files": _names(args),
              "results": [asdict(choice) for choice in found], "interrupted": False}  # fmt: skip
    return finish(layers_table(result), result, args.json)


def _names(args: argparse.Namespace) -> list[str]:
    return [str(path) for path in args.files]
