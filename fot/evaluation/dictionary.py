"""Dictionary lookup: accuracy of answers about records read into the memory (arXiv 2307.03170, section 4.1)."""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from fot.machine import peak_rss_bytes
from fot.tasks.dictionary import VOCABULARY, DictionaryTable, ask, record_chunks


@torch.no_grad()
def run(
    model: Any, lengths: Sequence[int], *, windows: int = 4, seed: int = 0, progress: Any = False
) -> dict[str, Any]:
    """Accuracy by size of the dictionary.

    Args:
        model: a ``FoTForCausalLM`` whose windows hold records of ``fot.tasks.dictionary``.
        lengths: tokens of records, whole windows each.
        windows: windows of questions for each length; every answer token counts.
        seed: draws the dictionary and the questions.
        progress: a tqdm bar that is moved by each token read, or False.

    Returns:
        ``{"results": [...], "interrupted": bool}``, one entry a length: ``length``, ``accuracy`` of answer tokens,
        ``exact`` share of whole answers, ``answers``, ``seconds``, ``memory_bytes``, ``peak_rss_bytes``. Ctrl-C ends
        the run and keeps the finished lengths.

    Raises:
        ValueError: a model with another vocabulary, or a length that is no whole number of windows.
    """
    window = model.memory_config.window
    if model.config.vocab_size < VOCABULARY:
        raise ValueError(
            f"the model has {model.config.vocab_size} tokens, but the dictionary task needs {VOCABULARY}: "
            "use a model trained by the dictionary recipes"
        )
    tables = [DictionaryTable.of_tokens(length, seed, window) for length in lengths]
    found: list[dict[str, Any]] = []
    interrupted = False
    try:
        for length, table in zip(lengths, tables, strict=True):
            found.append({"length": length} | _measure(model, table, windows, seed, progress))
    except KeyboardInterrupt:
        interrupted = True
    return {"results": found, "interrupted": interrupted}


def _measure(model: Any, table: DictionaryTable, windows: int, seed: int, progress: Any) -> dict[str, Any]:
    """One dictionary, read and asked about."""
    start = time.perf_counter()
    window, memory = model.memory_config.window, model.new_memory()
    for chunk in record_chunks(table, window):
        model.ingest(chunk, memory, progress=progress)
    rng = np.random.default_rng(seed)
    answers = torch.cat([_marks(model, memory, table, rng, window) for _ in range(windows)])  # (answers, 4)
    return {
        "accuracy": float(answers.float().mean()),
        "exact": float(answers.all(1).float().mean()),
        "answers": len(answers),
        "seconds": time.perf_counter() - start,
        "memory_bytes": sum(memory.nbytes().values()),
        "peak_rss_bytes": peak_rss_bytes(),
    }


def _marks(model: Any, memory: Any, table: DictionaryTable, rng: np.random.Generator, window: int) -> torch.Tensor:
    """(questions, 4) bool: which answer tokens the model gives, each after the right ones before it."""
    questions = ask(table, rng, window)
    ids = questions.ids.unsqueeze(0).to(model.device)
    guesses = model(ids, memory=memory).logits[0, :-1].argmax(-1).cpu()
    wanted = questions.answers[1:]
    return (guesses == questions.ids[1:])[wanted].reshape(len(questions.numbers), -1)
