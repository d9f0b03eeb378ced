"""Which windows a row sees, and that nothing of what follows it is in them."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from training.contexts import Rows, choose_contexts, reading_order
from training.schedule import ContextSchedule


def rows(lanes: int, windows: int) -> Rows:
    lane = torch.arange(lanes).repeat_interleave(windows)
    return Rows(lane, torch.arange(windows).repeat(lanes), lane * 100)


def chosen(schedule: ContextSchedule, table: Rows, d: int = 0, seed: int = 0) -> list[list[int]]:
    contexts = choose_contexts(schedule, table, range(len(table.lane)), d, str(seed))
    return [row.tolist() for row in contexts.rows]


@settings(deadline=None)  # on a loaded machine any example may take long
@given(st.integers(1, 6), st.integers(1, 4), st.integers(0, 12), st.integers(0, 3), st.integers(0, 99))
def test_positives_come_first_and_nothing_later_is_seen(lanes: int, windows: int, d: int, w: int, seed: int) -> None:
    table = rows(lanes, windows)
    schedule = ContextSchedule(values=(d,), previous_windows=w)
    order = reading_order(table, str(seed))
    for row, others in enumerate(chosen(schedule, table, d, seed)):
        lane, index = divmod(row, windows)
        own = [other for other in others if other // windows == lane]
        assert own == [lane * windows + index - back for back in range(1, min(d, w, index) + 1)]
        before = [other for other in order[: order.index(row)] if other // windows != lane]
        assert set(others) - set(own) <= set(before)
        assert len(set(others)) == len(others) == min(d, len(own) + len(before))


@settings(deadline=None)  # on a loaded machine any example may take long
@given(st.integers(1, 6), st.integers(1, 4), st.integers(0, 99))
def test_windows_are_read_step_by_step_in_changing_orders_of_lanes(lanes: int, windows: int, seed: int) -> None:
    table = rows(lanes, windows)
    order = reading_order(table, str(seed))
    assert sorted(order) == list(range(lanes * windows))
    assert [row % windows for row in order] == sorted(row % windows for row in order)
    first = {reading_order(table, f"{seed}/{step}")[0] for step in range(400)}
    assert len(first) == lanes


def test_segments_of_longllama() -> None:
    schedule = ContextSchedule(segments=((0, 0), (1, 1), (2, 1), (3, 0)))
    table = rows(8, 4)
    found, order = chosen(schedule, table), reading_order(table, "0")
    for lane in range(8):
        positives, negatives = schedule.segments[lane // 2]
        for index in range(4):
            others = found[lane * 4 + index]
            own = [other for other in others if other // 4 == lane]
            assert len(own) == min(positives, index)
            before = [other for other in order[: order.index(lane * 4 + index)] if other // 4 != lane]
            assert len(others) - len(own) == min(negatives, len(before))
    # All that is asked for (44 windows), but for a first window that is the first of all.
    assert sum(len(others) for others in found) >= 43


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
    order = reading_order(table, "0")
    assert found[0] == [4] * (order.index(4) < order.index(0))
    assert 5 not in order
    assert sorted(found[1]) == [0, 4]


def test_a_row_draws_the_same_whichever_process_it_is_on() -> None:
    schedule, table = ContextSchedule(), rows(6, 2)
    whole = chosen(schedule, table, d=4)
    split = [choose_contexts(schedule, table, part, 4, "0") for part in (range(0, 6), range(6, 12))]
    assert [row.tolist() for part in split for row in part.rows] == whole
    other = choose_contexts(schedule, table, range(12), 4, "1")
    assert [row.tolist() for row in other.rows] != whole


@settings(deadline=None)  # on a loaded machine any example may take long
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
        if row == reading_order(table, "0")[0]:  # has nothing before it
            assert not len(others)
            continue
        assert len(copies[~own].unique()) == 1
        assert 1 <= copies[~own][0] <= 100
        drawn.add(float(copies[~own][0]))
    assert len(drawn) == 7
