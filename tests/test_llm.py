"""The plugin of ``llm``, by that program itself."""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from configparser import ConfigParser
from pathlib import Path
from typing import Any

import forks
import pytest
from click.testing import CliRunner
from llm.cli import cli
from llm.plugins import pm

from fot.ask import Conversation
from fot.cli import main
from fot.commands import llm as plugin
from fot.commands.llm import in_pieces
from fot.commands.options import add_memory_options, open_memory
from fot.memories import MANIFEST, kept_memories, memories_dir
from memory import manifest

ROOT = Path(__file__).parent.parent
TEXT = "The vicar of Highbury is Mr Elton. Tea is at five in the garden.\n" * 20

Program = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def memories(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the memory ``emma``, and a folder that is none."""
    folder = tmp_path_factory.mktemp("memories")
    (folder / "notes").mkdir()
    (folder / "emma.txt").write_text(TEXT)
    build = ["memory", "build", str(folder / "emma.memory"), str(folder / "emma.txt"), "--model", str(checkpoint)]
    options = ["--mem-layers", "1,3", "--local-context", "64", "--dtype", "float32", "--device", "cpu"]
    assert main([*build, *options]) == 0
    return folder


@pytest.fixture
def program(memories: Path, tmp_path: Path) -> Program:
    """Runs ``llm`` in a process of its own, with the entry points that pyproject.toml names, whatever is installed."""
    lines = (ROOT / "pyproject.toml").read_text("utf-8").splitlines()
    start = lines.index("[project.entry-points.llm]")
    points = ConfigParser()
    points.read_string("\n".join(["[llm]", *lines[start + 1 : lines.index("", start)]]))
    info = tmp_path / "path" / "fot_as_written-0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fot-as-written\nVersion: 0\n")
    with open(info / "entry_points.txt", "w") as file:
        file.writelines(["[llm]\n", *(f"{name} = {value.strip(chr(34))}\n" for name, value in points["llm"].items())])
    own = {"PYTHONPATH": f"{info.parent}{os.pathsep}{ROOT}", "LLM_USER_PATH": str(tmp_path / "user")}
    own |= {"FOT_MEMORIES": str(memories)}

    def run(*arguments: str, options: Sequence[str] = (), **more: str) -> "subprocess.CompletedProcess[str]":
        if not options:
            return forks.run("-m", "llm", *arguments, cwd=tmp_path, more=own | more)
        command = [sys.executable, *options, "-m", "llm", *arguments]
        return subprocess.run(
            command, env=dict(os.environ) | own | more, cwd=tmp_path, capture_output=True, text=True, check=False,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip

    return run


@pytest.fixture
def said(memories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Runs ``llm`` in this process; gives what it has logged of the answer, or its error."""
    monkeypatch.setenv("LLM_USER_PATH", str(tmp_path / "user"))
    monkeypatch.setenv("FOT_MEMORIES", str(memories))
    known = pm.is_registered(plugin)  # where fot is installed, by its entry point
    if not known:
        pm.register(plugin)

    def run(*arguments: str) -> Any:
        done = CliRunner().invoke(cli, arguments, input="", catch_exceptions=False)
        if done.exit_code:
            return done.output
        (logged,) = json.loads(CliRunner().invoke(cli, ["logs", "--json", "-n", "1"]).stdout)
        return logged

    yield run
    if not known:
        pm.unregister(plugin)


def conversation(folder: Path) -> Conversation:
    """One with the memory, as fot has it."""
    parser = argparse.ArgumentParser()
    add_memory_options(parser)
    memory, model = open_memory(argparse.Namespace(**vars(parser.parse_args([])), memory=folder, model=None))
    return Conversation(model, memory, title=lambda name: Path(name).name)


def test_memories_are_listed_quickly(program: Program) -> None:
    """Without torch, which takes seconds to load."""
    done = program("models", "list", options=["-X", "importtime"])
    assert [line for line in done.stdout.splitlines() if "fot" in line] == ["fot memory: fot/emma"]
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "fot.commands.options" in loaded  # import_module, by which llm loads plugins, is not timed
    assert not loaded & {"torch", "transformers"}  # NumPy comes with the openai package
    none = program("models", "list", FOT_MEMORIES="not-there")
    assert none.returncode == 0
    assert "fot" not in none.stdout


def test_the_program_answers(program: Program, memories: Path) -> None:
    """What is installed is enough: nothing but the answer is printed."""
    done = program("-m", "fot/emma", "Who is the vicar?", "-o", "max_tokens", "4")
    assert (done.returncode, done.stderr) == (0, "")
    wanted = conversation(memories / "emma.memory").say("Who is the vicar?", max_new_tokens=4).text
    assert done.stdout.split() == wanted.split()


def test_a_question_and_the_next(said: Callable[..., Any], memories: Path) -> None:
    """Answers are those of fot.ask, streamed or not; a conversation goes on from what was logged."""
    wanted = conversation(memories / "emma.memory")
    first = wanted.say("Who is the vicar?", max_new_tokens=8)
    asked = ("-m", "fot/emma", "Who is the vicar?", "-o", "max_tokens", "8")
    assert said(*asked)["response"] == first.text
    logged = said(*asked, "--no-stream")
    assert logged["response"] == first.text
    assert logged["model"] == "fot/emma"
    listed = logged["response_json"]["passages"]
    assert [one["text"] for one in listed] == [passage.text for passage in first.passages]
    assert listed[0]["document"] == "emma.txt"
    assert logged["output_tokens"] == first.answer_tokens
    assert logged["input_tokens"] == len(wanted.memory) + first.prompt_tokens
    again = wanted.anew()
    again.go_back_to([{"role": "user", "content": "Who is the vicar?"}, {"role": "assistant", "content": first.text}])
    second = again.say("And when is tea?", max_new_tokens=6)
    logged = said("-c", "And when is tea?", "-o", "max_tokens", "6")
    assert logged["response"] == second.text
    drawn = [said(*asked, "-o", "temperature", "1.5", "-o", "seed", seed)["response"] for seed in ("1", "1", "2")]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["Who?", "-o", "temperature", "3"], "temperature"),
        (["Who?", "-o", "colour", "red"], "colour"),
        (["word " * 200], "tokens, but the window has 64"),
    ],
)
def test_mistakes_are_told(said: Callable[..., Any], arguments: list[str], message: str) -> None:
    found = said("-m", "fot/emma", *arguments)
    assert message in found
    assert found.startswith("Error:")


def test_what_is_in_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert MANIFEST == manifest.MANIFEST
    for name in ("emma", "emma.memory", "my books.mem", "my-books", "none"):
        (tmp_path / name).mkdir()
        if name != "none":
            (tmp_path / name / MANIFEST).write_text("{}")
    (tmp_path / "link").symlink_to(tmp_path / "emma")
    monkeypatch.setenv("FOT_MEMORIES", str(tmp_path))
    found = {name: folder.name for name, folder in kept_memories().items()}
    assert found == {
        "emma": "emma",
        "emma.memory": "emma.memory",
        "link": "link",
        "my-books": "my books.mem",
        "my-books-2": "my-books",
    }
    monkeypatch.delenv("FOT_MEMORIES")
    monkeypatch.setenv("XDG_DATA_HOME", "/xdg")
    assert memories_dir() == Path("/xdg/fot/memories")
    monkeypatch.delenv("XDG_DATA_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert memories_dir() == Path("/home/someone/.local/share/fot/memories")


def test_work_in_pieces_ends_when_nobody_reads_on() -> None:
    ends = []

    def work(on_text: Callable[[str], None], stopped: Callable[[], bool]) -> str:
        on_text("a")
        while not stopped():
            on_text("b")
        ends.append("stopped")
        return "whole"

    pieces = in_pieces(work)
    assert next(pieces) == "a"
    pieces.close()
    assert ends == ["stopped"]

    def fails(on_text: Callable[[str], None], stopped: Callable[[], bool]) -> Any:
        on_text("a")
        raise ValueError("the window is full")

    pieces = in_pieces(fails)
    assert next(pieces) == "a"
    with pytest.raises(ValueError, match="the window is full"):
        next(pieces)
