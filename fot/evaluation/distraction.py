"""Distraction: how much attention memory layers give to what belongs to the text, among windows that do not.

The positive attention mass of arXiv 2307.03170 (section 3.3): a window is read with its document's previous window
(the positive) and d - 1 windows of other documents in memory. A model without preference gives the positive 1/d of
its attention to memory; one trained with many negatives gives it more. A model that lowers the weight of what is far
back in a large memory (``newest_full_weight``) gives the newest window more in any case, so both are measured.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fot.attention import attend_newest, memory_discount
from fot.cache import LocalCache, local_window
from fot.tasks.dictionary import DictionaryTask
from fot.windows import Inputs, run_window
from memory import Memory


@dataclass(frozen=True)
class Trial:
    """One window and what it finds in memory, as rows of ``Sample.windows``: the positive, then the negatives."""

    query: int
    contexts: tuple[int, ...]


@dataclass(frozen=True)
class Sample:
    """What is measured.

    Attributes:
        windows: (N, T) int64 token ids.
        trials: each with as many contexts.
    """

    windows: Tensor
    trials: list[Trial]

    def tokens(self) -> int:
        """Tokens that ``run`` reads: each context once, each query once."""
        rows = {context for trial in self.trials for context in trial.contexts}
        return (len(rows) + len(self.trials)) * self.windows.shape[1]


def text_sample(texts: Sequence[Sequence[int]], window: int, most: int, trials: int, seed: int) -> Sample:
    """Windows of real texts: the positive is the one before the query, negatives are of other texts.

    Trials share their negatives as far as they can, so that few windows have to be read.

    Args:
        texts: token ids, each text a document.
        window: tokens of a window.
        most: contexts of each trial.
        trials: how many.
        seed: draws queries and negatives.

    Raises:
        ValueError: too few texts, or too short ones.
    """
    rng = random.Random(f"{seed}/text")
    document, rows = [], []
    for number, ids in enumerate(texts):
        for start in range(0, len(ids) - window + 1, window):
            document.append(number)
            rows.append(list(ids[start : start + window]))
    queries = [row for row in range(1, len(rows)) if document[row] == document[row - 1]]
    fewest = min(
        (sum(other != one for other in document) for one in {document[row] for row in queries}),
        default=0,
    )
    if not queries or fewest < most - 1:
        raise ValueError(
            f"{most} contexts need two windows of {window} tokens from one text and {most - 1} from others, but "
            f"these texts have {fewest}: give more or longer files, or fewer --contexts"
        )
    order = rng.sample(range(len(rows)), len(rows))
    found = []
    for query in rng.sample(queries, min(trials, len(queries))):
        others = [row for row in order if document[row] != document[query]]
        found.append(Trial(query, (query - 1, *others[: most - 1])))
    return Sample(torch.tensor(rows), found)


def dictionary_sample(window: int, most: int, trials: int, seed: int) -> Sample:
    """Windows of the dictionary task: the positive holds the records that the query asks for.

    Args and errors as ``text_sample``.
    """
    task = DictionaryTask(window=window)
    rng = random.Random(f"{seed}/dictionary")
    ids = [task.document(rng)[0] for _ in range(max(trials, most))]
    rows = torch.tensor(ids)[:, : 2 * window].reshape(-1, window)  # records, questions, records, ...
    found = []
    for number in range(trials):
        others = [2 * other for other in range(len(ids)) if other != number]
        found.append(Trial(2 * number + 1, (2 * number, *others[: most - 1])))
    return Sample(rows, found)


@torch.no_grad()
def run(model: Any, sample: Sample, counts: Sequence[int], *, progress: Any = None) -> dict[str, Any]:
    """Positive attention mass by number of contexts.

    Each context is read on its own into a memory of its own; a query reads the first d of its trial's.

    Args:
        model: a ``FoTForCausalLM`` with memory layers.
        sample: for this model's window.
        counts: numbers of contexts d, each at most what the trials have.
        progress: a tqdm bar that is moved by each token read, or None.

    Returns:
        ``{"results": [...], "interrupted": bool}``, one entry a count: ``contexts``, ``trials``, averages over trials,
        queries, heads and layers, and the same for each of ``layers``: ``to_memory``, the share of the attention to
        memory if it weighs all of it alike; ``weighed``, this share as the model weighs its memory, the positive stored
        last; and ``of_all``, the share of all attention then. Ctrl-C ends the run and keeps the finished trials.
    """
    memories: dict[int, Memory] = {}

    def memory_of(row: int) -> Memory:
        if row not in memories:
            memories[row] = model.new_memory(index="exact", top_k=None)
            model.ingest(sample.windows[row], memories[row], progress=False)
            _move(progress, sample)
        return memories[row]

    found: list[list[dict[int, dict[str, float]]]] = []  # trial -> count -> layer -> shares
    interrupted = False
    try:
        for trial in sample.trials:
            read = [memory_of(row) for row in trial.contexts]
            query = sample.windows[trial.query]
            found.append([_positive_shares(context_scores(model, query, read[:count][::-1])) for count in counts])
            _move(progress, sample)
    except KeyboardInterrupt:
        interrupted = True
    results = [_summary(count, [trial[n] for trial in found]) for n, count in enumerate(counts) if found]
    return {"results": results, "interrupted": interrupted}


@dataclass(frozen=True)
class Scores:
    """What the queries of a window attend to in one layer: log-sum-exps (H, T) float32, comparable with each other.

    Attributes:
        all: of everything, the window itself included.
        alike: (d, H, T), of each memory, every token of it at the weight of the oldest ones.
        memory: of all memories, as the model weighs them.
        newest: of the last memory, likewise.
    """

    all: Tensor
    alike: Tensor
    memory: Tensor
    newest: Tensor


def context_scores(model: Any, query: Tensor, memories: Sequence[Memory]) -> dict[int, Scores]:
    """How much each query of a window attends to its own window and to each of d memories, for each memory layer.

    Args:
        model: a ``FoTForCausalLM``.
        query: (T,) token ids, at most a window.
        memories: what the window reads, each a context, the newest last; at least one.
    """
    ids = query.unsqueeze(0).to(model.device)
    positions = torch.arange(len(query), device=model.device).unsqueeze(0)
    window = local_window(model, [list(memories)])
    listener = _Listener(memories)
    window.recorder = listener  # type: ignore[assignment]
    run_window(model, Inputs(ids, None, None, positions), window, {})
    return listener.scores


class _Listener:
    """Takes note of what each memory layer attends to."""

    def __init__(self, memories: Sequence[Memory]) -> None:
        self.memories = memories
        self.scores: dict[int, Scores] = {}

    def note(self, layer: int, queries: Tensor, lses: list[Tensor], window: LocalCache, scale: float) -> None:
        """Called by the attention of each memory layer; see ``fot.trace.Recorder.note``."""
        local, memory = lses[0][0], lses[1][0]  # (H, T)
        folded = queries[0].reshape(self.memories[0].num_key_value_heads, -1, queries.shape[-1])
        alike = [read[layer].attend(folded, scale=scale)[1].reshape(local.shape) for read in self.memories]
        newest, every = alike[-1], torch.logaddexp(local, memory)
        count, discount = window.config.newest_full_weight, memory_discount(self.memories, window.config)
        if discount and count:
            # An old token weighs 1 here, one of the newest exp(discount). What it weighs more is in ``local``.
            more = math.log(math.expm1(discount))
            memory, newest = (
                torch.logaddexp(lse, attend_newest(queries, [read], layer, count, scale=scale)[1][0] + more)
                for lse, read in ((memory, self.memories), (newest, self.memories[-1:]))
            )
        self.scores[layer] = Scores(every, torch.stack(alike), memory, newest)


def _positive_shares(scores: dict[int, Scores]) -> dict[int, dict[str, float]]:
    """For each layer, the shares of the last memory, on the mean over heads and queries."""
    return {
        layer: {
            "to_memory": float(found.alike.softmax(0)[-1].mean()),
            "weighed": float((found.newest - found.memory).exp().mean()),
            "of_all": float((found.newest - found.all).exp().mean()),
        }
        for layer, found in scores.items()
    }


def _summary(count: int, trials: Sequence[dict[int, dict[str, float]]]) -> dict[str, Any]:
    def mean(many: list[dict[str, float]]) -> dict[str, float]:
        return {name: sum(one[name] for one in many) / len(many) for name in many[0]}

    layers = {layer: mean([trial[layer] for trial in trials]) for layer in trials[0]}
    pooled = mean(list(layers.values()))
    return {"contexts": count, "trials": len(trials), **pooled, "layers": layers}


def _move(progress: Any, sample: Sample) -> None:
    if progress is not None:
        progress.update(sample.windows.shape[1])
