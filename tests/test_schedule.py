"""Which windows a row sees, by schedule."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from training.schedule import ContextSchedule, Rows, choose_contexts, schedule_from


def rows(lanes: int, windows: int) -> Rows:
    lane = torch.arange(lanes).repeat_interleave(windows)
    return Rows(lane, torch.arange(windows).repeat(lanes), lane * 100)


def chosen(schedule: ContextSchedule, table: Rows, d: int = 0, seed: int = 0) -> list[list[int]]:
    contexts = choose_contexts(schedule, table, range(len(table.lane)), d, str(seed))
    return [row.tolist() for row in contexts.rows]


def test_d_over_time() -> None:
    def at(schedule: ContextSchedule, step: int, accuracy: float = 0.0) -> int:
        return schedule.contexts_at(step, accuracy, seed=3)

    assert at(ContextSchedule(values=(8,)), 1000) == 8
    steps = ContextSchedule(kind="steps", values=(2, 64), at=(0, 900))
    assert [at(steps, step) for step in (0, 899, 900, 5000)] == [2, 2, 64, 64]
    ramp = ContextSchedule(kind="ramp", values=(1, 13), at=(120,))
    assert [at(ramp, step) for step in (0, 10, 60, 120, 500)] == [1, 2, 7, 13, 13]
    switch = ContextSchedule(kind="accuracy", values=(1, 128), at=(0.98,))
    assert [at(switch, 10, accuracy) for accuracy in (0.0, 0.97, 0.98)] == [1, 1, 128]
    drawn = ContextSchedule(kind="drawn", values=(2, 128))
    found = [at(drawn, step) for step in range(50)]
    assert set(found) == {2, 128}
    assert found == [at(drawn, step) for step in range(50)]


@given(st.integers(1, 6), st.integers(1, 4), st.integers(0, 12), st.integers(0, 3), st.integers(0, 99))
def test_positives_come_first_and_nothing_later_is_seen(lanes: int, windows: int, d: int, w: int, seed: int) -> None:
    table = rows(lanes, windows)
    schedule = ContextSchedule(values=(d,), previous_windows=w)
    for row, others in enumerate(chosen(schedule, table, d, seed)):
        lane, index = divmod(row, windows)
        own = [other for other in others if other // windows == lane]
        assert own == [lane * windows + index - back for back in range(1, min(d, w, index) + 1)]
        assert len(set(others)) == len(others) == min(d, len(own) + (lanes - 1) * windows)


def test_segments_of_longllama() -> None:
    schedule = ContextSchedule(segments=((0, 0), (1, 1), (2, 1), (3, 0)))
    found = chosen(schedule, rows(8, 4))
    for lane in range(8):
        positives, negatives = schedule.segments[lane // 2]
        for index in range(4):
            others = found[lane * 4 + index]
            own = [other for other in others if other // 4 == lane]
            assert len(own) == min(positives, index)
            assert len(others) - len(own) == negatives


def test_another_documents_window_is_no_positive() -> None:
    table = rows(2, 3)
    table.document[2] = 7  # the third window of the first lane starts a new document
    found = chosen(ContextSchedule(previous_windows=2), table, d=1)
    assert found[1] == [0]
    assert found[2][0] >= 3
    assert found[5] == [4]


def test_a_copy_or_padding_is_no_negative() -> None:
    table = rows(3, 2)
    table.document[2:4] = table.document[0]  # the second lane reads the same document as the first
    table.document[5] = -1  # and the third lane's second window is padding
    found = chosen(ContextSchedule(), table, d=6)
    assert found[0] == [4]
    assert sorted(found[1]) == [0, 4]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "sometimes"}, "kind is 'sometimes'"),
        ({"kind": "ramp", "values": [1]}, "takes 2 values and 1 entries"),
        ({"kind": "steps", "values": [1, 2], "at": [5]}, "as many entries in at as values"),
        ({"values": [-1]}, "at least 0"),
        ({"previous_windows": -1}, "previous_windows is -1"),
        ({"positives": 3}, "unknown entry 'positives'"),
    ],
)
def test_bad_settings(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        schedule_from(settings)


def test_a_row_draws_the_same_whichever_process_it_is_on() -> None:
    schedule, table = ContextSchedule(), rows(6, 2)
    whole = chosen(schedule, table, d=4)
    split = [choose_contexts(schedule, table, part, 4, "0") for part in (range(0, 6), range(6, 12))]
    assert [row.tolist() for part in split for row in part.rows] == whole
    other = choose_contexts(schedule, table, range(12), 4, "1")
    assert [row.tolist() for row in other.rows] != whole


@given(st.integers(1, 6), st.integers(1, 4), st.integers(0, 12), st.integers(0, 3), st.integers(0, 99))
def test_isolated_windows_read_or_are_read(lanes: int, windows: int, d: int, w: int, seed: int) -> None:
    table = rows(lanes, windows)
    schedule = ContextSchedule(values=(d,), previous_windows=w)
    found = choose_contexts(schedule, table, range(len(table.lane)), d, str(seed), isolated=True).rows
    reading = {row for row, others in enumerate(found) if len(others)}
    assert all(row % windows == windows - 1 for row in reading)
    assert reading.isdisjoint(other for others in found for other in others.tolist())
    for row in range(windows - 1, len(found), windows):
        own = min(d, w, windows - 1)
        assert len(found[row]) == min(d, own + (lanes - 1) * (windows - 1))
        assert sum(other // windows == row // windows for other in found[row].tolist()) == own


def test_copies_are_of_negatives_alone_and_within_their_bounds() -> None:
    table = rows(4, 2)
    plain = choose_contexts(ContextSchedule(previous_windows=1), table, range(8), 3, "0")
    assert plain.copies is None
    contexts = choose_contexts(ContextSchedule(previous_windows=1, copies=100), table, range(8), 3, "0")
    drawn = set()
    for row, (others, copies) in enumerate(zip(contexts.rows, contexts.copies or (), strict=True)):
        own = others // 2 == row // 2
        assert (copies[own] == 1).all()
        assert len(copies[~own].unique()) == 1
        assert 1 <= copies[~own][0] <= 100
        drawn.add(float(copies[~own][0]))
    assert len(drawn) == 8
