"""How many other windows each row attends to: d over time, or by segments of the batch."""

import random
from dataclasses import dataclass
from typing import Any, Literal

Demand = tuple[int, int]  # positives, negatives


@dataclass(frozen=True)
class ContextSchedule:
    """Which windows a row attends to besides itself (arXiv 2307.03170, sections 3.2 and A).

    Attributes:
        segments: (positives, negatives) for each of equally large segments of the batch's lanes. This is LongLLaMA's
            form: ``[(0, 0), (1, 1), (2, 1), (3, 0)]`` for 3B and ``[(0, 0), (1, 2), (2, 5), (3, 4)]`` for 7B. It
            replaces ``kind`` and ``values``.
        kind: how the number of contexts d changes over time. ``constant`` keeps ``values[0]``. ``steps`` takes
            ``values[i]`` from step ``at[i]`` on. ``ramp`` goes from ``values[0]`` to ``values[1]`` over the first
            ``at[0]`` steps. ``accuracy`` takes ``values[0]`` until the accuracy of answers to tasks' questions reaches
            ``at[0]``, then ``values[1]``. ``drawn`` draws one of ``values`` at every step.
        values: numbers of contexts d. A row gets as many positives as there are, up to ``previous_windows``; the other
            contexts are negatives.
        at: steps, or an accuracy; see ``kind``.
        previous_windows: w, the number of earlier windows of its own document that a row may see.
        copies: each negative of a row is weighted as if the memory held c copies of it. c is drawn for each row and
            step between 1 and ``copies``, evenly on a logarithmic scale. In this way a batch of a few windows has the
            diluting effect of a memory of thousands.
    """

    segments: tuple[Demand, ...] = ()
    kind: Literal["constant", "steps", "ramp", "accuracy", "drawn"] = "constant"
    values: tuple[int, ...] = (1,)
    at: tuple[float, ...] = ()
    previous_windows: int = 1
    copies: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "segments", tuple((int(p), int(n)) for p, n in self.segments))
        object.__setattr__(self, "values", tuple(int(value) for value in self.values))
        object.__setattr__(self, "at", tuple(self.at))
        needed = {"constant": (1, 0), "ramp": (2, 1), "accuracy": (2, 1), "drawn": (None, 0), "steps": (None, None)}
        if self.kind not in needed:
            raise ValueError(f"contexts: kind is {self.kind!r}; choose one of {', '.join(needed)}")
        values, at = needed[self.kind]
        if (values is not None and len(self.values) != values) or (at is not None and len(self.at) != at):
            raise ValueError(f"contexts: kind {self.kind!r} needs {values} values and {at} entries in at")
        if self.kind == "steps" and (len(self.at) != len(self.values) or list(self.at) != sorted(self.at)):
            raise ValueError(
                "contexts: kind 'steps' needs one entry in at for each of its values: in ascending order, "
                "the first of them 0"
            )
        if not self.values or min(self.values) < 0:
            raise ValueError(f"contexts: values are {self.values}; give numbers of at least 0")
        if self.previous_windows < 0:
            raise ValueError(f"contexts: previous_windows is {self.previous_windows}; it must be at least 0")
        if not 1 <= self.copies < float("inf"):
            raise ValueError(f"contexts: copies is {self.copies}; it must be at least 1")

    def contexts_at(self, step: int, accuracy: float, seed: int) -> int:
        """The number of contexts d at this step.

        Args:
            step: 0, 1, ...
            accuracy: best answer accuracy so far, 0..1.
            seed: seed for the kind ``drawn``; every process draws the same number.
        """
        if self.kind == "steps":
            return next((v for v, a in zip(self.values[::-1], self.at[::-1], strict=True) if step >= a), 0)
        if self.kind == "ramp":
            first, last = self.values
            return first + round((last - first) * min(1.0, step / max(1.0, self.at[0])))
        if self.kind == "accuracy":
            return self.values[int(accuracy >= self.at[0])]
        if self.kind == "drawn":
            return random.Random(f"{seed}/{step}/d").choice(self.values)
        return self.values[0]

    def mixes(self, windows: int) -> bool:
        """Whether it ever shows a row both its own document and others, in batches of so many windows of a lane."""
        own = range(1, windows)
        if self.segments:
            return any(min(positives, count) > 0 < negatives for positives, negatives in self.segments for count in own)
        return any(0 < min(d, self.previous_windows, count) < d for d in self.values for count in own)


def schedule_from(settings: dict[str, Any]) -> ContextSchedule:
    """The schedule that a recipe's ``contexts`` describes.

    Raises:
        ValueError: An entry is not known.
    """
    unknown = set(settings) - set(ContextSchedule.__dataclass_fields__)
    if unknown:
        known = ", ".join(ContextSchedule.__dataclass_fields__)
        raise ValueError(f"contexts: unknown entry {sorted(unknown)[0]!r}; known: {known}")
    return ContextSchedule(**settings)
