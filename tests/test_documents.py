"""Files as documents: what is found, what is read of it, and reading that was interrupted."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import WINDOW, ModelMaker
from document_helpers import HTML, make_folder, make_pdf, names
from transformers import PreTrainedTokenizerFast

import fot
from fot import ingest as ingest_module
from fot.documents import add as add_module
from fot.documents import add_document, add_documents, describe_left_out, find_documents, read_document
from fot.fingerprint import tokenizer_fingerprint
from memory import DocumentNote, Memory
from memory.disk import verify

TEXT = "".join(f"Line {number} of a document, long enough for some windows.\n" for number in range(14))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path)


def test_folders_are_walked(folder: Path) -> None:
    found = find_documents([folder])
    assert names(found, folder) == ["a.md", "b.py", "sub/c.txt", "sub/page.html", "sub/deep/d.py"]
    assert found.characters == [len("# Ä title\r\n"), 9, 4, len("Emma\n\nMr. Weston"), 6]
    assert describe_left_out(found) == (
        f"1 binary, 1 empty, 1 hidden, 1 hidden folders, 1 unreadable; {folder}/latin.txt is not UTF-8 text (byte 3)"
    )


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        (["*.py"], [], ["b.py", "sub/deep/d.py"]),
        (["*.py", "*.md"], ["sub"], ["a.md", "b.py"]),
        (["sub/*"], ["*.html"], ["sub/c.txt", "sub/deep/d.py"]),
        ([], ["*.html", "deep", "[ab].*"], ["sub/c.txt"]),
    ],
)
def test_globs(include: list[str], exclude: list[str], expected: list[str], folder: Path) -> None:
    assert names(find_documents([folder], include, exclude), folder) == expected


def test_files_come_in_the_order_given_and_once(folder: Path) -> None:
    found = find_documents([folder / "sub" / "c.txt", folder / "b.py", folder, folder / "sub" / ".." / "a.md"])
    assert names(found, folder)[:2] == ["sub/c.txt", "b.py"]
    assert len(found.paths) == len(set(found.paths)) == 5


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("picture.png", r"picture\.png is a binary file"),
        ("latin.txt", r"latin\.txt is not UTF-8 text \(byte 3\)"),
        ("empty.txt", r"empty\.txt has no text"),
    ],
)
def test_named_files_without_text_are_errors(name: str, message: str, folder: Path) -> None:
    with pytest.raises(ValueError, match=message):
        find_documents([folder / "b.py", folder / name])


def test_nothing_found(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"no file with text in .*docs \(.*8 not asked for\); check the path, --include"
    ):
        find_documents([folder], ["*.rs"], ["latin.txt", "picture.png", "empty.txt"])
    with pytest.raises(FileNotFoundError, match="nowhere"):
        find_documents([tmp_path / "nowhere"])


def test_html_is_its_text(folder: Path) -> None:
    assert read_document(folder / "sub" / "page.html") == "Emma\n\nMr. Weston"
    assert read_document(folder / "a.md") == "# Ä title\r\n"
    assert read_document(folder / "sub" / "c.txt") == "text"


def test_pdf_is_its_text(tmp_path: Path) -> None:
    make_pdf(tmp_path / "a.pdf", "Mr. Elton")
    assert read_document(tmp_path / "a.pdf").strip() == "Mr. Elton"
    make_pdf(tmp_path / "scan.pdf", "")
    with pytest.raises(ValueError, match=r"scan\.pdf has no text"):
        read_document(tmp_path / "scan.pdf")
    (tmp_path / "bad.pdf").write_bytes(b"%PDF-1.4 and then nothing")
    with pytest.raises(ValueError, match=r"bad\.pdf cannot be read as PDF"):
        read_document(tmp_path / "bad.pdf")


@pytest.mark.parametrize(("name", "package"), [("a.pdf", "pypdf"), ("a.html", "selectolax.lexbor")])
def test_missing_packages_are_named(name: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / name).write_text(HTML)
    monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(ImportError, match=r"reading .* needs .*: pip install 'fot\[documents\]'"):
        read_document(tmp_path / name)


# --- into a memory --------------------------------------------------------------------------------------------------


@pytest.fixture(params=[False, True], ids=["reading", "isolated"])
def model(request: pytest.FixtureRequest, make_model: ModelMaker, tokenizer: PreTrainedTokenizerFast) -> Any:
    model = make_model(isolated_windows=request.param)
    model.tokenizer = tokenizer
    return model


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ingest_module, "PIECE", 70)
    monkeypatch.setattr(ingest_module, "ISOLATED_TOKENS", 3 * WINDOW)
    monkeypatch.setattr(add_module, "FLUSH_TOKENS", 5 * WINDOW)


def opened(model: Any, path: Path) -> Memory:
    model.new_memory().save(path)
    return Memory.open(path, "a")


def assert_same(found: Memory, wanted: Memory) -> None:
    assert found.token_ids().tolist() == wanted.token_ids().tolist()
    assert [found.source(slot) for slot in range(len(found))] == [wanted.source(slot) for slot in range(len(wanted))]
    for layer in wanted.layers:
        # A window that is read alone or with others, or attends to blocks of other sizes, is summed in another order.
        # Later windows read what came of that, so it adds up.
        torch.testing.assert_close(found[layer].keys(), wanted[layer].keys(), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(found[layer].values(), wanted[layer].values(), atol=1e-4, rtol=1e-4)


@pytest.mark.usefixtures("small_pieces")
def test_flushing_on_the_way_changes_nothing(model: Any, tmp_path: Path) -> None:
    wanted = model.new_memory()
    model.ingest(TEXT, wanted, source="a")
    with opened(model, tmp_path / "m") as memory:
        assert add_document(model, memory, "a", TEXT) == len(wanted)
        assert len(list((tmp_path / "m").glob("segment*"))) == 8
        assert_same(memory, wanted)
    assert_same(Memory.open(tmp_path / "m"), wanted)


@pytest.mark.parametrize("seconds", [30.0, 0.0])
def test_short_documents_share_a_file(
    seconds: float, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are written together, unless long is passed; interrupted, those that were read are there."""
    for number in range(12):
        (tmp_path / "docs").mkdir(exist_ok=True)
        (tmp_path / "docs" / f"{number:02}.txt").write_text(f"Text {number}. " * (1 + number % 3))
    monkeypatch.setattr(add_module, "FLUSH_SECONDS", seconds)
    left, append = [7], Memory.append

    def interrupting(self: Memory, *args: Any, **kwargs: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        append(self, *args, **kwargs)

    with opened(model, tmp_path / "m") as memory:
        found = find_documents([tmp_path / "docs"])
        with monkeypatch.context() as context:
            context.setattr(Memory, "append", interrupting)
            with pytest.raises(KeyboardInterrupt):
                add_documents(model, memory, found)
        part = Memory.open(tmp_path / "m")
        assert len(part) == len(memory) > 0
        done = [name for name, note in part.notes.items() if note.complete]
        assert set(part.documents()) - set(done) in (set(), {max(part.documents())})
        added = add_documents(model, memory, find_documents([tmp_path / "docs"]))
        assert added.same == len(done)
    whole = Memory.open(tmp_path / "m")
    assert len(whole.documents()) == 12
    assert all(note.complete for note in whole.notes.values())
    files = len(list((tmp_path / "m").glob("segment*")))
    assert files == 2 if seconds else files >= 12
    assert verify(tmp_path / "m") == []


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize(("overlap", "stop"), [(0, 1), (5, 7), (0, 23), (0, 10_000), (5, 10_000)])
def test_interrupted_documents_go_on(
    model: Any, stop: int, overlap: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted (stop windows on), or killed before the last note was written, as a rerun of ``append`` meets it."""
    fot.attach_memory(model, replace(model.memory_config, window_overlap=overlap))
    wanted, text = model.new_memory(), TEXT[:400]
    model.ingest(text, wanted, source="a")
    left, append = [stop], Memory.append

    def interrupting(self: Memory, *args: Any, **kwargs: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        append(self, *args, **kwargs)

    monkeypatch.setattr(Memory, "append", interrupting)
    with opened(model, tmp_path / "m") as memory:
        if stop < 1000:
            with pytest.raises(KeyboardInterrupt):
                add_document(model, memory, "a", text)
        else:
            add_document(model, memory, "a", text)
            memory.notes["a"] = DocumentNote(memory.notes["a"].sha256, complete=False)
            memory.flush()
    monkeypatch.undo()
    part = Memory.open(tmp_path / "m")
    assert len(part) == min(overlap + stop * (WINDOW - overlap), len(wanted))
    assert not part.notes["a"].complete
    with Memory.open(tmp_path / "m", "a") as memory:
        assert add_document(model, memory, "a", text) == len(wanted) - len(part)
        assert memory.notes["a"].complete
        assert add_document(model, memory, "a", text) == 0
    assert_same(Memory.open(tmp_path / "m"), wanted)
    assert Memory.open(tmp_path / "m").notes["a"].complete
    assert verify(tmp_path / "m") == []


def test_changed_documents_are_refused(model: Any, tmp_path: Path) -> None:
    with opened(model, tmp_path / "m") as memory:
        add_document(model, memory, "a", TEXT)
        count = len(memory)
        with pytest.raises(ValueError, match=r"a has changed since .*drop it first"):
            add_document(model, memory, "a", TEXT + "more")
        assert len(memory) == count
        memory.drop_document("a")
        assert add_document(model, memory, "a", TEXT + "more") == count + 4


def test_other_tokenizers_are_refused(model: Any, make_model: ModelMaker, tmp_path: Path) -> None:
    memory = model.new_memory()
    memory.metadata["tokenizer"] = ours = tokenizer_fingerprint(model.tokenizer)
    model.check_memory(memory)
    model.tokenizer(["a", "long text"], padding=True, truncation=True, max_length=5)  # changes its state
    del model.tokenizer.__dict__["_fot_fingerprint"]
    assert tokenizer_fingerprint(model.tokenizer) == ours
    other = PreTrainedTokenizerFast.from_pretrained(_saved(model.tokenizer, tmp_path))
    assert tokenizer_fingerprint(other) == ours
    other.add_tokens(["<extra>"])
    model.tokenizer = other
    theirs = tokenizer_fingerprint(other)
    with pytest.raises(ValueError, match=rf"another tokenizer: its fingerprint is {ours}, the model's {theirs}; load"):
        model.check_memory(memory)
    model.tokenizer = None  # ids may still be given
    model.check_memory(memory)


def _saved(tokenizer: PreTrainedTokenizerFast, folder: Path) -> Path:
    tokenizer.save_pretrained(folder)
    return folder


def test_files_that_are_gone_when_their_turn_comes_are_left_out(model: Any, folder: Path, tmp_path: Path) -> None:
    found = find_documents([folder], ["*.py", "*.md"])
    (folder / "a.md").unlink()
    with opened(model, tmp_path / "m") as memory:
        add_documents(model, memory, found)
        assert list(memory.documents()) == [f"{folder}/b.py", f"{folder}/sub/deep/d.py"]
    assert f"{folder}/a.md cannot be read (No such file or directory)" in describe_left_out(found)


def test_texts_without_a_form_in_utf8_are_refused(model: Any, tmp_path: Path) -> None:
    with opened(model, tmp_path / "m") as memory:
        for name, text in (("a", "x\ud800"), ("a\udce9", "x")):
            with pytest.raises(ValueError, match=r"is not UTF-8 text, from character 1 on: convert it to UTF-8"):
                add_document(model, memory, name, text)
        with pytest.raises(ValueError, match=r"the text is not UTF-8 text, from character 2 on"):
            model.ingest("ab\ud800", memory)
        assert len(memory) == 0
