"""The lanes of a run stay the same, however many processes read them."""

import json
from pathlib import Path
from typing import Any

import pytest
from data_helpers import Counting, loader_of, same, write_rows, write_texts
from hypothesis import given, settings
from hypothesis import strategies as st

from training.batches import Batch, TaskSource, join_lanes, select_lanes
from training.shares import LaneLoader, all_shares, lanes_of_a_process
from training.sources import DataSource

SHARES, LANES = 2, 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shares")
    write_texts(folder / "texts", 7)
    write_rows(folder / "rows", "jsonl")
    return folder


class Run:
    """All processes of a run, one after the other."""

    def __init__(self, folder: Path, tokenizer: Any, processes: int) -> None:
        sources = [DataSource(str(folder / "texts")), DataSource(str(folder / "rows/*.jsonl"), weight=0.5),
                   TaskSource(Counting(), 0.5)]  # fmt: skip

        def share(number: int) -> Any:
            return loader_of(sources, tokenizer, lanes=LANES, rank=number, world_size=SHARES)

        self.loaders = [
            LaneLoader(share, shares=SHARES, lanes=LANES, process=number, processes=processes)
            for number in range(processes)
        ]

    def step(self) -> Batch:
        batches = [next(loader) for loader in self.loaders]
        assert len({len(batch.lane) for batch in batches}) == 1
        assert all(int(batch.lane[0]) == 0 for batch in batches), "each process numbers its own lanes"
        return join_lanes(batches)

    def state(self) -> Any:
        return json.loads(json.dumps(all_shares([loader.state_dict() for loader in self.loaders])))


def test_every_process_has_its_lanes_of_the_same_batches(folder: Path, tokenizer: Any) -> None:
    runs = [Run(folder, tokenizer, processes) for processes in (1, 2, 3, 6)]
    for _ in range(12):
        first, *others = [run.step() for run in runs]
        assert first.lane.tolist() == [lane for lane in range(6) for _ in range(2)]
        assert all(same(first, other) for other in others)
    assert len({json.dumps(run.state()) for run in runs}) == 1


@settings(max_examples=12, deadline=None)
@given(numbers=st.lists(st.sampled_from([1, 2, 3, 6]), min_size=2, max_size=4), steps=st.integers(1, 5))
def test_lanes_go_on_where_they_were(folder: Path, tokenizer: Any, numbers: list[int], steps: int) -> None:
    whole, state = Run(folder, tokenizer, 2), None
    for processes in numbers:
        run = Run(folder, tokenizer, processes)
        if state is not None:
            for loader in run.loaders:
                loader.load_state_dict(state)
        assert all(same(run.step(), whole.step()) for _ in range(steps))
        state = run.state()


def test_lanes_are_divided_evenly_or_not_at_all() -> None:
    assert [lanes_of_a_process(12, count) for count in (1, 2, 3, 4, 6, 12)] == [12, 6, 4, 3, 2, 1]
    for count in (5, 24):
        with pytest.raises(ValueError, match=f"12 lanes, .* evenly among {count} processes: use .* 1, 2, 3, 4, 6, 12$"):
            lanes_of_a_process(12, count)


def test_lanes_of_a_batch(folder: Path, tokenizer: Any) -> None:
    batch = next(loader_of(DataSource(str(folder / "texts")), tokenizer, lanes=4, windows=3))
    parts = [select_lanes(batch, 0, 1), select_lanes(batch, 1, 4)]
    assert [part.lane.tolist() for part in parts] == [[0] * 3, [0] * 3 + [1] * 3 + [2] * 3]
    assert same(join_lanes(parts), batch)
