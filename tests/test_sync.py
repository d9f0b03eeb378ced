"""A memory keeps up with its files: ``fot memory sync``, and texts that are there twice."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from fot.cli import main
from fot.documents import Plan, plan_sync
from fot.documents import find as find_module
from memory import Memory, disk

OPTIONS = ["--mem-layers", "1,3", "--local-context", "16", "--dtype", "float32", "--device", "cpu"]


@pytest.fixture
def place(tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Path:
    """A folder with documents and the memory ``m`` of them, which is the working folder."""
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b", "c"):
        write(f"docs/{name}.txt", f"This is document {name}. " * 3)
    write("one.md", "a file of its own")
    assert main(["memory", "build", "m", "docs", "one.md", "--model", str(checkpoint), *OPTIONS]) == 0
    capsys.readouterr()
    return tmp_path


def write(name: str, text: str) -> None:
    path = Path(name)
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    os.utime(path, ns=(10**18, 10**18 + sum(map(ord, name))))  # long ago, each file at another time


def sync(*more: str) -> int:
    return main(["memory", "sync", "m", "--dtype", "float32", *more])


Held = Callable[..., dict[str, str]]


@pytest.fixture
def held(tokenizer: PreTrainedTokenizerFast) -> Held:
    """Name -> text of the documents of a memory."""

    def read(memory: str = "m") -> dict[str, str]:
        opened = Memory.open(memory)
        ids = opened.token_ids().tolist()
        runs = opened.document_runs()
        return {str(name): tokenizer.decode(ids[start:stop], skip_special_tokens=True) for name, start, stop in runs}

    return read


def test_a_second_run_does_nothing(place: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path.name: path.read_bytes() for path in Path("m").iterdir()}

    def refuse(*args: Any) -> None:
        raise AssertionError("a file that has not changed was read")

    monkeypatch.setattr(find_module, "read", refuse)
    assert sync() == 0
    assert "m: up to date" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in Path("m").iterdir()} == before


def test_what_changed_is_read_what_is_gone_is_dropped_what_moved_is_renamed(
    place: Path, held: Held, capsys: pytest.CaptureFixture, checkpoint: Path
) -> None:
    before = Memory.open("m")
    moved = before.token_ids()[: before.documents()["docs/a.txt"]].tolist()
    (place / "docs" / "a.txt").rename(place / "docs" / "z.txt")
    write("docs/b.txt", "another text")
    Path("docs/c.txt").unlink()
    write("docs/new.txt", "new")
    assert sync("--dry-run") == 0
    shown = capsys.readouterr().out
    assert held()["docs/c.txt"]
    assert sync() == 0
    for line in (
        "changed: docs/b.txt",
        "new:     docs/new.txt",
        "gone:    docs/c.txt",
        "moved:   docs/a.txt -> docs/z.txt",
    ):
        assert line in shown.splitlines()
        assert line in capsys.readouterr().out.splitlines() or line in shown
    texts = held()
    assert texts == {
        "docs/z.txt": "This is document a. " * 3,
        "one.md": "a file of its own",
        "docs/b.txt": "another text",
        "docs/new.txt": "new",
    }
    after = Memory.open("m")
    assert after.token_ids()[: len(moved)].tolist() == moved  # not read again
    assert after.notes["docs/z.txt"].complete
    assert sync() == 0
    assert "m: up to date" in capsys.readouterr().out
    assert main(["memory", "verify", "m"]) == 0
    assert main(["memory", "compact", "m"]) == 0
    assert held() == texts
    assert sync() == 0


def test_what_is_gone_goes_at_once(place: Path, held: Held, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many documents are dropped, the folder is changed once for that; those who read see all or none go."""
    for number in range(6):
        write(f"docs/more{number}.txt", f"This is text {number}. " * 3)
    assert sync() == 0
    seen, commit = list[int](), disk.commit

    def counted(folder: Path, manifest: Any) -> None:
        commit(folder, manifest)
        seen.append(len(Memory.open(folder).documents()))

    monkeypatch.setattr(disk, "commit", counted)
    for number in range(6):
        Path(f"docs/more{number}.txt").unlink()
    assert sync() == 0
    assert len(held()) == 4
    assert seen[0] == 4
    assert len(seen) == 2  # then the state of the files is written


def test_names_that_swap(place: Path, held: Held) -> None:
    Path("docs/a.txt").rename("docs/x")
    Path("docs/b.txt").rename("docs/a.txt")
    Path("docs/x").rename("docs/b.txt")
    ids = Memory.open("m").token_ids().tolist()
    assert sync() == 0
    assert Memory.open("m").token_ids().tolist() == ids
    assert held()["docs/a.txt"] == "This is document b. " * 3


def test_a_change_of_the_same_size_and_time_is_seen_if_recent(place: Path, held: Held) -> None:
    Path("docs/a.txt").write_text("first")
    assert sync() == 0
    state = os.stat("docs/a.txt")
    Path("docs/a.txt").write_text("other")
    os.utime("docs/a.txt", ns=(state.st_atime_ns, state.st_mtime_ns))
    assert sync() == 0
    assert held()["docs/a.txt"] == "other"


def test_a_dropped_document_comes_back(place: Path, held: Held, capsys: pytest.CaptureFixture) -> None:
    before = held()
    assert main(["memory", "drop", "m", "docs/a.txt"]) == 0
    assert "docs/a.txt" not in held()
    assert sync() == 0
    assert held() == before
    capsys.readouterr()
    assert sync() == 0
    assert "m: up to date" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["docs/a.txt", "docs/new.txt"])
def test_a_file_that_fails_while_it_is_read_is_read_next_time(
    name: str, place: Path, held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(name, "another text")

    def plan_and_lose(*args: Any) -> Plan:
        plan = plan_sync(*args)
        Path(name).rename("lost")
        return plan

    with monkeypatch.context() as patched:
        patched.setattr("fot.documents.plan_sync", plan_and_lose)
        sync()
    assert name not in held()
    Path("lost").rename(name)
    assert sync() == 0
    assert held()[name] == "another text"


def test_the_same_text_is_stored_once(place: Path, held: Held, capsys: pytest.CaptureFixture) -> None:
    shutil.copy("docs/a.txt", "docs/copy.txt")
    assert main(["memory", "append", "m", "docs", "--dtype", "float32"]) == 0
    assert "0 tokens read; 4 documents were already in the memory" in capsys.readouterr().out
    assert "docs/copy.txt" not in held()
    Path("docs/a.txt").unlink()  # its copy is the document now
    assert sync() == 0
    assert held()["docs/copy.txt"] == "This is document a. " * 3
    assert "docs/a.txt" not in held()


def test_it_works_from_elsewhere_and_when_all_has_moved(
    place: Path,
    held: Held,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path_factory: pytest.TempPathFactory,
    capsys: pytest.CaptureFixture,
) -> None:
    text = Path("m/manifest.json").read_text()
    other = tmp_path_factory.mktemp("other") / "place"
    shutil.copytree(place, other)
    shutil.rmtree(place / "docs")
    monkeypatch.chdir(other / "docs")
    write("new.txt", "new")
    assert main(["memory", "sync", "../m", "--dtype", "float32"]) == 0
    assert "docs/new.txt" in held("../m")
    noted = json.loads(text)["metadata"]
    assert str(place) not in json.dumps([noted["sources"], noted["files"]])


def test_a_disk_that_is_not_mounted_empties_no_memory(place: Path, held: Held, capsys: pytest.CaptureFixture) -> None:
    before = held()
    shutil.move("docs", "away")
    assert sync() == 2
    assert "docs is not there, so nothing was changed: put it back (mount its disk)" in capsys.readouterr().err
    Path("docs").mkdir()
    assert sync() == 2
    assert "docs holds no document any more, so nothing was changed" in capsys.readouterr().err
    assert held() == before
    Path("docs").rmdir()
    shutil.move("away", "docs")
    Path("one.md").unlink()  # a file alone may go
    assert sync() == 0
    assert "one.md" not in held()


def test_memories_that_say_nothing_of_files(place: Path, capsys: pytest.CaptureFixture) -> None:
    manifest = json.loads(Path("m/manifest.json").read_text())
    for wrong in (
        [],
        None,
        [3],
        [{"name": 3}],
        [{"name": "a", "path": "b", "include": [], "exclude": [], "options": {"x": 1}}],
    ):
        manifest["metadata"]["sources"] = wrong
        Path("m/manifest.json").write_text(json.dumps(manifest))
        assert sync() == 2
        shown = capsys.readouterr().err
        assert shown.count("\n") == 1
        assert "does not say which files it was made of" in shown or "says of its files is damaged" in shown


def test_a_dry_run_lists_tokens_and_reads_nothing(
    place: Path, held: Held, checkpoint: Path, capsys: pytest.CaptureFixture
) -> None:
    write("docs/latin.txt", "x")
    Path("docs/latin.txt").write_bytes(("Größe und Übermut " * 20).encode("latin-1"))
    arguments = ["memory", "build", "new", "docs", "--model", str(checkpoint), *OPTIONS, "--dry-run"]
    assert main(arguments) == 0
    shown = capsys.readouterr().out.splitlines()
    tokens = Memory.open("m").documents()["docs/a.txt"]
    assert f"{tokens:>11,}  docs/a.txt" in shown
    assert any(line.endswith("tokens in 4 documents; nothing was read into a memory") for line in shown)
    assert any(line.startswith("docs/latin.txt was read as cp125") for line in shown)
    assert not Path("new").exists()
    assert main(["memory", "append", "m", "docs", "--dry-run"]) == 0
    assert f"{tokens:>11,}  docs/a.txt" in capsys.readouterr().out.splitlines()
    assert "docs/latin.txt" not in held()


def test_renaming_documents(place: Path) -> None:
    with Memory.open("m", "a") as memory:
        with pytest.raises(KeyError, match="no document 'x' in this memory"):
            memory.rename_documents({"x": "y"})
        with pytest.raises(ValueError, match=r"two documents would be named 'docs/b\.txt'"):
            memory.rename_documents({"docs/a.txt": "docs/b.txt"})
        before = memory.documents()
        memory.rename_documents({"docs/a.txt": "docs/b.txt", "docs/b.txt": "docs/a.txt"})
        assert list(memory.documents()) == ["docs/b.txt", "docs/a.txt", "docs/c.txt", "one.md"]
        assert list(memory.documents()) == list(Memory.open("m").documents())
        assert memory.notes.keys() == before.keys()
    with pytest.raises(ValueError, match="opened read-only"):
        Memory.open("m").rename_documents({"one.md": "two.md"})
