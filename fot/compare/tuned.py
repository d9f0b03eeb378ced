"""Checkpoints that were tuned for long texts, each read in its own way, beside methods without training."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import DynamicCache

from fot.compare.catalogue import MEMORY, METHODS, WHOLE, Method
from fot.compare.landmark import LandmarkReader, reading_blocks
from fot.compare.readers import CachedReader, MemoryReader, Reader
from fot.evaluation.answers import without_memory
from fot.loading import load_model

RECIPE = "recipe.json"  # that ``fot train`` leaves in a result's folder
WITH_MEMORY = ("crossbatch", "memorizing")  # of the methods that train


@dataclass(frozen=True)
class Tuned:
    """A tuned checkpoint.

    Attributes:
        name: in tables and pictures.
        folder: of the checkpoint, or of an adapter.
        method: of the recipe that made it, ``training.methods``.
        trained_length: tokens of a document that were trained on at once.
    """

    name: str
    folder: Path
    method: str
    trained_length: int

    def as_method(self) -> Method:
        """For a plan of trials."""
        attends = MEMORY if self.method in WITH_MEMORY else WHOLE
        return Method(self.name, f"tuned by {self.method}", str(self.folder), attends=attends)


def find_tuned(asked: Sequence[str]) -> dict[str, Tuned]:
    """What ``NAME=FOLDER`` texts name, by name.

    Raises:
        ValueError: a text of another form, a name that is there twice or is a method's, or a folder that ``fot train``
            did not write.
    """
    found: dict[str, Tuned] = {}
    for text in asked:
        name, separator, folder = text.partition("=")
        if not (name and separator and folder):
            raise ValueError(f"--tuned is {text!r}: give NAME=FOLDER, such as yarn-tuned=runs/tuned-yarn/model")
        if name in found or any(name == method.name for method in METHODS):
            raise ValueError(f"--tuned {text}: {name!r} is the name of another method: choose another one")
        found[name] = _tuned(name, Path(folder))
    return found


def _tuned(name: str, folder: Path) -> Tuned:
    path = folder / RECIPE
    if not path.is_file():
        raise ValueError(
            f"--tuned {name}={folder}: there is no {RECIPE}: name the folder model or adapter of a run of fot train"
        )
    recipe = json.loads(path.read_text("utf-8"))
    method = recipe.get("method", "crossbatch")  # recipes of before had one method
    length = recipe.get("length") or recipe["windows"] * recipe["memory"].get("local_context", 0)
    return Tuned(name, folder, method, length)


@contextmanager
def opened_tuned(tuned: Tuned, base: Any) -> Iterator[Reader]:
    """A reader of a tuned checkpoint, loaded for as long as the block lasts.

    Args:
        tuned: which.
        base: the model of the comparison, whose dtype, device and tokens it shares.

    Raises:
        ValueError: it has other tokens.
    """
    options = {"index": "exact"} if tuned.method in WITH_MEMORY else {}
    model: Any = load_model(tuned.folder, dtype=base.dtype, **options).to(base.device)
    if model.tokenizer is None or model.tokenizer.get_vocab() != base.tokenizer.get_vocab():
        raise ValueError(f"{tuned.folder} has other tokens than the model that is compared: name that one's base")
    if tuned.method in WITH_MEMORY:
        yield MemoryReader(model)
        return
    with without_memory(model) as plain:
        if tuned.method == "landmark":
            with reading_blocks(plain):
                yield LandmarkReader(plain)
        else:
            yield CachedReader(plain, DynamicCache)
