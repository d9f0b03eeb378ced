"""``fot ask``, ``fot chat`` and their Python API."""

import builtins
import copy
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ModelMaker
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from fot import FoTForCausalLM, attach_memory
from fot.ask import Conversation, ask
from fot.cli import main
from fot.fingerprint import tokenizer_fingerprint

WINDOW = 64
TEXT = "The vicar of Highbury is Mr Elton. Tea is at five in the garden.\n" * 4
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def model(make_model: ModelMaker, tokenizer: PreTrainedTokenizerFast) -> Any:
    made = make_model(local_context=WINDOW, layers=5)
    made.tokenizer = copy.deepcopy(tokenizer)
    return made


@pytest.fixture
def memory(model: Any) -> Any:
    stored = model.new_memory()
    model.ingest(TEXT, stored, "text.txt")
    return stored


@pytest.fixture(params=[False, True], ids=["plain", "template"])
def templated(request: pytest.FixtureRequest, model: Any) -> bool:
    if request.param:
        model.tokenizer.chat_template = TEMPLATE
    return request.param


def test_answer_is_what_generate_gives(model: Any, memory: Any, templated: bool) -> None:
    before, pieces = len(memory), []
    answer = ask(model, memory, "Who is it?", max_new_tokens=12, on_text=pieces.append)
    text = "<user>Who is it?</s>\n<assistant>" if templated else "\nQuestion: Who is it?\nAnswer:"
    ids = torch.tensor([model.tokenizer(text, add_special_tokens=not templated).input_ids])
    stop = {} if templated else {"stop_strings": ["\n"], "tokenizer": model.tokenizer}
    output = model.generate(ids, memory=memory, max_new_tokens=12, do_sample=False, **stop)
    expected = output[0, ids.shape[1] :]
    assert answer.text == model.tokenizer.decode(expected, skip_special_tokens=True).strip()
    assert answer.text == "".join(pieces).strip()
    assert (answer.prompt_tokens, answer.answer_tokens) == (ids.shape[1], len(expected))
    assert 0 < answer.first_token_seconds <= answer.seconds
    assert len(memory) == before
    assert sum(passage.share for passage in answer.passages) <= 1 + 1e-6
    assert {passage.document for passage in answer.passages} <= {"text.txt", "(prompt)"}
    assert answer.passages[0].share >= answer.passages[-1].share > 0


def test_second_turn_answers_as_one_prompt_of_both_does(model: Any, memory: Any) -> None:
    chat = Conversation(model, memory)
    chat.say("A?", max_new_tokens=4)
    first = len(chat._ids)
    chat.say("B?", max_new_tokens=4)
    turn = len(model.tokenizer("\nQuestion: B?\nAnswer:").input_ids)
    prompt = torch.tensor([chat._ids[: first + turn]])
    output = model.generate(
        prompt, memory=memory, max_new_tokens=4, do_sample=False, stop_strings=["\n"], tokenizer=model.tokenizer
    )
    assert output[0].tolist() == chat._ids


def test_old_turns_move_to_a_memory_of_the_conversation(model: Any, memory: Any, templated: bool) -> None:
    chat = Conversation(model, memory)
    before = len(memory)
    for turn in ("Who is it?", "And the tea, when is that?", "Where?"):
        chat.say(turn, max_new_tokens=30)
    assert len(chat.messages) == 6
    own = chat._cache.rows[0].own
    assert len(memory) == before
    assert len(own) > 0  # three turns are longer than the window
    text = model.tokenizer.decode(own.token_ids())
    assert "Who is it?" in text
    if templated:
        assert model.tokenizer.decode(chat._ids).count("<user>") == 3
        assert "</s></s>" not in model.tokenizer.decode(chat._ids)


def test_a_turn_sees_the_turn_before(model: Any, memory: Any, templated: bool) -> None:
    def second(first: str) -> torch.Tensor:
        chat = Conversation(model, memory)
        chat.say(first, max_new_tokens=1)
        chat.say("So?", max_new_tokens=1)
        return chat._cache.local.layers[-1].keys[0, :, -1]

    assert not torch.equal(second("The king is old?"), second("The cat is cold?"))


@pytest.mark.parametrize(("question", "message"), [("  ", "empty"), ("x" * (WINDOW + 1), f"the window has {WINDOW}")])
def test_bad_questions(model: Any, memory: Any, question: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ask(model, memory, question)


def test_without_a_template(model: Any, memory: Any) -> None:
    with pytest.raises(ValueError, match="no chat template"):
        Conversation(model, memory, use_chat_template=True)


@pytest.fixture
def folder(model: Any, memory: Any, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path / "model")
    model.tokenizer.save_pretrained(tmp_path / "model")
    memory.metadata |= {"model": str(tmp_path / "model"), "memory": model.memory_config.to_dict()}
    memory.save(tmp_path / "memory")
    return tmp_path / "memory"


OPTIONS = ["--dtype", "float32", "--device", "cpu", "--max-new-tokens", "8"]


def test_ask_command(folder: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["ask", str(folder), "Who is it?", *OPTIONS]) == 0
    shown = capsys.readouterr()
    assert "text.txt" in shown.out
    assert "first token after" in shown.err


def test_a_memory_made_in_python_is_asked_by_its_folder(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Model, settings and tokenizer are in it, as in one that ``fot memory build`` made; paths are absolute."""
    monkeypatch.chdir(tmp_path)
    loaded = FoTForCausalLM.from_pretrained("model", dtype=torch.float32)
    attached = attach_memory(AutoModelForCausalLM.from_pretrained("model"), loaded.memory_config)
    attached.tokenizer = loaded.tokenizer
    for name, one in (("loaded", loaded), ("attached", attached)):
        made = one.new_memory()
        one.ingest("Who is it? A text to be asked about.", made, "letter")
        assert made.metadata["memory"] == loaded.memory_config.to_dict()
        assert made.metadata["tokenizer"] == tokenizer_fingerprint(loaded.tokenizer)
        made.save(tmp_path / name)
        monkeypatch.chdir("/")
        assert main(["ask", str(tmp_path / name), "Who is it?", *OPTIONS]) == 0
        assert "letter" in capsys.readouterr().out
        monkeypatch.chdir(tmp_path)


def type_in(monkeypatch: pytest.MonkeyPatch, *turns: str) -> None:
    """What is typed at the prompt of ``fot chat``, and then Ctrl-D."""
    left = iter(turns)

    def typed(prompt: str) -> str:
        try:
            return next(left)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr(builtins, "input", typed)


def test_chat_command(folder: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    type_in(monkeypatch, "Who is it?", "", "x" * 100, "Where?")
    assert main(["chat", str(folder), *OPTIONS]) == 0
    shown = capsys.readouterr()
    assert shown.out.count("text.txt") >= 2
    assert shown.err.count("first token after") == 2
    assert "but the window has 64" in shown.err
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before


def test_texts_and_names_are_shown_as_they_are(
    model: Any, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Brackets are no markup, and what would steer the terminal does not reach it."""
    odd = model.new_memory()
    model.ingest("if a[/b]: [red]c\x1b[31m", odd, "[bold]odd\x1b\udcff.txt")
    odd.metadata = {"model": str(tmp_path / "model"), "memory": model.memory_config.to_dict()}
    odd.save(tmp_path / "odd")
    for command in (["ask", str(tmp_path / "odd"), "Who?", *OPTIONS], ["memory", "info", str(tmp_path / "odd")]):
        assert main(command) == 0
        shown = capsys.readouterr().out
        assert "[bold]odd\ufffd\ufffd.txt" in shown
        assert "\x1b" not in shown
        assert command[0] != "ask" or "a[/b]: [red]c\ufffd[31m" in shown


def test_an_empty_memory(model: Any, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    empty = model.new_memory()
    empty.metadata = {"model": str(tmp_path / "model"), "memory": model.memory_config.to_dict()}
    empty.save(tmp_path / "empty")
    assert main(["ask", str(tmp_path / "empty"), "Who?", *OPTIONS]) == 0
    assert "the memory is empty" in capsys.readouterr().out


def test_command_errors(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    ask_for: Callable[..., int] = lambda *parts: main(["ask", *parts, *OPTIONS])  # noqa: E731
    assert ask_for(str(folder), "x" * 100) == 2
    assert "but the window has 64" in capsys.readouterr().err
    assert ask_for(str(tmp_path / "nothing"), "Who?") == 2
    assert "nothing" in capsys.readouterr().err


def test_a_stopped_answer_leaves_the_conversation_whole(model: Any, memory: Any, templated: bool) -> None:
    pieces: list[str] = []
    chat = Conversation(model, memory)
    answer = chat.say("Who?", max_new_tokens=20, on_text=pieces.append, stop=lambda: len(chat.messages) == 0)
    assert answer.answer_tokens == 1
    again = Conversation(model, memory)
    again.say("Who?", max_new_tokens=1)
    one, other = (talk.say("So?", max_new_tokens=5) for talk in (chat, again))
    assert one.text == other.text
    assert chat._ids == again._ids


def test_ctrl_c_ends_an_answer_and_not_the_chat(
    folder: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    type_in(monkeypatch, "Who is it?", "Where?")
    said, say = [], Conversation.say

    def interrupted(self: Conversation, text: str, **options: Any) -> Any:
        if not said:
            signal.raise_signal(signal.SIGINT)
        said.append(say(self, text, **options))
        return said[-1]

    monkeypatch.setattr(Conversation, "say", interrupted)
    assert main(["chat", str(folder), *OPTIONS]) == 0
    assert said[0].answer_tokens == 1
    assert len(said) == 2


def test_other_windows_than_the_memorys(folder: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["ask", str(folder), "Who?", *OPTIONS, "--local-context", "32"]) == 2
    assert "windows of 64 tokens: omit --local-context" in capsys.readouterr().err
