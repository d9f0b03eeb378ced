"""``fot inspect`` and what it prints."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import ModelMaker
from inspection_demo import demo_trace
from rich.console import Console
from transformers import PreTrainedTokenizerFast

from fot.cli import main
from fot.inspection.table import hits_table
from fot.inspection.texts import token_texts
from memory import Memory

TEXTS = {"one.txt": "The vicar of Highbury is Mr Elton.\n" * 3, "two.txt": "Tea is at five in the garden.\n" * 4}


@pytest.fixture(scope="module")
def folders(
    make_model: ModelMaker, tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """A model and a memory of two documents, as folders."""
    model, folder = make_model(), tmp_path_factory.mktemp("inspect")
    model.tokenizer = tokenizer
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    memory = model.new_memory(key_dtype="float32", value_dtype="float32")
    for name, text in TEXTS.items():
        model.ingest(text, memory, name)
    memory.metadata["model"] = str(folder / "model")
    memory.save(folder / "memory")
    return folder / "model", folder / "memory"


@pytest.fixture
def inspect(folders: tuple[Path, Path]) -> Callable[..., int]:
    def run(*arguments: str) -> int:
        settings = ["--mem-layers", "1,3", "--local-context", "16", "--dtype", "float32", "--device", "cpu"]
        return main(["inspect", str(folders[1]), "Who is it?", "--max-new-tokens", "6", *settings, *arguments])

    return run


def test_command(inspect: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    outputs = {name: tmp_path / name for name in ("out.html", "out.json", "out.png")}
    arguments = [part for name, path in outputs.items() for part in (f"--{name[4:].replace('png', 'plot')}", str(path))]
    assert inspect(*arguments) == 0
    shown = capsys.readouterr().out
    assert "kNN" in shown
    assert "one.txt" in shown
    content = json.loads(outputs["out.json"].read_text())
    assert {*content["hits"]["layer"]} == {1, 3}
    assert set(content["documents"]) >= set(TEXTS)
    assert content["text"] == "".join(token["text"] for token in content["tokens"] if token["is_generated"])
    assert outputs["out.png"].read_bytes().startswith(b"\x89PNG")
    assert "one.txt" in outputs["out.html"].read_text()


def test_options_choose_what_is_shown(inspect: Callable[..., int], capsys: pytest.CaptureFixture) -> None:
    assert inspect("--layer", "3", "--head", "2", "--top", "1") == 0
    one = capsys.readouterr().out
    assert set(re.findall(r"\b[13]\.[0-3]\b", one)) == {"3.2"}
    assert inspect("--top", "2") == 0
    assert len(re.findall(r"\b[13]\.[0-3]\b", capsys.readouterr().out)) == 2 * len(re.findall(r"\b3\.2\b", one))
    assert inspect("--prompt-tokens") == 0
    assert "read " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layer", "2"], "layer 2 is not among those traced: choose one of 1, 3"),
        (["--head", "9"], "head 9 is not among those traced"),
        (["--plot", "x.nope"], "has a picture format that is not supported"),
        (["--html", "/nowhere/out.html"], "/nowhere is not a folder"),
        (["--chat"], "this model's tokenizer has no chat template"),
    ],
)
def test_bad_input(
    arguments: list[str], message: str, inspect: Callable[..., int], capsys: pytest.CaptureFixture
) -> None:
    assert inspect(*arguments) == 2
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1
    assert message in shown


def test_memory_that_names_no_model(folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    memory = Memory.open(folders[1])
    del memory.metadata["model"]
    memory.save(tmp_path / "anonymous")
    assert main(["inspect", str(tmp_path / "anonymous"), "Who?"]) == 2
    assert "does not record which model made it: add --model" in capsys.readouterr().err


def test_table_shows_the_strongest_hits() -> None:
    trace = demo_trace(20_000)
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(hits_table(trace, top=2))
    shown = console.export_text()
    answered = sum(token.is_generated for token in trace.tokens)
    assert len(re.findall(r"\d+\.\d+% +\d\.\d\d +\d+\.\d+% +\d+\.\d", shown)) == 2 * answered
    query = int(np.flatnonzero(trace.found.chose)[0])
    best = trace.found.share[query].max()
    assert f"{best:.1%}" in next(line for line in shown.splitlines() if "Mr" in line)


def test_table_fits_a_narrow_terminal() -> None:
    """Numbers and positions stand whole in 80 columns."""
    trace = demo_trace(200_000)
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(hits_table(trace, top=2))
    hits = re.findall(r"\d+\.\d% +\d\.\d\d +\d+\.\d% +\d+\.\d +\w+\.txt, ([\d,]+) *\n", console.export_text())
    assert len(hits) == 2 * sum(token.is_generated for token in trace.tokens)
    assert {int(hit.replace(",", "")) for hit in hits} <= set(trace.found.slot.flatten().tolist())


@pytest.mark.parametrize("text", ["plain words", "zwölf Boxkämpfer 🦊🦊", "line\nline", " two  spaces ", ""])
def test_token_texts_add_up(text: str, tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer(text).input_ids
    texts = token_texts(tokenizer, ids)
    assert len(texts) == len(ids)
    assert "".join(texts) == text
    assert "\ufffd" not in "".join(texts)
    if "🦊" in text:  # four bytes, four tokens: the character belongs to the last
        assert texts[-4:] == ["", "", "", "🦊"]
        assert token_texts(tokenizer, ids[:-1])[-1] == "\ufffd"


def test_plot_needs_matplotlib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from fot.inspection.plot import position_plot

    trace = demo_trace(5_000)
    position_plot(tmp_path / "plot.svg", trace)
    drawn = (tmp_path / "plot.svg").read_text()
    assert drawn.count("<svg") == 1
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'fot\[plot\]'"):
        position_plot(tmp_path / "plot.png", trace)


def test_index_of_the_options(inspect: Callable[..., int], tmp_path: Path) -> None:
    """The memory is searched as the options say: with two hits a query, two are recorded."""
    assert inspect("--top-k", "2", "--json", str(tmp_path / "two.json")) == 0
    content = json.loads((tmp_path / "two.json").read_text())
    assert not content["positions_complete"]
    given = [
        rank for rank, memory in zip(content["hits"]["rank"], content["hits"]["memory"], strict=True) if not memory
    ]
    assert max(given) < 4  # two of the file, and two of what the prompt itself moved to memory
    assert inspect("--json", str(tmp_path / "all.json")) == 0
    assert json.loads((tmp_path / "all.json").read_text())["positions_complete"]
