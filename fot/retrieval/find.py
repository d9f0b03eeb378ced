"""Find the passages of a memory that a question is about.

Three ways: by ``attention``, the question's tokens ask the memory and passages are ranked by what they receive above
chance; by ``bm25``, passages are ranked by the words that they share with the question; by ``both``, joined.
"""

from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fot.inspection.passages import Passage, make_passage
from fot.retrieval.attention import passage_masses, question_queries
from fot.retrieval.passages import Cut, cut, passage_texts
from fot.retrieval.words import WordIndex
from memory import Memory

WAYS = ("attention", "bm25", "both")

# A question about nothing. What it attends to are sinks: they receive as much whatever is asked.
NO_QUESTION = "What is the answer to this question?"
# What has no word in common with it: both prompts begin and end with what every prompt has.
NOTHING = "N/A"

# Attention below so many times what is to be expected says nothing. Chosen on the questions about Northanger Abbey.
TIMES_EXPECTED = 5.0

# Words that tell passages apart, with which a question needs no question before it.
ENOUGH_WORDS = 2

# Of reciprocal rank fusion (Cormack et al. 2009): 1 / (60 + rank), summed over the rankings.
FUSION = 60


class Finder:
    """Finds passages in one memory for one model. What it learns of the memory is kept until the memory changes.

    Args:
        model: a ``FoTForCausalLM`` with its tokenizer.
        memory: made by this model.
        turn_ids: the ids of a question as the model is asked it.
    """

    def __init__(self, model: Any, memory: Memory, turn_ids: Callable[[str], list[int]]) -> None:
        self._model, self._memory, self._turn_ids = model, memory, turn_ids
        self._known: tuple[int, list[tuple[str | None, int, int]]] | None = None
        self._cut: Cut
        self._words: WordIndex | None
        self._sinks: dict[int, Tensor] | None

    def __len__(self) -> int:
        """Tokens to find something in."""
        return len(self._memory)

    def find(self, question: str, count: int, by: str = "both") -> list[Passage]:
        """The passages that a question is about, best first; at most ``count``.

        Their shares are of the question's attention above chance: all passages of the memory together have 1.

        Args:
            question: asked of the memory; must fit the local window.
            count: passages wanted.
            by: one of ``WAYS``.

        Raises:
            ValueError: another way.
        """
        if by not in WAYS:
            raise ValueError(f"passages are found by {by!r}: choose one of {', '.join(WAYS)}")
        if not len(self._memory):
            return []
        self._look()
        shares = self._shares(question)
        rankings = []
        if by != "bm25":
            rankings.append(shares)
        if by != "attention":
            rankings.append(self._by_words().scores(question))
        order = fuse(rankings)[:count]
        bounds = [(int(self._cut.starts[one]), int(self._cut.stops[one]), float(shares[one])) for one in order]
        return [
            make_passage(self._memory, start, stop, share, self._model.tokenizer, own=False, context=0)
            for start, stop, share in bounds
        ]

    def follow_up(self, question: str, before: str) -> str:
        """What to search for where a question comes after another: both, if it says too little by itself.

        "And his sister?" has no subject of its own; a question with two words that tell passages apart has.
        """
        self._look()
        if self._by_words().telling(question) >= ENOUGH_WORDS:
            return question
        return f"{before}\n{question}"

    def text(self, passage: Passage) -> str:
        """The whole text of a passage, as it stands in its document."""
        ids = self._memory.token_ids(slice(passage.start, passage.stop)).tolist()
        return str(self._model.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _look(self) -> None:
        """Cut the memory, if it is not the one that was cut."""
        now = len(self._memory), self._memory.document_runs()
        if now != self._known:
            self._cut = cut(self._memory, self._model.tokenizer)
            self._known, self._words, self._sinks = now, None, None

    def _by_words(self) -> WordIndex:
        if self._words is None:
            self._words = WordIndex(passage_texts(self._memory, self._model.tokenizer, self._cut))
        return self._words

    def passages(self) -> Cut:
        """The passages of the memory as it is now."""
        self._look()
        return self._cut

    def head_scores(self, question: str) -> dict[int, Tensor]:
        """Layer -> (H, P) what each head gives to each passage above what is to be expected."""
        self._look()
        if self._sinks is None:
            self._sinks = {layer: masses.mean(1) for layer, masses in self._masses(NO_QUESTION).items()}  # (H, P)
        sizes = torch.from_numpy(self._cut.stops - self._cut.starts).float()
        chance = sizes / sizes.sum()
        return {
            layer: above_chance(masses, chance, self._sinks[layer]) for layer, masses in self._masses(question).items()
        }

    def _shares(self, question: str) -> np.ndarray:
        """(P,) share of the attention above chance, by the model's retrieval heads."""
        scores = self.head_scores(question)
        total = torch.cat([above[self._heads(layer, len(above))] for layer, above in scores.items()]).sum(0).double()
        return np.asarray(total / total.sum().clamp(min=1e-30))

    def _masses(self, question: str) -> dict[int, Tensor]:
        """Layer -> (H, T, P) attention of each token of the question to each passage, of that to memory."""
        first, last = self._frame()
        ids = self._turn_ids(question)
        asked = question_queries(self._model, self._memory, ids, range(first, len(ids) - last))
        return {layer: passage_masses(self._memory, layer, queries, self._cut) for layer, queries in asked.items()}

    def _frame(self) -> tuple[int, int]:
        """How many ids stand before a question, and after it, in every prompt."""
        one, other = self._turn_ids(NO_QUESTION), self._turn_ids(NOTHING)
        return common(one, other), common(one[::-1], other[::-1])

    def _heads(self, layer: int, count: int) -> list[int]:
        """The retrieval heads of a layer; all heads if the model names none."""
        config = self._model.memory_config
        chosen = [one for one in config.retrieval_heads or () if one[0] in config.layers]
        return [head for number, head in chosen if number == layer] if chosen else list(range(count))


def above_chance(masses: Tensor, chance: Tensor, sinks: Tensor) -> Tensor:
    """What passages receive beyond ``TIMES_EXPECTED`` times what they would receive from any question.

    Args:
        masses: (H, T, P) attention of each token of a question to each passage; the sum over P is 1.
        chance: (P,) share of the memory that each passage is.
        sinks: (H, P) what a question about nothing gives to each.

    Returns:
        (H, P), at least 0, summed over the tokens.
    """
    # Of chance, the odds: a passage of a small memory may be a fifth of it.
    by_chance = TIMES_EXPECTED * chance / (1 + (TIMES_EXPECTED - 1) * chance)
    return (masses - torch.maximum(by_chance, TIMES_EXPECTED * sinks).unsqueeze(1)).clamp(min=0).sum(1)


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many ids two prompts have in common, from their beginning on."""
    return sum(takewhile(bool, (first == second for first, second in zip(one, other, strict=False))))


def fuse(rankings: Sequence[np.ndarray]) -> list[int]:
    """Numbers of passages, best first, by the reciprocal ranks in all rankings; none that all of them leave at 0.

    Args:
        rankings: (P,) scores of each; a passage with score 0 has no rank in it.
    """
    total = np.zeros(len(rankings[0]))
    for scores in rankings:
        order = np.argsort(-scores, kind="stable")
        ranked = order[scores[order] > 0]
        total[ranked] += 1 / (FUSION + 1 + np.arange(len(ranked)))
    best = np.argsort(-total, kind="stable")
    return [int(one) for one in best if total[one] > 0]
