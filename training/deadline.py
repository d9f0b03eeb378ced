"""When ``--max-hours`` ends a run, and what that leaves of the learning rate's schedule."""

import time

from training.rates import learning_rate_at
from training.recipe import Recipe

# Schedules that are meant to reach a run's last step.
FALLING = ("linear", "cosine", "warmup_stable_decay")
# Steps, and share of the time, after which the speed of a run is known.
STEPS, SHARE = 5, 0.05
# A run that gets so far of its schedule has had it.
NEARLY = 0.97


class Deadline:
    """The end of a run's time, counted from when this is made.

    Args:
        max_hours: that the run may take; None for any time.
    """

    def __init__(self, max_hours: float | None) -> None:
        self._started = time.monotonic()
        self._seconds = None if max_hours is None else max_hours * 3600
        self._said = False

    def passed(self) -> bool:
        """Whether the time is up."""
        return self._seconds is not None and time.monotonic() - self._started > self._seconds

    def warning(self, recipe: Recipe, first: int, done: int, seconds: float) -> str | None:
        """That the run will end before its learning rate has fallen, once, as soon as its speed is known; else None.

        Args:
            recipe: of the run.
            first: steps done before this start.
            done: steps done, more than ``first``.
            seconds: that this start's steps took.
        """
        if self._seconds is None or self._said or recipe.lr_schedule not in FALLING:
            return None
        used = time.monotonic() - self._started
        known = done - first >= STEPS and used >= SHARE * self._seconds
        if not (known or used > self._seconds):
            return None
        self._said = True
        reached = done + int(max(0.0, self._seconds - used) * (done - first) / seconds)
        if reached >= NEARLY * recipe.steps:
            return None
        rate = learning_rate_at(recipe, reached - 1) / recipe.learning_rate
        return (
            f"at this speed --max-hours ends the run at about step {reached:,} of {recipe.steps:,}, with the learning "
            f"rate still at {rate:.0%} of its highest: steps={reached} would let it fall to the end"
        )
