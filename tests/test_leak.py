"""No token sees its future: whole models of two to four memory layers, the contexts of every shipped recipe."""

import functools
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ranks_run import with_windows
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from fot.config import MemoryConfig
from training.batches import DocumentLoader, TaskSource
from training.contexts import Rows, choose_all, rows_of
from training.crossbatch import Contexts, enable_crossbatch
from training.hiding import filler_from
from training.recipe import load_recipe
from training.schedule import ContextSchedule
from training.sources import DataSource
from training.tasks import SyntheticRetrieval

WINDOW = 5
MEM_LAYERS = [(1, 3), (0, 2, 3), (1, 2, 3, 4)]
Chooser = Callable[[ContextSchedule, Rows, int, str, bool], list[list[int]]]


def choose(schedule: ContextSchedule, rows: Rows, d: int, seed: str, isolated: bool) -> list[list[int]]:
    return choose_all(schedule, rows, d, seed, isolated=isolated).rows


def choose_in_any_order(schedule: ContextSchedule, rows: Rows, d: int, seed: str, isolated: bool) -> list[list[int]]:
    """As it was once: negatives from anywhere in other lanes. Safe in one memory layer, and not in two."""
    lane, index, document = rows.lane.tolist(), rows.index.tolist(), rows.document.tolist()
    last, lanes = max(index), len(set(lane))
    chosen = []
    for row in range(len(lane)):
        own = [o for o in range(row) if lane[o] == lane[row] and document[o] == document[row]][::-1]
        if schedule.segments:
            positives, negatives = schedule.segments[lane[row] * len(schedule.segments) // lanes]
        else:
            positives = min(d, schedule.previous_windows, len(own))
            negatives = d - positives
        others = [
            o
            for o in range(len(lane))
            if lane[o] != lane[row] and document[o] != document[row] and (index[o] < last or not isolated)
        ]
        drawn = random.Random(f"{seed}/{row}").sample(others, min(negatives, len(others)))
        chosen.append([] if isolated and index[row] < last else own[:positives] + drawn)
    return chosen


@dataclass(frozen=True)
class Shape:
    """What decides the contexts of a batch."""

    schedule: ContextSchedule
    lanes: int
    windows: int
    isolated: bool


def shape_of(recipe_name: str, lanes: int) -> Shape:
    recipe = load_recipe(recipe_name)
    return Shape(recipe.schedule(), lanes, recipe.windows, recipe.memory_config().isolated_windows)


RECIPES = with_windows()
SHAPES = {name: shape_of(name, 4) for name in RECIPES} | {
    "one window back": Shape(ContextSchedule(values=(4,)), 4, 3, False),
    "all windows back": Shape(ContextSchedule(values=(6,), previous_windows=3), 3, 4, False),
}


@functools.cache  # some recipes differ in nothing that matters here
def rows_reached_by_their_future(shape: Shape, mem_layers: tuple[int, ...], chooser: Chooser, seed: int = 0) -> int:
    """How many rows' logits change when tokens after some token of theirs do, in the row and in the lane's later rows.

    Also rows before it in its lane count. All of them are computed in one process, as over several: contexts are
    chosen among the rows of all processes.
    """
    set_seed(seed)
    settings = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 16,
                "num_hidden_layers": mem_layers[-1] + 1, "num_attention_heads": 2, "num_key_value_heads": 1,
                "initializer_range": 0.5}  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(**settings)).eval()
    config = MemoryConfig(mem_layers=mem_layers, local_context=WINDOW, isolated_windows=shape.isolated)
    crossbatch = enable_crossbatch(model, config)
    lane = torch.arange(shape.lanes).repeat_interleave(shape.windows)
    table = Rows(lane, torch.arange(shape.windows).repeat(shape.lanes), lane)
    d = max(shape.schedule.values)
    chosen = chooser(shape.schedule, table, d, str(seed), shape.isolated)
    crossbatch.contexts = Contexts([torch.tensor(row, dtype=torch.int64) for row in chosen])
    rng = random.Random(seed)
    ids = torch.randint(40, (len(lane), WINDOW), generator=torch.Generator().manual_seed(seed))
    reached = 0
    with torch.no_grad():
        before = model(ids, use_cache=False).logits
        for row in range(len(lane)):
            seen = rng.randint(1, WINDOW)  # first tokens of the row, which stay as they are
            end = (lane[row] + 1) * shape.windows
            changed = ids.clone()
            changed[row, seen:] = (changed[row, seen:] + 1 + rng.randrange(38)) % 40
            changed[row + 1 : end] = (changed[row + 1 : end] + 1 + rng.randrange(38)) % 40
            difference = (model(changed, use_cache=False).logits - before).abs()
            start = lane[row] * shape.windows
            reached += bool(difference[row, :seen].max() > 0 or (difference[start:row] > 0).any())
    return reached


@pytest.mark.parametrize("mem_layers", MEM_LAYERS, ids=len)
@pytest.mark.parametrize("name", SHAPES)
def test_changing_the_future_changes_no_earlier_logits(name: str, mem_layers: tuple[int, ...]) -> None:
    assert sum(rows_reached_by_their_future(SHAPES[name], mem_layers, choose, seed) for seed in range(2)) == 0


def test_the_same_is_found_out_where_negatives_come_from_anywhere() -> None:
    """What ``rows_reached_by_their_future`` is worth: it finds the leak that once was, and none that was not."""
    leaking = {name for name, shape in SHAPES.items() if not shape.isolated}
    for name, shape in SHAPES.items():
        found = (rows_reached_by_their_future(shape, (1, 2, 3), choose_in_any_order, seed) for seed in range(3))
        assert any(found) == (name in leaking), name
    assert {"open-llama-3b", "open-llama-7b"} <= leaking
    assert rows_reached_by_their_future(SHAPES["open-llama-7b"], (2,), choose_in_any_order) == 0


def test_isolated_windows_get_the_contexts_they_always_got() -> None:
    """They were safe: rows that are read read nothing."""
    for name, shape in SHAPES.items():
        lane = torch.arange(6).repeat_interleave(shape.windows)
        table, d = Rows(lane, torch.arange(shape.windows).repeat(6), lane), max(shape.schedule.values)
        one, other = (pick(shape.schedule, table, d, "0", shape.isolated) for pick in (choose, choose_in_any_order))
        assert (one == other) == shape.isolated, name


# The same text in several lanes


class Numbers:
    """A tokenizer of texts that are numbers already."""

    bos_token_id, eos_token_id, pad_token_id = 1, 2, 0

    def __call__(self, texts: list[str], **options: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [[int(word) for word in text.split()] for text in texts]}


def write_numbers(folder: Path, lengths: list[int]) -> dict[int, tuple[int, int]]:
    """Documents of which no two tokens are alike; for each token, its document and its place there."""
    folder.mkdir()
    owner: dict[int, tuple[int, int]] = {}
    first = 3
    for number, length in enumerate(lengths):
        tokens = range(first, first + length)
        (folder / f"{number:03}.txt").write_text(" ".join(map(str, tokens)))
        owner |= {token: (number, place) for place, token in enumerate(tokens)}
        first += length
    return owner


def knows(rows: list[list[int]], row: int) -> set[int]:
    """The rows from which something reaches a row, through any number of layers."""
    found: set[int] = set()
    waiting = list(rows[row])
    while waiting:
        other = waiting.pop()
        if other not in found:
            found.add(other)
            waiting += rows[other]
    return found


def rows_told_what_follows(batch: Any, rows: list[list[int]], owner: dict[int, tuple[int, int]]) -> int:
    """Rows that know a token of one of their documents that comes after their own first token of it."""
    told = 0
    for row in range(len(rows)):
        first: dict[int, int] = {}
        for token in batch.input_ids[row].tolist():
            if token in owner:
                document, place = owner[token]
                first[document] = min(place, first.get(document, place))
        tokens = [token for other in knows(rows, row) for token in batch.input_ids[other].tolist() if token in owner]
        told += any(owner[token][1] > first.get(owner[token][0], 10**9) for token in tokens)
    return told


TEXTS = {
    "five short notes": [11, 9, 14, 8, 12],
    "one long text": [1000],
    "two texts": [180, 260],
    "long and short": [9, 300, 40, 12, 200, 90, 7],
    "many texts": [60 + 7 * n for n in range(40)],
}


@pytest.mark.parametrize("isolated", [False, True])
@pytest.mark.parametrize("texts", TEXTS)
def test_no_row_is_told_what_follows_in_its_own_documents(tmp_path: Path, texts: str, isolated: bool) -> None:
    owner = write_numbers(tmp_path / "a", TEXTS[texts])
    schedule = ContextSchedule(values=(6,), previous_windows=2)
    loader = DocumentLoader([DataSource(str(tmp_path / "a"))], Numbers(), lanes=4, windows=3, window=12)  # type: ignore[arg-type]
    told = told_before = negatives = 0
    for step in range(40):
        batch = next(loader)
        found = choose_all(schedule, rows_of(batch), 6, str(step), isolated=isolated)
        assert found.found <= found.wanted
        told += rows_told_what_follows(batch, found.rows, owner)
        negatives += found.found
        before = choose_in_any_order(schedule, rows_of(batch), 6, str(step), isolated)
        told_before += rows_told_what_follows(batch, before, owner)
        if texts == "one long text":
            rows = [tuple(row) for row in batch.input_ids.tolist()]
            assert len(set(rows)) == len(rows), "lanes go through the same tokens"
    assert told == 0
    assert told_before > 0 or (texts, isolated) == ("many texts", True)
    assert (negatives > 0) == (texts != "one long text")


# Real text in tasks' documents


class Spelling:
    """A tokenizer of facts and questions, a token a byte; the filler has tokens of its own, above these."""

    bos_token_id, eos_token_id, pad_token_id = 1, 2, 0

    def __call__(self, text: str, **_: Any) -> Any:
        return SimpleNamespace(input_ids=[3 + byte for byte in text.encode()])

    def decode(self, ids: list[int]) -> str:
        return ""


FILLERS = {"one text": [4000], "short texts": [500, 300, 700, 450], "many texts": [2000 + 10 * n for n in range(30)]}
FIRST = 1000  # token of the filler


def rows_told_their_lanes_future(batch: Any, rows: list[list[int]]) -> int:
    """Rows that know, from other lanes, a token of real text that is new in their own lane after their first token."""
    told = 0
    for row, lane in enumerate(batch.lane.tolist()):
        mine = batch.input_ids[batch.lane == lane].flatten().tolist()
        now = int(batch.index[row]) * batch.input_ids.shape[1] + 1
        new = {token for token in mine[now:] if token >= FIRST} - {*mine[:now]}
        others = [other for other in knows(rows, row) if int(batch.lane[other]) != lane]
        told += any(new & set(batch.input_ids[other].tolist()) for other in others)
    return told


@pytest.mark.parametrize("isolated", [False, True])
@pytest.mark.parametrize("texts", FILLERS)
def test_no_row_of_a_task_is_told_its_fillers_continuation(texts: str, isolated: bool) -> None:
    first, filler = FIRST, []
    for length in FILLERS[texts]:
        filler.append(list(range(first, first + length)))
        first += length
    task = SyntheticRetrieval(Spelling(), filler_from(filler), windows=2, window=400, facts=(1, 3))
    loader = DocumentLoader([TaskSource(task)], None, lanes=6, windows=2, window=400)
    schedule = ContextSchedule(values=(6,))
    told = told_before = negatives = wanted = positives = 0
    for step in range(25):
        batch = next(loader)
        found = choose_all(schedule, rows_of(batch), 6, str(step), isolated=isolated)
        told += rows_told_their_lanes_future(batch, found.rows)
        before = choose_in_any_order(schedule, rows_of(batch), 6, str(step), isolated)
        told_before += rows_told_their_lanes_future(batch, before)
        negatives, wanted = negatives + found.found, wanted + found.wanted
        positives += sum(row - 1 in found.rows[row] for row in range(1, 12, 2))
    assert told == 0
    assert told_before > 0
    assert negatives > {"one text": 0.4, "short texts": 0.2, "many texts": 0.6}[texts] * wanted
    assert positives == 25 * 6, "a document's own windows are never left out"


def test_lanes_that_read_a_tasks_filler_know_it(tmp_path: Path) -> None:
    """The same file is a source and a filler."""
    length = 3000
    (tmp_path / "a.txt").write_text(" ".join(str(FIRST + n) for n in range(length)))
    filler = filler_from([list(range(FIRST, FIRST + length))], Numbers())
    task = SyntheticRetrieval(Spelling(), filler, window=400, facts=(1, 3))
    sources = [TaskSource(task), DataSource(str(tmp_path))]
    loader = DocumentLoader(sources, Numbers(), lanes=6, windows=2, window=400)  # type: ignore[arg-type]
    told = told_before = negatives = wanted = 0
    for step in range(25):
        batch = next(loader)
        assert batch.whole.any()
        assert not batch.whole.all()
        found = choose_all(ContextSchedule(values=(6,)), rows_of(batch), 6, str(step))
        told += rows_told_their_lanes_future(batch, found.rows)
        before = choose_in_any_order(ContextSchedule(values=(6,)), rows_of(batch), 6, str(step), False)
        told_before += rows_told_their_lanes_future(batch, before)
        negatives, wanted = negatives + found.found, wanted + found.wanted
    assert told == 0
    assert told_before > 0
    assert negatives > 0.2 * wanted
