"""Turns answered in one batch are what they are alone."""

from typing import Any

import pytest
from test_ask import TEMPLATE
from transformers import PreTrainedTokenizerFast
from wide import make_wide

from fot.ask import Conversation
from fot.sampling import Scorer
from fot.together import Turn, pays, say_together
from fot.turns import Answer

TEXT = (
    "It was a dark evening in the old town, and nobody would have gone out. " * 4
    + "The vicar of Highbury is Mr Elton, a young man whom all like.\n\n"
    + "It was a wet evening in the small town, and nobody would have gone out. " * 4
    + "A ship left the harbour of Lyme at dawn, and nobody saw it again.\n\n"
)
QUESTIONS = (
    "Who is the vicar of Highbury?",
    "What left the harbour?",
    "Who saw the ship at Lyme again?",
    "Was it dark?",
)
WINDOW = 512
LONG = 220  # behind a prompt, past the window


@pytest.fixture(params=[False, True], ids=["plain", "template"])
def model(request: pytest.FixtureRequest, tokenizer: PreTrainedTokenizerFast) -> Any:
    made = make_wide(tokenizer, WINDOW)
    if request.param:
        made.tokenizer.chat_template = TEMPLATE
    return made


@pytest.fixture
def memory(model: Any) -> Any:
    stored = model.new_memory()
    model.ingest(TEXT, stored, "book.txt")
    return stored


class Heard:
    """A turn, and all that is told of it."""

    def __init__(self, conversation: Conversation, text: str, most: int, stop_after: int = 10**9) -> None:
        self.pieces: list[str] = []
        self.scorer = Scorer(2)
        self.told: list[Answer | Exception] = []
        self.options: dict[str, Any] = {
            "max_new_tokens": most,
            "on_text": self.pieces.append,
            "stop": lambda: len(self.scorer.scored) >= stop_after,
            "scorer": self.scorer,
        }
        self.turn = Turn(conversation, text, on_answer=self.told.append, **self.options)

    def alone(self) -> "Heard":
        self.told.append(self.turn.conversation.say(self.turn.text, **self.options))
        return self

    @property
    def answer(self) -> Answer:
        (answer,) = self.told
        assert isinstance(answer, Answer)
        return answer


def same(one: Heard, other: Heard) -> None:
    a, b = one.answer, other.answer
    assert (a.text, a.passages, a.read_again, a.ended) == (b.text, b.passages, b.read_again, b.ended)
    assert (a.prompt_tokens, a.known_tokens, a.answer_tokens) == (b.prompt_tokens, b.known_tokens, b.answer_tokens)
    assert one.pieces == other.pieces
    assert [each.token for each in one.scorer.scored] == [each.token for each in other.scorer.scored]
    for mine, yours in zip(one.scorer.scored, other.scorer.scored, strict=True):
        assert mine.logprob == pytest.approx(yours.logprob, abs=1e-4)


def turns(blank: Conversation) -> list[Heard]:
    """Answers that end by their length at different times, one of them far behind the window, and by their caller."""
    return [
        Heard(blank.anew(), text, most, stop)
        for text, most, stop in zip(QUESTIONS, (3, LONG, 40, 40), (99999, 99999, 7, 99999), strict=True)
    ]


def test_each_gets_what_it_gets_alone(model: Any, memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    blank = Conversation(model, memory)
    assert pays(blank)
    long, last = (turns(blank)[number].alone() for number in (1, 3))
    assert long.answer.prompt_tokens + long.answer.answer_tokens > WINDOW
    written = {each.token for each in long.scorer.scored}
    said = [each.token for each in last.scorer.scored]
    at, end = next((at, token) for at, token in enumerate(said) if at > 4 and token not in written)
    model.generation_config.eos_token_id = [2, end]  # the last ends by itself, the long one does not
    wanted = [long if number == 1 else one.alone() for number, one in enumerate(turns(blank))]
    assert wanted[3].answer.ended
    assert wanted[3].answer.answer_tokens <= at + 1
    sizes: list[int] = []
    generate = type(model).generate

    def spy(self: Any, inputs: Any, *args: Any, **options: Any) -> Any:
        sizes.append(len(inputs))
        return generate(self, inputs, *args, **options)

    monkeypatch.setattr(type(model), "generate", spy)
    given = turns(blank)
    say_together([one.turn for one in given])
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == 4  # and a row leaves when it has ended
    assert sizes[-1] == 1
    for mine, alone in zip(given, wanted, strict=True):
        same(mine, alone)
    for mine, alone in zip(given, wanted, strict=True):  # the conversations go on
        texts = [heard.turn.conversation.say("And his ship?", max_new_tokens=5).text for heard in (mine, alone)]
        assert texts[0] == texts[1]
        assert mine.turn.conversation.messages == alone.turn.conversation.messages
    given[0].turn.conversation.take_back()
    assert given[0].turn.conversation.say("Was it dark?", max_new_tokens=5).text
    assert len(given[0].turn.conversation.messages) == 4


def test_stop_strings_of_the_checkpoint_hold(model: Any, memory: Any) -> None:
    blank = Conversation(model, memory)
    whole = Heard(blank.anew(), QUESTIONS[1], 30).alone()
    model.generation_config.stop_strings = [
        next(one for one in whole.answer.text[3:] if one.isascii() and one.isalnum())
    ]
    wanted = [one.alone() for one in turns(blank)[1:3]]
    assert wanted[0].answer.answer_tokens <= 30
    given = turns(blank)[1:3]
    say_together([one.turn for one in given])
    for mine, alone in zip(given, wanted, strict=True):
        same(mine, alone)


def test_what_goes_wrong_is_told_to_its_turn_alone(model: Any, memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    blank = Conversation(model, memory)
    wanted = [Heard(blank.anew(), text, 6).alone() for text in QUESTIONS[:2]]
    long = Heard(blank.anew(), "why " * WINDOW, 6)
    without_passages = Heard(blank.anew(), "w" * (WINDOW - 80), 6)  # no passage fits beside it
    bad = Heard(blank.anew(), QUESTIONS[2], 6)
    bad.turn.on_text = lambda text: {}[text]
    given = [Heard(blank.anew(), text, 6) for text in QUESTIONS[:2]]
    say_together([one.turn for one in (bad, given[0], long, without_passages, given[1])])
    for mine, alone in zip(given, wanted, strict=True):
        same(mine, alone)
    same(without_passages, Heard(blank.anew(), without_passages.turn.text, 6).alone())
    assert not without_passages.answer.read_again
    (error,) = long.told
    assert isinstance(error, ValueError)
    assert "the question has" in str(error)
    assert isinstance(bad.told[0], KeyError)
    assert bad.turn.conversation.messages == []

    def broken(*args: Any, **options: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(type(model), "generate", broken)
    given = [Heard(blank.anew(), text, 6) for text in QUESTIONS[:2]]
    say_together([one.turn for one in given])
    assert [type(told) for one in given for told in one.told] == [MemoryError, MemoryError]


def test_when_it_pays(model: Any, memory: Any) -> None:
    assert not pays(Conversation(model, None))
    assert not pays(Conversation(model, model.new_memory()))
    for options in ({"index": "clusters"}, {"top_k": 4}, {"index": "Flat"}):
        other = model.new_memory(**options)
        model.ingest(TEXT, other, "book.txt")
        assert not pays(Conversation(model, other)), options
    for name, value in {"repetition_penalty": 1.3, "min_new_tokens": 1, "forced_eos_token_id": 0}.items():
        setattr(model.generation_config, name, value)
        assert not pays(Conversation(model, memory)), name
        setattr(model.generation_config, name, None)
    model.generation_config.repetition_penalty = 1.0
    assert pays(Conversation(model, memory))
