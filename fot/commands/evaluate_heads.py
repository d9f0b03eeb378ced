"""``fot eval heads``."""

import argparse
import json
from pathlib import Path
from typing import Any

from fot.commands.options import (
    about,
    add_model_and_texts,
    add_outcome_options,
    check_writable,
    finish,
    load,
    positive,
)


def add(kinds: Any) -> None:
    parser = kinds.add_parser(
        "heads",
        help="find out which heads of a model find the passage that a question is about",
        description="Hide facts in a text, and judge each head of the memory layers by the passages that it finds for "
        "questions about them. The best heads can be stored with the model; fot ask uses them.",
    )
    add_model_and_texts(parser, "UTF-8 text to hide the facts in")
    parser.add_argument("--keep", type=positive, default=8, metavar="N", help="number of heads to choose (default: 8)")
    parser.add_argument("--length", type=positive, default=16384, metavar="N",
                        help="tokens of each text with its facts (default: 16384)")  # fmt: skip
    parser.add_argument("--needles", type=positive, default=8, help="number of facts in each text (default: 8)")
    parser.add_argument("--trials", type=positive, default=4, help="number of texts (default: 4)")
    parser.add_argument("--store", action="store_true", help="store the heads in the model's folder")
    add_outcome_options(parser, seed="seed for facts and texts", result="file to write the results to")
    parser.set_defaults(command=_eval_heads)


def _eval_heads(args: argparse.Namespace) -> int:
    settings = _settings_file(Path(args.model)) if args.store else None
    check_writable(args.json, settings)
    model = load(args)
    from dataclasses import asdict

    from fot.evaluation import heads
    from fot.evaluation.report import heads_table
    from fot.evaluation.texts import read_texts
    from fot.progress import progress_bar

    texts = read_texts(args.files, model.tokenizer)
    with progress_bar(total=args.needles * args.trials, unit="question", desc="heads") as bar:
        found = heads.run(
            model, texts, length=args.length, needles=args.needles, trials=args.trials, seed=args.seed, progress=bar
        )
    chosen = sorted((one.layer, one.head) for one in found[: args.keep])
    result = {**about(model, args.model), "seed": args.seed, "files": [str(path) for path in args.files],
              "retrieval_heads": chosen, "heads": [asdict(one) for one in found], "interrupted": False}  # fmt: skip
    if settings is not None:
        _store(settings, chosen)
    return finish(heads_table(result, args.keep), result, args.json)


def _settings_file(folder: Path) -> Path:
    """Where a model's folder keeps its memory settings."""
    for name in ("fot_adapter.json", "config.json"):
        if (folder / name).is_file():
            return folder / name
    raise ValueError(f"--store needs a folder with a model, and {folder} is none: save the model to a folder first")


def _store(settings: Path, heads: list[tuple[int, int]]) -> None:
    from fot.config import CONFIG_KEY
    from memory.atomic import write_json

    content = json.loads(settings.read_text("utf-8"))
    key = "memory" if settings.name == "fot_adapter.json" else CONFIG_KEY
    content[key] = content.get(key, {}) | {"retrieval_heads": heads}
    write_json(settings, content)
