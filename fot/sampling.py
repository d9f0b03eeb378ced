"""How an answer's tokens are drawn, and their probabilities."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
        temperature: 0 takes the likeliest token each time.
        top_p: draws from the likeliest tokens that together have this probability, above 0 and at most 1.
        seed: of the draws; None: another one each time.

    Raises:
        ValueError: a number out of range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 2:
            raise ValueError(f"temperature is {self.temperature}; it must be 0..2")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must be above 0 and at most 1")

    def options(self) -> dict[str, Any]:
        """Arguments of ``generate``."""
        if self.temperature == 0:
            return {}
        return {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}

    @contextmanager
    def seeded(self) -> Iterator[None]:
        """Within, draws depend on the seed alone. Other threads must not draw meanwhile."""
        if self.seed is None or self.temperature == 0:
            yield
            return
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            yield


GREEDY = Sampling()


@dataclass(frozen=True)
class Scored:
    """A token of an answer with its log-probability by the model.

    It is that before temperature, top_p and the penalty that holds off loops. Penalties that the checkpoint's
    generation settings name come before it.

    Attributes:
        token: its id.
        logprob: its log-probability.
        top: (id, log-probability) of the likeliest tokens in its place, likeliest first.
    """

    token: int
    logprob: float
    top: list[tuple[int, float]]


class Scorer(LogitsProcessor):
    """Takes note of the probabilities of an answer's tokens; it changes none.

    Args:
        count: likeliest tokens that are noted in each place.

    Attributes:
        scored: tokens so far.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._logits: Tensor | None = None
        self.scored: list[Scored] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Called by ``generate`` before each token, with logits (1, V)."""
        self._logits = scores[0].float()
        return scores

    def chosen(self, token: int) -> None:
        """Called with each token that was chosen."""
        assert self._logits is not None
        self.scored.append(score(self._logits, token, self._count))


def score(logits: Tensor, token: int, count: int) -> Scored:
    """A token and the likeliest ones in its place, by their logits (V,)."""
    logprobs = logits.log_softmax(-1)
    values, ids = logprobs.topk(min(count, len(logprobs)))
    return Scored(token, float(logprobs[token]), list(zip(ids.tolist(), values.tolist(), strict=True)))
