"""Which query heads find the passage that a question is about? Tried out on facts hidden in text.

In a pretrained model some heads look for the place of an answer, and most do something else (QRHead,
arXiv 2506.09944). Facts (``fot.evaluation.needles``) are hidden in texts that lie in memory, and each head of the
memory layers is judged by the passages that it would list for their questions. The best are stored with the model's
settings as ``retrieval_heads``.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fot.chat import first_turn_ids, has_template
from fot.evaluation.needles import Haystack, make_haystack
from fot.retrieval.find import Finder
from memory import Memory


@dataclass(frozen=True)
class Head:
    """How a query head finds the passages with the answers.

    Attributes:
        layer: its memory layer.
        head: in that layer.
        rank: mean of 1 / rank of the right passage, over all questions: 1 if it is always the first.
        first: share of the questions for which it is the first.
    """

    layer: int
    head: int
    rank: float
    first: float


@torch.no_grad()
def run(
    model: Any,
    texts: Sequence[Sequence[int]],
    *,
    length: int = 16384,
    needles: int = 8,
    trials: int = 4,
    seed: int = 0,
    progress: Any = None,
) -> list[Head]:
    """Every head of the memory layers, the best first.

    Args:
        model: a ``FoTForCausalLM`` with ``tokenizer``.
        texts: token ids of real texts.
        length: tokens of each text with its facts.
        needles: facts in each text.
        trials: texts.
        seed: draws texts and facts.
        progress: a tqdm bar that is moved by each question, or None.

    Raises:
        ValueError: the facts do not fit the length.
    """
    rng, tokenizer, templated = random.Random(seed), model.tokenizer, has_template(model.tokenizer)
    ranks: dict[tuple[int, int], list[int]] = {}
    for haystack in [make_haystack(tokenizer, texts, length, needles, rng) for _ in range(trials)]:
        memory: Memory = model.new_memory()
        model.ingest(haystack.ids, memory, progress=False)
        finder = Finder(model, memory, lambda question: first_turn_ids(tokenizer, question, templated))
        for needle, right in zip(haystack.needles, _places(tokenizer, haystack, finder), strict=True):
            for layer, scores in finder.head_scores(needle.asked).items():
                for head, place in enumerate(_rank(scores, right)):
                    ranks.setdefault((layer, head), []).append(place)
            if progress is not None:
                progress.update()
    found = [
        Head(layer, head, sum(1 / place for place in places) / len(places), places.count(1) / len(places))
        for (layer, head), places in ranks.items()
    ]
    return sorted(found, key=lambda one: (-one.rank, one.layer, one.head))


def _places(tokenizer: Any, haystack: Haystack, finder: Finder) -> list[int]:
    """The passage that holds each needle's answer; where it is cut in two, that with its end."""
    passages, last = finder.passages(), []
    for needle, depth in zip(haystack.needles, haystack.depths, strict=True):
        length = len(tokenizer(f"\n{needle.statement}\n", add_special_tokens=False).input_ids)
        end = round(depth * len(haystack.ids)) + length - 2  # the token before the line's end
        last.append(int((passages.stops <= end).sum()))
    return last


def _rank(scores: Tensor, right: int) -> list[int]:
    """For each head, the place of a passage among (H, P) scores, from 1; the last of those with equal scores."""
    return (scores >= scores[:, right : right + 1]).sum(1).tolist()
