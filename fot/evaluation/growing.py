"""What a memory is worth on ordinary text: perplexity of the same tokens with more and more of the text in memory.

At each of many places of a text, one window is read with the tokens right before it in memory. The second half of the
window is what a user meets while a model generates: half a window of local tokens comes before it. The first half has
none, and stands for a window's start. Beside them stands plain attention of the same weights, with as much of the text
before the window as the memory held. Other texts may join the memory: that is the distraction of arXiv 2307.03170,
section 3.3, on whole texts.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fot.families import head
from fot.loss import token_losses
from fot.windows import Inputs, store_isolated
from memory import Memory

ROWS = 8  # windows read at once

# A token counts in the weighted perplexity by how much likelier the text before makes it, at most this much (LongCE,
# arXiv 2410.23771, section 3.2).
MOST_WEIGHT = 5.0


@dataclass(frozen=True)
class Place:
    """A window that is scored: which text, and its first token there."""

    text: int
    start: int


class Shelf:
    """A text cut into windows as ``fot.ingest`` cuts it, for memories that begin at any window.

    If windows are isolated, what is stored of one depends on nothing but the window: each is read once, and every
    memory takes it from here. Otherwise each memory is read anew.
    """

    def __init__(self, model: Any, ids: Sequence[int], progress: Any = None) -> None:
        self._model, self._ids, self._progress = model, torch.tensor(ids, dtype=torch.int64), progress
        config = model.memory_config
        self.window, self.overlap = config.window, config.overlap
        self.step = self.window - self.overlap
        self._read: dict[int, int] = {}  # window -> where its first token is in what was read
        self._all = model.new_memory(index="exact", top_k=None)

    def whole(self, tokens: int) -> int:
        """The number of tokens nearest to this that whole windows hold; 0 for 0."""
        return self.overlap + self.step * max(1, round((tokens - self.overlap) / self.step)) if tokens else 0

    def memory(self, start: int, stop: int, memory: Memory | None = None) -> Memory:
        """A memory of tokens start..stop-1, which are whole windows of the text; or more of one.

        Args:
            start: a multiple of ``step``.
            stop: ``overlap`` more than such a multiple.
            memory: what they are added to; None for a new one.
        """
        memory = self._model.new_memory() if memory is None else memory
        if stop <= start:
            return memory
        if not self._model.memory_config.isolated_windows:
            self._model.ingest(self._ids[start:stop], memory, progress=self._progress or False)
            return memory
        numbers = range(start // self.step, (stop - self.overlap) // self.step)
        self._ensure(numbers)
        taken = [torch.arange(self.window) + self._read[numbers[0]]]
        taken += [torch.arange(self.overlap, self.window) + self._read[number] for number in numbers[1:]]
        slots = torch.cat(taken).expand(self._all.num_key_value_heads, -1)
        keys = {layer: self._all[layer].keys(slots) for layer in self._all.layers}
        values = {layer: self._all[layer].values(slots) for layer in self._all.layers}
        memory.append(keys, values, self._ids[start:stop])
        return memory

    def _ensure(self, numbers: range) -> None:
        missing = [number for number in numbers if number not in self._read]
        for first in range(0, len(missing), ROWS):
            some = missing[first : first + ROWS]
            ids = torch.stack([self._ids[self.step * number :][: self.window] for number in some])
            ids = ids.to(self._model.device)
            positions = torch.arange(self.window, device=ids.device).expand_as(ids)
            for row, number in enumerate(some):
                self._read[number] = len(self._all) + row * self.window
            store_isolated(
                self._model, Inputs(ids, None, None, positions), self._all, skips=[0] * len(some),
                spans=[None] * len(some),
            )  # fmt: skip
            _move(self._progress, ids.numel())


@torch.no_grad()
def run(
    model: Any,
    texts: dict[str, Sequence[int]],
    sizes: Sequence[int],
    *,
    places: int = 30,
    others: Sequence[Sequence[int]] = (),
    others_tokens: int = 32768,
    plain: bool = True,
    progress: Any = None,
) -> dict[str, Any]:
    """Perplexity of windows by the tokens of memory that they read.

    Args:
        model: a ``FoTForCausalLM``.
        texts: token ids by name.
        sizes: tokens of memory, those right before the window, rounded to whole windows; 0 for none.
        places: windows of each text, evenly spread behind the largest memory; fewer where the text has fewer.
        others: token ids of other texts. If there are any, each memory is measured once more with
            ``others_tokens`` of them in it, in equal shares.
        others_tokens: see there.
        plain: whether to measure plain attention, too.
        progress: a tqdm bar that gets its total here and is moved by each token read, or None.

    Returns:
        ``{"rows": [...], "texts": {name: {"places": int, "rows": [...]}}, "interrupted": bool}``. A row has ``tokens``
        of the text and of ``others`` in memory, and for ``memory`` and ``plain`` (None where the model's positions do
        not suffice) ``inside`` and ``start``, the perplexity of the second and of the first half of the windows, and
        ``weighted``, of the second half with tokens weighted by what plain attention gains from the text (None
        without it). The rows of all texts together are means over texts. Ctrl-C ends the run and keeps the finished
        places.

    Raises:
        ValueError: a text without room for a window behind the largest memory.
    """
    shelves = [Shelf(model, ids, progress) for ids in texts.values()]
    rounded = sorted({shelves[0].whole(size) for size in sizes}) if shelves else []
    found: list[list[dict[str, Tensor]]] = [[] for _ in texts]
    spots = [_places(number, name, shelves[number], len(ids), max(rounded), places)
             for number, (name, ids) in enumerate(texts.items())]  # fmt: skip
    other_shelves = [Shelf(model, ids, progress) for ids in others]
    most = model.config.max_position_embeddings - model.memory_config.window
    _expect(progress, model, spots, rounded, most if plain else -1, len(others), others_tokens)
    interrupted = False
    try:
        for round_ in range(max(map(len, spots), default=0)):
            for number, ids in enumerate(texts.values()):
                if round_ < len(spots[number]):
                    found[number].append(
                        _losses_at(
                            model, torch.tensor(ids), spots[number][round_].start, shelves[number], rounded,
                            other_shelves, others_tokens, most if plain else -1, progress,
                        )
                    )  # fmt: skip
    except KeyboardInterrupt:
        interrupted = True
    by_text = {name: {"places": len(places), "rows": _rows(places)} for name, places in zip(texts, found, strict=True)}
    by_text = {name: entry for name, entry in by_text.items() if entry["places"]}
    return {"rows": _joint([entry["rows"] for entry in by_text.values()]), "texts": by_text, "interrupted": interrupted}


def _places(number: int, name: str, shelf: Shelf, length: int, largest: int, count: int) -> list[Place]:
    """Windows of a text that begin where whole windows end, behind ``largest`` tokens."""
    first = -(-(largest - shelf.overlap) // shelf.step)
    last = (length - shelf.window - shelf.overlap) // shelf.step
    if last < first:
        raise ValueError(
            f"{name} has {length:,} tokens; a memory of {largest:,} and a window of {shelf.window} behind it take "
            f"{largest + shelf.window:,}: give a smaller --memory or longer files"
        )
    count = min(count, last - first + 1)
    steps = [first + (number * (last - first)) // max(1, count - 1) for number in range(count)]
    return [Place(number, shelf.overlap + shelf.step * step) for step in steps]


def _losses_at(
    model: Any,
    ids: Tensor,
    start: int,
    shelf: Shelf,
    sizes: Sequence[int],
    others: Sequence[Shelf],
    others_tokens: int,
    most: int,
    progress: Any,
) -> dict[str, Tensor]:
    """Losses (W - 1,) of the window that starts there, by "memory/size/others" and "plain/size"."""
    window = ids[start : start + shelf.window]
    found = {}
    for size in sizes:
        memory = shelf.memory(start - size, start)
        found[f"memory/{size}/0"] = _window_losses(model, window, memory)
        _move(progress, len(window))
        if others and size:
            share = shelf.whole(others_tokens // len(others))
            for other in others:
                other.memory(0, share, memory)
            found[f"memory/{size}/{share * len(others)}"] = _window_losses(model, window, memory)
            _move(progress, len(window))
        if size <= most:
            found[f"plain/{size}"] = _plain_losses(model, ids[start - size : start + shelf.window], shelf.window)
            _move(progress, size + len(window))
    return found


def _window_losses(model: Any, window: Tensor, memory: Memory) -> Tensor:
    window = window.to(model.device)
    hidden = model(window[None], memory=memory, use_cache=False, output_hidden_states=False).logits
    return torch.nn.functional.cross_entropy(hidden[0, :-1].float(), window[1:], reduction="none").cpu()


def _plain_losses(model: Any, ids: Tensor, window: int) -> Tensor:
    """Under attention to all of these tokens: without a context, memory layers are plain ones."""
    ids = ids.to(model.device)
    hidden = model.base_model(input_ids=ids[None], use_cache=False).last_hidden_state[0, -window:-1]
    return token_losses(hidden, ids[-window + 1 :], partial(head, model))[0].cpu()


def _rows(places: Sequence[dict[str, Tensor]]) -> list[dict[str, Any]]:
    """What was measured at the places of one text, a row a memory."""
    if not places:
        return []
    joint = {name: torch.stack([losses[name] for losses in places]) for name in places[0]}  # (places, W - 1)
    plain = {int(name.split("/")[1]): losses for name, losses in joint.items() if name.startswith("plain")}
    weights = None
    if len(plain) > 1:
        gain = _inside(plain[min(plain)]) - _inside(plain[max(plain)])
        weights = gain.exp().clamp(max=MOST_WEIGHT)
    rows = []
    for name, losses in joint.items():
        kind, size, *other = name.split("/")
        if kind == "memory":
            beside = plain.get(int(size)) if other == ["0"] else None
            rows.append({
                "tokens": int(size),
                "others": int(other[0]),
                "memory": _perplexities(losses, weights),
                "plain": None if beside is None else _perplexities(beside, weights),
                "losses": _inside(losses).mean(1).tolist(),
            })  # fmt: skip
    return rows


def _perplexities(losses: Tensor, weights: Tensor | None) -> dict[str, float | None]:
    inside = _inside(losses)
    weighted = None if weights is None else math.exp(float((inside * weights).sum() / weights.sum()))
    start = losses[:, : losses.shape[1] - inside.shape[1]]
    return {"inside": math.exp(float(inside.mean())), "start": math.exp(float(start.mean())), "weighted": weighted}


def _inside(losses: Tensor) -> Tensor:
    """Of the second half of the windows: (places, W / 2)."""
    return losses[:, losses.shape[1] // 2 :]


def _joint(texts: Sequence[Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Rows of several texts together: geometric means of their perplexities, each text counting once."""
    rows = []
    for same in zip(*texts, strict=True):
        row: dict[str, Any] = {"tokens": same[0]["tokens"], "others": same[0]["others"]}
        for kind in ("memory", "plain"):
            row[kind] = None if same[0][kind] is None else {
                name: None if value is None else math.exp(sum(math.log(one[kind][name]) for one in same) / len(same))
                for name, value in same[0][kind].items()
            }  # fmt: skip
        rows.append(row)
    return rows


def _expect(
    progress: Any,
    model: Any,
    spots: Sequence[Sequence[Place]],
    sizes: Sequence[int],
    most: int,
    others: int,
    tokens: int,
) -> None:
    if progress is None:
        return
    window, total = model.memory_config.window, 0
    for places in spots:
        if model.memory_config.isolated_windows:
            read = (places[-1].start - places[0].start + max(sizes)) if places else 0
        else:
            read = len(places) * (sum(sizes) + (tokens * (len(sizes) - 1) if others else 0))
        plain = sum(size + window for size in sizes if size <= most)
        scored = len(sizes) * window * (2 if others else 1)
        total += read + len(places) * (plain + scored)
    progress.total = total + (tokens if others and model.memory_config.isolated_windows else 0)


def _move(progress: Any, tokens: int) -> None:
    if progress is not None:
        progress.update(tokens)
