"""Questions about long texts (``fot.tasks.ruler``), answered from a memory, in one context, and without the text."""

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from fot.chat import has_template, question_text
from fot.evaluation.answers import greedy_answer, without_memory
from fot.evaluation.intervals import wilson
from fot.tasks.haystack import bos, encode
from fot.tasks.ruler import Probe, make_probe

CONDITIONS = ("memory", "in_context", "without")


@dataclass(frozen=True)
class Trial:
    """One question.

    Attributes:
        task, length: of its text.
        expected: what the answer must hold.
        answers: by condition, what the model wrote; None where it has too few positions for the text.
        scores: by condition, the share of ``expected`` that the answer holds; likewise.
    """

    task: str
    length: int
    expected: tuple[str, ...]
    answers: dict[str, str | None]
    scores: dict[str, float | None]


@torch.no_grad()
def run(
    model: Any,
    texts: Sequence[Sequence[int]],
    tasks: Sequence[str],
    lengths: Sequence[int],
    *,
    trials: int = 10,
    chat: bool = False,
    seed: int = 0,
    report: Callable[[Trial], None] = lambda trial: None,
    progress: Any = None,
) -> dict[str, Any]:
    """Scores by task and length.

    Args:
        model: a ``FoTForCausalLM`` with ``tokenizer``.
        texts: token ids of real texts.
        tasks: names from ``fot.tasks.ruler.TASKS``.
        lengths: tokens of a text.
        trials: texts of each task and length.
        chat: put questions in the tokenizer's chat template.
        seed: draws texts and questions.
        report: called after each trial.
        progress: a tqdm bar that is moved by each token read into a memory, or None.

    Returns:
        ``{"results": [...], "interrupted": bool}``, one entry a task and length: ``task``, ``length``, ``trials``
        (fields of ``Trial``) and for each of ``CONDITIONS`` ``score`` (mean), ``whole`` (share of trials with score 1)
        and ``interval`` (of ``whole``, 95 %), or None. Ctrl-C ends the run and keeps the finished trials.

    Raises:
        ValueError: ``chat`` and a tokenizer without a chat template, or a length too small for a task.
    """
    if chat and not has_template(model.tokenizer):
        raise ValueError("this model's tokenizer has no chat template: ask without chat")
    found: dict[tuple[str, int], list[Trial]] = {}
    interrupted = False
    try:
        for length in lengths:
            for task in tasks:
                rng = random.Random(f"{seed}/{task}/{length}")
                for _ in range(trials):
                    probe = make_probe(task, model.tokenizer, texts, length, rng)
                    trial = _ask(model, task, length, probe, chat, progress)
                    found.setdefault((task, length), []).append(trial)
                    report(trial)
    except KeyboardInterrupt:
        interrupted = True
    return {"results": [_summary(some) for some in found.values()], "interrupted": interrupted}


def _ask(model: Any, task: str, length: int, probe: Probe, chat: bool, progress: Any) -> Trial:
    memory = model.new_memory()
    model.ingest(probe.ids, memory, progress=False if progress is None else progress)
    asked = prompt(model.tokenizer, probe, chat)
    alone = asked if chat else bos(model.tokenizer) + asked
    answers: dict[str, str | None] = {
        "memory": greedy_answer(model, alone, probe.tokens, memory=memory),
        "in_context": None,
        "without": greedy_answer(model, alone, probe.tokens),
    }
    if len(probe.ids) + len(asked) + probe.tokens <= model.config.max_position_embeddings:
        with without_memory(model) as plain:
            answers["in_context"] = greedy_answer(plain, probe.ids + asked, probe.tokens)
    scores = {name: None if text is None else score(text, probe.answers) for name, text in answers.items()}
    return Trial(task, length, probe.answers, answers, scores)


def prompt(tokenizer: Any, probe: Probe, chat: bool) -> list[int]:
    """Token ids of the question, up to where the answer goes on."""
    if not chat:
        return encode(tokenizer, f"\n{probe.question} {probe.stem}")
    return encode(tokenizer, question_text(tokenizer, probe.question) + probe.stem)


def score(text: str, expected: Sequence[str]) -> float:
    """The share of what is expected that a text holds, as whole words, in small or capital letters."""
    return sum(re.search(rf"(?<!\w){re.escape(one)}(?!\w)", text, re.I) is not None for one in expected) / len(expected)


def _summary(trials: Sequence[Trial]) -> dict[str, Any]:
    entry: dict[str, Any] = {"task": trials[0].task, "length": trials[0].length}
    for name in CONDITIONS:
        scores = [trial.scores[name] for trial in trials]
        known = [value for value in scores if value is not None]
        whole = sum(value == 1 for value in known)
        entry[name] = None
        if known:
            share = {"score": sum(known) / len(known), "whole": whole / len(known)}
            entry[name] = share | {"interval": wilson(whole, len(known))}
    return entry | {"trials": [asdict(trial) for trial in trials]}
