"""``fot info``."""

import argparse
from typing import Any

from fot.commands.options import add_model_options, find_dtype, memory_settings, quiet, readable


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "info",
        help="what a model name stands for, and what fits in this machine",
        description="What would be loaded, its memory layers, and how long a memory fits in this machine.",
    )
    add_model_options(parser)
    parser.set_defaults(command=_info)


def _info(args: argparse.Namespace) -> int:
    from fot.evaluation.report import info_text
    from fot.families import SUPPORTED_MODEL_TYPES
    from fot.loading import load_config

    quiet()
    dtype = find_dtype(args)
    with readable(args.model):
        config, settings = load_config(args.model, str(dtype).removeprefix("torch."), **memory_settings(args))
    if config.model_type not in SUPPORTED_MODEL_TYPES:
        known = ", ".join(SUPPORTED_MODEL_TYPES)
        raise ValueError(f"{config.model_type!r} models have no memory attention here; supported: {known}")
    print(info_text(args.model, config, settings, dtype))
    return 0
