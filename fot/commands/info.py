"""``fot info``."""

import argparse
from typing import Any

from fot.commands.options import add_model_options, find_dtype, memory_settings, quiet, readable


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "info",
        help="describe a model, and say what it takes and how large a memory fits on this machine",
        description="Describe the model that a name stands for and its memory layers. Say what its weights and its "
        "memory take, and how large a memory fits on this machine. No weights are loaded for it.",
    )
    add_model_options(parser)
    parser.set_defaults(command=_info)


def _info(args: argparse.Namespace) -> int:
    from fot.evaluation.costs import info_text
    from fot.families import SUPPORTED_MODEL_TYPES
    from fot.loading import load_config

    quiet()
    dtype = str(find_dtype(args)).removeprefix("torch.")
    with readable(args.model):
        config, settings = load_config(args.model, dtype, **memory_settings(args))
    if config.model_type not in SUPPORTED_MODEL_TYPES:
        known = ", ".join(SUPPORTED_MODEL_TYPES)
        raise ValueError(f"{config.model_type!r} models are not supported; fot supports {known}")
    print(info_text(args.model, config, settings, args.quantization or dtype))
    return 0
