"""Focused Transformer / LongLLaMA: an external kNN memory for Llama-family models (arXiv 2307.03170).

    import fot

    model = fot.FoTForCausalLM.from_pretrained("smollm2-135m")
    memory = model.new_memory()
    model.ingest(Path("book.txt"), memory)
    model.generate(prompt_ids, memory=memory, max_new_tokens=32)

Importing it also teaches transformers' Auto classes to load LongLLaMA checkpoints, and to warn where they load a model
that was saved with a memory without it.
"""

import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fot.config import MemoryConfig
    from fot.longllama import LongLlamaConfig, LongLlamaForCausalLM
    from fot.model import FoTForCausalLM, attach_memory, detach_memory
    from memory import Memory, attention_mass_recall

__version__ = "0.1.0"

__all__ = [
    "FoTForCausalLM",
    "LongLlamaConfig",
    "LongLlamaForCausalLM",
    "Memory",
    "MemoryConfig",
    "attach_memory",
    "attention_mass_recall",
    "detach_memory",
]

_HOMES = {
    "FoTForCausalLM": "fot.model",
    "LongLlamaConfig": "fot.longllama",
    "LongLlamaForCausalLM": "fot.longllama",
    "Memory": "memory",
    "MemoryConfig": "fot.config",
    "attach_memory": "fot.model",
    "attention_mass_recall": "memory",
    "detach_memory": "fot.model",
}


# Modules that people use as they are: ``fot.ask.ask(...)``.
_MODULES = ("ask", "trace")


def __getattr__(name: str) -> Any:
    """Public names and modules are imported when first used."""
    if name in _MODULES:
        return import_module(f"fot.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'fot' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def _check_own_packages() -> None:
    """Raise ImportError if a user's own folder or file named ``memory`` or ``training`` hides ours."""
    here = Path(__file__).resolve().parent.parent
    for name in ("memory", "training"):
        spec = find_spec(name)
        places = [] if spec is None else [spec.origin, *(spec.submodule_search_locations or ())]
        if not any(place and Path(place).resolve().is_relative_to(here / name) for place in places):
            found = next((place for place in places if place), "nothing")
            raise ImportError(
                f"fot needs its own package {name!r}, but Python finds {found} first: rename that one, or start Python "
                "from another folder"
            )


_check_own_packages()


# Programs that find fot by themselves, and need no torch for most of what they do: ours, and that of fot.commands.llm.
_PROGRAMS = ("fot", "llm")


def _is_command() -> bool:
    """Whether this process is such a program, or ``python -m`` of it; ``sys.argv[0]`` is ``-m`` while that starts."""
    if sys.argv[0] == "-m":
        pairs = list(zip(sys.orig_argv, sys.orig_argv[1:], strict=False))
        return any(f"-m{name}" in sys.orig_argv or ("-m", name) in pairs for name in _PROGRAMS)
    path = Path(sys.argv[0])  # llm.py would be a program of the user's own
    return (path.parent.name if path.name == "__main__.py" else path.name.removesuffix(".exe")) in _PROGRAMS


# These programs register LongLLaMA when they load a model, so that `fot --help` need not wait for torch.
if not _is_command():
    import_module("fot.longllama")
    import_module("fot.auto")
