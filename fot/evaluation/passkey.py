"""The passkey test: a number hidden in a long, dull text must be given back.

Wording after Mohtashami and Jaggi, *Landmark Attention* (arXiv 2305.16300), as LongLLaMA was tested with. Lengths
are exact in tokens; key and depth are drawn from the seed.
"""

import functools
import random
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from fot.evaluation.answers import greedy_answer
from fot.ingest import id_pieces, ingest_pieces
from fot.machine import peak_rss_bytes
from fot.model import FoTForCausalLM, attach_memory, detach_memory
from memory import Memory

TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there."
)
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "The pass key is {key}. Remember it. {key} is the pass key."
QUESTION = "What is the pass key? The pass key is"
LARGEST_KEY = 50_000

Report = Callable[["Trial"], None]


@dataclass(frozen=True)
class Prompt:
    """One passkey prompt.

    Attributes:
        ids: exactly as many token ids as were asked for.
        key: the hidden number.
        depth: share of the filler that lies before it, 0..1.
        common: first ids that all prompts of this length have in common: those before the number.
    """

    ids: list[int]
    key: int
    depth: float
    common: int = 0


@dataclass(frozen=True)
class Trial:
    """What a model answered to one prompt.

    Attributes:
        length: tokens of the prompt.
        depth: where the key was, 0 (start) to 1 (end).
        key: the hidden number.
        answer: what the model wrote.
        correct: whether the answer is the key, and not the start of a longer number.
        seconds: from the prompt to the last answered token.
        ingest_tokens: tokens read into the memory for this prompt; what it has in common with one before is not
            read again.
        ingest_seconds: time that took.
        memory_bytes: size of the memory.
    """

    length: int
    depth: float
    key: int
    answer: str
    correct: bool
    seconds: float
    ingest_tokens: int = 0
    ingest_seconds: float = 0.0
    memory_bytes: int = 0


def make_prompt(tokenizer: Any, length: int, rng: random.Random) -> Prompt:
    """A prompt of exactly ``length`` tokens.

    Raises:
        ValueError: too short to hold task, key and question.
    """
    key = rng.randint(1, LARGEST_KEY)

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    bos = [tokenizer.bos_token_id] if getattr(tokenizer, "add_bos_token", False) else []
    head = bos + encode(TASK + "\n")
    needle = encode("\n" + NEEDLE.format(key=key) + "\n")
    question = encode("\n" + QUESTION)
    room = length - len(head) - len(needle) - len(question)
    if room < 0:
        raise ValueError(f"a passkey prompt of {length} tokens is too short: it needs at least {length - room} tokens")
    unit = encode(FILLER + " ")
    filler = (unit * (room // len(unit) + 1))[:room]
    before = rng.randint(0, room)
    ids = head + filler[:before] + needle + filler[: room - before] + question
    return Prompt(ids, key, before / room if room else 0.0, common=len(head) + before)


def make_prompts(tokenizer: Any, length: int, trials: int, seed: int) -> list[Prompt]:
    """The same prompts for the same tokenizer, length and seed, however many lengths are tested."""
    rng = random.Random(f"{seed}/{length}")
    return [make_prompt(tokenizer, length, rng) for _ in range(trials)]


@dataclass
class Beginning:
    """What prompts of one length have in common, read once: whole windows of it, as far as one has needed them."""

    memory: Memory
    tokens: int = 0
    known: dict[bytes, int] = field(default_factory=dict)  # its windows, as ``ingest_pieces`` takes them


@torch.no_grad()
def answer_from_memory(model: Any, prompt: Prompt, progress: Any = False, beginning: Beginning | None = None) -> Trial:
    """Read all but the last window into a memory, then answer from it.

    Args:
        model: with ``tokenizer``.
        prompt: what to read and answer.
        progress: a tqdm bar that is moved by each token read, or False.
        beginning: of prompts whose common part ended no later; goes as far as this one's, then. The memory is the same
            as without: what it held before a text tells nothing of what comes.
    """
    start = time.perf_counter()
    stored = len(prompt.ids) - model.memory_config.local_length(len(prompt.ids))
    memory, done, read = model.new_memory(), 0, 0
    known: dict[bytes, int] = {}
    if beginning is not None:
        window, new = model.memory_config.window, model.memory_config.window - model.memory_config.overlap
        common = min(prompt.common, stored)
        read = beginning.tokens
        beginning.tokens = max(read, window + (common - window) // new * new if common >= window else 0)
        _read(model, prompt.ids[: beginning.tokens], beginning.memory, read, progress, beginning.known)
        memory, done, known = beginning.memory.clone(), beginning.tokens, dict(beginning.known)
    _read(model, prompt.ids[:stored], memory, done, progress, known)
    ingested = time.perf_counter()
    answer = _answer(model, prompt.ids[stored:], memory=memory)
    return _trial(
        prompt,
        answer,
        time.perf_counter() - start,
        ingest_tokens=stored - read,
        ingest_seconds=ingested - start,
        memory_bytes=sum(memory.nbytes().values()),
    )


def _read(model: Any, ids: list[int], memory: Memory, done: int, progress: Any, known: dict[bytes, int]) -> None:
    """Go on reading into a memory that holds the first ``done`` tokens, whole windows, these among them."""
    context = min(done, model.memory_config.overlap)
    if len(ids) > done:
        ingest_pieces(
            model, id_pieces(model, ids[done - context :]), memory, None, progress, stored=context, known=known
        )


def _remembering(model: Any, progress: Any, trials: int) -> Callable[[Prompt], Trial]:
    beginning = Beginning(model.new_memory()) if trials > 1 else None  # kept beside each trial's own memory
    return lambda prompt: answer_from_memory(model, prompt, progress, beginning)


@torch.no_grad()
def answer_plainly(model: Any, prompt: Prompt) -> Trial:
    """What the model answers without memory: it reads the last tokens that it has positions for, and no others."""
    start = time.perf_counter()
    answer = _answer(model, prompt.ids[-(model.config.max_position_embeddings - _answer_length()) :])
    return _trial(prompt, answer, time.perf_counter() - start)


def run(
    model: FoTForCausalLM,
    lengths: Sequence[int],
    trials: int,
    seed: int,
    *,
    with_memory: bool = True,
    baseline: bool = True,
    report: Report = lambda trial: None,
    progress: Any = None,
) -> dict[str, Any]:
    """The passkey test with memory and, beside it, without.

    Args:
        model: with ``tokenizer``.
        lengths: tokens of the prompts.
        trials: prompts of each length.
        seed: draws keys and depths.
        with_memory: test the model with its memory.
        baseline: test the same model without.
        report: called with each finished trial.
        progress: a tqdm bar that is moved by each token read, or None.

    Returns:
        ``{"results": [...], "baseline": [...], "interrupted": bool}``, each list with one entry a length:
        ``length``, ``accuracy``, averages, and ``trials``. Ctrl-C ends the run and keeps the finished trials.
    """
    prompts = {length: make_prompts(model.tokenizer, length, trials, seed) for length in lengths}
    done: dict[str, list[Trial]] = {"results": [], "baseline": []}
    peaks: dict[str, dict[int, int]] = {"results": {}, "baseline": {}}
    interrupted = False

    def go_through(part: str, new_length: Callable[[], Callable[[Prompt], Trial]]) -> None:
        for length in lengths:
            answer = new_length()
            for prompt in sorted(prompts[length], key=lambda prompt: prompt.common):
                trial = answer(prompt)
                done[part].append(trial)
                peaks[part][length] = peak_rss_bytes()
                if progress is not None:
                    progress.update(trial.length - trial.ingest_tokens)
                report(trial)

    config = model.memory_config
    try:
        if with_memory:
            bar = False if progress is None else progress
            go_through("results", lambda: _remembering(model, bar, trials))
        if baseline:
            plain = detach_memory(model)
            go_through("baseline", lambda: functools.partial(answer_plainly, plain))
    except KeyboardInterrupt:
        interrupted = True
    finally:
        attach_memory(model, config)
    summary: dict[str, Any] = {part: list(_summaries(done[part], peaks[part])) for part in done}
    return summary | {"interrupted": interrupted}


def _summaries(trials: Sequence[Trial], peaks: dict[int, int]) -> Iterator[dict[str, Any]]:
    for length, peak in peaks.items():
        mine = [trial for trial in trials if trial.length == length]
        ingest_seconds = sum(trial.ingest_seconds for trial in mine)
        ingest_tokens = sum(trial.ingest_tokens for trial in mine)
        yield {
            "length": length,
            "accuracy": sum(trial.correct for trial in mine) / len(mine),
            "ingest_tokens_per_second": ingest_tokens / ingest_seconds if ingest_tokens else None,
            "seconds_per_trial": sum(trial.seconds for trial in mine) / len(mine),
            "memory_bytes": max(trial.memory_bytes for trial in mine),
            "peak_rss_bytes": peak,
            "trials": [asdict(trial) for trial in mine],
        }


def _answer(model: Any, ids: list[int], **options: Any) -> str:
    return greedy_answer(model, ids, _answer_length(), **options)


def _answer_length() -> int:
    # A space, the digits, and one token more to see that the number ends: any tokenizer needs at most these.
    return len(str(LARGEST_KEY)) + 2


def _trial(prompt: Prompt, answer: str, seconds: float, **figures: Any) -> Trial:
    return Trial(len(prompt.ids), prompt.depth, prompt.key, answer, key_in(answer, prompt.key), seconds, **figures)


def key_in(answer: str, key: int) -> bool:
    """Whether an answer begins with the key, and not with a longer number."""
    number = re.match(r"\s*(\d+)", answer)
    return number is not None and number.group(1) == str(key)
