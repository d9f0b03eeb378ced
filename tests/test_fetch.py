"""The scripts that fetch texts, on repositories and packages made here."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"

OPF = """<?xml version="1.0"?><package xmlns="http://www.idpf.org/2007/opf"><spine>
<itemref idref="titlepage.xhtml"/><itemref idref="chapter-2.xhtml"/><itemref idref="chapter-1.xhtml"/>
<itemref idref="endnotes.xhtml"/><itemref idref="uncopyright.xhtml"/></spine></package>"""
PAGE = """<?xml version="1.0" encoding="utf-8"?>
<html xmlns="http://www.w3.org/1999/xhtml" xmlns:epub="http://www.idpf.org/2007/ops">
<head><title>Not this</title></head>
<body><section><header><h2><span>{heading}</span></h2></header>{inner}</section></body></html>"""
FIRST = (
    '<p>It was\n\t\t<i>dark</i>\u2060\u2014<abbr>Mr.</abbr>\u00a0Elton &amp; &lt;co&gt;.<a epub:type="noteref">1</a> '
    "\u201c\u200a\u2018Who?\u2019\u200a\u201d</p><blockquote><p><span>One line,</span><br/>\n<span>another.</span></p>"
    "</blockquote><p>Stop\u2060\u200a\u2026</p>"
)
READ = (
    "II\n\nThe end.\n\nI\n\nIt was dark\u2014Mr. Elton & <co>. \u201c\u2018Who?\u2019\u201d\n\nOne line,\nanother.\n\n"
    "Stop \u2026\n"
)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """name -> the module of an example."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    for name in ("clones", "fetch_books", "fetch_code", "fetch_fairytales"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return __import__


def commit(folder: Path, files: dict[str, str], bare: bool) -> None:
    """Make a repository of files; a bare clone of it in its place, if wanted."""
    made = folder.with_name(f"{folder.name}-made") if bare else folder
    for name, text in files.items():
        (made / name).parent.mkdir(parents=True, exist_ok=True)
        (made / name).write_text(text, encoding="utf-8")
    git = ["git", "-C", str(made), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "all"]):
        subprocess.run([*git, *command], check=True)
    if bare:
        subprocess.run(["git", "clone", "-q", "--bare", str(made), str(folder)], check=True)


@pytest.mark.parametrize("bare", [False, True], ids=["clone", "bare"])
@pytest.mark.parametrize("held_out", [False, True], ids=["training", "held out"])
def test_books_are_read_in_the_order_of_the_spine(
    bare: bool, held_out: bool, script: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    books = script("fetch_books")
    pages = {"chapter-1": ("I", FIRST), "chapter-2": ("II", "<p>The end.</p>")}
    pages |= {name: ("No", "<p>None of it.</p>") for name in ("titlepage", "endnotes", "uncopyright")}
    files = {f"src/epub/text/{name}.xhtml": PAGE.format(heading=h, inner=p) for name, (h, p) in pages.items()}
    commit(tmp_path / "clones" / "a_book", files | {"src/epub/content.opf": OPF, "README.md": "no"}, bare)
    monkeypatch.setattr(books, "HELD_OUT" if held_out else "TITLES", ["a_book"])
    options = ["--from", str(tmp_path / "clones"), *(["--held-out"] if held_out else [])]
    monkeypatch.setattr(sys, "argv", ["fetch_books.py", str(tmp_path / "out"), *options])
    assert books.main() == 0
    assert (tmp_path / "out" / "a_book.txt").read_text("utf-8") == READ


def test_no_book_is_trained_on_and_held_out(script: Callable[[str], Any]) -> None:
    books = script("fetch_books")
    assert not set(books.TITLES) & set(books.HELD_OUT)
    assert len(set(books.TITLES)) == len(books.TITLES) >= 30
    for author in ("austen", "doyle"):
        assert not any(author in title for title in books.TITLES)
    code = script("fetch_code")
    assert not set(code.PACKAGES) & set(code.HELD_OUT)


def test_a_clone_that_is_not_there(script: Callable[[str], Any], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no such clone: .*a_book; run git clone"):
        script("clones").read_files("https://host.test/of/a_book", ["src"], tmp_path)


def test_fairytales_are_questions_with_answers_in_short_passages(
    script: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = "question_id,local-or-sum,cor_section,attribute1,attribute2,question,ex-or-im1,answer1,answer2,answer3,"
    head += "ex-or-im2,answer4,answer5,answer6\n"
    rows = [
        "1,local,1,a,,Who was  at the sea ?,explicit,the king 's son .,,,explicit,\"The king's son\",a prince,",
        '2,summary,"1,2",a,,What did he see?,explicit,a ship,,,implicit,nothing,,',
        "3,local,2,a,,Why?,implicit,joy,,,explicit,joy,,",
        "4,local,3,a,,How long?,explicit,long,,,,,,",
        f"5,local,2,a,,What?,explicit,{'very ' * 20}long,,,,,,",
        "6,local,9,a,,Where?,explicit,here,,,,,,",
    ]
    sections = f'section,text\n1,"The king\'s son stood\nat the sea."\n2,He saw a ship.\n3,{"long " * 351}\n'
    files = {"README.md": "no"}
    for split, count in (("train", 6), ("val", 1)):
        base = "data-by-train-split"
        files[f"{base}/questions/{split}/Sea-questions.csv"] = head + "\n".join(rows[:count]) + "\n"
        files[f"{base}/section-stories/{split}/Sea-story.csv"] = sections
    commit(tmp_path / "clones" / "FairytaleQAData", files, bare=True)
    tales = script("fetch_fairytales")
    monkeypatch.setattr(sys, "argv", ["x", str(tmp_path / "out"), "--from", str(tmp_path / "clones")])
    assert tales.main() == 0
    first = "The king's son stood\nat the sea."
    expected = [
        {"passage": first, "question": "Who was at the sea?", "answers": ["the king's son.", "a prince"]},
        {"passage": f"{first}\nHe saw a ship.", "question": "What did he see?", "answers": ["a ship"]},
    ]
    for name, count in (("fairytales.jsonl", 2), ("fairytales_val.jsonl", 1)):
        found = [json.loads(line) for line in (tmp_path / "out" / name).read_text().splitlines()]
        assert found == [row | {"title": "sea.txt"} for row in expected[:count]]


def test_code_is_of_modules_that_people_wrote(
    script: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = script("fetch_code")
    body = "def area(width, height):\n    return width * height\n\n\n" * 200
    files = {
        "__init__.py": "",
        "good.py": body,
        "sub/fine.py": body + "# more\n",
        "short.py": "x = 'short'\n",
        "tests/test_good.py": body,
        "test_other.py": body,
        "_vendor/copied.py": body,
        "made.py": f"# Generated by a script.\n{body}",
        "table.py": "x = [1234567890, 1234567890]\n" * 400,
    }
    for name, text in files.items():
        file = tmp_path / "some_package" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(code, "PACKAGES", ["some_package"])
    monkeypatch.setattr(code, "HELD_OUT", ["some_package"])
    monkeypatch.setattr(sys, "argv", ["x", str(tmp_path / "out")])
    assert code.main() == 0
    found = sorted(file.name for file in (tmp_path / "out").iterdir())
    assert found == ["some_package.good.py", "some_package.sub.fine.py"]
    monkeypatch.setattr(sys, "argv", ["x", str(tmp_path / "whole"), "--held-out"])
    assert code.main() == 0
    whole = (tmp_path / "whole" / "some_package.py").read_text()
    assert whole.count("def area") == 400
    assert "# some_package/short.py\nx = 'short'" in whole
    monkeypatch.setattr(code, "PACKAGES", ["no_such_package"])
    monkeypatch.setattr(sys, "argv", ["x", str(tmp_path / "out")])
    with pytest.raises(ModuleNotFoundError, match="no package no_such_package here: pip install it"):
        code.main()
