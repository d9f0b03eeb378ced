"""Each example runs, as its first lines say, on something tiny."""

import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import forks
import pytest
from conftest import ModelMaker
from transformers import PreTrainedTokenizerFast

from fot.cli import main
from memory import Memory

EXAMPLES = Path(__file__).parent.parent / "examples"
LONGLLAMA = Path(__file__).parent / "data" / "longllama"
TEXTS = {
    "emma.txt": "The vicar of Highbury is Mr Elton. He dines at Hartfield.\n" * 9,
    "tea.txt": "Tea is at five in the garden.\nCake is at six.\n" * 9,
}

Run = Callable[..., str]


@pytest.fixture
def run_here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, place: Path) -> Run:
    """name of an example, arguments -> what it prints; in this process, which has torch already, and in ``place``."""

    def run_example(name: str, *arguments: str | Path) -> str:
        monkeypatch.chdir(place)
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        capsys.readouterr()
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run_example


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with texts."""
    for name, text in TEXTS.items():
        (tmp_path / name).write_text(text)
    return tmp_path


@pytest.fixture(scope="module")
def checkpoint(
    make_model: ModelMaker, tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder with a model that has memory settings of its own, as a fine-tuned one has."""
    folder = tmp_path_factory.mktemp("tiny")
    make_model(local_context=64).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_load_longllama(run_here: Run) -> None:
    shown = run_here("load_longllama.py", LONGLLAMA)
    assert "memory layers (1, 2), windows of 32 tokens" in shown
    assert "160 tokens read" in shown


def test_passkey(run_here: Run, make_plain: ModelMaker, tokenizer: PreTrainedTokenizerFast, place: Path) -> None:
    make_plain().save_pretrained(place / "model")
    tokenizer.save_pretrained(place / "model")
    shown = run_here("passkey.py", "model", "400")
    assert "368 tokens" in shown
    assert "answered:" in shown


def test_finetune_openllama(run_here: Run, tmp_path: Path) -> None:
    shown = run_here("finetune_openllama.py", tmp_path, "steps=8", "--tiny").splitlines()
    first, last = re.findall(r"[\d.]+(?= at step)", shown[0])
    assert "at step 8" in shown[0]
    assert float(last) < float(first)
    assert "layer 1: exact, dense, layer 2: exact, dense" in shown[1]


def test_inspect_hits(run_here: Run, checkpoint: Path, place: Path) -> None:
    shown = run_here("inspect_hits.py", "Who?", *TEXTS, "--model", checkpoint, "--out", "hits", "--tokens", "4")
    assert f"{sum(map(len, TEXTS.values())):,} tokens" in shown
    shares = [float(share) for share in re.findall(r"([\d.]+)% to \w+\.txt", shown)]
    assert len(shares) == len(TEXTS)
    assert sum(shares) == pytest.approx(100, abs=0.2)
    assert len(re.findall(r"[\d.]+% (?:emma|tea)\.txt \d+: ", shown)) == 5
    assert "kNN" in shown
    assert "emma.txt" in (place / "hits.html").read_text()
    assert (place / "hits.png").read_bytes().startswith(b"\x89PNG")


def test_ask_a_book(run_here: Run, checkpoint: Path, place: Path, capsys: pytest.CaptureFixture) -> None:
    arguments = ["emma.txt", "Who is it?", "And where?", "--model", checkpoint, "--tokens", "6"]
    first = run_here("ask_a_book.py", *arguments)
    length = len(TEXTS["emma.txt"])
    assert f"emma.memory: {length} tokens read now" in first
    assert Memory.open(place / "emma.memory").documents() == {"emma.txt": length}
    second = run_here("ask_a_book.py", *arguments)
    assert "emma.memory: opened as it was" in second

    def answers(shown: str) -> list[str]:
        return re.sub(r"after [\d.]+ s", "", shown).split("\n> ")[1:]

    assert len(answers(first)) == 2
    assert answers(second) == answers(first)
    assert len(re.findall(r"\n +[\d.]+% at \d+: ", first)) == 6
    assert main(["ask", "emma.memory", "Who?", "--max-new-tokens", "2", "--dtype", "float32", "--device", "cpu"]) == 0


def test_search_a_codebase(run_here: Run, checkpoint: Path, place: Path) -> None:
    code, source = place / "code", "import os\n\n\ndef tea() -> int:\n    return 5\n"
    (code / "sub").mkdir(parents=True)
    (code / "a.py").write_text(source)
    (code / "sub" / "b.py").write_text("CAKE = 6\n")
    (code / "notes.txt").write_text("not read\n")
    arguments = ["code", "def ", "--include", "*.py", "--model", checkpoint, "--memory", "m", "--tokens", "6"]
    shown = run_here("search_a_codebase.py", *arguments, "--complete")
    assert "2 of 2 files read now" in shown
    assert "\ndef " in shown
    hits = re.findall(r"% (a\.py|sub/b\.py):(\d+)(?:-(\d+))?  ", shown)
    assert hits
    for name, first, last in hits:
        assert 1 <= int(first) <= int(last or first) <= {"a.py": 6, "sub/b.py": 2}[name]
    (code / "a.py").write_text(source + "# changed\n")
    (code / "sub" / "b.py").unlink()
    assert "1 of 1 files read now" in run_here("search_a_codebase.py", *arguments)
    assert Memory.open(place / "m").documents() == {"a.py": len(source) + 10}
    assert "0 of 1 files read now" in run_here("search_a_codebase.py", *arguments)


@pytest.mark.parametrize("family", ["qwen2", "mistral"])
def test_any_huggingface_model(
    run_here: Run, make_plain: ModelMaker, tokenizer: PreTrainedTokenizerFast, place: Path, family: str
) -> None:
    make_plain(family).save_pretrained(place / "model")
    tokenizer.save_pretrained(place / "model")
    arguments = ["model", "tea.txt", "--mem-layers", "1", "3", "--window", "32", "--tokens", "8"]
    shown = run_here("any_huggingface_model.py", *arguments)
    assert "(1, 3) of 4 layers with memory, windows of 32 tokens" in shown
    assert f"{len(TEXTS['tea.txt']) - 16} tokens" in shown
    with_memory, without = re.findall(r"with(?:out)? memory: *(.+)", shown)
    assert with_memory != without


def test_custom_index(run_here: Run, checkpoint: Path) -> None:
    def judged(blocks: int) -> list[tuple[float, float]]:
        shown = run_here("custom_index.py", "emma.txt", "--model", checkpoint, "--blocks", blocks, "--tokens", "4")
        found = re.findall(r"layer (\d): ([\d.]+)% of the attention mass kept, output off by ([\d.]+)%", shown)
        assert [layer for layer, _, _ in found] == ["1", "3"]
        assert f"{blocks} of {len(TEXTS['emma.txt']) // 16} blocks" in shown
        return [(float(recall), float(error)) for _, recall, error in found]

    few, some, everything = judged(1), judged(8), judged(1000)
    for (low, wrong), (high, better), (all_, right) in zip(few, some, everything, strict=True):
        assert low < high < all_ == 100
        assert wrong > better > right == 0


def test_sharded_memory(checkpoint: Path, place: Path) -> None:
    build = ["memory", "build", str(place / "m"), str(place / "emma.txt"), "--model", str(checkpoint)]
    assert main([*build, "--dtype", "float32", "--device", "cpu"]) == 0
    words = [place / "m", "Who is it?", "And where?", "--tokens", "4"]
    shown = forks.run_ranks(2, EXAMPLES / "sharded_memory.py", *words)
    assert "exact, dense, on each of 2 ranks" in shown
    assert shown.count("\n> ") == 2
