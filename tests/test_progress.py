"""How far long work is, where stderr is no terminal and where it is one."""

import io
import re
import sys

import pytest
from tqdm import tqdm

from fot import progress
from fot.cli import main


def test_a_line_says_how_much_how_fast_and_how_long(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "INTERVAL", 0.0)
    with progress.progress_bar(total=2000, unit="tok", desc="reading") as bar:
        bar.set_postfix_str("b.txt")
        bar.update(500)
        bar.total = 1000
        bar.update(250)
    first, second = capsys.readouterr().err.splitlines()
    pattern = r"reading: {} of {} tok \({}%\), [\d.,e+]+ tok/s, \d+:\d\d:\d\d left, b\.txt"
    assert re.fullmatch(pattern.format("500", "2,000", 25), first)
    assert re.fullmatch(pattern.format("750", "1,000", 75), second)


def test_without_a_total_there_is_no_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "INTERVAL", 0.0)
    with progress.progress_bar(unit="set", desc="layers") as bar:
        bar.update()
    assert re.fullmatch(r"layers: 1 set, [\d.,e+]+ set/s\n", capsys.readouterr().err)


def test_short_work_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.progress_bar(total=2, unit="tok", desc="reading") as bar:
        bar.update(2)
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress.progress_bar(total=2, unit="tok", desc="reading") as bar:
        bar.update(2)
    assert type(bar) is tqdm
    assert "reading: 100%" in terminal.getvalue()


def test_an_evaluation_in_the_background_says_how_far_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "INTERVAL", 0.0)
    assert main(["eval", "dictionary", "dictionary-fot", "--lengths", "1000"]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("dictionary: ")]
    assert re.match(r"dictionary: [\d,]+ of 1,000 tok \(\d+%\)", lines[-1])
