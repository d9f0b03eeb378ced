"""Needles in a novel: exact in length, asked from a memory that is only read, honestly marked."""

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ModelMaker
from transformers import PreTrainedTokenizerFast
from wide import make_wide

from fot.ask import Conversation
from fot.cli import main
from fot.evaluation import needles
from fot.evaluation.report import needles_table
from fot.model import detach_memory

TEXT = "It was a dark evening in the old town, and nobody would have gone out without need. "


@pytest.fixture
def model(make_model: ModelMaker, tokenizer: PreTrainedTokenizerFast) -> Any:
    model = make_model(layers=2, mem_layers=(1,), local_context=64)
    model.tokenizer = tokenizer
    return model


def texts(tokenizer: Any, repeat: int = 5) -> list[list[int]]:
    return [tokenizer(TEXT * repeat, add_special_tokens=False).input_ids]


def test_needles_are_distinct() -> None:
    drawn = needles.draw_needles(random.Random(0), 80)
    assert len({(needle.kind, needle.subject) for needle in drawn}) == len({needle.answer for needle in drawn}) == 80
    for needle in drawn:
        assert needle.answer in needle.statement
        assert needle.answer not in needle.question
        assert needle.subject in needle.statement
        assert needle.subject in needle.question
    assert needles.draw_needles(random.Random(3), 9) == needles.draw_needles(random.Random(3), 9)
    with pytest.raises(ValueError, match="at most 80"):
        needles.draw_needles(random.Random(0), 81)


def test_haystack_is_exact_and_holds_each_needle_once(tokenizer: Any) -> None:
    for seed in range(10):
        haystack = needles.make_haystack(tokenizer, texts(tokenizer), 3000, 5, random.Random(seed))
        assert len(haystack.ids) == 3000
        text = tokenizer.decode(haystack.ids)
        places = [text.index(f"\n{needle.statement}\n") for needle in haystack.needles]
        assert places == sorted(places)
        for needle, place, depth in zip(haystack.needles, places, haystack.depths, strict=True):
            assert text.count(needle.statement) == 1
            assert place / len(text) == pytest.approx(depth, abs=0.01)
        for needle in haystack.needles:
            text = text.replace(f"\n{needle.statement}\n", "")
        assert text in TEXT * 100, "what lies between is consecutive"
    with pytest.raises(ValueError, match=r"5 needles do not fit in 100 tokens: they need \d+ tokens without"):
        needles.make_haystack(tokenizer, texts(tokenizer), 100, 5, random.Random(0))


@pytest.mark.parametrize(
    ("text", "right"),
    [
        (" Oslo.", True),
        ("Oslo", True),
        ("\nOslo, of course", True),
        (" Oslonia", False),
        (" in Oslo", False),
        ("", False),
    ],
)
def test_marking(text: str, right: bool) -> None:
    assert needles._begins_with(text, "Oslo") is right


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("Smoked eel.", True),  # a reply's first letter is a capital
        ("The best is smoked eel, they say.", True),
        ("Smoked eels.", False),
        ("Eel, smoked.", False),
        ("", False),
    ],
)
def test_marking_of_a_reply(text: str, right: bool) -> None:
    assert needles._holds(text, "smoked eel") is right


@torch.no_grad()
def test_answers_are_read_from_the_memory(model: Any) -> None:
    """Teacher forcing and greedy answers are those of the model's own forward pass, with and without the memory."""
    haystack = needles.make_haystack(model.tokenizer, texts(model.tokenizer), 600, 3, random.Random(0))
    memory = model.new_memory()
    model.ingest(haystack.ids, memory)
    for needle in haystack.needles:
        answer = needles.ask(model, needle, 0.5, memory)
        assert len(memory) == 600
        prompt = model.tokenizer(f"\n{needle.question}", add_special_tokens=False).input_ids
        target = model.tokenizer(f" {needle.answer}", add_special_tokens=False).input_ids
        ids = torch.tensor([prompt + target])
        for read, share in ((memory, answer.tokens_right), (None, answer.without["tokens_right"])):
            guesses = model(ids, memory=read).logits[0, len(prompt) - 1 : -1].argmax(-1)
            assert share == pytest.approx(float((guesses == ids[0, len(prompt) :]).float().mean()))
        first = int(model(torch.tensor([prompt]), memory=memory).logits[0, -1].argmax())
        assert answer.answer.startswith(model.tokenizer.decode([first], skip_special_tokens=True)[:1])


def test_an_oracle_is_right_with_the_memory_alone(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It answers as the text in memory says, and cannot without."""

    def oracle(given: Any, ids: list[int], length: int, memory: Any = None) -> str:
        if memory is None:
            return "no idea"
        stem = given.tokenizer.decode(ids).split("? ")[1]
        return given.tokenizer.decode(memory.token_ids().tolist()).split(stem)[1].split("\n")[0]

    monkeypatch.setattr(needles, "greedy_answer", oracle)
    found = needles.run(model, texts(model.tokenizer), [700, 900], needles=4, trials=2, seed=1)
    assert not found["interrupted"]
    for entry in found["results"]:
        assert len(entry["answers"]) == 8
        assert set(entry["kinds"]) == {"birthplace", "pastime", "phone", "sandwich", "all"}
        assert all(shares["correct"] == 1 for shares in entry["kinds"].values())
        assert all(shares["without"]["correct"] == 0 for shares in entry["kinds"].values())
        assert entry["kinds"]["all"]["questions"] == 8
    depths = [answer["depth"] for entry in found["results"] for answer in entry["answers"]]
    assert min(depths) < 0.2
    assert max(depths) > 0.7


def test_chat_asks_in_the_template_and_takes_any_wording(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The question is put without the sentence that answers it; the right answer may stand anywhere in the reply."""
    model.tokenizer = copy.deepcopy(model.tokenizer)
    with pytest.raises(ValueError, match="no chat template"):
        needles.run(model, texts(model.tokenizer), [700], chat=True)
    model.tokenizer.chat_template = (
        "{% for m in messages %}U:{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}M:{% endif %}"
    )
    haystack = needles.make_haystack(model.tokenizer, texts(model.tokenizer), 700, 4, random.Random(0))
    memory = model.new_memory()
    model.ingest(haystack.ids, memory)
    for needle in haystack.needles:
        asked: list[str] = []

        def reply(given: Any, ids: list[int], length: int, memory: Any = None) -> str:
            asked.append(given.tokenizer.decode(ids))  # noqa: B023
            return f"Surely {needle.answer}, no doubt" if memory else f"Surely {needle.answer}ish"  # noqa: B023

        monkeypatch.setattr(needles, "greedy_answer", reply)
        answer = needles.ask(model, needle, 0.5, memory, chat=True)
        assert asked == [f"U:{needle.asked}\nM:"] * 2
        assert (answer.correct, answer.without["correct"]) == (True, 0.0)
        prompt, target = needles.question_ids(model.tokenizer, needle, chat=True)
        assert model.tokenizer.decode(prompt) == f"U:{needle.asked}\nM:{needle.stem}"
        assert model.tokenizer.decode(target) == f" {needle.answer}"


@pytest.mark.parametrize("right", [[1.0, 1.0, 0.5], [0.9, 0.0, 0.5]])
def test_shares_with_the_beginning_given_are_comparable(right: list[float]) -> None:
    """In chat, one context is asked with the beginning of the answer alone; the table has that share of all columns."""
    marks = {"correct": 0.0, "tokens_right": 0.25}
    whole = {"correct": 1.0, "tokens_right": 1.0}
    answers = [needles.Answer("phone", 0.5, "12", "no", False, share, marks, whole) for share in right]
    entry = needles._summary(
        {"length": 700, "answers": answers, "ingest_seconds": 1.0, "ingest_tokens": 700, "memory_bytes": 1}
    )
    shares = entry["kinds"]["phone"]
    begun = sum(share == 1 for share in right) / 3
    assert (shares["correct"], shares["begun"], shares["whole_text"]["begun"]) == (0, begun, 1)
    result = {"model": "m", "dtype": "float32", "seed": 0, "results": [entry], "interrupted": False}
    chat = " ".join(needles_table(result | {"chat": True}).split())
    tokens = f"{sum(right) / 3:.0%}"
    assert f"phone 0% / {begun:.0%} / {tokens} - / 100% / 100% 0% / 0% / 25%" in chat
    line = " ".join(needles_table(result | {"chat": False}).split())
    assert f"phone 0% / {tokens} 100% / 100% 0% / 25%" in line


def test_chat_reads_passages_again_as_fot_ask_does(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(needles, "CHAT_TOKENS", 8)
    model = make_wide(copy.deepcopy(tokenizer), 512)
    with pytest.raises(ValueError, match="ask with chat"):
        needles.run(model, texts(model.tokenizer), [700], reread="auto")
    model.tokenizer.chat_template = (
        "{% for m in messages %}U:{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}M:{% endif %}"
    )
    found = needles.run(
        model, texts(model.tokenizer), [700], needles=2, trials=1, chat=True, reread="bm25", report=lambda *_: None
    )
    haystack = needles.make_haystack(model.tokenizer, texts(model.tokenizer), 700, 2, random.Random("0/700"))
    memory = model.new_memory()
    model.ingest(haystack.ids, memory)
    for needle, answer in zip(haystack.needles, found["results"][0]["answers"], strict=True):
        said = Conversation(model, memory).say(needle.asked, max_new_tokens=needles.CHAT_TOKENS, reread="bm25")
        assert (said.read_again > 0, answer["answer"]) == (True, said.text)


def test_interrupted_run_keeps_its_answers(model: Any) -> None:
    answers = []

    def report(length: int, answer: needles.Answer) -> None:
        answers.append((length, answer))
        if len(answers) == 3:
            raise KeyboardInterrupt

    found = needles.run(model, texts(model.tokenizer), [400, 500, 600], needles=2, trials=1, report=report)
    assert found["interrupted"]
    assert [(entry["length"], entry["kinds"]["all"]["questions"]) for entry in found["results"]] == [(400, 2), (500, 1)]


def test_command(model: Any, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model.save_pretrained(tmp_path / "model")
    model.tokenizer.save_pretrained(tmp_path / "model")
    novel, out = tmp_path / "novel.txt", tmp_path / "out.json"
    novel.write_text(TEXT * 10)
    command = ["eval", "needles", str(tmp_path / "model"), str(novel), "--lengths", "450,500", "--needles", "4",
               "--trials", "1", "--seed", "7", "--json", str(out)]  # fmt: skip
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("sandwich", "phone", "all", "450 tokens", "without memory"))
    first = json.loads(out.read_text())
    assert [len(entry["answers"]) for entry in first["results"]] == [4, 4]
    assert main([*command, "--lengths", "450"]) == 0
    again = json.loads(out.read_text())
    assert [entry["answers"] for entry in again["results"]] == [first["results"][0]["answers"]]
    assert main([*command, "--seed", "8", "--lengths", "450"]) == 0
    assert json.loads(out.read_text())["results"][0]["answers"] != first["results"][0]["answers"]


@torch.no_grad()
def test_whole_text_in_one_context(model: Any) -> None:
    """Where the model has positions for the text, its marks are those of one plain forward pass over all of it."""
    model.config.max_position_embeddings = 4096
    haystack = needles.make_haystack(model.tokenizer, texts(model.tokenizer), 500, 2, random.Random(0))
    marks = needles._read_whole(model, haystack)
    needle = haystack.needles[0]
    prompt, target = needles.question_ids(model.tokenizer, needle)
    found = marks(needle)
    assert found is not None
    plain = detach_memory(model)
    logits = plain(torch.tensor([haystack.ids + prompt + target])).logits[0, -len(target) - 1 : -1]
    right = (logits.argmax(-1) == torch.tensor(target)).float()
    assert found == {"correct": float(right.all()), "tokens_right": pytest.approx(float(right.mean()))}
    model.config.max_position_embeddings = 500
    assert needles._read_whole(model, haystack)(needle) is None
