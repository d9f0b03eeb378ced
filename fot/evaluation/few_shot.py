"""In-context learning from a memory: questions of a labelled set, with more and more labelled examples before them.

The set is TREC's (Li and Roth 2002) or any other in its form. LongLLaMA's authors measure with it (arXiv 2307.03170,
section 5.3). As there, the examples are one prompt: the last of them stay in the local window, those before are in the
memory.
"""

import copy
import random
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fot.compat import CACHE
from fot.evaluation.answers import greedy_answer, without_memory
from fot.evaluation.intervals import wilson
from fot.files import check_utf8
from fot.tasks.haystack import bos, encode

LABEL_TOKENS = 10  # most tokens of an answer

Example = tuple[str, str]  # label, text


def read_examples(path: Path, encoding: str = "utf-8") -> list[Example]:
    """Labelled examples, one a line: the label, a space, the text.

    Raises:
        ValueError: A line without a text, or a file in another encoding; it is named.
    """
    if encoding == "utf-8":
        check_utf8(path)
    examples = []
    for number, line in enumerate(path.read_text(encoding=encoding).splitlines(), 1):
        if line.strip():
            label, _, text = line.strip().partition(" ")
            if not text:
                raise ValueError(f"{path}, line {number} is {line.strip()!r}: each line is a label, a space and a text")
            examples.append((label, text.strip()))
    if not examples:
        raise ValueError(f"{path} has no examples: each line is a label, a space and a text")
    return examples


@torch.no_grad()
def run(
    model: Any,
    examples: Sequence[Example],
    questions: Sequence[Example],
    lengths: Sequence[int],
    *,
    trials: int = 100,
    seed: int = 0,
    report: Callable[[int, str, str, str], None] = lambda length, text, label, answer: None,
    progress: Any = None,
) -> dict[str, Any]:
    """Share of right labels, by tokens of examples.

    Args:
        model: a ``FoTForCausalLM`` with ``tokenizer``.
        examples: shown, in random order, the same for all questions.
        questions: asked.
        lengths: tokens of examples; 0 for none. A longer list of examples begins with the shorter one.
        trials: questions for each length.
        seed: draws questions and the order of examples.
        report: called with the length, the question, its label and the answer.
        progress: a tqdm bar that is moved by each token read into the memory, or None.

    Returns:
        ``{"results": [...], "interrupted": bool}``, one entry a length: ``length`` (tokens of whole examples),
        ``stored`` (of them in the memory), ``examples``, and ``accuracy``, ``trials`` and ``interval`` (95 %) for
        ``memory``, ``local`` (the same local tokens without the memory; None while nothing is stored) and
        ``in_context`` (None where the model has too few positions). Ctrl-C ends the run and keeps the finished lengths.

    Raises:
        ValueError: There are too few examples for the longest length.
    """
    rng = random.Random(f"{seed}/few-shot")
    shown = [shot(*example) for example in rng.sample(list(examples), len(examples))]
    asked = rng.sample(list(questions), min(trials, len(questions)))
    pieces = [encode(model.tokenizer, text) for text in shown]
    counts = [_fitting(pieces, length) for length in sorted(set(lengths))]
    longest = max(len(encode(model.tokenizer, shot("", text))) for _, text in asked) + LABEL_TOKENS
    memory, read, ids = model.new_memory(), 0, bos(model.tokenizer)
    results, interrupted = [], False
    try:
        for count in counts:
            ids, read = ids + [token for piece in pieces[read:count] for token in piece], count
            # As ``forward`` divides a prompt of so many tokens.
            kept = max(0, model.memory_config.local_length(len(ids) + longest) - longest)
            local, stored = ids[max(0, len(ids) - kept) :], max(0, len(ids) - kept)
            if new := ids[len(memory) : stored]:
                model.ingest(new, memory, progress=False if progress is None else progress)
            entry: dict[str, Any] = {"length": len(ids), "stored": stored, "examples": count, "in_context": None}
            entry["memory"] = _accuracy(model, local, asked, partial(report, len(ids)), memory=memory)
            entry["local"] = _accuracy(model, local, asked, lambda *found: None) if stored else None
            if count and len(ids) + longest <= model.config.max_position_embeddings:
                with without_memory(model) as plain:
                    prompt = torch.tensor([ids], device=plain.device)
                    cache = getattr(plain(prompt, use_cache=True, logits_to_keep=1), CACHE)
                    entry["in_context"] = _accuracy(plain, ids, asked, lambda *found: None, cache)
            results.append(entry)
    except KeyboardInterrupt:
        interrupted = True
    return {"results": results, "interrupted": interrupted}


def shot(label: str, text: str) -> str:
    """An example as the model reads it; without a label, up to where the answer goes on."""
    return f"Question: {text}\nType: {label}\n\n" if label else f"Question: {text}\nType:"


def _fitting(pieces: Sequence[Sequence[int]], length: int) -> int:
    """How many examples fit in so many tokens."""
    total = 0
    for count, piece in enumerate(pieces):
        total += len(piece)
        if total > length:
            return count
    if total < length:
        raise ValueError(
            f"{len(pieces):,} examples have {total:,} tokens, fewer than {length:,}: give smaller --lengths"
        )
    return len(pieces)


def _accuracy(
    model: Any,
    before: list[int],
    asked: Sequence[Example],
    report: Callable[[str, str, str], None],
    cache: Any = None,
    **options: Any,
) -> dict[str, Any]:
    """What share of questions is answered by their labels; ``cache`` holds what was read ``before`` them."""
    right = 0
    for label, text in asked:
        if cache is not None:
            options[CACHE] = copy.deepcopy(cache)
        ids = (before or bos(model.tokenizer)) + encode(model.tokenizer, shot("", text))
        answer = greedy_answer(model, ids, LABEL_TOKENS, **options).strip().split("\n")[0].strip()
        right += answer == label
        report(text, label, answer)
    return {"accuracy": right / len(asked), "trials": len(asked), "interval": wilson(right, len(asked))}
