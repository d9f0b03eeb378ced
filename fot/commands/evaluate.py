"""``fot eval``."""

import argparse
from pathlib import Path
from typing import Any

from fot.commands.options import add_memory_options, check_writable, load, positive, positive_list


def add(commands: Any) -> None:
    parser = commands.add_parser("eval", help="measure a model", description="Measure a model.")
    kinds = parser.add_subparsers(title="measurements", required=True, metavar="WHAT")
    dictionary = kinds.add_parser(
        "dictionary",
        help="dictionary lookup, by size of the dictionary",
        description="Accuracy of answers about records read into the memory, for a model trained on such records.",
    )
    dictionary.add_argument("model", help="folder of a model trained by the recipe dictionary")
    add_memory_options(dictionary)
    dictionary.add_argument("--lengths", type=positive_list, default=[16_000, 256_000, 1_000_000], metavar="N,N,...",
                            help="tokens of records (default: 16000,256000,1000000)")  # fmt: skip
    dictionary.add_argument("--windows", type=positive, default=4, help="windows of questions (default: 4)")
    dictionary.add_argument("--seed", type=int, default=0, help="draws dictionary and questions (default: 0)")
    dictionary.add_argument("--json", type=Path, metavar="OUT", help="write the results")
    dictionary.set_defaults(command=_eval_dictionary)


def _eval_dictionary(args: argparse.Namespace) -> int:
    check_writable(args.json)
    model = load(args, tokenizer=False)
    from tqdm import tqdm

    from fot.evaluation import dictionary
    from fot.evaluation.machine import describe_machine
    from fot.evaluation.report import dictionary_table, write_json

    with tqdm(total=sum(args.lengths), unit="tok", desc="dictionary", disable=None) as bar:
        found = dictionary.run(model, args.lengths, windows=args.windows, seed=args.seed, progress=bar)
    result = {"model": args.model, "seed": args.seed, "machine": describe_machine(), "results": found}
    print(dictionary_table(result))
    if args.json:
        write_json(args.json, result)
    return 0
