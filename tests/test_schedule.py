"""How many windows a row sees, by schedule."""

import pytest

from training.schedule import ContextSchedule, schedule_from


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


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "sometimes"}, "kind is 'sometimes'"),
        ({"kind": "ramp", "values": [1]}, "needs 2 values and 1 entries"),
        ({"kind": "steps", "values": [1, 2], "at": [5]}, "one entry in at for each of its values"),
        ({"values": [-1]}, "at least 0"),
        ({"previous_windows": -1}, "previous_windows is -1"),
        ({"positives": 3}, "unknown entry 'positives'"),
    ],
)
def test_bad_settings(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        schedule_from(settings)
