"""The lm-evaluation-harness: in process, and over the server's completions."""

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from harness_helpers import write_tasks
from serve_helpers import make_library, make_model, running
from transformers import PreTrainedTokenizerFast

from fot.cli import main
from fot.evaluation import harness

pytest.importorskip("lm_eval")

NAMES = ["tiny_choice", "tiny_word", "tiny_answer"]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness would copy this process to draw a few numbers, and list all packages at each evaluation."""
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")
    monkeypatch.setattr("torch.utils.collect_env.get_pretty_env_info", str)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def manager(tasks: Path) -> Any:
    return harness.find_tasks(NAMES, tasks)


def logprob(model: Any, context: str, text: str) -> float:
    """Of a text that follows another, by the model itself."""
    import torch

    before, after = (model.tokenizer(part, add_special_tokens=False).input_ids for part in (context, text))
    with torch.no_grad():
        logits = model(torch.tensor([(before + after)[:-1]]), use_cache=False).logits[0].float().log_softmax(-1)
    return sum(float(logits[len(before) + place - 1, token]) for place, token in enumerate(after))


def test_scores_are_those_of_the_model_with_its_memory(
    tokenizer: PreTrainedTokenizerFast, tasks: Path, manager: Any
) -> None:
    """The contexts are longer than the window, so that they are read into a memory."""
    model = make_model(tokenizer, window=32)
    found = harness.run(model, NAMES, manager, max_length=200)
    entries = {entry["task"]: entry for entry in found["results"]}
    assert list(entries) == NAMES
    documents = [json.loads(line) for line in (tasks / "documents.jsonl").read_text("utf-8").splitlines()]
    likeliest = [
        max(range(2), key=lambda number: logprob(model, each["context"], " " + each["choices"][number]))
        for each in documents
    ]
    right = [number == each["label"] for number, each in zip(likeliest, documents, strict=True)]
    assert entries["tiny_choice"]["metrics"]["acc"]["value"] == pytest.approx(sum(right) / len(right))
    assert entries["tiny_choice"]["documents"] == len(documents)
    mean = sum(logprob(model, each["context"], " " + each["word"]) for each in documents) / len(documents)
    assert entries["tiny_word"]["metrics"]["perplexity"]["value"] == pytest.approx(math.exp(-mean), rel=1e-4)
    assert not found["interrupted"]


def test_the_command(checkpoint: Path, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["eval", "harness", str(checkpoint), "--tasks", "tiny_choice, tiny_word", "--include-path", str(tasks)]
    options = ["--limit", "2", "--batch-size", "2", "--shots", "0", "--json", str(tmp_path / "out.json")]
    small = ["--mem-layers", "1,3", "--local-context", "16", "--dtype", "float32", "--device", "cpu"]
    assert main([*command, *options, *small]) == 0
    printed = capsys.readouterr().out
    assert "tiny_choice" in printed
    assert "perplexity" in printed
    written = json.loads((tmp_path / "out.json").read_text())
    assert [(entry["task"], entry["documents"], entry["shots"]) for entry in written["results"]] == [
        ("tiny_choice", 2, 0),
        ("tiny_word", 2, 0),
    ]
    assert set(written["results"][0]["metrics"]) == {"acc", "acc_norm"}
    assert written["memory"]["local_context"] == 16


def test_ctrl_c_keeps_finished_tasks(
    tokenizer: PreTrainedTokenizerFast, manager: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lm_eval

    whole, asked = lm_eval.simple_evaluate, []

    def until_second(*args: Any, tasks: Sequence[str], **options: Any) -> Any:
        asked.extend(tasks)
        if len(asked) > 1:
            raise KeyboardInterrupt
        return whole(*args, tasks=tasks, **options)

    monkeypatch.setattr(lm_eval, "simple_evaluate", until_second)
    found = harness.run(make_model(tokenizer), ["tiny_choice", "tiny_word"], manager, limit=1)
    assert [entry["task"] for entry in found["results"]] == ["tiny_choice"]
    assert found["interrupted"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tasks", "tiny_nothing"], "there is no task 'tiny_nothing': lm_eval ls tasks lists"),
        (["--tasks", "tiny_word", "--include-path", "not-there"], "--include-path not-there is not a folder"),
    ],
)
def test_mistakes(
    options: list[str],
    message: str,
    checkpoint: Path,
    tasks: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # The package looks beside this file for its own tasks, which are thousands.
    monkeypatch.setattr("lm_eval.tasks.manager.__file__", str(tasks / "manager.py"))
    assert main(["eval", "harness", str(checkpoint), *options]) == 2
    assert message in capsys.readouterr().err


def test_the_package_is_named_where_it_is_missing(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main(["eval", "harness", str(checkpoint), "--tasks", "hellaswag"]) == 2
    assert "fot eval harness needs lm_eval" in capsys.readouterr().err


def test_local_completions_of_the_server(
    tokenizer: PreTrainedTokenizerFast, tasks: Path, manager: Any, tmp_path: Path
) -> None:
    """The harness's client for servers, by token ids and by text, gives what the model gives in process."""
    from lm_eval import simple_evaluate
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    model = make_model(tokenizer)
    model.tokenizer.save_pretrained(tmp_path / "tokenizer")
    wanted = harness.run(model, NAMES, manager, max_length=199)["results"]

    def scores(url: str, **options: Any) -> list[dict[str, Any]]:
        client = LocalCompletionsAPI(
            base_url=f"{url}/v1/completions", model="tiny", tokenizer=str(tmp_path / "tokenizer"),
            tokenizer_backend="huggingface", max_length=200, **options,
        )  # fmt: skip
        found = [simple_evaluate(client, tasks=[name], task_manager=manager, bootstrap_iters=10) for name in NAMES]
        return [harness.task_scores(name, each) for name, each in zip(NAMES, found, strict=True)]

    with running(make_library(model, tmp_path)) as (url, _):
        for options in ({}, {"batch_size": 3, "num_concurrent": 2}, {"tokenized_requests": False}):
            for entry, ours in zip(scores(url, **options), wanted, strict=True):
                for metric, score in ours["metrics"].items():
                    assert entry["metrics"][metric]["value"] == pytest.approx(score["value"], rel=1e-4), options
