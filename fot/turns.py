"""What is read for a turn of a conversation, and what is answered."""

from dataclasses import dataclass

from fot.trace import Passage


@dataclass(frozen=True)
class Prompt:
    """A turn that is about to be answered.

    Attributes:
        text: what the user says.
        ids: of the whole conversation, up to where the model is to answer.
        found: passages that the turn is about, and how many of them stand in front of it; None if none do.
        begun: when, by ``time.perf_counter``.
    """

    text: str
    ids: list[int]
    found: tuple[list[Passage], int] | None
    begun: float


@dataclass(frozen=True)
class Answer:
    """The answer to one turn.

    Attributes:
        text: the answer.
        passages: what the answer was read from, best first. If passages were read again, these come first; the others
            were found by the same ranking. Otherwise the passages that received most attention during the answer.
        read_again: how many of ``passages`` stood in front of the question.
        prompt_tokens: number of tokens in this turn's prompt.
        known_tokens: tokens of the conversation before those, which were not read again.
        answer_tokens: number of tokens generated.
        ended: whether the answer was ended by the model or by the caller's ``stop``, not by ``max_new_tokens``.
        first_token_seconds: time from the question to the first token.
        seconds: time from the question to the last token.
    """

    text: str
    passages: list[Passage]
    read_again: int
    prompt_tokens: int
    known_tokens: int
    answer_tokens: int
    ended: bool
    first_token_seconds: float
    seconds: float
