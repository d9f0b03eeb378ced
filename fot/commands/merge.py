"""``fot merge`` and ``fot push``."""

import argparse
import os
import shutil
from typing import Any

from fot.commands.options import named_path, quiet, readable


def add(commands: Any) -> None:
    merge = commands.add_parser(
        "merge",
        help="write an adapter and its base model as one plain checkpoint",
        description="Add an adapter to its base model and write the result as a checkpoint that plain transformers "
        "loads. The memory settings are in its config.json.",
    )
    merge.add_argument("model", help="folder or hub id of an adapter, or any other name of a model")
    merge.add_argument("out", type=named_path, help="folder for the checkpoint; it must not exist")
    merge.add_argument("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto",
                       help="dtype of the checkpoint; auto is that of the base model (default: auto)")  # fmt: skip
    merge.add_argument("-v", "--verbose", action="store_true", help="print what is chosen automatically, and why")
    merge.set_defaults(command=_merge)
    push = commands.add_parser(
        "push",
        help="put a model, an adapter or a memory on the Hugging Face hub",
        description="Put what fot wrote (a model, an adapter or a memory) on the Hugging Face hub. Log in with "
        "`hf auth login` first.",
    )
    push.add_argument("folder", type=named_path, help="folder of the model, the adapter or the memory")
    push.add_argument("hub_id", metavar="ORG/NAME", help="its id on the hub")
    push.add_argument("--private", action="store_true", help="if it is new, let nobody else see it")
    push.add_argument("-v", "--verbose", action="store_true", help="print what is chosen automatically, and why")
    push.set_defaults(command=_push)


def _merge(args: argparse.Namespace) -> int:
    if args.out.exists():
        raise ValueError(f"{args.out} exists: give the name of a new folder")
    import torch

    from fot.loading import load_model

    quiet()
    dtype = args.dtype if args.dtype == "auto" else getattr(torch, args.dtype)
    with readable(args.model):
        model: Any = load_model(args.model, dtype=dtype)
    temporary = args.out.with_name(f".{args.out.name}.{os.getpid()}")
    try:
        model.save_pretrained(temporary)
        if model.tokenizer is not None:
            model.tokenizer.save_pretrained(temporary)
        os.replace(temporary, args.out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(f"{args.model} is in {args.out}, in {str(model.dtype).removeprefix('torch.')}")
    return 0


def _push(args: argparse.Namespace) -> int:
    from fot.hub import push

    if not args.folder.is_dir():
        raise FileNotFoundError(f"{args.folder} is not a folder: give one that fot wrote")
    quiet()
    print(push(args.folder, args.hub_id, private=args.private))
    return 0
