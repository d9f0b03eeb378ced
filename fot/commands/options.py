"""Options and helpers that several subcommands share."""

import argparse
import logging
import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", default="smollm2-135m-fot",
                        help="alias, folder, GGUF file or hub id (default: smollm2-135m-fot)")  # fmt: skip
    add_memory_options(parser)


def add_model_and_texts(parser: argparse.ArgumentParser, texts: str) -> None:
    """The model, texts, and the options of its memory."""
    parser.add_argument("model", help="alias, folder, GGUF file or hub id")
    parser.add_argument("files", nargs="+", type=named_path, metavar="FILE", help=texts)
    add_memory_options(parser)


def add_memory_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--mem-layers", type=integers, metavar="N,N,...", help="layers with a memory (default: those of the model)"
    )
    parser.add_argument("--local-context", type=positive, metavar="N",
                        help="tokens in a local window (default: that of the model, at most 2048)")  # fmt: skip
    parser.add_argument("--window-overlap", type=whole, metavar="N",
                        help="tokens that a window repeats of the one before (default: that of the model)")  # fmt: skip
    parser.add_argument("--full-weight-tokens", type=whole, metavar="N",
                        help="tokens from which on a memory weighs no more, or 0 (default: the model's)")  # fmt: skip
    parser.add_argument("--newest-full-weight", type=whole, metavar="N",
                        help="newest tokens of a larger one that keep their weight (default: the model's)")  # fmt: skip
    parser.add_argument(
        "--index",
        metavar="NAME",
        help="search index: auto, exact, clusters, or a FAISS factory string such as IVF,Flat or HNSW32",
    )
    parser.add_argument(
        "--top-k",
        type=int,
        metavar="K",
        help="pairs that a query retrieves (default: all with the exact index, 128 with FAISS)",
    )
    parser.add_argument("--vectors", choices=["float32", "bfloat16", "float16", "int8"],
                        help="dtype of a new memory's keys and values (default: that of the model)")  # fmt: skip
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto",
                        help="dtype of the model; auto is the fastest on this device (default: auto)")  # fmt: skip
    parser.add_argument("--quantization", choices=["nf4"],
                        help="hold the weights in 4 bits; needs bitsandbytes (default: 16 or 32 bits)")  # fmt: skip
    parser.add_argument(
        "--device", metavar="NAME", help="device: cpu, cuda, cuda:1, ... (default: a GPU if there is one)"
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="print what is chosen automatically, and why")


def load(args: argparse.Namespace, *, tokenizer: bool = True, saved: Mapping[str, Any] | None = None) -> Any:
    """The model that the options name, on its device; with its tokenizer, if that is needed.

    ``saved`` settings of ``MemoryConfig`` hold where no option says otherwise.
    """
    from fot.pretrained import resolve

    with readable(args.model):
        resolve(args.model)  # a name that is none is told at once, and not when torch is loaded
    quiet()
    from fot import FoTForCausalLM
    from fot.config import merged
    from fot.quantized import nf4

    device = find_device(args)
    settings = merged(saved or {}, memory_settings(args))
    packed = {"quantization_config": nf4(find_dtype(args))} if args.quantization else {}
    with readable(args.model):
        model: Any = FoTForCausalLM.from_pretrained(args.model, dtype=find_dtype(args), **packed, **settings)
    if tokenizer and model.tokenizer is None:
        raise ValueError(f"{args.model} has no tokenizer beside its weights: put its tokenizer files into the folder")
    logging.getLogger("fot").info(
        "%s in %s on %s; %s", args.model, str(model.dtype).removeprefix("torch."), device, model.memory_config
    )
    return model.to(device)


def load_tokenizer(name: str | None) -> Any:
    """The tokenizer of a model, without its weights.

    Raises:
        ValueError: no model is named, or it has no tokenizer.
    """
    if name is None:
        raise ValueError("the memory does not record which model made it: add --model")
    quiet()
    from fot import pretrained

    with readable(name):
        return pretrained.load_tokenizer(pretrained.find(name))


@contextmanager
def readable(name: str) -> Iterator[None]:
    """Within, files of a model that are cut short or damaged raise ValueError."""
    import struct

    from safetensors import SafetensorError

    try:
        yield
    except (SafetensorError, struct.error) as error:  # of safetensors; of transformers' reader of GGUF files
        raise ValueError(f"{name} is damaged ({error}): download it again") from error


def open_memory(args: argparse.Namespace, mode: str = "r") -> tuple[Any, Any]:
    """The memory in the folder ``args.memory``, and the model that made it (or ``args.model``), set up as then."""
    from fot.hub import memory_folder
    from memory import Memory

    args.memory = memory_folder(args.memory, mode)
    memory = Memory.open(args.memory, mode, index=args.index, top_k=args.top_k)
    try:
        model = load_for(args, memory)
        _warn_of_top_k(args, memory)
        return memory, model
    except BaseException:
        memory.close()
        raise


def load_for(args: argparse.Namespace, memory: Any) -> Any:
    """The model that made an open memory (or ``args.model``), set up as then."""
    from fot import MemoryConfig

    args.model = args.model or memory.metadata.get("model")
    if args.model is None:
        raise ValueError(f"{args.memory} does not record which model made it: add --model")
    saved = memory.metadata.get("memory", {})
    window = MemoryConfig.from_dict(saved).local_context  # names a setting that this version does not know
    if None not in (window, args.local_context) and window != args.local_context:
        raise ValueError(f"{args.memory} was made with windows of {window} tokens: omit --local-context")
    if args.vectors not in (None, memory.key_dtype):
        raise ValueError(f"{args.memory} was made with vectors in {memory.key_dtype}: omit --vectors")
    model = load(args, saved=saved)
    model.check_memory(memory)
    return model


def _warn_of_top_k(args: argparse.Namespace, memory: Any) -> None:
    """Say that an index drops most of the attention, and how to find out how much."""
    from memory.backends import drops_the_tail

    if drops_the_tail(memory.index, memory.top_k):
        asked = "".join(f" --{name} {value}" for name, value in (("index", args.index), ("top-k", args.top_k)) if value)
        logging.getLogger("fot").warning(
            "%s attends to %s of %s stored tokens and drops the rest: fot memory check %s%s measures what that loses",
            memory.index, f"{memory.top_k or 128:,}", f"{len(memory):,}", args.memory, asked,
        )  # fmt: skip


def add_outcome_options(parser: argparse.ArgumentParser, *, seed: str, result: str) -> None:
    """``--seed`` and ``--json`` of a measurement, with what they do."""
    parser.add_argument("--seed", type=int, default=0, help=f"{seed} (default: 0)")
    parser.add_argument("--json", type=named_path, metavar="OUT", help=result)


def memory_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Options that were given, as settings of ``MemoryConfig``."""
    names = (
        *("mem_layers", "local_context", "window_overlap", "full_weight_tokens", "newest_full_weight"),
        *("index", "top_k"),
    )
    settings = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    return settings | ({"key_dtype": args.vectors, "value_dtype": args.vectors} if args.vectors else {})


def find_dtype(args: argparse.Namespace) -> Any:
    import torch

    from fot.machine import default_dtype

    return default_dtype(find_device(args)) if args.dtype == "auto" else getattr(torch, args.dtype)


def find_device(args: argparse.Namespace) -> Any:
    from fot.machine import find_device

    return find_device(args.device)


def quiet() -> None:
    """Keep the bars and hints of transformers and its hub client off the terminal."""
    import huggingface_hub
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    huggingface_hub.logging.set_verbosity_error()


def check_writable(*paths: Path | None) -> None:
    """Raise OSError before hours of work, not after, if a result could not be written."""
    for path in paths:
        if path is None:
            continue
        folder = path.absolute().parent
        if path.is_dir():
            raise OSError(f"{path} is a folder: give the name of a file to write")
        if path.exists() and not path.is_file():  # files are replaced, and a device must not be
            raise OSError(f"{path} is a pipe or a device: give the name of a file to write")
        if not folder.is_dir():
            raise OSError(f"{folder} is not a folder, so {path.name} cannot be written there: create the folder first")
        if not os.access(folder, os.W_OK):
            raise OSError(f"{folder} is read-only, so {path.name} cannot be written there: choose another folder")


def check_plot(path: Path | None) -> None:
    """Raise before the work, not after, if a picture could not be drawn."""
    if path is None:
        return
    check_writable(path)
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError as error:
        raise ImportError("--plot needs matplotlib: pip install 'fot[plot]'") from error
    if path.suffix.lstrip(".") not in FigureCanvasBase.filetypes:
        raise ValueError(
            f"--plot {path} has a picture format that is not supported: end the name in .png, .svg or .pdf"
        )


def named_path(text: str) -> Path:
    if not text.strip():  # Path("") is the working folder
        raise argparse.ArgumentTypeError("the name is empty")
    return Path(text)


def positive(text: str) -> int:
    number = int(text) if text.strip().lstrip("-").isdigit() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return number


def above_zero(text: str) -> float:
    """A finite number above 0, of an option."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not (math.isfinite(number) and number > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return number


def positive_list(text: str) -> list[int]:
    return [positive(part) for part in text.split(",")]


def whole(text: str) -> int:
    if not re.fullmatch(r"\s*\d+\s*", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 0")
    return int(text)


def whole_list(text: str) -> list[int]:
    """Numbers of tokens, 0 for none."""
    if not re.fullmatch(r"\s*\d+\s*(,\s*\d+\s*)*", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers of tokens such as 0,2048,8192")
    return [int(part) for part in text.split(",")]


def integers(text: str) -> list[int]:
    if not re.fullmatch(r"\s*\d+\s*(,\s*\d+\s*)*", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers such as 8,16,24")
    return [int(part) for part in text.split(",")]


def about(model: Any, name: str) -> dict[str, Any]:
    """What was measured, and where."""
    from fot.machine import describe_machine

    config = model.memory_config
    return {
        "model": name,
        "dtype": str(model.dtype).removeprefix("torch."),
        "memory": {field: getattr(config, field) for field in config.__dataclass_fields__},
        "machine": describe_machine(),
    }


def finish(table: str, result: dict[str, Any], path: Path | None) -> int:
    """Print a result, write it to ``--json``, and say by the exit status whether it was interrupted."""
    from memory.atomic import write_json

    print(table)
    if path:
        write_json(path, result)
    return 130 if result["interrupted"] else 0
