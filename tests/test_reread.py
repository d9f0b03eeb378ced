"""Passages that are read again: what the model reads, what later turns see, and that loops are held off."""

from pathlib import Path
from typing import Any

import pytest
import torch
from test_ask import TEMPLATE
from test_chat import assert_same, failing, state_of
from transformers import PreTrainedTokenizerFast
from wide import make_wide

from fot.ask import ANSWER_ROOM, Conversation, ask
from fot.cli import main
from fot.greedy import REPETITION_PENALTY

WINDOW = 512
BEFORE, AFTER = (
    "".join(f"It was {word} evening in the {word} town, and nobody would have gone out. " for word in words.split())
    for words in ("dark cold old late", "wet small grey long still")
)
TEXT = BEFORE + "The vicar of Highbury is Mr Elton, a young man whom all like.\n\n" + AFTER
QUESTION = "Who is the vicar of Highbury?"


@pytest.fixture
def model(tokenizer: PreTrainedTokenizerFast) -> Any:
    return make_wide(tokenizer, WINDOW)


@pytest.fixture(params=[False, True], ids=["plain", "template"])
def templated(request: pytest.FixtureRequest, model: Any) -> bool:
    if request.param:
        model.tokenizer.chat_template = TEMPLATE
    return request.param


@pytest.fixture
def memory(model: Any) -> Any:
    stored = model.new_memory()
    model.ingest(TEXT, stored, "book.txt")
    return stored


def prompts(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The prompt of each generation from here on."""
    seen: list[list[int]] = []
    generate = type(model).generate

    def spy(self: Any, inputs: torch.Tensor, *args: Any, **options: Any) -> Any:
        seen.append(inputs[0].tolist())
        return generate(self, inputs, *args, **options)

    monkeypatch.setattr(type(model), "generate", spy)
    return seen


def test_a_follow_up_is_searched_for_with_the_question_before_it(model: Any, memory: Any, templated: bool) -> None:
    options = {"max_new_tokens": 2, "reread": "bm25"}
    first = Conversation(model, memory, use_chat_template=templated)
    assert first.say("Then why?", **options).read_again == 0  # no word of it is in the text
    for follow_up in ("Then why?", "Is he?"):
        chat = first.anew()
        chat.say(QUESTION, **options)
        answer = chat.say(follow_up, **options)
        assert answer.read_again
        assert "vicar of Highbury is Mr Elton" in answer.passages[0].text
    own = "Was it still, grey and long?"
    assert chat.say(own, **options).passages == first.anew().say(own, **options).passages


@pytest.mark.parametrize("way", ["auto", "attention", "bm25", "both"])
def test_passages_stand_before_the_question(
    model: Any, memory: Any, templated: bool, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = prompts(model, monkeypatch)
    answer = ask(model, memory, QUESTION, reread=way, max_new_tokens=5, num_passages=4)
    text = model.tokenizer.decode(seen[0])
    assert 1 <= answer.read_again <= len(answer.passages)
    assert text.count("From book.txt:") == answer.read_again
    places = [text.index(passage.text) for passage in answer.passages[: answer.read_again]]
    assert places == sorted(places, reverse=True)  # the best is next to the question
    assert max(places) < text.index(QUESTION)
    assert len(seen[0]) + 5 <= WINDOW
    assert answer.prompt_tokens == len(seen[0])
    if way == "bm25":
        assert "vicar of Highbury is Mr Elton" in answer.passages[0].text


def test_a_model_is_told_files_and_no_folders(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """So an answer does not depend on where the files of a memory were when it was built."""
    seen, answers = prompts(model, monkeypatch), []
    for name in ("/home/reader/old books/book.txt", "book.txt", "../book.txt"):
        memory = model.new_memory()
        model.ingest(TEXT, memory, name)
        answers.append(ask(model, memory, QUESTION, max_new_tokens=5))
        assert {passage.document for passage in answers[-1].passages} == {name}
    assert seen[0] == seen[1] == seen[2]
    assert len({answer.text for answer in answers}) == 1
    named = Conversation(model, memory, title=lambda name: f"the file {Path(name).stem}").say(QUESTION)
    assert "From the file book:" in model.tokenizer.decode(seen[3])
    assert named.passages[0].document == "the file book"


def test_the_answer_is_what_generate_gives(model: Any, memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory stays attended."""
    seen = prompts(model, monkeypatch)
    model.generation_config.repetition_penalty = 1.3  # of the checkpoint: holds in both
    answer = ask(model, memory, QUESTION, reread="bm25", max_new_tokens=8)
    ids = torch.tensor([seen[0]])
    again, without = (
        model.generate(ids, max_new_tokens=8, do_sample=False, stop_strings=["\n"], tokenizer=model.tokenizer, **given)
        for given in ({"memory": memory}, {})
    )
    assert answer.text == model.tokenizer.decode(again[0, ids.shape[1] :], skip_special_tokens=True).strip()
    assert not torch.equal(again, without)


def test_off_and_no_memory_read_nothing_again(model: Any, memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = prompts(model, monkeypatch)
    assert ask(model, memory, QUESTION, reread="off", max_new_tokens=2).read_again == 0
    assert Conversation(model, None).say(QUESTION, max_new_tokens=2).read_again == 0
    empty = model.new_memory()
    assert ask(model, empty, QUESTION, reread="both", max_new_tokens=2).read_again == 0
    alone = model.tokenizer(f"\nQuestion: {QUESTION}\nAnswer:").input_ids
    assert seen == [alone] * 3


def test_later_turns_do_not_see_the_passages(
    model: Any, memory: Any, templated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the model has read when it answers is the clean conversation, then this turn's passages and question."""
    seen = prompts(model, monkeypatch)
    chat, turns = Conversation(model, memory), {QUESTION: "bm25", "And when is tea?": "attention", "So?": "off"}
    for turn, way in turns.items():
        chat.say(turn, reread=way, max_new_tokens=4)
    assert [message["content"] for message in chat.messages[::2]] == list(turns)
    first, second, third = (model.tokenizer.decode(ids) for ids in seen)
    assert first.count("From book.txt:") >= 1
    assert second.index(QUESTION) < second.index("From book.txt:")
    assert "From book.txt:" not in third
    assert all(turn in third for turn in turns)
    # Nothing of the passages is left in the window: it is as if the last prompt had been read at once.
    fresh = model.generate(torch.tensor([seen[-1]]), memory=memory, max_new_tokens=1, do_sample=False)
    assert chat._ids[: len(seen[-1]) + 1] == fresh[0].tolist()


def test_a_failed_turn_changes_nothing(model: Any, memory: Any, templated: bool) -> None:
    chat = Conversation(model, memory)
    chat.say(QUESTION, max_new_tokens=4)
    before, told = state_of(chat), list(chat._told)
    for where, at in (("attention", 1), ("head", 2), ("stop", 1)):
        with failing(model, where, at, MemoryError("no memory left")) as options, pytest.raises(MemoryError):
            chat.say("And when is tea?", max_new_tokens=4, **options)
        assert_same(state_of(chat), before)
        assert chat._told == told
    other = Conversation(model, memory)
    other.say(QUESTION, max_new_tokens=4)
    assert chat.say("So?", max_new_tokens=4).text == other.say("So?", max_new_tokens=4).text


def test_no_room(tokenizer: PreTrainedTokenizerFast) -> None:
    model = make_wide(tokenizer, 64)
    memory = model.new_memory()
    model.ingest(TEXT, memory, "book.txt")
    assert ask(model, memory, "Who?", max_new_tokens=4).read_again == 0
    with pytest.raises(ValueError, match=r"no passage fits the window of 64 tokens beside the question.*reread='off'"):
        ask(model, memory, "Who?", max_new_tokens=4, reread="bm25")


def test_room_is_left_for_the_answer(model: Any, memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = prompts(model, monkeypatch)
    ask(model, memory, QUESTION, max_new_tokens=200, stop=lambda: True)
    assert len(seen[0]) + ANSWER_ROOM <= WINDOW


def test_another_way_is_refused(model: Any, memory: Any) -> None:
    with pytest.raises(ValueError, match="reread is 'guess'; choose one of auto, attention, bm25, both, off"):
        ask(model, memory, QUESTION, reread="guess")


def loop(model: Any, memory: Any) -> list[int]:
    chat = Conversation(model, memory)
    chat.say(QUESTION, max_new_tokens=60, reread="off")
    return chat._ids[len(model.tokenizer(f"\nQuestion: {QUESTION}\nAnswer:").input_ids) :]


def test_repetition_is_held_off_in_the_answer_alone(model: Any, memory: Any) -> None:
    """The answer's own tokens are less likely to come again; those of the prompt are as likely as ever."""
    model.generation_config.suppress_tokens = [2, *model.tokenizer("\n", add_special_tokens=False).input_ids]
    ids = model.tokenizer(f"\nQuestion: {QUESTION}\nAnswer:").input_ids
    expected = list(ids)
    for _ in range(60):
        logits = model(torch.tensor([expected]), memory=memory, use_cache=False, logits_to_keep=1).logits[0, -1]
        for token in set(expected[len(ids) :]):
            logits[token] = (
                logits[token] / REPETITION_PENALTY if logits[token] > 0 else logits[token] * REPETITION_PENALTY
            )
        logits[model.generation_config.suppress_tokens] = -torch.inf
        expected.append(int(logits.argmax()))
    assert loop(model, memory) == expected[len(ids) :]


@pytest.mark.parametrize("settings", [{"repetition_penalty": 1.7}, {"no_repeat_ngram_size": 2}])
def test_settings_of_the_checkpoint_hold(model: Any, memory: Any, settings: dict[str, Any]) -> None:
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    ids = torch.tensor([model.tokenizer(f"\nQuestion: {QUESTION}\nAnswer:").input_ids])
    expected = model.generate(
        ids, memory=memory, max_new_tokens=60, do_sample=False, stop_strings=["\n"], tokenizer=model.tokenizer
    )
    assert loop(model, memory) == expected[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("way", ["auto", "bm25", "off"])
def test_command(model: Any, memory: Any, tmp_path: Path, capsys: pytest.CaptureFixture, way: str) -> None:
    model.save_pretrained(tmp_path / "model")
    model.tokenizer.save_pretrained(tmp_path / "model")
    memory.metadata |= {"model": str(tmp_path / "model"), "memory": model.memory_config.to_dict()}
    memory.save(tmp_path / "memory")
    options = ["--dtype", "float32", "--device", "cpu", "--max-new-tokens", "3", "--reread", way]
    assert main(["ask", str(tmp_path / "memory"), QUESTION, *options]) == 0
    shown = capsys.readouterr()
    assert ("read again: the first" in shown.err) == (way != "off")
    assert "book.txt" in shown.out
    assert "DEBUG" not in shown.err
    assert "Building index" not in shown.err
