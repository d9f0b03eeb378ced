"""All trials of ``fot compare``: methods x lengths x tasks, one process, one checkpoint."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fot.compare import rope
from fot.compare.catalogue import WHOLE, Method
from fot.compare.methods import Setting, opened
from fot.compare.readers import CachedReader, Progress
from fot.compare.results import Draft, Trial, append, key_of
from fot.compare.search import first_factors, search_factors
from fot.compare.tasks import TASK_FUNCTIONS, Material, judge, perplexity
from fot.evaluation.answers import without_memory
from fot.machine import peak_rss_bytes

Planned = tuple[Method, str, int, int]


def plan(
    methods: Sequence[Method], tasks: Sequence[str], lengths: Sequence[int], trials: int, whole_up_to: int
) -> list[Planned]:
    """Method, task, length and number of each trial: short texts first, and every method at one before the next.

    Args:
        methods: to compare.
        tasks: by name; a method that cannot do one is left out there.
        lengths: in tokens.
        trials: of each.
        whole_up_to: longest text for methods that attend to all of it.
    """
    return [
        (method, task, length, trial)
        for length in sorted(lengths)
        for task in tasks
        for trial in range(trials)
        for method in methods
        if task in method.tasks and (method.attends != WHOLE or length <= whole_up_to)
    ]


def run(
    model: Any,
    planned: Sequence[Planned],
    setting: Setting,
    material: Material,
    folder: Path,
    done: Sequence[Trial],
    *,
    report: Callable[[Trial], None] = lambda trial: None,
    progress: Any = None,
) -> dict[str, Any]:
    """Make the trials that are not done yet, and write each down as soon as it is.

    Args:
        model: a ``FoTForCausalLM``.
        planned: all trials.
        setting: what methods are set up for.
        material: what trials are made of.
        folder: of the results.
        done: trials that are in it.
        report: called with each new trial.
        progress: a tqdm bar that is moved by each token, or None.

    Returns:
        ``{"trials": [...], "interrupted": bool}``. Ctrl-C ends the run and keeps the finished trials.
    """
    trials, known = list(done), {key_of(trial) for trial in done}
    move = (lambda tokens: None) if progress is None else progress.update
    try:
        for method, task, length, number in planned:
            if (method.name, task, length, number) in known:
                move(length)
                continue
            draft = Draft(folder, (method.name, task, length, number))
            trial = _trial(model, method, task, length, number, setting, material, move, draft)
            append(folder, trial)
            draft.delete()
            trials.append(trial)
            report(trial)
    except KeyboardInterrupt:
        return {"trials": trials, "interrupted": True}
    return {"trials": trials, "interrupted": False}


def _trial(
    model: Any, method: Method, task: str, length: int, number: int, setting: Setting, material: Material,
    move: Progress, draft: Draft,
) -> Trial:  # fmt: skip
    kept = {"draft": draft} if task == "fluency" else {}
    reset_peak_rss()
    with opened(method.name, model, setting) as reader:
        outcome = TASK_FUNCTIONS[task](reader, material, length, number, move, **kept)
    peak, figures = peak_rss_bytes(), outcome.figures
    if outcome.ids:
        with without_memory(model) as plain:
            figures = judge(plain, material, outcome.ids)
    return {
        "method": method.name,
        "task": task,
        "length": length,
        "trial": number,
        "figures": figures,
        "tokens": outcome.tokens,
        "seconds": outcome.seconds,
        "held_bytes": outcome.held_bytes,
        "held_tokens": outcome.held_tokens,
        "peak_rss_bytes": peak,
    }


def reset_peak_rss() -> None:
    """Let the most memory that was held count from now, where the system can (Linux); elsewhere it goes on."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


@torch.no_grad()
def searched(model: Any, setting: Setting, material: Material, rounds: int, progress: Any = None) -> Setting:
    """A setting with LongRoPE factors searched for at the longest text, by perplexity.

    Args:
        model: a ``FoTForCausalLM``.
        setting: without factors.
        material: with a text as long as the longest.
        rounds: of the search; 0 for the best of those it begins with.
        progress: a tqdm bar that is moved by each token, or None.
    """
    move = (lambda tokens: None) if progress is None else progress.update

    def loss(lambdas: tuple[float, ...]) -> float:
        with opened("longrope", model, replace(setting, lambdas=lambdas)) as reader:
            assert isinstance(reader, CachedReader)
            figures = perplexity(reader, material, setting.longest, 0, move).figures
        return float(figures["loss_sum"] / figures["scored"])

    with without_memory(model) as plain:
        rope.check_rotary(plain)
        dim, base, trained = rope.shape_of(plain)
        factor = setting.factor(plain)
    found = search_factors(loss, first_factors(dim, base, factor, trained), factor, rounds=rounds, seed=material.seed)
    return replace(setting, lambdas=found)
