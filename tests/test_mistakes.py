"""Every command against a list of a user's mistakes: each ends in one line, with status 2."""

import builtins
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ModelMaker
from transformers import PreTrainedTokenizerFast

from fot.cli import main

OPTIONS = ["--mem-layers", "1,3", "--local-context", "32", "--dtype", "float32", "--device", "cpu"]
TEXT = "".join(f"Line {number} of a document.\n" for number in range(40))
LONG = "x" * 300  # longer than a file's name may be
SECONDS = 60  # a mistake is found at once; what takes so long waits for something

# A command as it does its work, by name.
COMMANDS = {
    "info": "info model",
    "passkey": "passkey model --lengths 350 --trials 1",
    "build": "memory build new book.txt --model model",
    "append": "memory append m book.txt",
    "memory info": "memory info m",
    "drop": "memory drop m book.txt",
    "compact": "memory compact m",
    "verify": "memory verify m",
    "ask": "ask m Who? --max-new-tokens 4",
    "chat": "chat m",
    "inspect": "inspect m Who? --max-new-tokens 4",
    "train": "train recipe.yaml --out run",
    "dictionary": "eval dictionary model --lengths 128 --windows 1",
    "needles": "eval needles model book.txt --lengths 300 --trials 1 --needles 1",
    "perplexity": "eval perplexity model book.txt --tokens 64",
    "distraction": "eval distraction model --text book.txt other.txt --contexts 1,2 --trials 1",
    "layers": "eval layers model book.txt --count 1 --trials 1 --windows 5",
}

# What is put in the place of a word, for all commands that have it, and further mistakes for one of them: these are
# met in the same code.
WRONG = {
    "model": "nosuch book.txt hollow broken m",
    "m": "nosuch book.txt hollow damaged",
    "book.txt": "nosuch.txt empty.txt latin.txt pipe",
    "recipe.yaml": "nosuch folder empty.txt latin.txt zeros.bin list.yaml bad.yaml book.txt pipe",
}
WRONG_ONCE = {
    ("perplexity", "model"): ["folder", "other", "list", "odd", "no_weights", "short", "text.gguf", "pipe", "socket",
                              "", "no/such", "a b", "../..", "zeros.bin", "smollm", "/dev/null", LONG],
    ("info", "model"): ["other", "list", "odd", "text.gguf", "pipe", ""],
    ("append", "m"): ["folder", "listed", "part", "gone", "binary", "newer", "typed", "pipe", "", "model", LONG],
    ("build", "book.txt"): ["hollow", "zeros.bin", "socket", "/dev/null", "/dev/zero", "bad.pdf", "", "book.txt/x", "m",
                            "m/manifest.json", "loop", LONG],
    ("perplexity", "book.txt"): ["folder", "zeros.bin", "socket", "/dev/null", "/dev/zero", "", "book.txt/x", LONG],
}  # fmt: skip

# Options that are wrong wherever a model is loaded, and those tried on one command.
BAD = "--dtype=int3 --device=cuda:99 --mem-layers=9 --mem-layers=1.5 --local-context=0 --top-k=0 --index=nonsense"
BAD_ONCE = {
    "passkey": "--device=nonsense --device=meta --mem-layers=-1 --mem-layers=1,1 --mem-layers=a --mem-layers=true "
    "--mem-layers=[1] --mem-layers= --local-context=-3 --local-context=x --local-context=1000000000 --top-k=-1 "
    "--top-k=x --index= --index=IVF0,Flat --index=IVF4,Nope --index=IVF-1,Flat --lengths=0 --lengths=-5 --lengths= "
    "--lengths=12 --trials=0 --seed=x --plot=nosuch/a.png --plot=a.xyz --plot=folder --plot= --json=book.txt/a.json "
    "--json=/proc/a.json --json=pipe --json=" + LONG,
    "build": "--include --model=nosuch --model=",
    "ask": "--max-new-tokens=0 --max-new-tokens=x --passages=-1 --model=nosuch --model=other",
    "chat": "--max-new-tokens=0 --passages=0 --model=nosuch",
    "inspect": "--max-new-tokens=0 --layer=99 --layer=-1 --layer=0 --head=99 --top=0 --html=nosuch/a.html "
    "--html=folder --html= --plot=a.xyz --plot=nosuch/a.png --chat",
    "train": "steps=0 steps=x steps nonsense=1 == model=nosuch memory.mem_layers=[9] sources=[] lanes=-1 dtype=int3 "
    "sources=[{path:nosuch.txt}] learning_rate=-1 tasks=[{kind:x}] --max-hours=x --out=book.txt "
    "memory=1 sources=1 sources=[1] tasks=[x] betas=1 contexts=1 held_out=1 lora=1 lora.nonsense=1 model=[ clip=-1 "
    "--max-hours=-1 --max-hours=nan --peak-tflops=0 --peak-tflops=inf --out=",
    "dictionary": "--lengths=0 --lengths=1 --windows=0 --seed=x",
    "needles": "--lengths=0 --lengths=1 --needles=0 --trials=0 --chat",
    "perplexity": "--tokens=0 --lengths=-1 --lengths=1.5 --base=nosuch --base=other",
    "distraction": "--contexts=0 --contexts=x --trials=0 --task=dictionary --plot=a.xyz --text=book.txt",
    "layers": "--count=0 --count=99 --windows=0 --trials=0",
    "drop": "nosuch other.txt",
}
TOGETHER = [
    ("passkey", ["--no-memory", "--no-baseline"]),
    ("ask", ["--local-context", "16"]),
    ("append", ["--mem-layers", "1,2"]),
]
INCOMPLETE = [
    *("", "nonsense", "memory", "memory build new", "memory append m", "memory info", "memory drop m", "memory verify"),
    *("ask m", "chat", "inspect m", "train recipe.yaml", "train --out run", "eval", "eval needles model"),
    *("eval perplexity model", "eval distraction model", "eval layers model"),
]
LOADING = [name for name in COMMANDS if name not in ("memory info", "drop", "compact", "verify", "train")]
WRITING = ["passkey", "memory info", "inspect", "dictionary", "needles", "perplexity", "distraction", "layers"]

RECIPE = {"model": "model", "memory": {"mem_layers": [1, 3], "local_context": 16}, "sources": [{"path": "book.txt"}],
          "lanes": 1, "windows": 1, "steps": 1, "dtype": "float32", "eval_batches": 1}  # fmt: skip


def mistakes() -> Iterator[list[str]]:
    """Arguments of commands, each with a mistake."""
    for name, line in COMMANDS.items():
        words = line.split()
        yield [*words, "--nonsense"]
        yield [*words, "caf\udce9"]
        for right in WRONG:
            for wrong in [*WRONG[right].split(), *WRONG_ONCE.get((name, right), [])] if right in words else ():
                yield [wrong if word == right else word for word in words]
        options = (BAD if name in LOADING else "") + " " + BAD_ONCE.get(name, "")
        for option in [*options.split(), *(["--json=nosuch/a.json", "--json=folder"] if name in WRITING else [])]:
            yield [*words, option]
    for name, more in TOGETHER:
        yield [*COMMANDS[name].split(), *more]
    for line in INCOMPLETE:
        yield line.split()


@pytest.fixture(scope="module")
def place(make_plain: ModelMaker, tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, a memory, documents, and things that are wrong."""
    place = tmp_path_factory.mktemp("mistakes")
    make_plain().save_pretrained(place / "model")
    tokenizer.save_pretrained(place / "model")
    files: dict[str, Any] = {
        "book.txt": TEXT,
        "other.txt": TEXT.upper(),
        "empty.txt": "",
        "latin.txt": "café".encode("latin-1"),
        "zeros.bin": bytes(100),
        "bad.pdf": "%PDF-1.4\nnothing",
        "folder/a.txt": "a",
        "broken/config.json": "{",
        "other/config.json": '{"model_type": "bert"}',
        "list/config.json": "[1]",
        "odd/config.json": '{"model_type": 3}',
        "no_weights/config.json": (place / "model/config.json").read_bytes(),
        "short/config.json": (place / "model/config.json").read_bytes(),
        "short/model.safetensors": (place / "model/model.safetensors").read_bytes()[:5000],
        "text.gguf": "GGUF and no more",
        "recipe.yaml": json.dumps(RECIPE),
        "list.yaml": "[1]",
        "bad.yaml": "a: [",
    }
    for name, content in files.items():
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    (place / "hollow").mkdir()
    (place / "loop").symlink_to("loop")
    os.mkfifo(place / "pipe")
    here = Path.cwd()
    os.chdir(place)
    try:
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind("socket")  # by a short name: a socket's is at most 107 bytes
        assert main(["memory", "build", "m", "book.txt", "--model", "model", *OPTIONS]) == 0
    finally:
        os.chdir(here)
    spoil(place)
    return place


def spoil(place: Path) -> None:
    """Copies of the memory, each damaged in another way."""
    manifest = (place / "m/manifest.json").read_text()
    typed = json.dumps(json.loads(manifest) | {"metadata": [], "layers": "x"})
    manifests = {"damaged": manifest[:200], "listed": "[]", "binary": "\0", "typed": typed, "part": manifest,
                 "gone": manifest, "newer": json.dumps(json.loads(manifest) | {"version": 99})}  # fmt: skip
    for name, content in manifests.items():
        shutil.copytree(place / "m", place / name)
        (place / name / "manifest.json").write_text(content)
    for segment in (place / "part").glob("segment*"):
        segment.write_bytes(segment.read_bytes()[:50])
    for segment in (place / "gone").glob("segment*"):
        segment.unlink()


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No hub, nobody at the keyboard, and an end to what waits."""

    def too_long(number: int, frame: Any) -> None:
        raise AssertionError(f"nothing was said for {SECONDS} s")

    def nobody(prompt: str) -> str:
        raise EOFError

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(builtins, "input", nobody)
    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.usefixtures("guarded")
@pytest.mark.parametrize(
    "arguments", [pytest.param(mistake, id=ascii(" ".join(mistake))[1:60]) for mistake in mistakes()]
)
def test_a_mistake_ends_in_one_line(
    arguments: list[str], place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(place)
    shutil.rmtree("new", ignore_errors=True)  # of a mistake that was not found
    before = contents(place / "m")
    try:
        status: Any = main(arguments)
    except SystemExit as exit_:  # of argparse
        status = exit_.code
        shown = capfd.readouterr().err
        assert shown.startswith("usage: fot ")
        assert ": error: " in shown.splitlines()[-1]
    else:
        shown = capfd.readouterr().err
        assert shown.startswith("fot: ")
        assert shown.count("\n") == 1, shown
    assert status == 2, shown
    assert "Traceback" not in shown
    assert contents(place / "m") == before
    assert not (place / "new").exists()


@pytest.mark.parametrize("name", COMMANDS)
def test_without_a_mistake(
    name: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, guarded: None
) -> None:
    """What the mistakes are made in is right."""
    shutil.copytree(place, tmp_path / "copy", ignore=shutil.ignore_patterns("pipe", "socket", "loop"))
    monkeypatch.chdir(tmp_path / "copy")
    assert main(COMMANDS[name].split()) == 0


@pytest.mark.usefixtures("guarded")
@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_what_is_typed_in_another_encoding(
    errors: str, place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.undo()  # of the keyboard that nobody sits at
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9?\n"), encoding="utf-8", errors=errors))
    assert main(["chat", "m"]) == 2
    *begun, said = capfd.readouterr().err.splitlines()
    assert said.startswith("fot: what was typed is not UTF-8 text")
    assert len(begun) == 2  # how a chat begins


@pytest.mark.parametrize("arguments", [[b"ask", b"m", b"caf\xe9?"], [b"memory", b"info", b"caf\xe9.memory"]])
def test_arguments_in_another_encoding(arguments: list[bytes], place: Path) -> None:
    program = Path(sys.executable).with_name("fot")
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "PYTHONUTF8": "1"}
    done = subprocess.run([program, *arguments], cwd=place, capture_output=True, timeout=SECONDS, check=False, env=env)
    assert done.returncode == 2
    assert done.stderr.count(b"\n") == 1
    shown = arguments[-1].decode(errors="replace")
    assert (
        done.stderr.decode()
        == f"fot: the argument {shown!r} is not UTF-8 text, from character 3 on: convert it to UTF-8\n"
    )
