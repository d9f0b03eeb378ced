"""The command ``fot``: parse, call one public function, print."""

import argparse
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fot import __version__

Command = Callable[[argparse.Namespace], int]

# What a user can mend; anything else is a defect of ours and keeps its traceback.
USER_ERRORS = (ValueError, OSError, ImportError, KeyError, FloatingPointError)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status (2: bad input, 130: interrupted)."""
    args = _parser().parse_args(argv)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    for name in ("fot", "memory"):
        logging.getLogger(name).setLevel(logging.INFO if args.verbose else logging.WARNING)
    command: Command = args.command
    try:
        return command(args)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except USER_ERRORS as error:
        if args.verbose:
            raise
        message = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
        print(f"fot: {' '.join(message.split())}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fot", description="External kNN memory for Llama-family models.")
    parser.add_argument("--version", action="version", version=f"fot {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_passkey(commands)
    _add_info(commands)
    _add_train(commands)
    _add_eval(commands)
    return parser


def _add_passkey(commands: Any) -> None:
    parser = commands.add_parser(
        "passkey",
        help="hide a number in a long text and ask for it",
        description="The passkey test: accuracy by length, with the memory and without.",
    )
    _add_model_options(parser)
    parser.add_argument("--lengths", type=_positive_list, default=[1024, 2048, 4096], metavar="N,N,...",
                        help="prompt lengths in tokens (default: 1024,2048,4096)")  # fmt: skip
    parser.add_argument("--trials", type=_positive, default=4, help="prompts of each length (default: 4)")
    parser.add_argument("--seed", type=int, default=0, help="draws keys and depths (default: 0)")
    parser.add_argument("--no-memory", action="store_true", help="test the plain model alone")
    parser.add_argument("--no-baseline", action="store_true", help="do not test the plain model beside it")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write all results, trial by trial")
    parser.add_argument("--plot", type=Path, metavar="OUT.png", help="draw accuracy by length and depth")
    parser.set_defaults(command=_passkey)


def _add_info(commands: Any) -> None:
    parser = commands.add_parser(
        "info",
        help="what a model name stands for, and what fits in this machine",
        description="What would be loaded, its memory layers, and how long a memory fits in this machine.",
    )
    _add_model_options(parser)
    parser.set_defaults(command=_info)


def _add_train(commands: Any) -> None:
    parser = commands.add_parser(
        "train",
        help="fine-tune a model with crossbatch",
        description="Crossbatch fine-tuning by a recipe. On several devices: accelerate launch -m fot train ...",
    )
    parser.add_argument("recipe", help="YAML or JSON file, or the name of a shipped recipe")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="entries to change, such as steps=100")
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints, log and result")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out")
    parser.add_argument("--max-hours", type=float, metavar="H", help="end in time, with a checkpoint and a result")
    parser.add_argument("-v", "--verbose", action="store_true", help="say what is chosen and why")
    parser.set_defaults(command=_train)


def _add_eval(commands: Any) -> None:
    parser = commands.add_parser("eval", help="measure a model", description="Measure a model.")
    kinds = parser.add_subparsers(title="measurements", required=True, metavar="WHAT")
    dictionary = kinds.add_parser(
        "dictionary",
        help="dictionary lookup, by size of the dictionary",
        description="Accuracy of answers about records read into the memory, for a model trained on such records.",
    )
    dictionary.add_argument("model", help="folder of a model trained by the recipe dictionary")
    _add_memory_options(dictionary)
    dictionary.add_argument("--lengths", type=_positive_list, default=[16_000, 256_000, 1_000_000], metavar="N,N,...",
                            help="tokens of records (default: 16000,256000,1000000)")  # fmt: skip
    dictionary.add_argument("--windows", type=_positive, default=4, help="windows of questions (default: 4)")
    dictionary.add_argument("--seed", type=int, default=0, help="draws dictionary and questions (default: 0)")
    dictionary.add_argument("--json", type=Path, metavar="OUT", help="write the results")
    dictionary.set_defaults(command=_eval_dictionary)


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", default="smollm2-135m",
                        help="alias, folder, GGUF file or hub id (default: smollm2-135m)")  # fmt: skip
    _add_memory_options(parser)


def _add_memory_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--mem-layers", type=_integers, metavar="N,N,...", help="memory layers (default: the model's)")
    parser.add_argument("--local-context", type=_positive, metavar="N",
                        help="tokens of a local window (default: the model's, at most 2048)")  # fmt: skip
    parser.add_argument("--index", metavar="NAME",
                        help="auto, exact, or a FAISS factory string such as IVF,Flat or HNSW32")  # fmt: skip
    parser.add_argument("--top-k", type=int, metavar="K", help="pairs a query retrieves (default: all, or 128)")
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto",
                        help="auto: the fastest on this device")  # fmt: skip
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    parser.add_argument("-v", "--verbose", action="store_true", help="say what is chosen and why")


def _passkey(args: argparse.Namespace) -> int:
    if args.no_memory and args.no_baseline:
        raise ValueError("--no-memory and --no-baseline leave nothing to test: drop one of them")
    _check_writable(args.json, args.plot)
    model = _load(args)
    from tqdm import tqdm

    from fot.evaluation import passkey
    from fot.evaluation.report import passkey_plot, passkey_table, write_json

    parts = (not args.no_memory) + (not args.no_baseline)
    config = model.memory_config
    with tqdm(total=parts * args.trials * sum(args.lengths), unit="tok", desc="passkey", disable=None) as bar:
        log = bar.write if args.verbose else lambda line: None
        found = passkey.run(
            model,
            args.lengths,
            args.trials,
            args.seed,
            with_memory=not args.no_memory,
            baseline=not args.no_baseline,
            report=lambda trial: log(
                f"{trial.length} tokens, depth {trial.depth:.2f}: {trial.key}, got {trial.answer!r}"
            ),
            progress=bar,
        )
    from fot.evaluation.machine import describe_machine

    result = {
        "model": args.model,
        "dtype": str(model.dtype).removeprefix("torch."),
        "memory": {name: getattr(config, name) for name in config.__dataclass_fields__},
        "trials": args.trials,
        "seed": args.seed,
        "machine": describe_machine(),
        **found,
    }
    print(passkey_table(result))
    if args.json:
        write_json(args.json, result)
    if args.plot:
        passkey_plot(args.plot, result)
    return 130 if found["interrupted"] else 0


def _train(args: argparse.Namespace) -> int:
    try:
        from training.recipe import load_recipe
        from training.train import train
    except ImportError as error:
        raise ImportError(f"training needs more packages ({error}): pip install 'fot[train]'") from error

    recipe = load_recipe(args.recipe, args.overrides)
    _quiet()
    line = train(recipe, args.out, resume=args.resume, max_hours=args.max_hours)
    print(json.dumps(line))
    return 0


def _eval_dictionary(args: argparse.Namespace) -> int:
    _check_writable(args.json)
    model = _load(args, tokenizer=False)
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


def _info(args: argparse.Namespace) -> int:
    from fot.evaluation.report import info_text
    from fot.loading import load_config

    _quiet()
    dtype = _dtype(args)
    config, settings = load_config(args.model, str(dtype).removeprefix("torch."), **_settings(args))
    print(info_text(args.model, config, settings, dtype))
    return 0


def _load(args: argparse.Namespace, *, tokenizer: bool = True) -> Any:
    """The model that the options name, on its device; with its tokenizer, if that is needed."""
    _quiet()
    from fot import FoTForCausalLM

    device = _device(args)
    model: Any = FoTForCausalLM.from_pretrained(args.model, dtype=_dtype(args), **_settings(args))
    if tokenizer and model.tokenizer is None:
        raise ValueError(f"{args.model} has no tokenizer beside its weights; put its tokenizer files into the folder")
    logging.getLogger("fot").info(
        "%s in %s on %s; %s", args.model, str(model.dtype).removeprefix("torch."), device, model.memory_config
    )
    return model.to(device)


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """Options that were given, as settings of ``MemoryConfig``."""
    names = ("mem_layers", "local_context", "index", "top_k")
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def _dtype(args: argparse.Namespace) -> Any:
    import torch

    from fot.evaluation.machine import default_dtype

    return default_dtype(_device(args)) if args.dtype == "auto" else getattr(torch, args.dtype)


def _device(args: argparse.Namespace) -> Any:
    from fot.evaluation.machine import find_device

    return find_device(args.device)


def _quiet() -> None:
    """Keep the bars and hints of transformers and its hub client off the terminal."""
    import huggingface_hub
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    huggingface_hub.logging.set_verbosity_error()


def _check_writable(*paths: Path | None) -> None:
    """Raise OSError before hours of work, not after, if a result could not be written."""
    for path in paths:
        if path is None:
            continue
        folder = path.absolute().parent
        if path.is_dir():
            raise OSError(f"{path} is a folder; give the name of a file to write")
        if not folder.is_dir():
            raise OSError(f"{folder} is not a folder, so {path.name} cannot be written there; make it first")
        if not os.access(folder, os.W_OK):
            raise OSError(f"{folder} is read-only, so {path.name} cannot be written there; choose another place")


def _positive(text: str) -> int:
    number = int(text) if text.strip().lstrip("-").isdigit() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return number


def _positive_list(text: str) -> list[int]:
    return [_positive(part) for part in text.split(",")]


def _integers(text: str) -> list[int]:
    try:
        return json.loads(f"[{text}]")
    except json.JSONDecodeError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers such as 8,16,24") from None


if __name__ == "__main__":
    sys.exit(main())
