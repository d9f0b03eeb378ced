"""``fot train``."""

import argparse
import json
import os
import sys
from typing import Any

from fot.commands.options import above_zero, named_path, positive, quiet


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "train",
        help="fine-tune a model with crossbatch, or by another method for long texts",
        description="Fine-tune a model as a recipe describes, with crossbatch or by another method for long texts. Use "
        "accelerate launch -m fot train ... on several GPUs, and torchrun --nproc_per_node N -m fot train ... for "
        "several processes on CPUs.",
    )
    parser.add_argument("recipe", help="YAML or JSON file, or the name of a shipped recipe")
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="entries of the recipe to change, such as steps=100"
    )
    parser.add_argument("--out", type=named_path, help="folder for the checkpoints, the log and the result")
    parser.add_argument(
        "--estimate", action="store_true", help="print what the run takes of memory and where it fits; train nothing"
    )
    parser.add_argument(
        "--processes", type=positive, metavar="N", help="for --estimate: number of processes (default: 1)"
    )
    parser.add_argument("--resume", action="store_true", help="continue from the last complete checkpoint in --out")
    parser.add_argument(
        "--max-hours", type=above_zero, metavar="H", help="end the run within this time, with a checkpoint and a result"
    )
    parser.add_argument(
        "--peak-tflops",
        type=above_zero,
        metavar="X",
        help="peak TFLOP/s of one device at the run's precision; the log then has the share of it that is used",
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="print what is chosen automatically, and why")
    parser.set_defaults(command=_train)


def _train(args: argparse.Namespace) -> int:
    try:
        from training.recipe import load_recipe
        from training.signals import Stopped
        from training.train import train
    except ImportError as error:
        raise ImportError(f"training needs more packages ({error}): pip install 'fot[train]'") from error

    if args.processes is not None and not args.estimate:
        raise ValueError(
            f"--processes {args.processes} is for --estimate; to train on so many: torchrun --nproc_per_node "
            f"{args.processes} -m fot train ..., or accelerate launch on GPUs"
        )
    recipe = load_recipe(args.recipe, args.overrides)
    if args.estimate:
        from training.estimate import estimate, estimate_text

        quiet()
        print(estimate_text(recipe, estimate(recipe, args.processes or 1)))
        return 0
    if args.out is None:
        raise ValueError("fot train writes to a folder: give --out FOLDER")
    changed = {override.partition("=")[0].partition(".")[0] for override in args.overrides}
    quiet()
    speaks = os.environ.get("RANK", "0") == "0"  # of several processes, one
    try:
        line = train(
            recipe,
            args.out,
            resume=args.resume,
            max_hours=args.max_hours,
            changed=changed,
            peak_tflops=args.peak_tflops,
        )
    except Stopped as stopped:
        if speaks:
            print(f"fot: {stopped}", file=sys.stderr)
        return 128 + stopped.signum
    if speaks:
        print(json.dumps(line))
    return 0
