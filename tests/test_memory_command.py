"""``fot memory``, as a user runs it."""

import json
import os
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest

from fot import FoTForCausalLM
from fot.cli import main
from fot.documents import add as add_module
from memory import Memory

TEXT = "".join(f"Line {number} of a document.\n" for number in range(40))
OPTIONS = ["--mem-layers", "1,3", "--local-context", "16", "--dtype", "float32", "--device", "cpu"]


def write_documents(folder: Path) -> None:
    (folder / "book.txt").write_text(TEXT)
    (folder / "code").mkdir()
    (folder / "code" / "a.py").write_text("print('a')\n")
    (folder / "code" / "b.md").write_text("# B\n")
    (folder / "code" / "c.bin").write_bytes(b"\0\1")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with documents, which is the working folder."""
    write_documents(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def first_built(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A memory of such documents."""
    folder = tmp_path_factory.mktemp("built")
    write_documents(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["memory", "build", "m", "book.txt", "code", "--model", str(checkpoint), *OPTIONS]) == 0
    return folder / "m"


@pytest.fixture
def built(place: Path, first_built: Path) -> Path:
    """A copy of it in the working folder."""
    return shutil.copytree(first_built, place / "m")


def test_clusters_read_a_memory_built_with_a_number_of_pairs(
    place: Path, checkpoint: Path, capsys: pytest.CaptureFixture
) -> None:
    options = [*OPTIONS[:-2], "--local-context", "64"]
    assert main(["memory", "build", "m", "book.txt", "--model", str(checkpoint), *options, "--top-k", "9"]) == 0
    asked = ["ask", "m", "Which line?", "--max-new-tokens", "2", "--device", "cpu", "--index"]
    for index in ("clusters", "Flat"):
        assert main([*asked, index]) == 0, capsys.readouterr().err
    assert Memory.open(place / "m").top_k == 9


def test_build_and_info(place: Path, checkpoint: Path, capsys: pytest.CaptureFixture) -> None:
    arguments = ["memory", "build", "m", "book.txt", "code", "--include", "*.py", "*.bin", "--model", str(checkpoint)]
    assert main([*arguments, *OPTIONS]) == 0
    shown = capsys.readouterr().out
    assert "2 documents" in shown
    assert "left out: 1 binary, 1 not asked for" in shown
    memory = Memory.open(place / "m")
    model: Any = FoTForCausalLM.from_pretrained(checkpoint, mem_layers=[1, 3], local_context=16)
    model.check_memory(memory)
    assert memory.metadata["model"] == str(checkpoint)
    assert memory.metadata["memory"]["mem_layers"] == [1, 3]
    wanted = model.new_memory()
    model.ingest(TEXT, wanted)
    assert memory.documents() == {"book.txt": len(wanted), "code/a.py": 11}
    assert memory.token_ids()[: len(wanted)].tolist() == wanted.token_ids().tolist()
    assert main(["memory", "info", "m", "--json", "out.json"]) == 0
    shown = capsys.readouterr().out
    described = json.loads((place / "out.json").read_text())
    for expected in ("book.txt", "code/a.py", f"{len(memory):,}", memory.fingerprint, "1, 3", str(checkpoint)[:20]):
        assert expected in shown
    assert "made_with" in memory.metadata
    assert "made_with" not in described["metadata"]  # kilobytes of numbers for no reader
    assert described["tokens"] == len(memory)
    assert [(d["name"], d["complete"]) for d in described["documents"]] == [("book.txt", True), ("code/a.py", True)]
    assert described["bytes"] == sum(path.stat().st_size for path in (place / "m").glob("*.safetensors"))


def test_append_reads_what_is_new(built: Path, capsys: pytest.CaptureFixture) -> None:
    before = Memory.open(built)
    Path("new.txt").write_text("something new")
    assert main(["memory", "append", "m", "book.txt", "code", "new.txt", "--dtype", "float32"]) == 0
    shown = capsys.readouterr().out
    assert "13 tokens read; 3 documents were already in the memory" in shown
    after = Memory.open(built)
    assert after.documents() == before.documents() | {"new.txt": 13}
    Path("book.txt").write_text(TEXT + "changed")
    assert main(["memory", "append", "m", "book.txt", "--dtype", "float32"]) == 2
    shown = capsys.readouterr().err
    assert "book.txt has changed" in shown
    assert "fot memory drop" in shown
    assert Memory.open(built).documents() == after.documents()


def test_memories_in_the_folder_are_not_read(place: Path, checkpoint: Path, capsys: pytest.CaptureFixture) -> None:
    """The one that is written among them, and those that are damaged."""
    arguments = ["memory", "build", "code/own.memory", "code", "--model", str(checkpoint), *OPTIONS]
    assert main(arguments) == 0
    shutil.copytree("code/own.memory", "code/sub/other")
    manifest = Path("code/sub/other/manifest.json")
    manifest.write_text(manifest.read_text()[:300])
    Path("code/notes").mkdir()
    Path("code/notes/manifest.json").write_text('{"name": "of something else"}')
    capsys.readouterr()
    for said in ("; 2 documents were already in the memory", "0 tokens read; 3 documents were already in the memory"):
        assert main(["memory", "append", "code/own.memory", "code", "--dtype", "float32"]) == 0
        shown = capsys.readouterr().out
        assert "left out: 1 binary, 2 memories\n" in shown
        assert said in shown
    held = Memory.open(Path("code/own.memory")).documents()
    assert list(held) == ["code/a.py", "code/b.md", "code/notes/manifest.json"]
    assert main(["memory", "verify", "code/own.memory"]) == 0


@pytest.mark.parametrize("name", ["m", "m/manifest.json", "m/../m"])
def test_a_memory_is_no_document(name: str, built: Path, checkpoint: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["memory", "build", "new", name, "--model", str(checkpoint), *OPTIONS]) == 2
    assert "a memory, not a document: give the files that it was made of" in capsys.readouterr().err
    assert not Path("new").exists()


def test_odd_files_do_not_stop_a_build(place: Path, checkpoint: Path, capsys: pytest.CaptureFixture) -> None:
    os.mkfifo("code/pipe")
    Path("code/bad.pdf").write_bytes(b"%PDF-1.4\x1b nothing")
    Path("code/round").symlink_to(Path("code").resolve())
    Path("code/a\x1b\nb.txt").write_bytes(b"\xff")
    arguments = ["memory", "build", "m", "code", "--model", str(checkpoint), *OPTIONS]
    assert main(arguments) == 0
    shown = capsys.readouterr()
    assert list(Memory.open(Path("m")).documents()) == ["code/a.py", "code/b.md"]
    (line,) = [line for line in shown.out.splitlines() if line.startswith("left out: ")]
    for part in ("1 binary, 4 unreadable; ", "code/pipe is a named pipe", "code/bad.pdf cannot be read as PDF",
                 "code/round is a link to a folder", "code/a\ufffd b.txt is not UTF-8 text (byte 0)"):  # fmt: skip
        assert part in line
    assert "pypdf" not in shown.err
    assert "EOF marker" not in shown.err


def test_ctrl_c_leaves_a_memory_that_append_continues(
    place: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    left, append = [9], Memory.append

    def interrupting(self: Memory, *args: Any, **kwargs: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        append(self, *args, **kwargs)

    monkeypatch.setattr(Memory, "append", interrupting)
    assert main(["memory", "build", "m", "book.txt", "code", "--model", str(checkpoint), *OPTIONS]) == 130
    assert "interrupted; to continue, run: fot memory append m book.txt code" in capsys.readouterr().err
    monkeypatch.undo()
    assert Memory.open(place / "m").documents() == {"book.txt": 16 + 8 * 14}  # windows overlap by two tokens
    monkeypatch.chdir(place)
    assert main(["memory", "info", "m"]) == 0
    assert "incomplete" in capsys.readouterr().out
    assert main(["memory", "append", "m", "book.txt", "code", "--dtype", "float32"]) == 0
    assert main(["memory", "build", "whole", "book.txt", "code", "--model", str(checkpoint), *OPTIONS]) == 0
    part, whole = Memory.open(place / "m"), Memory.open(place / "whole")
    assert part.token_ids().tolist() == whole.token_ids().tolist()
    assert part.documents() == whole.documents()


def test_ctrl_c_says_what_goes_on_with_the_same_files(
    place: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def interrupting(self: Memory, *args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    (place / "code").rename(place / "my code")
    arguments = ["memory", "build", "m m", "my code", "--include", "*.py", "*.md", "--exclude", "b*"]
    monkeypatch.setattr(Memory, "append", interrupting)
    assert main([*arguments, "--model", str(checkpoint), *OPTIONS]) == 130
    command = capsys.readouterr().err.split("to continue, run: fot ")[1].splitlines()[0]
    monkeypatch.undo()
    monkeypatch.chdir(place)
    assert main([*shlex.split(command), "--dtype", "float32"]) == 0
    assert list(Memory.open(place / "m m").documents()) == ["my code/a.py"]


def test_drop_compact_verify(built: Path, capsys: pytest.CaptureFixture) -> None:
    book = Memory.open(built).documents()["book.txt"]
    assert main(["memory", "drop", "m", "book.txt", "nothing.txt"]) == 2
    assert "holds no document 'nothing.txt', so nothing was dropped" in capsys.readouterr().err
    assert main(["memory", "drop", "m", "book.txt"]) == 0
    assert f"{book:,} tokens dropped" in capsys.readouterr().out
    assert list(Memory.open(built).documents()) == ["code/a.py", "code/b.md"]
    size = sum(path.stat().st_size for path in built.glob("*.safetensors"))
    assert main(["memory", "compact", "m", "--by-cluster"]) == 2
    assert "has no clusters to write by: it needs 8,192 tokens" in capsys.readouterr().err
    assert main(["memory", "compact", "m"]) == 0
    assert sum(path.stat().st_size for path in built.glob("*.safetensors")) < size / 4
    assert main(["memory", "verify", "m"]) == 0
    assert "all unchanged" in capsys.readouterr().out
    (part,) = built.glob("segment*")
    part.write_bytes(part.read_bytes()[:-1] + b"\x55")
    assert main(["memory", "verify", "m"]) == 1
    assert part.name in capsys.readouterr().err


def test_the_index_is_there_when_building_is_done(place: Path, checkpoint: Path) -> None:
    arguments = ["memory", "build", "m", "book.txt", "--model", str(checkpoint), *OPTIONS, "--index", "IVF4,Flat"]
    assert main(arguments) == 0
    assert len(list((place / "m").glob("index*"))) == 1
    assert Memory.open(place / "m").index == "IVF4,Flat"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["build", "new", "empty.txt"], "empty.txt has no text"),
        (["build", "new", "code/c.bin"], "code/c.bin is a binary file"),
        (["build", "new", "void"], "no file with text in void (empty)"),
        (["build", "new", "nowhere.txt"], "nowhere.txt"),
        (["build", "book.txt", "code"], "book.txt is a file"),
        (["build", "m", "code"], "m is already a memory: add to it with fot memory append"),
        (["build", "nowhere/new", "code"], "nowhere is not a folder"),
        (["build", "code", "book.txt"], "code is not empty and holds no memory"),
        (["append", "nowhere", "code"], "nowhere does not exist"),
        (["append", "book.txt", "code"], "book.txt is a file; a memory is a folder"),
        (["append", "code", "book.txt"], "code holds no memory"),
        (["append", "m", "book.txt", "--mem-layers", "1,2", "--dtype", "float32"], "made by another model"),
        (["info", "code"], "code holds no memory"),
        (["verify", "book.txt"], "book.txt is a file"),
        (["drop", "m", "x"], "holds no document 'x'"),
        (["info", "m", "--json", "/nowhere/out.json"], "/nowhere is not a folder"),
    ],
)
def test_bad_input(
    arguments: list[str], message: str, built: Path, checkpoint: Path, capsys: pytest.CaptureFixture
) -> None:
    Path("empty.txt").write_text("\n")
    Path("void").mkdir()
    if arguments[0] == "build":
        arguments = [*arguments, "--model", str(checkpoint), *OPTIONS]
    before = {path.name: path.read_bytes() for path in built.iterdir()}
    assert main(["memory", *arguments]) == 2
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1
    assert shown.startswith("fot: ")
    assert message in shown
    assert not Path("new").exists()
    assert {path.name: path.read_bytes() for path in built.iterdir()} == before


def test_a_full_disk_keeps_what_was_written(
    built: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    import errno
    import os

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = Memory.open(built).documents()
    Path("new.txt").write_text(TEXT)
    monkeypatch.setattr(os, "fsync", full)
    assert main(["memory", "append", "m", "new.txt", "--dtype", "float32"]) == 2
    monkeypatch.undo()
    assert "could not be written (No space left on device)" in capsys.readouterr().err
    assert Memory.open(built).documents() == before


def test_one_bar_over_all_files(
    place: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    from tqdm import tqdm

    bars: list[tqdm] = []

    class Bar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **(kwargs | {"disable": False, "mininterval": 0.0}))
            bars.append(self)

    monkeypatch.setattr(add_module, "progress_bar", Bar)
    assert main(["memory", "build", "m", "book.txt", "code", "--model", str(checkpoint), *OPTIONS]) == 0
    shown = capfd.readouterr().err
    (bar,) = bars
    assert bar.n == bar.total == len(Memory.open(place / "m"))
    assert "tok/s" in shown
    assert "book.txt" in shown


def test_vectors_of_another_dtype(place: Path, checkpoint: Path, capsys: pytest.CaptureFixture) -> None:
    arguments = ["memory", "build", "m", "book.txt", "--model", str(checkpoint), *OPTIONS]
    assert main([*arguments, "--vectors", "int8"]) == 0
    with Memory.open(place / "m", "a") as memory:
        assert (memory.key_dtype, memory.value_dtype) == ("int8", "int8")
    assert main(["memory", "append", "m", "code", "--vectors", "float32"]) == 2
    assert "was made with vectors in int8: omit --vectors" in capsys.readouterr().err
