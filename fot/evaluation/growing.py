"""What a memory is worth on ordinary text: perplexity of the same tokens with more and more of the text in memory.

At each of many places of a text, one window is read with the tokens right before it in memory. The second half of the
window is what a user meets while a model generates: half a window of local tokens comes before it. The first half has
none, and stands for a window's start. Beside them stands plain attention of the same weights, with as much of the text
before the window as the memory held. Other texts may join the memory: that is the distraction of arXiv 2307.03170,
section 3.3, on whole texts.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from fot.config import MemoryConfig
from fot.families import decoder_of, head
from fot.loss import token_losses
from fot.windows import Inputs, store_isolated
from memory import Memory

ROWS = 8  # windows read at once

# A token counts in the weighted perplexity by how much likelier the text before makes it, at most this much (LongCE,
# arXiv 2410.23771, section 3.2).
MOST_WEIGHT = 5.0

# Differences of a row, and what its memory is compared with; see ``run``.
DIFFERENCES = {
    "beside_same": "plain, same tokens",
    "beside_plain": "plain, best number of tokens",
    "beside_alone": "memory without other texts",
}


class Key(NamedTuple):
    """What was measured: ``memory`` or ``plain``, tokens of the text before the window, and of other texts."""

    kind: str
    tokens: int
    others: int


class Shelf:
    """A text cut into windows as ``fot.ingest`` cuts it, for memories that begin at any window.

    If windows are isolated, what is stored of one depends on nothing but the window: each is read once, and every
    memory takes it from here. Otherwise each memory is read anew.
    """

    def __init__(self, model: Any, ids: Sequence[int], progress: tqdm) -> None:
        self._model, self.progress = model, progress
        self.ids = torch.tensor(ids, dtype=torch.int64)
        config = model.memory_config
        self.window, self.overlap = config.window, config.overlap
        self.step = self.window - self.overlap
        self._read: dict[int, int] = {}  # window -> where its first token is in what was read
        self._all = model.new_memory(index="exact", top_k=None)

    def whole(self, tokens: int) -> int:
        """The number of tokens nearest to this that whole windows hold; 0 for 0."""
        return self.overlap + self.step * max(1, round((tokens - self.overlap) / self.step)) if tokens else 0

    def numbers(self, start: int, stop: int) -> range:
        """Windows that hold tokens start..stop-1; see ``memory``."""
        return range(start // self.step, (stop - self.overlap) // self.step) if stop > start else range(0)

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
            self._model.ingest(self.ids[start:stop], memory, progress=self.progress)
            return memory
        numbers = self.numbers(start, stop)
        self._ensure(numbers)
        taken = [torch.arange(self.window) + self._read[numbers[0]]]
        taken += [torch.arange(self.overlap, self.window) + self._read[number] for number in numbers[1:]]
        slots = torch.cat(taken).expand(self._all.num_key_value_heads, -1)
        keys = {layer: self._all[layer].keys(slots) for layer in self._all.layers}
        values = {layer: self._all[layer].values(slots) for layer in self._all.layers}
        memory.append(keys, values, self.ids[start:stop])
        return memory

    def _ensure(self, numbers: range) -> None:
        missing = [number for number in numbers if number not in self._read]
        for first in range(0, len(missing), ROWS):
            some = missing[first : first + ROWS]
            ids = torch.stack([self.ids[self.step * number :][: self.window] for number in some])
            ids = ids.to(self._model.device)
            positions = torch.arange(self.window, device=ids.device).expand_as(ids)
            for row, number in enumerate(some):
                self._read[number] = len(self._all) + row * self.window
            store_isolated(
                self._model, Inputs(ids, None, None, positions), self._all, skips=[0] * len(some),
                spans=[None] * len(some),
            )  # fmt: skip
            self.progress.update(ids.numel())


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
        without it). Three differences are ``(mean, standard error)`` of the mean losses inside, at the same places, or
        None with one place: ``beside_same`` is memory's less that of plain attention over the same tokens,
        ``beside_plain`` less that of the context with which plain attention is best, and ``beside_alone``, for rows
        with others, less that of the memory without them. In the rows of a text, ``losses`` and ``plain_losses`` are
        the mean losses inside by place. The rows of all texts together are means over texts. Ctrl-C ends the run and
        keeps the finished places.

    Raises:
        ValueError: a text without room for a window behind the largest memory.
    """
    progress = tqdm(disable=True) if progress is None else progress
    shelves = [Shelf(model, ids, progress) for ids in texts.values()]
    sizes = sorted({shelves[0].whole(size) for size in sizes})
    starts = [_starts(name, shelf, sizes[-1], places) for name, shelf in zip(texts, shelves, strict=True)]
    beside = [Shelf(model, ids, progress) for ids in others]
    share = shelves[0].whole(others_tokens // len(beside)) if beside else 0
    for other in beside:
        if len(other.ids) < share:
            raise ValueError(
                f"another text has {len(other.ids):,} tokens, but its share of --others-tokens is {share:,}"
            )
    most = model.config.max_position_embeddings - model.memory_config.window if plain else -1
    progress.total = _expected(model.memory_config, shelves, starts, sizes, most, beside, share)
    found: list[list[dict[Key, Tensor]]] = [[] for _ in texts]
    interrupted = False
    try:
        for number in range(max(map(len, starts))):  # a place of each text in turn, so that all are alike if it stops
            for shelf, mine, losses in zip(shelves, starts, found, strict=True):
                if number < len(mine):
                    losses.append(_losses_at(model, shelf, mine[number], sizes, beside, share, most))
    except KeyboardInterrupt:
        interrupted = True
    by_text = {
        name: {"places": len(losses), "rows": _rows(losses)}
        for name, losses in zip(texts, found, strict=True)
        if losses
    }
    rows: list[Any] = [entry["rows"] for entry in by_text.values()]
    return {"rows": _joint(rows), "texts": by_text, "interrupted": interrupted}


def _starts(name: str, shelf: Shelf, largest: int, count: int) -> list[int]:
    """First tokens of the windows of a text: where whole windows end, behind ``largest`` tokens."""
    first = -(-(largest - shelf.overlap) // shelf.step)
    last = (len(shelf.ids) - shelf.window - shelf.overlap) // shelf.step
    if last < first:
        raise ValueError(
            f"{name} has {len(shelf.ids):,} tokens; a memory of {largest:,} and a window of {shelf.window} behind it "
            f"take {largest + shelf.window:,}: give a smaller --memory or longer files"
        )
    count = min(count, last - first + 1)
    steps = [first + number * (last - first) // max(1, count - 1) for number in range(count)]
    return [shelf.overlap + shelf.step * step for step in steps]


def _losses_at(
    model: Any, shelf: Shelf, start: int, sizes: Sequence[int], others: Sequence[Shelf], share: int, most: int
) -> dict[Key, Tensor]:
    """Losses (W - 1,) of the window that starts there, by what was measured."""
    window, found = shelf.ids[start : start + shelf.window], {}
    for size in sizes:
        memory: Memory | None = shelf.memory(start - size, start)
        found[Key("memory", size, 0)] = _window_losses(model, window, memory)
        shelf.progress.update(len(window))
        if others and size:
            memory = None  # others come first: what a model goes on with is what it has read last
            for other in others:
                memory = other.memory(0, share, memory)
            memory = shelf.memory(start - size, start, memory)
            found[Key("memory", size, share * len(others))] = _window_losses(model, window, memory)
            shelf.progress.update(len(window))
        if size <= most:
            seen = shelf.ids[start - size : start + shelf.window]
            found[Key("plain", size, 0)] = _plain_losses(model, seen, shelf.window)
            shelf.progress.update(len(seen))
    return found


def _window_losses(model: Any, window: Tensor, memory: Memory | None) -> Tensor:
    window = window.to(model.device)
    logits = model(window[None], memory=memory, use_cache=False).logits[0, :-1].float()
    return cross_entropy(logits, window[1:], reduction="none").cpu()


def _plain_losses(model: Any, ids: Tensor, window: int) -> Tensor:
    """Under attention to all of these tokens: without a context, memory layers are plain ones."""
    ids = ids.to(model.device)
    hidden = decoder_of(model)(input_ids=ids[None], use_cache=False).last_hidden_state[0, -window:-1]
    return token_losses(hidden, ids[-window + 1 :], partial(head, model))[0].cpu()


def _rows(places: Sequence[dict[Key, Tensor]]) -> list[dict[str, Any]]:
    """What was measured at the places of one text, a row a memory."""
    joint = {key: torch.stack([losses[key] for losses in places]) for key in places[0]}  # (places, W - 1)
    plain = {key.tokens: losses for key, losses in joint.items() if key.kind == "plain"}
    weights, best = None, None
    if plain:
        best = min(map(_by_place, plain.values()), key=lambda losses: float(losses.mean()))
    if len(plain) > 1:
        gain = _inside(plain[min(plain)]) - _inside(plain[max(plain)])
        weights = gain.exp().clamp(max=MOST_WEIGHT)
    rows = []
    for key, losses in joint.items():
        if key.kind == "memory":
            same = None if key.others else plain.get(key.tokens)
            alone = joint[key._replace(others=0)] if key.others else None
            here, by_place = _by_place(losses), None if same is None else _by_place(same)
            rows.append({
                "tokens": key.tokens,
                "others": key.others,
                "memory": _perplexities(losses, weights),
                "plain": None if same is None else _perplexities(same, weights),
                "beside_same": _difference(here, by_place),
                "beside_plain": _difference(here, best),
                "beside_alone": _difference(here, None if alone is None else _by_place(alone)),
                "losses": here.tolist(),
                "plain_losses": None if by_place is None else by_place.tolist(),
            })  # fmt: skip
    return rows


def _difference(losses: Tensor, others: Tensor | None) -> tuple[float, float] | None:
    """Mean of losses - others over pairs, with its standard error; None without others or for one pair."""
    if others is None or len(losses) < 2:
        return None
    pairs = losses - others
    return float(pairs.mean()), float(pairs.std()) / math.sqrt(len(pairs))


def _perplexities(losses: Tensor, weights: Tensor | None) -> dict[str, float | None]:
    inside = _inside(losses)
    weighted = None if weights is None else math.exp(float((inside * weights).sum() / weights.sum()))
    start = losses[:, : losses.shape[1] - inside.shape[1]]
    return {"inside": math.exp(float(inside.mean())), "start": math.exp(float(start.mean())), "weighted": weighted}


def _inside(losses: Tensor) -> Tensor:
    """Of the second half of the windows: (places, W / 2)."""
    return losses[:, losses.shape[1] // 2 :]


def _by_place(losses: Tensor) -> Tensor:
    """Mean losses of the second half of the windows: (places,)."""
    return _inside(losses).mean(1)


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
        for difference in DIFFERENCES:
            pairs = [one[difference] for one in same]
            row[difference] = None if None in pairs else (
                sum(mean for mean, _ in pairs) / len(pairs), math.hypot(*(error for _, error in pairs)) / len(pairs)
            )  # fmt: skip
        rows.append(row)
    return rows


def _expected(
    config: MemoryConfig,
    shelves: Sequence[Shelf],
    starts: Sequence[Sequence[int]],
    sizes: Sequence[int],
    most: int,
    others: Sequence[Shelf],
    share: int,
) -> int:
    """Tokens that will be read."""
    plain = sum(size + config.window for size in sizes if size <= most)
    memories = sum(size > 0 for size in sizes) if others else 0
    total = sum(map(len, starts)) * (plain + config.window * (len(sizes) + memories))
    if config.isolated_windows:  # each window once
        read = [
            set().union(*(shelf.numbers(start - sizes[-1], start) for start in mine))
            for shelf, mine in zip(shelves, starts, strict=True)
        ]
        read += [set(other.numbers(0, share)) for other in others if memories]
        return total + config.window * sum(map(len, read))
    return total + sum(map(len, starts)) * (sum(sizes) * (2 if others else 1) + memories * len(others) * share)
