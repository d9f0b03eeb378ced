"""Trials in a file, a line each, that a run can go on with; and what they come to."""

import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fot.evaluation.intervals import Z95, wilson
from memory.atomic import write_json, write_text

RESULTS, SETTINGS, DRAFT = "results.jsonl", "settings.json", "unfinished.json"

Trial = dict[str, Any]


def key_of(trial: Trial) -> tuple[str, str, int, int]:
    return trial["method"], trial["task"], trial["length"], trial["trial"]


def open_folder(folder: Path, settings: dict[str, Any], *, resume: bool) -> list[Trial]:
    """Make a folder for results, or go on with one: the trials that it has.

    Args:
        folder: where ``results.jsonl`` and ``settings.json`` go.
        settings: all that a trial's outcome depends on.
        resume: go on with what is there.

    Raises:
        ValueError: there are results and ``resume`` is False, or they were made with other settings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    results, noted = folder / RESULTS, folder / SETTINGS
    there = results.exists() and results.stat().st_size > 0  # a run may end before its first trial does
    if there and not resume:
        raise ValueError(f"{results} exists: go on with it by --resume, or choose another --out")
    if not resume:
        (folder / DRAFT).unlink(missing_ok=True)
    if (there or (folder / DRAFT).exists()) and noted.exists():
        before, now = json.loads(noted.read_text("utf-8")), json.loads(json.dumps(settings))
        if differing := _differing(before, now):
            raise ValueError(f"{noted} has {'; '.join(differing)}: make it as it was, or choose another --out")
    write_json(noted, settings)
    trials = read_trials(results)
    # A line that was cut short must not be joined with the next.
    write_text(results, "".join(json.dumps(trial) + "\n" for trial in trials))
    return trials


def _differing(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    """Which settings are not as they were, in words; of a group of them, those that differ."""
    words = []
    for name in sorted(before.keys() | now.keys()):
        old, new = before.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            words += _differing(old, new, f"{prefix}{name}.")
        elif old != new:
            words.append(f"{prefix}{name} {old!r}, and now it is {new!r}")
    return words


def read_trials(path: Path) -> list[Trial]:
    """The trials in a file, but for a last line that was cut short; none if there is no file.

    Raises:
        ValueError: another line is damaged.
    """
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    trials = []
    for number, line in enumerate(lines):
        try:
            trials.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number + 1 < len(lines):
                raise ValueError(f"line {number + 1} of {path} is damaged: delete it, then --resume") from error
    return trials


def append(folder: Path, trial: Trial) -> None:
    """Add a trial; it is on stable storage when this returns."""
    with open(folder / RESULTS, "a", encoding="utf-8") as file:
        file.write(json.dumps(trial) + "\n")
        file.flush()
        os.fsync(file.fileno())


@dataclass(frozen=True)
class Draft:
    """A text of an unfinished trial, kept in the folder of the results.

    Attributes:
        folder: of the results.
        key: of the trial, as ``key_of`` gives it.
    """

    folder: Path
    key: tuple[str, str, int, int]

    def read(self) -> tuple[list[int], float, bytes | None]:
        """What ``write`` was given last for this trial, else nothing.

        Raises:
            ValueError: the file is damaged.
        """
        path = self.folder / DRAFT
        try:
            content = json.loads(path.read_text("utf-8")) if path.exists() else {}
            if content.get("key") != list(self.key):
                return [], 0.0, None
            return list(map(int, content["ids"])), float(content["seconds"]), bytes.fromhex(content["generator"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is damaged: delete it to begin its trial again ({error})") from error

    def write(self, ids: Sequence[int], seconds: float, generator: bytes) -> None:
        """Keep it, whole or not at all.

        Args:
            ids: tokens written so far.
            seconds: that they took.
            generator: the state that draws the next one.
        """
        content = {"key": self.key, "ids": list(ids), "seconds": seconds, "generator": generator.hex()}
        write_text(self.folder / DRAFT, json.dumps(content))

    def delete(self) -> None:
        """The trial is finished."""
        (self.folder / DRAFT).unlink(missing_ok=True)


@dataclass(frozen=True)
class Row:
    """What the trials of one method, task and length come to.

    Attributes:
        method: its name.
        task: its name.
        length: tokens.
        trials: how many.
        score: share of right answers, perplexity, or share of repeated pieces.
        low: of its 95 % interval.
        high: likewise.
        bytes_per_token: kept of the text.
        tokens_per_second: read or written.
        peak_rss_bytes: most memory of the process in one of the trials.
    """

    method: str
    task: str
    length: int
    trials: int
    score: float
    low: float
    high: float
    bytes_per_token: float
    tokens_per_second: float
    peak_rss_bytes: int


def rows(trials: Iterable[Trial]) -> list[Row]:
    """A row for each method, task and length, by task and length, methods in the order of their first trials."""
    groups: dict[tuple[str, int, str], list[Trial]] = {}
    for trial in trials:
        groups.setdefault((trial["task"], trial["length"], trial["method"]), []).append(trial)
    order = {name: place for place, name in enumerate(dict.fromkeys(key[2] for key in groups))}
    return [_row(*key, groups[key]) for key in sorted(groups, key=lambda key: (key[0], key[1], order[key[2]]))]


def _row(task: str, length: int, method: str, trials: Sequence[Trial]) -> Row:
    score, low, high = perplexity_score(trials) if task == "perplexity" else share_score(trials)
    return Row(
        method, task, length, len(trials), score, low, high,
        sum(trial["held_bytes"] for trial in trials) / max(1, sum(trial["held_tokens"] for trial in trials)),
        sum(trial["tokens"] for trial in trials) / sum(trial["seconds"] for trial in trials),
        max(trial["peak_rss_bytes"] for trial in trials),
    )  # fmt: skip


def share_score(trials: Sequence[Trial]) -> tuple[float, float, float]:
    """Share of what is ``right`` of what was ``asked``, and its Wilson interval."""
    right, asked = (sum(trial["figures"][name] for trial in trials) for name in ("right", "asked"))
    return right / max(1, asked), *wilson(right, asked)


def perplexity_score(trials: Sequence[Trial]) -> tuple[float, float, float]:
    """Perplexity of all tokens together, and its interval as if their losses were independent and normal."""
    total, squares, count = (
        sum(trial["figures"][name] for trial in trials) for name in ("loss_sum", "loss_squares", "scored")
    )
    mean = total / count
    spread = Z95 * math.sqrt(max(0.0, squares / count - mean**2) / count)
    return math.exp(mean), math.exp(mean - spread), math.exp(mean + spread)
