"""The passkey test itself: prompts as the paper's, exact in length, and honest marking."""

import random
import re
from typing import Any

import pytest
import torch
from conftest import ModelMaker
from transformers import PreTrainedTokenizerFast

from fot.evaluation import passkey
from fot.evaluation.report import passkey_table


@pytest.mark.parametrize("length", [350, 777, 2048])
def test_prompt_is_exact_and_in_the_papers_words(length: int, tokenizer: PreTrainedTokenizerFast) -> None:
    for seed in range(10):
        prompt = passkey.make_prompt(tokenizer, length, random.Random(seed))
        assert len(prompt.ids) == length
        text = tokenizer.decode(prompt.ids)
        assert text.startswith(
            "There is an important info hidden inside a lot of irrelevant text. Find it and memorize"
        )
        assert text.endswith("\nWhat is the pass key? The pass key is")
        needle = f"\nThe pass key is {prompt.key}. Remember it. {prompt.key} is the pass key.\n"
        assert text.count(needle) == 1
        before, after = text.split(needle)
        filler = before.removeprefix(passkey.TASK + "\n")
        assert len(filler) / (len(filler) + after.rindex("\nWhat")) == pytest.approx(prompt.depth, abs=0.01)
        assert (passkey.FILLER + " ").startswith(filler[: len(passkey.FILLER)])


def test_seed_draws_keys_and_depths(tokenizer: PreTrainedTokenizerFast) -> None:
    first = passkey.make_prompts(tokenizer, 500, 8, seed=1)
    assert first == passkey.make_prompts(tokenizer, 500, 8, seed=1)
    assert first[:3] == passkey.make_prompts(tokenizer, 500, 3, seed=1)
    other = passkey.make_prompts(tokenizer, 500, 8, seed=2)
    assert {prompt.key for prompt in first}.isdisjoint(prompt.key for prompt in other)
    assert max(prompt.depth for prompt in first) - min(prompt.depth for prompt in first) > 0.3


def test_too_short(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match=r"a passkey prompt of 10 tokens is too short: it needs at least \d\d\d"):
        passkey.make_prompt(tokenizer, 10, random.Random(0))


@pytest.mark.parametrize(
    ("answer", "correct"),
    [(" 1234.", True), ("1234", True), ("\n1234\n", True), (" 12345", False), (" 123", False), (" is 1234", False),
     ("", False), (" 01234", False)],
)  # fmt: skip
def test_marking(answer: str, correct: bool) -> None:
    prompt = passkey.Prompt([1, 2, 3], 1234, 0.5)
    assert passkey._trial(prompt, answer, 1.0).correct is correct


class Oracle:
    """Stands in for generate: knows the key if the needle was read, by the memory or by the prompt."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.tokenizer, self.model = tokenizer, model

    def __call__(self, prompt: torch.Tensor, memory: Any = None, **options: Any) -> torch.Tensor:
        read = ([] if memory is None else memory.token_ids().tolist()) + prompt[0].tolist()
        found = re.search(r"The pass key is (\d+)\. Remember", self.tokenizer.decode(read))
        answer = self.tokenizer(f" {found.group(1)}. " if found else " no idea").input_ids
        return torch.cat([prompt, torch.tensor([answer])], dim=1)


@pytest.fixture
def model(make_model: ModelMaker, tokenizer: PreTrainedTokenizerFast) -> Any:
    model = make_model()
    model.tokenizer = tokenizer
    return model


def test_every_token_is_read_once(
    model: Any, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(model), "generate", lambda self, *a, **k: Oracle(self, tokenizer)(*a, **k))
    monkeypatch.setattr(passkey, "detach_memory", lambda model: model)
    found = passkey.run(model, [400, 500], 3, seed=0)
    assert [entry["accuracy"] for entry in found["results"]] == [1.0, 1.0]
    # The plain model has 64 positions, and the key is further back than that.
    assert [entry["accuracy"] for entry in found["baseline"]] == [0.0, 0.0]
    for entry in found["results"]:
        assert entry["length"] in (400, 500)
        for trial in entry["trials"]:
            assert {"depth", "key", "answer", "correct"} <= set(trial)
        assert entry["trials"][0]["ingest_tokens"] == entry["length"] - 8
        assert entry["trials"][-1]["ingest_tokens"] < entry["length"] - 8  # the beginning is there already


@pytest.mark.parametrize("settings", [{}, {"isolated_windows": True}, {"isolated_windows": True, "window_overlap": 5}])
def test_shared_beginnings_change_nothing(
    make_model: ModelMaker, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, settings: Any
) -> None:
    model = make_model(**settings)
    model.tokenizer = tokenizer
    memories: list[Any] = []
    monkeypatch.setattr(passkey, "_answer", lambda model, ids, memory: memories.append(memory) or "")
    prompts = sorted(passkey.make_prompts(tokenizer, 450, 3, seed=3), key=lambda prompt: prompt.common)
    beginning = passkey.Beginning(model.new_memory())
    for prompt in prompts:
        shared = passkey.answer_from_memory(model, prompt, beginning=beginning)
        alone = passkey.answer_from_memory(model, prompt)
        assert shared.ingest_tokens <= alone.ingest_tokens == 450 - 8
        one, other = memories[-2:]
        assert one.token_ids().tolist() == other.token_ids().tolist() == prompt.ids[: 450 - 8]
        for layer in one.layers:
            torch.testing.assert_close(one[layer].keys(), other[layer].keys(), atol=1e-4, rtol=1e-4)
    assert shared.ingest_tokens < alone.ingest_tokens
    assert 0 < beginning.tokens <= prompts[-1].common


def test_run_on_a_real_if_tiny_model(model: Any) -> None:
    found = passkey.run(model, [350], 2, seed=0)
    for part in ("results", "baseline"):
        assert len(found[part][0]["trials"]) == 2
    assert found["results"][0]["ingest_tokens_per_second"] > 0
    assert found["results"][0]["memory_bytes"] > 0
    assert found["interrupted"] is False


def test_interrupted_run_keeps_what_is_finished(model: Any) -> None:
    done = []

    def report(trial: passkey.Trial) -> None:
        done.append(trial)
        if len(done) == 3:
            raise KeyboardInterrupt

    found = passkey.run(model, [350, 400], 2, seed=0, report=report)
    assert found["interrupted"] is True
    assert [len(entry["trials"]) for entry in found["results"]] == [2, 1]
    assert found["baseline"] == []
    table = passkey_table(found | {"model": "tiny", "dtype": "float32", "seed": 0})
    assert "interrupted: finished trials only" in table
