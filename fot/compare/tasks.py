"""The tasks of ``fot compare``, each for any reader: one trial at a time.

Texts, keys and places depend on seed, length and trial alone, so that every method gets the same.
"""

import itertools
import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from fot.compare.fluency import NGRAM, losses_in_windows, measures, stretches
from fot.compare.readers import Progress, Reader, greedy, written
from fot.compare.results import Draft
from fot.evaluation.needles import make_haystack, question_ids
from fot.evaluation.passkey import LARGEST_KEY, QUESTION, key_in, make_prompt
from fot.tasks.haystack import bos, encode

# Perplexity is of the last tokens of a text, each after as many that every method has at hand.
SCORED = 256
# Facts in a text.
NEEDLES = 4
# Tokens of a real text from which a model writes on, and after how many of its own these are kept on disk.
BEGINNING, KEPT = 256, 256


@dataclass(frozen=True)
class Material:
    """What trials are made of.

    Attributes:
        tokenizer: of the model.
        texts: token ids of real texts; passkey needs none.
        seed: draws keys, facts and places.
    """

    tokenizer: Any
    texts: Sequence[Sequence[int]]
    seed: int

    def rng(self, task: str, length: int, trial: int) -> random.Random:
        return random.Random(f"{self.seed}/{task}/{length}/{trial}")


@dataclass(frozen=True)
class Outcome:
    """What came of one trial.

    Attributes:
        figures: what the score is made of; see ``fot.compare.results``.
        tokens: read or written.
        seconds: that took.
        held_bytes: of what was kept of ``held_tokens`` tokens.
        held_tokens: see there.
        ids: that the model wrote on its own, to be judged.
    """

    figures: dict[str, Any]
    tokens: int
    seconds: float
    held_bytes: int
    held_tokens: int
    ids: tuple[int, ...] = ()


@torch.no_grad()
def passkey(reader: Reader, material: Material, length: int, trial: int, progress: Progress) -> Outcome:
    """A number hidden in a dull text of ``length`` tokens: ``right`` of ``asked``, 0 or 1 of 1."""
    prompt = make_prompt(material.tokenizer, length, material.rng("passkey", length, trial))
    question = len(encode(material.tokenizer, "\n" + QUESTION))
    start = time.perf_counter()
    state = reader.read(prompt.ids[:-question], progress)
    held = reader.held_bytes(state)
    ids = greedy(reader, state, prompt.ids[-question:], len(str(LARGEST_KEY)) + 2)
    progress(question)
    answer = material.tokenizer.decode(ids, skip_special_tokens=True)
    figures = {"right": int(key_in(answer, prompt.key)), "asked": 1, "depth": prompt.depth, "answer": answer}
    return Outcome(figures, length, time.perf_counter() - start, held, length - question)


@torch.no_grad()
def perplexity(reader: Reader, material: Material, length: int, trial: int, progress: Progress) -> Outcome:
    """The last ``SCORED`` tokens of ``length`` tokens of a text: ``loss_sum``, ``loss_squares`` and ``scored``.

    Raises:
        ValueError: the text is shorter.
    """
    ids = _piece(material, "perplexity", length, trial)
    scored = min(SCORED, length // 4)
    start = time.perf_counter()
    state = reader.read(ids[: -2 * scored], progress)
    held = reader.held_bytes(state)
    logits = reader.feed(state, ids[-2 * scored :], scored + 1)[:-1].float().cpu()
    progress(2 * scored)
    losses = cross_entropy(logits, torch.tensor(ids[-scored:]), reduction="none").double()
    figures = {"loss_sum": float(losses.sum()), "loss_squares": float((losses**2).sum()), "scored": scored}
    return Outcome(figures, length, time.perf_counter() - start, held, length - 2 * scored)


@torch.no_grad()
def needles(reader: Reader, material: Material, length: int, trial: int, progress: Progress) -> Outcome:
    """Facts hidden in ``length`` tokens of real text: ``right`` of ``asked``, each token the likeliest."""
    tokenizer, rng = material.tokenizer, material.rng("needles", length, trial)
    haystack = make_haystack(tokenizer, material.texts, length, NEEDLES, rng)
    start, right = time.perf_counter(), 0
    state = reader.read(haystack.ids, progress)
    held = reader.held_bytes(state)
    for needle in haystack.needles:
        prompt, target = question_ids(tokenizer, needle)
        prompt = prompt[len(bos(tokenizer)) :]  # the text goes on
        ids = prompt + target[:-1]
        found = reader.feed(reader.fork(state), ids, len(target)).argmax(-1).cpu()
        right += bool((found == torch.tensor(target)).all())
    return Outcome({"right": right, "asked": NEEDLES}, length, time.perf_counter() - start, held, length)


@torch.no_grad()
def fluency(
    reader: Reader, material: Material, length: int, trial: int, progress: Progress, draft: Draft | None = None
) -> Outcome:
    """The model goes on with a text, at random, until there are ``length`` tokens; ``judge`` says how it did.

    Args:
        reader: of the method.
        material: its texts.
        length: tokens of the beginning and of what is written.
        trial: which.
        progress: called with the tokens that were read or written.
        draft: what is written is kept there, and goes on from what is there; None keeps nothing.
    """
    beginning = PIECES["fluency"](length)
    ids = _piece(material, "fluency", beginning, trial)
    generator = torch.Generator().manual_seed(material.rng("fluency", length, trial).getrandbits(62))
    made, before, drawn = ([], 0.0, None) if draft is None else draft.read()
    if drawn is not None:
        generator.set_state(torch.frombuffer(bytearray(drawn), dtype=torch.uint8))
    start = time.perf_counter() - before
    text = ids + made
    state = reader.read(text[:-1], progress)
    for token in itertools.islice(written(reader, state, text[-1:], generator), length - len(text)):
        made.append(token)
        progress(1)
        if draft is not None and len(made) % KEPT == 0:
            draft.write(made, time.perf_counter() - start, generator.get_state().numpy().tobytes())
    seconds = time.perf_counter() - start
    progress(1)
    return Outcome({}, length, seconds, reader.held_bytes(state), length - 1, tuple(made))


@torch.no_grad()
def judge(plain: Any, material: Material, ids: Sequence[int]) -> dict[str, Any]:
    """Figures of what a model wrote: all measures of fluency, of the whole and ``by_stretch``, and repeated pieces as
    ``right`` of ``asked``.

    Args:
        plain: the model as it is.
        material: with its tokenizer.
        ids: written.
    """
    decode = partial(material.tokenizer.decode, clean_up_tokenization_spaces=False)
    losses = losses_in_windows(plain, ids)
    found = measures(ids, decode(list(ids)), losses)
    pieces = max(0, len(ids) - NGRAM + 1)
    right = round(found["repeated_ngrams"] * pieces)
    return {**found, "right": right, "asked": pieces, "by_stretch": stretches(ids, losses, decode)}


def check_texts(material: Material, trials: Iterable[tuple[str, int, int]]) -> None:
    """See that texts are long enough, before the first trial.

    Args:
        material: what trials are made of.
        trials: task, length and number of each.

    Raises:
        ValueError: one is not.
    """
    for task, length, trial in trials:
        if task in PIECES:
            _text(material, task, PIECES[task](length), trial)


def _piece(material: Material, task: str, length: int, trial: int) -> list[int]:
    """A random piece of a text, each text in turn."""
    text, rng = _text(material, task, length, trial), material.rng(task, length, trial)
    start = rng.randint(0, len(text) - length)
    return list(text[start : start + length])


def _text(material: Material, task: str, length: int, trial: int) -> Sequence[int]:
    """The text of a trial.

    Raises:
        ValueError: it is too short.
    """
    text = material.texts[trial % len(material.texts)]
    if len(text) < length:
        raise ValueError(f"a text has {len(text):,} tokens, and {task} at {length:,} needs as many: give a longer text "
                         "or lower --lengths")  # fmt: skip
    return text


# Tokens of a real text that trials of some length take in one piece. The others begin a text anew where it ends.
PIECES: dict[str, Callable[[int], int]] = {
    "perplexity": lambda length: length,
    "fluency": lambda length: min(BEGINNING, length // 2),
}

TASK_FUNCTIONS: dict[str, Callable[..., Outcome]] = {
    "passkey": passkey,
    "perplexity": perplexity,
    "needles": needles,
    "fluency": fluency,
}
