"""What a recipe names as a source is found and read, or refused by name."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from data_helpers import loader_of, write_rows, write_texts
from datasets import Dataset

from training.data import DocumentStream, read_documents
from training.reader import tokenize
from training.sources import DataSource, find_files


def test_every_kind_of_file_gives_the_same_documents(tmp_path: Path, tokenizer: Any) -> None:
    texts = ["one\ntwo\n", "drei ä", "four"]
    rows = "".join(json.dumps({"content": text}) + "\n" for text in texts)
    (tmp_path / "a[1].jsonl").write_text(rows)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(rows.encode()))
    (tmp_path / "c.json").write_text(json.dumps([{"content": text} for text in texts]))
    Dataset.from_dict({"content": texts}).to_parquet(tmp_path / "d.parquet")
    (tmp_path / "src" / "inner").mkdir(parents=True)
    for place, text in zip(("src/a.py", "src/b.py", "src/inner/c.py"), texts, strict=True):
        (tmp_path / place).write_text(text, encoding="utf-8")
    (tmp_path / "src" / "note.txt").write_text("no code")
    sources = [DataSource(str(tmp_path / name), text_field="content")
               for name in ("a[1].jsonl", "b.jsonl.gz", "c.json", "d.parquet", "*.jsonl")]  # fmt: skip
    sources += [DataSource(str(tmp_path / "src"), pattern="**/*.py"), DataSource(str(tmp_path / "src" / "**" / "*.py"))]
    for source in sources:
        assert [tokenizer.decode(ids) for ids in read_documents(source, tokenizer)] == texts
    one = DataSource(str(tmp_path / "src" / "a.py"))
    assert [tokenizer.decode(ids) for ids in read_documents(one, tokenizer)] == texts[:1]


def test_a_data_set_of_the_hub_is_streamed(monkeypatch: Any, tokenizer: Any) -> None:
    asked = []

    def load(*args: Any, **kwargs: Any) -> Any:
        asked.append((args, kwargs))
        return Dataset.from_dict({"body": ["aa", "bb"]}).to_iterable_dataset()

    monkeypatch.setattr("datasets.load_dataset", load)
    source = DataSource("someone/books", name="en", split="validation", text_field="body")
    assert [tokenizer.decode(ids) for ids in read_documents(source, tokenizer)] == ["aa", "bb"]
    assert asked == [(("someone/books", "en"), {"split": "validation", "streaming": True})]


def test_files_of_a_data_set_on_the_hub_are_named(monkeypatch: Any, tmp_path: Path, tokenizer: Any) -> None:
    """Some data sets, RedPajama among them, are programs that datasets no longer runs; their files can be read."""
    from datasets import load_dataset

    (tmp_path / "a.jsonl").write_text('{"text": "aa"}\n{"text": "bb"}\n')
    asked = []

    def load(*args: Any, **kwargs: Any) -> Any:
        asked.append((args, kwargs))
        if args[0] != "json":
            raise RuntimeError("Dataset scripts are no longer supported, but found books.py")
        return load_dataset(*args, **(kwargs | {"data_files": str(tmp_path / "a.jsonl")}))

    monkeypatch.setattr("datasets.load_dataset", load)
    source = DataSource("hf://datasets/someone/books/*_en.jsonl.gz")
    assert [tokenizer.decode(ids) for ids in read_documents(source, tokenizer)] == ["aa", "bb"]
    assert asked == [(("json",), {"data_files": source.path, "split": "train", "streaming": True})]
    with pytest.raises(ValueError, match=r"no longer supported.*; name its files, such as hf://datasets/a/b/\*\.jsonl"):
        list(read_documents(DataSource("a/b"), tokenizer))
    with pytest.raises(ValueError, match=r"hold rows: give files that end in \.json, \.jsonl"):
        find_files(DataSource("hf://datasets/a/b/*.txt"))
    with pytest.raises(ValueError, match="name, split and pattern have no use: omit them"):
        find_files(DataSource("hf://datasets/a/b/*.parquet", name="en"))


def test_a_data_set_that_is_not_on_the_hub_is_named(monkeypatch: Any, tokenizer: Any) -> None:
    def load(*args: Any, **kwargs: Any) -> Any:
        raise ConnectionError("no route")

    monkeypatch.setattr("datasets.load_dataset", load)
    with pytest.raises(
        ValueError, match="'novels' is neither a file or folder here nor readable from the hub: no rout"
    ):
        next(loader_of(DataSource("novels"), tokenizer))


def test_short_documents_are_left_out(tmp_path: Path, tokenizer: Any) -> None:
    for n in range(1, 9):
        (tmp_path / f"{n}.txt").write_text("ä" * n, encoding="utf-8")  # two tokens a character
    assert len(list(read_documents(DataSource(str(tmp_path), min_tokens=8), tokenizer))) == 5
    assert len(list(read_documents(DataSource(str(tmp_path), min_chars=8), tokenizer))) == 1
    loader = loader_of(DataSource(str(tmp_path), min_tokens=8), tokenizer, lanes=1, windows=20)
    while loader.progress()[str(tmp_path)]["epoch"] == 0:
        next(loader)
    assert loader.progress()[str(tmp_path)]["short"] >= 3


def test_hidden_files_are_not_read(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_text("secret")
    (tmp_path / "a.txt").write_text("a")
    assert list(read_documents(DataSource(str(tmp_path)), tokenizer)) == [tokenize(tokenizer, "a")]


def test_files_that_are_not_utf8(tmp_path: Path, tokenizer: Any, caplog: Any) -> None:
    (tmp_path / "a.txt").write_text("fine")
    (tmp_path / "b.txt").write_bytes(b"caf\xe9")
    stream = DocumentStream(DataSource(str(tmp_path)), tokenizer)
    assert {tokenizer.decode(stream.draw()[1]) for _ in range(3)} == {"fine"}
    assert stream.skipped["unreadable"] >= 2
    assert "b.txt" in caplog.text
    with pytest.raises(ValueError, match=r"b\.txt is not UTF-8 .*convert it"):
        DocumentStream(DataSource(str(tmp_path / "b.txt")), tokenizer).draw()


@pytest.mark.parametrize("kind", ["txt", "jsonl", "empty"])
def test_no_document_long_enough_is_an_error_not_an_endless_loop(tmp_path: Path, tokenizer: Any, kind: str) -> None:
    if kind == "txt":
        write_texts(tmp_path / "a", 3)
        path = str(tmp_path / "a")
    else:
        path = write_rows(tmp_path / "a", "jsonl", count=3 if kind == "jsonl" else 1)
    processes = 4 if kind == "empty" else 1
    source = DataSource(path, min_tokens=1000 if kind != "empty" else 1)
    with pytest.raises(ValueError, match=r"no document: .*min_tokens=.*lower the limits"):
        next(loader_of(source, tokenizer, rank=processes - 1, world_size=processes))


def test_wrong_paths_and_patterns_are_named(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed" / "a.py").write_text("a")
    (tmp_path / "mixed" / "b.json").write_text("{}")
    missing: list[tuple[dict[str, Any], str]] = [
        ({"path": str(tmp_path / "missing")}, "no such file or folder: .*missing"),
        ({"path": "missing.jsonl"}, "no such file or folder: .*missing.jsonl"),
        ({"path": "missing", "pattern": "*.py"}, "no such file or folder: .*missing"),
        ({"path": str(tmp_path / "*.txt")}, "no file matches"),
        ({"path": str(tmp_path / "empty")}, "holds no file that matches"),
        ({"path": str(tmp_path / "mixed"), "pattern": "*.rs"}, "holds no file that matches '.*rs'"),
    ]
    for entry, message in missing:
        with pytest.raises(FileNotFoundError, match=message):
            DocumentStream(DataSource(**entry), tokenizer)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"path": str(tmp_path / "mixed")}, "kinds json, text: name one with pattern"),
        ({"path": str(tmp_path / "mixed" / "a.py"), "pattern": "*.py"}, "pattern is for a folder"),
        (
            {"path": str(tmp_path / "mixed"), "pattern": "*.py", "split": "test"},
            "name and split are only for data sets",
        ),
    ]
    for entry, message in wrong:
        with pytest.raises(ValueError, match=message):
            DocumentStream(DataSource(**entry), tokenizer)


def test_rows_without_text_are_named(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "x", "n": 1}\n')
    with pytest.raises(ValueError, match="field 'text' is missing in a row with 'body', 'n'; set text_field"):
        DocumentStream(DataSource(str(tmp_path / "a.jsonl")), tokenizer).draw()
    with pytest.raises(ValueError, match="field 'n' holds int, not text"):
        DocumentStream(DataSource(str(tmp_path / "a.jsonl"), text_field="n"), tokenizer).draw()
    (tmp_path / "b.jsonl").write_text('{"text": "x"}\n{"text": null}\n{"text": "y"}\n')
    assert len(list(read_documents(DataSource(str(tmp_path / "b.jsonl")), tokenizer))) == 2
    (tmp_path / "d.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"d\.jsonl' holds no rows"):
        DocumentStream(DataSource(str(tmp_path / "d.jsonl")), tokenizer).draw()
    (tmp_path / "c.jsonl").write_text("no json at all\n")
    with pytest.raises(ValueError, match=r"c\.jsonl' (is not readable|cannot be read any further): ."):
        DocumentStream(DataSource(str(tmp_path / "c.jsonl")), tokenizer).draw()


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"path": "a", "wieght": 1}, "unknown entry 'wieght'; known: path, weight"),
        ({"weight": 1}, "has no path"),
        ({"path": ""}, "empty path"),
        ({"path": "a", "weight": 0}, "weight is 0; it must be above 0"),
        ({"path": "a", "weight": float("nan")}, "weight is nan"),
        ({"path": "a", "min_tokens": 0}, "min_tokens is 0; it must be at least 1"),
        ({"path": "a", "shuffle_buffer": 0}, "shuffle_buffer is 0"),
    ],
)
def test_wrong_entries_of_a_recipe_are_named(entry: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataSource.from_dict(entry)
