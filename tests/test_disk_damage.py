"""Damaged, edited and foreign folders are named, in one line, before they do harm."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from disk_helpers import forge, make, save_two

from memory import Memory
from memory.disk import verify


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save_two(tmp_path / "m")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def garbage(path: Path) -> None:
    path.write_bytes(b"\xff" * path.stat().st_size)


def other_names(path: Path) -> None:
    """A safetensors file of the right size whose tensors have other names."""
    path.write_bytes(path.read_bytes().replace(b"keys.1", b"Keys.1"))


def other_dtype(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b'"F32"', b'"I32"', 1))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (Path.unlink, "is missing"),
        (cut, r"the manifest says [\d,]+ bytes"),
        (garbage, "damaged or belongs to another memory"),
        (other_names, r"it has no 'keys\.1'"),
        (other_dtype, "is I32 of shape"),
    ],
)
def test_damaged_parts_are_named_at_once(damage: Callable[[Path], None], message: str, saved: Path) -> None:
    damage(saved / "segment-000001.safetensors")
    with pytest.raises(ValueError, match=rf"segment-000001\.safetensors.*{message}") as caught:
        Memory.open(saved)
    assert "\n" not in str(caught.value)
    (problem,) = verify(saved)
    assert problem == str(caught.value)
    with pytest.raises(ValueError, match=message):
        Memory.open(saved, "a")
    make().save(saved)  # the lock is free


def test_verify_reads_every_byte(saved: Path) -> None:
    flip(saved / "segment-000001.safetensors")
    Memory.open(saved)
    (problem,) = verify(saved)
    assert "segment-000001.safetensors was changed: its sha256 is" in problem


def test_verify_compares_the_manifest(saved: Path) -> None:
    forge(saved, "documents", tokens=31)
    (problem,) = verify(saved)
    assert "document 'a' has (tokens, first, last) = (30, 0, 29); the manifest says (31, 0, 29)" in problem


@pytest.mark.parametrize(
    ("entry", "changes", "message"),
    [
        ("", {"version": 99}, "has format version 99, but this version of fot reads up to 3: upgrade fot"),
        ("", {"format": "other"}, "does not belong to a memory"),
        ("", {"layers": [1, 1]}, r"layers are \[1, 1\]"),
        ("", {"head_dim": "8"}, "head_dim is '8'"),
        ("", {"head_dim": True}, "head_dim is 'True'"),
        ("", {"key_dtype": "int3"}, "key_dtype is 'int3'"),
        ("", {"surprise": 1}, "'surprise' is missing or unknown"),
        ("", {"index": "IVF99999999999,Flat"}, "asks for more than"),
        ("", {"index": "Nonsense"}, "Nonsense"),
        ("segments", {"file": "../segment-000001.safetensors"}, "is no segment of a memory"),
        ("segments", {"file": "/etc/passwd"}, "is no segment of a memory"),
        ("segments", {"tokens": 49}, "is I32 of shape"),
        ("segments", {"bytes": -1}, "is no segment of a memory"),
        ("documents", {"name": "b"}, "names a document twice"),
    ],
)
def test_damaged_manifests(entry: str, changes: dict[str, Any], message: str, saved: Path) -> None:
    forge(saved, entry, **changes)
    with pytest.raises(ValueError, match=message) as caught:
        Memory.open(saved)
    assert "\n" not in str(caught.value)


def test_a_manifest_that_is_no_json(saved: Path) -> None:
    cut(saved / "manifest.json")
    with pytest.raises(ValueError, match=r"manifest\.json is damaged: .*restore it"):
        Memory.open(saved)
    with pytest.raises(ValueError, match=r"manifest\.json is damaged"):
        make().save(saved)


def test_tokens_of_documents_that_are_not_there(saved: Path) -> None:
    manifest = json.loads((saved / "manifest.json").read_text())
    manifest["documents"].pop()
    (saved / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"segment-000001.*a token is of a document outside 0\.\.0"):
        Memory.open(saved)


def test_paths_that_are_no_memory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.tex").write_text("x")
    for mode in ("r", "a"):
        with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
            Memory.open(tmp_path / "nowhere", mode)
        with pytest.raises(NotADirectoryError, match="file is a file; a memory is a folder"):
            Memory.open(tmp_path / "file", mode)
        with pytest.raises(ValueError, match=r"folder holds no memory: it has no manifest\.json"):
            Memory.open(tmp_path / "folder", mode)
    with pytest.raises(NotADirectoryError, match="file is a file"):
        make().save(tmp_path / "file")
    with pytest.raises(ValueError, match="folder is not empty and holds no memory: save to a new folder"):
        make().save(tmp_path / "folder")
    with pytest.raises(ValueError, match="mode is 'w'; choose 'r' to read or 'a' to add"):
        Memory.open(tmp_path, "w")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "folder", "thesis.tex"]


def test_metadata_must_be_json(tmp_path: Path) -> None:
    store = make()
    store.metadata["model"] = object()
    with pytest.raises(ValueError, match="metadata cannot be saved as JSON"):
        store.save(tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_other_files_in_the_folder_are_left_alone(saved: Path) -> None:
    (saved / "notes.txt").write_text("mine")
    (saved / "segment-000009.safetensors.tmp").write_text("left by a killed writer")
    (saved / "index-000007.safetensors").write_text("likewise")
    with Memory.open(saved, "a") as store:
        store.compact()
    assert {path.name for path in saved.iterdir()} == {
        "lock", "manifest.json", "notes.txt", "segment-000002.safetensors"
    }  # fmt: skip
