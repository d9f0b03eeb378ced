"""``--max-hours`` beside a learning rate that is meant to fall by the run's last step."""

from types import SimpleNamespace
from typing import Any

import pytest

from training.deadline import Deadline
from training.recipe import Recipe


def recipe_of(schedule: Any, steps: int = 500) -> Recipe:
    return Recipe(tasks=[{"kind": "dictionary"}], learning_rate=1.0, steps=steps, lr_schedule=schedule)


def said(monkeypatch: pytest.MonkeyPatch, recipe: Recipe, *, first: int = 0, pace: float) -> list[tuple[int, str]]:
    """What an hour says after which step, if a step takes ``pace`` seconds after a start of 60 seconds."""
    now = [1000.0]
    monkeypatch.setattr("training.deadline.time", SimpleNamespace(monotonic=lambda: now[0]))
    deadline, found = Deadline(1.0), []
    now[0] += 60
    for done in range(first + 1, recipe.steps + 1):
        now[0] += pace
        if words := deadline.warning(recipe, first, done, (done - first) * pace):
            found.append((done, words))
        if deadline.passed():
            break
    return found


@pytest.mark.parametrize(
    ("schedule", "left"),
    [("cosine", "51%"), ("linear", "50%"), ("warmup_stable_decay", "100%")],
)
def test_a_schedule_that_will_not_end_is_told_early(monkeypatch: pytest.MonkeyPatch, schedule: str, left: str) -> None:
    """(3,600 - 60) / 14.15 = 250 steps."""
    ((step, words),) = said(monkeypatch, recipe_of(schedule), pace=14.15)
    assert step <= 10
    assert f"step 250 of 500, with the learning rate still at {left} of its highest: steps=250" in words


def test_it_counts_from_where_a_run_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    ((step, words),) = said(monkeypatch, recipe_of("linear"), first=100, pace=14.15)
    assert 100 < step <= 110
    assert "step 350 of 500, with the learning rate still at 30%" in words


@pytest.mark.parametrize("schedule", ["constant", "inverse_sqrt"])
def test_schedules_without_an_end_are_let_be(monkeypatch: pytest.MonkeyPatch, schedule: str) -> None:
    assert not said(monkeypatch, recipe_of(schedule), pace=14.15)


def test_a_run_that_ends_in_time_is_told_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not said(monkeypatch, recipe_of("cosine"), pace=7.0)


def test_steps_that_take_all_the_time_are_told_of_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    ((step, words),) = said(monkeypatch, recipe_of("linear"), pace=1500.0)
    assert step == 3
    assert "step 3 of 500" in words
