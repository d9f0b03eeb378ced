"""One training step: the gradient is that of the loss in the log, over batches and processes; no process waits."""

import json
from pathlib import Path
from typing import Any

import forks
import pytest
import torch
from accelerate import Accelerator
from joint_batch import D, joint_batch, one_step, tiny_model
from ranks_run import with_windows
from torch.nn import functional

from training.contexts import choose_contexts, rows_of
from training.crossbatch import enable_crossbatch
from training.schedule import ContextSchedule
from training.step import accuracies

TESTS = Path(__file__).parent


def test_the_gradient_is_that_of_one_mean_over_all_labels_of_a_step() -> None:
    """Of two batches, one with thirty times as many labels; against plain autograd on the whole."""
    loss, gradients = one_step(Accelerator(cpu=True))
    model, config = tiny_model()
    crossbatch = enable_crossbatch(model, config)
    total, weight = torch.zeros(()), 0.0
    counts = []
    for number in range(2):
        batch = joint_batch(number)
        rows = range(len(batch.input_ids))
        crossbatch.contexts = choose_contexts(ContextSchedule(values=(D,)), rows_of(batch), rows, D, f"0/0/{number}")
        logits = model(batch.input_ids, use_cache=False).logits
        losses = functional.cross_entropy(logits.mT, batch.labels, ignore_index=-100, reduction="none")
        total = total + (losses * batch.weights).sum()
        weight += float(batch.weights.sum())
        counts.append(int((batch.labels != -100).sum()))
    assert counts[0] > 30 * counts[1] > 0
    mean = total / weight
    assert loss == pytest.approx(mean.item(), abs=1e-5)
    names = [name for name, _ in model.named_parameters()]
    for name, gradient in zip(names, torch.autograd.grad(mean, list(model.parameters())), strict=True):
        torch.testing.assert_close(gradients[name], gradient, atol=1e-5, rtol=1e-3)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    """What ``ranks_run.py`` found on 2 and 3 processes; whoever waits for ever is ended, and that fails."""
    out = tmp_path_factory.mktemp("ranks") / "found.json"
    done = forks.run(TESTS / "ranks_run.py", out, "2", "3")
    assert done.returncode == 0, done.stderr[-2000:]
    found = {world: json.loads(out.with_suffix(f".{world}.json").read_text()) for world in (2, 3)}
    return found | {2: found[2] | {"joint": torch.load(out.with_suffix(".2.pt"), weights_only=True)}}


@pytest.mark.parametrize("name", with_windows())
def test_processes_of_one_lane_each_do_not_wait_for_ever(name: str, ranks: dict[int, dict[str, Any]]) -> None:
    for world, found in ranks.items():
        assert found[name]["loss"] > 0
        assert found[name]["leaks"] == 0, world
    recomputed = ranks[3][f"{name}, recomputed"]
    assert recomputed["loss"] == pytest.approx(ranks[3][name]["loss"], abs=1e-5)
    assert recomputed["leaks"] == 0


@pytest.mark.parametrize("focus", [0.0, 2.0])
def test_two_processes_equal_one_with_the_joint_batch(focus: float, ranks: dict[int, dict[str, Any]]) -> None:
    loss, gradients = one_step(Accelerator(cpu=True), focus=focus)
    found_loss, found = ranks[2]["joint"][int(focus > 0)]
    assert found_loss == pytest.approx(loss, abs=1e-6, rel=1e-6)
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-4)


def test_accuracy_of_answers_is_told_from_that_of_text() -> None:
    sums = {"correct": 6.0, "labels": 8.0, "correct_answers": 0.0, "answers": 0.0}
    assert accuracies(sums) == {"token_accuracy": 0.75}
    sums |= {"correct_answers": 1.0, "answers": 4.0}
    assert accuracies(sums) == {"token_accuracy": 0.75, "answer_accuracy": 0.25}
