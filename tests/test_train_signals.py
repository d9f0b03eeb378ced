"""A run that is told to stop saves what it has done, says so, and goes on from there."""

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from forks import Fork
from train_helpers import losses, train, write_recipe

from training.checkpoints import list_checkpoints


def await_lines(out: Path, lines: int, ended: Callable[[], bool]) -> None:
    """Wait until the log of a run has so many lines."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and not ended():
        if (out / "log.jsonl").exists() and len((out / "log.jsonl").read_text().splitlines()) >= lines:
            break
        time.sleep(0.005)


LONG = {"steps": 100_000, "save_every": 100_000, "eval_every": 0, "lr_schedule": "constant"}


def stopped_there(recipe: Path, out: Path, number: signal.Signals) -> tuple[int, str]:
    """Exit status and stderr of a run in a process of its own that gets a signal."""
    process = Fork("-m", "fot", "train", recipe, "--out", out)
    await_lines(out, 3, lambda: process.poll() is not None)
    process.send_signal(number)
    return process.wait(), process.stderr


def stopped_here(recipe: Path, out: Path, number: signal.Signals) -> int:
    """Exit status of a run in this process, which sends itself a signal."""
    ended = threading.Event()

    def send() -> None:
        await_lines(out, 3, ended.is_set)
        if not ended.is_set():
            os.kill(os.getpid(), number)

    thread = threading.Thread(target=send)
    thread.start()
    status = train(recipe, out)
    ended.set()
    thread.join()
    return status


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_says_so(number: signal.Signals, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    recipe, out = write_recipe(tmp_path / "recipe.yaml", **LONG), tmp_path / "out"
    if number == signal.SIGTERM:
        status, said = stopped_there(recipe, out, number)
    else:
        status = stopped_here(recipe, out, number)
        said = capsys.readouterr().err
    assert status == 128 + number, said
    [saved] = list_checkpoints(out / "checkpoints")
    done = int(saved.name[5:])
    assert f"stopped after step {done}, which is saved: continue with --resume" in said
    assert [step for step, _ in losses(out)] == list(range(1, done + 1))
    assert train(recipe, out, f"steps={done + 2}", "--resume") == 0
    whole = tmp_path / "whole"
    assert train(recipe, whole, f"steps={done + 2}") == 0
    assert losses(out) == losses(whole)


def test_a_second_signal_stops_at_once(tmp_path: Path) -> None:
    """While the checkpoint of the first is written."""
    program = tmp_path / "slow.py"
    program.write_text(
        "import sys, time, training.train\nfrom fot.cli import main\n"
        "def slow(*_):\n    print('saving', file=sys.stderr, flush=True)\n    time.sleep(60)\n"
        "training.train.save_checkpoint = slow\nsys.exit(main(sys.argv[1:]))\n"
    )
    recipe, out = write_recipe(tmp_path / "recipe.yaml", **LONG), tmp_path / "out"
    process = Fork(program, "train", recipe, "--out", out)

    def await_line(start: str) -> None:
        while not any(line.startswith(start) for line in process.stderr.splitlines()):
            assert process.poll() is None, process.stderr
            time.sleep(0.01)

    await_line("step 1 of")
    process.send_signal(signal.SIGTERM)
    await_line("saving")
    process.send_signal(signal.SIGTERM)  # at once: the same wish, told twice
    time.sleep(1.2)
    assert process.poll() is None
    started = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == -signal.SIGTERM
    assert time.monotonic() - started < 20
    assert not list_checkpoints(out / "checkpoints")


def test_handlers_are_those_of_before(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", steps=2)
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert train(recipe, tmp_path / "out") == 0
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    status: list[int] = []
    thread = threading.Thread(target=lambda: status.append(train(recipe, tmp_path / "thread")))
    thread.start()  # where Python lets nobody handle signals
    thread.join()
    assert status == [0]
