"""Text and names of others do not act: not on the terminal, not in a page; a wrong manifest is one clear line."""

import json
from pathlib import Path
from typing import Any

import pytest

from fot.cli import main
from fot.inspection.texts import one_line, printable

OPTIONS = ["--mem-layers", "1,3", "--local-context", "64", "--dtype", "float32", "--device", "cpu"]
HOSTILE = "a\x1b[31m\rb\x07\x9b2J\u202egpj.\x85[link=http://x]c[/link]"
COMMANDS = set("\x1b\r\x07\x9b\u202e\x85\x0c\x0b\x1c")


@pytest.fixture
def built(tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("A line of a document.\n" * 30)
    assert main(["memory", "build", "m", "a.txt", "--model", str(checkpoint), *OPTIONS]) == 0
    capsys.readouterr()
    return tmp_path / "m"


def test_what_commands_a_terminal_is_shown() -> None:
    assert printable("a\x1b[31m\tb\r\nc\n") == "a\ufffd[31m\tb\nc\n"
    assert one_line(" a\r\n\x1b b\x0cc ") == "a \ufffd b c"
    for shown in (printable(HOSTILE), one_line(HOSTILE)):
        assert not COMMANDS & set(shown)
        assert "[link=http://x]c[/link]" in shown
    assert printable("日本語 עברית é \U0001f600") == "日本語 עברית é \U0001f600"


def test_hostile_names_and_texts_do_not_reach_the_terminal(
    built: Path, checkpoint: Path, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    folder = tmp_path / "docs"
    folder.mkdir()
    name = HOSTILE.replace("/", "_")
    (folder / f"{name}.txt").write_text(HOSTILE * 3)
    (folder / f"{name}.zip").write_text("x")
    (folder / f"{name}\n.latin").write_bytes(("Größe und Übermut " * 9).encode("latin-1"))
    assert main(["memory", "build", "h", "docs", "--model", str(checkpoint), *OPTIONS, "--dry-run"]) == 0
    assert main(["memory", "build", "h", "docs", "--model", str(checkpoint), *OPTIONS]) == 0
    manifest = json.loads(Path("h/manifest.json").read_text())
    manifest["metadata"]["fot"] = HOSTILE
    manifest["written_by"] = manifest["changed"] = manifest["fingerprint"] = HOSTILE
    Path("h/manifest.json").write_text(json.dumps(manifest))
    assert main(["memory", "info", "h"]) == 0
    assert main(["memory", "sync", "h", "--dry-run"]) == 0
    main(["memory", "drop", "h", "nothing"])
    main(["ask", "h", "What?", "--dtype", "float32", "--max-new-tokens", "4"])
    assert main(["ask", "m", "What?", "--dtype", "float32", "--max-new-tokens", "4"]) == 0
    shown = capsys.readouterr()
    assert not COMMANDS & set(shown.out + shown.err)


WRONG: tuple[Any, ...] = (None, 5, 0.5, True, "x", [], [3], {}, {"a": 1}, "y" * 5000)


def test_a_manifest_of_wrong_types_is_one_clear_line(built: Path, capsys: pytest.CaptureFixture) -> None:
    """Whatever stands there: it is read, or refused in a line that names it."""
    path = built / "manifest.json"
    good = json.loads(path.read_text())
    for name in good:
        for wrong in WRONG:
            path.write_text(json.dumps(good | {name: wrong}))
            _is_clear(main(["memory", "info", "m"]), capsys)
    for part in ("documents", "segments"):
        for name in good[part][0]:
            for wrong in WRONG:
                path.write_text(json.dumps(good | {part: [good[part][0] | {name: wrong}]}))
                _is_clear(main(["memory", "info", "m"]), capsys)


@pytest.mark.parametrize(
    "name", ["model", "memory", "tokenizer", "made_with", "index", "top_k", "mem_layers", "key_dtype"]
)
def test_settings_of_wrong_types_are_one_clear_line(name: str, built: Path, capsys: pytest.CaptureFixture) -> None:
    path = built / "manifest.json"
    good = json.loads(path.read_text())
    for wrong in (None, 5, "x", [3], {"a": 1}):
        metadata = dict(good["metadata"])
        if name in metadata:
            metadata[name] = wrong
        else:
            metadata["memory"] = metadata["memory"] | {name: wrong}
        path.write_text(json.dumps(good | {"metadata": metadata}))
        _is_clear(main(["ask", "m", "What?", "--dtype", "float32", "--max-new-tokens", "1"]), capsys)


def _is_clear(status: int, capsys: pytest.CaptureFixture) -> None:
    shown = capsys.readouterr()
    assert status in (0, 2)
    if status == 2:
        assert shown.err.startswith("fot: ")
        assert shown.err.count("\n") == 1
        assert len(shown.err) < 1200


@pytest.mark.parametrize("kind", ["page", "inspection"])
def test_pages_escape_everything(kind: str, built: Path, tmp_path: Path) -> None:
    """No script of ours makes markup of text, and what is put into a page ends no element."""
    from importlib.resources import files

    if kind == "page":
        script = (files("fot.serve") / "page" / "page.js").read_text()
        page = (files("fot.serve") / "page" / "page.html").read_text()
        assert "<script>" not in page  # its policy allows scripts of files alone
    else:
        script = (files("fot.inspection") / "page.js").read_text()
        attack = "</script><img src=x onerror=alert(1)>"
        out = tmp_path / "out.html"
        assert main(["inspect", "m", attack, "--html", str(out), "--dtype", "float32", "--max-new-tokens", "2"]) == 0
        assert "<img" not in out.read_text()
    for way in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function"):
        assert way not in script
