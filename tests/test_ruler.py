"""Questions about long texts: the text holds what the question asks for, and only what is in the answer counts."""

import json
import random
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import ModelMaker
from transformers import PreTrainedTokenizerFast

import fot
from fot.cli import main
from fot.compat import CACHE
from fot.evaluation import few_shot, ruler
from fot.evaluation.answers import without_memory
from fot.evaluation.intervals import wilson
from fot.tasks.ruler import REWORDED, TASKS, make_probe

FILLER = "It was a bright cold day in the harbour, and nobody spoke of anything but the weather. "
LENGTH = 6000


@pytest.fixture(scope="module")
def filler(tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    return [tokenizer(FILLER * 20).input_ids]


@pytest.mark.parametrize("task", TASKS)
def test_the_text_holds_the_answer(task: str, tokenizer: PreTrainedTokenizerFast, filler: list[list[int]]) -> None:
    rng = random.Random(task)
    probes = [make_probe(task, tokenizer, filler, LENGTH, rng) for _ in range(5)]
    for probe in probes:
        text = tokenizer.decode(probe.ids)
        assert 0.8 * LENGTH <= len(probe.ids) <= 1.2 * LENGTH
        assert len(set(probe.answers)) == len(probe.answers)
        assert all(answer in text for answer in probe.answers)
        assert not any(answer in probe.question + probe.stem for answer in probe.answers)
    assert len({probe.answers for probe in probes}) > 1
    again = make_probe(task, tokenizer, filler, LENGTH, random.Random(task))
    assert again == probes[0]


def test_answers_follow_from_the_text(tokenizer: PreTrainedTokenizerFast, filler: list[list[int]]) -> None:
    """Worked out from the text alone."""
    rng = random.Random(1)
    for _ in range(5):
        probes = {task: make_probe(task, tokenizer, filler, LENGTH, rng) for task in TASKS}
        texts = {task: tokenizer.decode(probe.ids) for task, probe in probes.items()}
        for task in ("single", "multikey", "multivalue", "multiquery"):
            told = re.findall(r"special magic numbers for (\S+) is: (\d+)\.", texts[task])
            right = {number for name, number in told if name in probes[task].question}
            assert right == set(probes[task].answers)
        last = re.findall(r"(\w+) (?:went|moved|travelled|journeyed)[ \w]* the (\w+)\.", texts["moves"])
        person = re.search(r"Where is (\w+) now", probes["moves"].question)
        assert person is not None
        assert dict(last)[person[1]] == probes["moves"].answers[0]
        values: dict[str, str] = {}
        for name, value in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", texts["variables"]):
            values[name] = values.get(value, value)
        assert set(values) == set(probes["variables"].answers)
        assert len(set(values.values())) == 1
        words = Counter(re.findall(r"\d+\. (\w+)", texts["common"]))
        assert {word for word, _ in words.most_common(10)} == set(probes["common"].answers)
        coded = Counter(word for word in texts["frequent"].split() if word != "...")
        assert sorted((coded[word] for word in probes["frequent"].answers), reverse=True)[0] == max(coded.values())


def test_reworded_questions_share_no_word_with_what_is_told() -> None:
    little = {"has", "been", "to", "the", "a", "in", "is", "and", "at", "of", "may", "must", "for"}
    for told, asked in REWORDED:
        words = [set(re.findall(r"[a-z]+", text.lower())) - little for text in (told, asked)]
        assert not words[0] & words[1], (told, asked)


def test_score() -> None:
    assert ruler.score("They are 12, 345 and 6.", ("12", "345")) == 1
    assert ruler.score("They are 123 and 345", ("12", "345")) == 0.5
    assert ruler.score("The KITCHEN.", ("kitchen",)) == 1


def test_intervals_are_wilsons() -> None:
    """Against the table of Newcombe (Statistics in Medicine, 1998, table I, method 3)."""
    for right, trials, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611)):
        assert wilson(right, trials) == pytest.approx((low, high), abs=5e-5)


def test_conditions(make_model: ModelMaker, tokenizer: PreTrainedTokenizerFast, filler: list[list[int]]) -> None:
    model = make_model(local_context=64, last_context_length=32)
    model.tokenizer = tokenizer
    model.config.max_position_embeddings = 700  # rotary positions are computed, so they go on
    found = ruler.run(model, filler, ["single", "moves"], [400, 900], trials=2)
    shape = [(entry["task"], entry["length"], len(entry["trials"])) for entry in found["results"]]
    assert shape == [("single", 400, 2), ("moves", 400, 2), ("single", 900, 2), ("moves", 900, 2)]
    assert [entry["in_context"] is None for entry in found["results"]] == [False, False, True, True]
    trial = found["results"][0]["trials"][0]
    assert len(set(trial["answers"].values())) > 1
    assert isinstance(model, fot.FoTForCausalLM)  # with memory again


def test_few_shot(make_model: ModelMaker, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    file = tmp_path / "examples"
    file.write_text("A What is a?\nB What is b?\n\nA And what is c?\n")
    examples = few_shot.read_examples(file)
    assert examples == [("A", "What is a?"), ("B", "What is b?"), ("A", "And what is c?")]
    assert few_shot.shot("A", "What is a?").startswith(few_shot.shot("", "What is a?"))
    model = make_model(local_context=64, last_context_length=60)
    model.tokenizer = tokenizer
    found = few_shot.run(model, examples * 9, examples, [0, 100, 300], trials=3)["results"]
    assert found[0]["examples"] == 0
    assert 60 < found[1]["length"] <= 100 < 260 < found[2]["length"] <= 300
    assert all(entry["memory"]["trials"] == 3 for entry in found)
    # So much stays local, the question and its answer in it.
    assert found[0]["stored"] == 0
    assert found[0]["local"] is None
    longest = max(len(few_shot.encode(tokenizer, few_shot.shot("", text))) for _, text in examples)
    longest += few_shot.LABEL_TOKENS
    assert [entry["length"] - entry["stored"] for entry in found[1:]] == [60 - longest] * 2
    assert all(entry["local"]["trials"] == 3 for entry in found[1:])
    # The examples are read once for all questions, and answers are those to the whole text.
    ids = [token for label, text in examples * 3 for token in tokenizer(few_shot.shot(label, text)).input_ids]
    answers: dict[bool, list[str]] = {True: [], False: []}
    with torch.no_grad(), without_memory(model) as plain:
        read = getattr(plain(torch.tensor([ids]), use_cache=True), CACHE)
        for kept, said in answers.items():
            cache = read if kept else None
            few_shot._accuracy(plain, ids, examples, lambda *found, to=said: to.append(found[2]), cache)
    assert answers[True] == answers[False]
    assert any(answers[True])
    with pytest.raises(ValueError, match="3 examples have"):
        few_shot.run(model, examples, examples, [1000])
    file.write_text("A\n")
    with pytest.raises(ValueError, match="line 1 is 'A'"):
        few_shot.read_examples(file)


def test_commands(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "out.json"
    text.write_text(FILLER * 20)
    options = ["--mem-layers", "1,3", "--local-context", "64", "--json", str(out)]
    command = ["eval", "ruler", str(checkpoint), str(text), *options, "--lengths", "500", "--trials", "1"]
    assert main([*command, "--tasks", "single,moves"]) == 0
    assert "0% (0%-79%)" in capsys.readouterr().out
    assert [entry["task"] for entry in json.loads(out.read_text())["results"]] == ["single", "moves"]
    with pytest.raises(SystemExit):
        main([*command, "--tasks", "single,none"])
    assert "'none' is no task: choose from single, multikey" in capsys.readouterr().err
    text.write_text("A What is a?\nB What is b?\n" * 9)
    assert main(["eval", "few-shot", str(checkpoint), str(text), str(text), *options, "--lengths", "0,90"]) == 0
    assert len(json.loads(out.read_text())["results"]) == 2
