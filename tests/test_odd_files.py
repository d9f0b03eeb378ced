"""Files that are no documents, or odd ones: in a folder left out and named, by name refused."""

import builtins
import errno
import os
import random
import socket
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from document_helpers import encrypted_pdf, make_folder, make_pdf, names, pdf_with_surrogate

from fot.documents import describe_left_out, find_documents, read_document
from fot.documents import find as find_module


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path)


def unreadable(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a file of another user's; for root, too."""
    opened_ = builtins.open

    def refusing(file: Any, *args: Any, **kwargs: Any) -> Any:
        if str(file) == str(path):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(file))
        return opened_(file, *args, **kwargs)

    path.write_text("secret")
    monkeypatch.setattr(builtins, "open", refusing)


# What is odd, how it comes to be, and what is said of it.
ODD: dict[str, tuple[Callable[[Path, pytest.MonkeyPatch], Any], str]] = {
    "pipe": (lambda path, _: os.mkfifo(path), "is a named pipe, not a file of text"),
    "device": (lambda path, _: path.symlink_to("/dev/zero"), "is a device, not a file of text"),
    "lost.txt": (lambda path, _: path.symlink_to("nothing"), "No such file or directory"),
    "circle.txt": (lambda path, _: path.symlink_to("circle.txt"), "Too many levels of symbolic links"),
    "secret.txt": (unreadable, "Permission denied"),
    "latin.txt": (lambda path, _: path.write_bytes(b"caf\xe9"), "is not UTF-8 text (byte 3)"),
    "locked.pdf": (lambda path, _: encrypted_pdf(path, "secret"), "is an encrypted PDF"),
    "scan.pdf": (lambda path, _: make_pdf(path, ""), "has no text (scanned pages?)"),
    "none.pdf": (lambda path, _: path.write_bytes(b""), "cannot be read as PDF"),
    "short.pdf": (lambda path, _: path.write_bytes(b"%PDF-1.4 and then nothing"), "cannot be read as PDF"),
    "caf\udce9.txt": (lambda path, _: path.write_text("x"), "caf\ufffd.txt has a name that is not UTF-8"),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_files_are_left_out_and_named(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in (folder / "latin.txt", folder / "picture.png", folder / "empty.txt"):
        path.unlink()
    make, said = ODD[name]
    make(folder / "sub" / name, monkeypatch)
    found = find_documents([folder])
    assert names(found, folder) == ["a.md", "b.py", "sub/c.txt", "sub/page.html", "sub/deep/d.py"]
    assert found.left_out["unreadable"] == 1
    (named,) = found.named
    assert said in named
    assert named.startswith(f"{folder}/sub/{name.split('.')[0][:3]}")
    assert describe_left_out(found) == f"1 hidden, 1 hidden folders, 1 unreadable; {named}"
    with pytest.raises((ValueError, OSError)) as raised:
        find_documents([folder / "b.py", folder / "sub" / name])
    for part in (said, name.replace("\udce9", "\ufffd")):
        assert part in str(raised.value)
    assert "\n" not in str(raised.value)


def test_sockets_are_left_out(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind("s")  # by a short name: a socket's is at most 107 bytes
    assert "s is a socket, not a file of text" in describe_left_out(find_documents([Path()]))
    with pytest.raises(ValueError, match=r"^s is a socket, not a file of text; nothing was stored$"):
        find_documents([Path("s")])


def test_links_to_folders_are_left_out(folder: Path) -> None:
    before = names(find_documents([folder]), folder)
    (folder / "sub" / "round").symlink_to(folder)
    found = find_documents([folder])
    assert names(found, folder) == before
    assert f"{folder}/sub/round is a link to a folder" in found.named
    assert names(find_documents([folder / "sub" / "round"]), folder / "sub" / "round") == before  # named, it is read


def test_folders_that_cannot_be_read_are_left_out(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = os.listdir

    def refusing(path: Any) -> list[str]:
        if str(path) == str(folder / "sub"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return listed(path)

    monkeypatch.setattr(os, "listdir", refusing)
    found = find_documents([folder])
    assert names(found, folder) == ["a.md", "b.py"]
    assert f"{folder}/sub cannot be read (Permission denied)" in found.named
    with pytest.raises(PermissionError):
        find_documents([folder / "sub"])


def test_thousands_of_odd_files_are_counted(folder: Path) -> None:
    for number in range(1234):
        (folder / f"{number:04}.txt").write_bytes(b"\xff")
    described = describe_left_out(find_documents([folder]))
    assert "1,235 unreadable; " in described
    assert described.endswith("; and 1,225 more")
    assert described.count("is not UTF-8") == 10


@pytest.mark.parametrize(
    "error",
    [KeyError("/Pages"), RecursionError("deep"), TypeError("x"), AttributeError("y"), IndexError(), zlib.error("z"),
     NotImplementedError(), AssertionError(), UnicodeDecodeError("utf-8", b"", 0, 0, "why"), OverflowError("1\n2")],
)  # fmt: skip
def test_whatever_pypdf_raises(error: Exception, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pypdf import PageObject

    def damaged(page: Any) -> str:
        raise error

    make_pdf(folder / "a.pdf", "x")
    monkeypatch.setattr(PageObject, "extract_text", damaged)
    found = find_documents([folder])
    assert any(
        named.startswith(f"{folder}/a.pdf cannot be read as PDF ({type(error).__name__}") for named in found.named
    )
    with pytest.raises(ValueError, match=r"a\.pdf cannot be read as PDF"):
        read_document(folder / "a.pdf")


def test_random_damage_to_a_pdf(tmp_path: Path) -> None:
    """It is read, or left out and named."""
    make_pdf(tmp_path / "good.pdf", "Mr. Elton")
    good, draw = (tmp_path / "good.pdf").read_bytes(), random.Random(0)
    for number in range(150):
        damaged = bytearray(good)
        for _ in range(draw.randint(1, 20)):
            damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        (tmp_path / f"{number}.pdf").write_bytes(damaged[: draw.randint(len(good) // 2, len(good))])
    found = find_documents([tmp_path])
    assert len(found.paths) + sum(found.left_out.values()) == 151
    assert found.left_out["unreadable"] == len(found.named) > 0


def test_lone_surrogates_of_a_pdf_are_replaced(tmp_path: Path) -> None:
    pdf_with_surrogate(tmp_path / "a.pdf")
    assert read_document(tmp_path / "a.pdf").strip() == "\ufffd man"


def test_encrypted_pdfs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a password, as those that only forbid printing, they are read, if cryptography is there."""
    encrypted_pdf(tmp_path / "a.pdf", "")
    assert read_document(tmp_path / "a.pdf").strip() == "Mr. Elton"
    from pypdf import _encryption
    from pypdf._crypt_providers import _fallback

    for name in ("CryptAES", "aes_cbc_decrypt", "aes_cbc_encrypt", "aes_ecb_decrypt", "aes_ecb_encrypt"):
        monkeypatch.setattr(_encryption, name, getattr(_fallback, name))
    with pytest.raises(ImportError, match=r"a\.pdf \(encrypted\) needs cryptography: pip install 'fot\[documents\]'"):
        read_document(tmp_path / "a.pdf")
    (tmp_path / "b.txt").write_text("text")
    found = find_documents([tmp_path])
    assert found.paths == [tmp_path / "b.txt"]
    assert "needs cryptography" in describe_left_out(found)


def test_the_byte_that_is_not_utf8_is_named_behind_a_block(tmp_path: Path) -> None:
    text = b"x" * ((1 << 20) - 1) + "é".encode() + b"\xff"  # a character over the end of a block
    (tmp_path / "a.txt").write_bytes(text)
    with pytest.raises(ValueError, match=rf"not UTF-8 text \(byte {len(text) - 1}\)"):
        read_document(tmp_path / "a.txt")


def test_pdf_and_html_are_parsed_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However much they hold: what is too much for RAM waits on disk."""
    make_pdf(folder / "a.pdf", "Mr. Elton")
    monkeypatch.setattr(find_module, "KEPT_BYTES", 12)
    found = find_documents([folder])
    monkeypatch.setattr(find_module, "read_document", lambda path, options: f"read {path.name}")
    texts = {path.relative_to(folder).as_posix(): found.text(path).strip() for path in found.paths}
    assert texts.pop("a.pdf") == "Mr. Elton"
    assert texts.pop("sub/page.html") == "Emma\n\nMr. Weston"
    assert all(text.startswith("read ") for text in texts.values())


def test_parsing_may_wait_until_a_text_is_needed(folder: Path) -> None:
    """Then what cannot be read, or is an archive, is told then; something that can be read is found at once."""
    make_pdf(folder / "a.pdf", "Mr. Elton")
    make_pdf(folder / "b.pdf", "")
    found = find_documents([folder], later=True)
    assert folder / "b.pdf" in found.paths
    assert found.text(folder / "a.pdf").strip() == "Mr. Elton"
    with pytest.raises(ValueError, match=r"b\.pdf has no text"):
        found.text(folder / "b.pdf")
    alone = folder / "alone"
    alone.mkdir()
    make_pdf(alone / "a.pdf", "")
    make_pdf(alone / "b.pdf", "")
    with pytest.raises(ValueError, match="no file with text in"):
        find_documents([alone], later=True)
