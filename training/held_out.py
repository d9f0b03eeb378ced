"""What the memory is worth: the loss of the same windows of held-out text with nothing in memory, and with more and
more of what precedes them.

A memory of n tokens is made as ``fot.ingest`` makes one: its text is cut into windows, with their overlap, and each
window reads those before it, unless windows are isolated. The windows lie side by side in a batch, and crossbatch lets
each see those before it, which is what a model with memory attached computes (a test holds the two together), and works
for parameters that are spread over processes, too.
"""

from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional

from fot.config import MemoryConfig
from training.batches import IGNORED, Batch
from training.crossbatch import Contexts, Crossbatch
from training.recipe import Recipe
from training.setup import tokenised

# Windows in memory where the recipe says nothing: about what a batch holds, and more.
DEFAULT_WINDOWS = (2, 8)

LOSS = "held_out_loss"


def loss_name(tokens: int) -> str:
    """Its name in the log, with so many tokens in memory."""
    return f"{LOSS}_memory_{tokens}" if tokens else LOSS


@dataclass(frozen=True)
class HeldOut:
    """Windows to be scored, and what precedes them.

    Attributes:
        sizes: of memories in tokens, ascending, without 0.
        texts: (N, sizes[-1] + window) tokens; the last window is scored.
        window: tokens of a window.
    """

    sizes: tuple[int, ...]
    texts: Tensor
    window: int

    @property
    def names(self) -> list[str]:
        """What is measured."""
        return [loss_name(size) for size in (0, *self.sizes)]


def build_held_out(recipe: Recipe, config: MemoryConfig, tokenizer: Any) -> HeldOut | None:
    """The windows of the recipe's held-out texts, evenly spread over them; None if it names no texts.

    Raises:
        ValueError: no text is long enough for a window after the largest memory that the recipe asks for.
    """
    if not recipe.held_out:
        return None
    documents = [ids for entry in recipe.held_out for ids in tokenised(entry, tokenizer)]
    longest, window = max(map(len, documents), default=0), config.window
    if not config.layers:
        sizes: tuple[int, ...] = ()
    elif recipe.held_out_memory:
        sizes = tuple(sorted(set(recipe.held_out_memory)))
    else:  # the largest is left out where no text has room for it
        sizes = tuple(count * window for count in DEFAULT_WINDOWS if (count + 1) * window <= longest)
    needed = max(sizes, default=0) + window
    if longest < needed:
        memory = f" after a memory of {max(sizes)}" if sizes else ""
        raise ValueError(
            f"held_out: the longest text has {longest} tokens, but a window of {window}{memory} needs {needed}: give "
            "longer texts" + (", or smaller sizes in held_out_memory" if sizes else "")
        )
    starts = [(ids, start) for ids in documents for start in range(0, len(ids) - needed + 1, window)]
    count = min(len(starts), recipe.eval_batches * recipe.lanes)
    chosen = [starts[number * len(starts) // count] for number in range(count)]
    return HeldOut(sizes, torch.tensor([list(ids[start : start + needed]) for ids, start in chosen]), window)


def held_out_losses(
    held_out: HeldOut, recipe: Recipe, module: nn.Module, crossbatch: Crossbatch, accelerator: Accelerator
) -> dict[str, float]:
    """Mean loss of the scored windows' tokens but their first, by size of the memory.

    Args:
        module: a ``Step`` that is not wrapped, whose processes all hold the same texts.
        crossbatch: its switch; it must not gather.
    """
    found = {}
    for size, name in zip((0, *held_out.sizes), held_out.names, strict=True):
        texts = held_out.texts[:, held_out.texts.shape[1] - held_out.window - size :]
        count = len(memory_windows(size, crossbatch.config)) + 1
        total = weight = 0.0
        for some in texts.split(max(1, recipe.lanes * recipe.windows // count)):
            batch, contexts = with_memory(some, size, crossbatch.config)
            crossbatch.contexts = contexts
            with accelerator.autocast():
                sums = module(batch.to(accelerator.device))
            total, weight = total + float(sums["loss"]), weight + float(sums["weight"])
        found[name] = total / weight
    return found


def memory_windows(size: int, config: MemoryConfig) -> list[tuple[int, int, int]]:
    """(start, stop, first that is stored) of the windows in which ``size`` tokens are read into a memory."""
    windows = []
    start = stored = 0
    while stored < size:
        stop = min(size, start + config.window)
        windows.append((start, stop, stored))
        start, stored = stop - config.overlap, stop
    return windows


def with_memory(texts: Tensor, size: int, config: MemoryConfig) -> tuple[Batch, Contexts | None]:
    """Texts as rows: for each, the windows of its memory and then its last window, which alone has labels.

    Args:
        texts: (n, size + window).

    Returns:
        the batch; for each row the rows that it sees, None where there is no memory.
    """
    windows = memory_windows(size, config)
    rows: list[Tensor] = []
    hidden, seen = [], []
    for text in texts:
        first = len(rows)
        for start, stop, stored in windows:
            seen.append(range(first, first if config.isolated_windows else len(rows))[::-1])
            rows.append(functional.pad(text[start:stop], (0, config.window - stop + start)))
            place = torch.arange(start, start + config.window)
            hidden.append((place < stored) | (place >= stop))
        seen.append(range(first, len(rows))[::-1])
        rows.append(text[size:])
        hidden.append(torch.zeros(config.window, dtype=torch.bool))
    batch = _batch(torch.stack(rows), len(windows) + 1)
    if not windows:
        return batch, None
    return batch, Contexts([torch.tensor(list(others), dtype=torch.int64) for others in seen], torch.stack(hidden))


def _batch(rows: Tensor, windows: int) -> Batch:
    """Every ``windows``-th row has labels, each of its tokens but the first once."""
    labels = torch.full_like(rows, IGNORED)
    scored = slice(windows - 1, None, windows)
    labels[scored, :-1] = rows[scored, 1:]
    nothing = torch.zeros_like(rows, dtype=torch.bool)
    number = torch.arange(len(rows))
    lane, index = number // windows, number % windows
    content, position = lane[:, None].expand_as(rows), nothing.long()
    weights, whole = (labels != IGNORED).float(), torch.zeros(len(rows), dtype=torch.bool)
    return Batch(rows, labels, weights, nothing, lane, index, lane, content, position, nothing, whole)
