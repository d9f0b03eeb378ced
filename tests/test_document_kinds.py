"""Documents as people have them: encodings, EPUB, DOCX, notebooks, JSON Lines, mail; archives are refused."""

import json
import mailbox
from email.message import EmailMessage
from pathlib import Path

import pytest
from document_helpers import make_docx, make_epub, make_zip, paragraph

from fot.documents import Options, describe_left_out, find_documents, read_document

TEXTS = {
    "ru": "Все счастливые семьи похожи друг на друга, каждая несчастливая семья несчастлива по-своему.\n",
    "fr": "Longtemps, je me suis couché de bonne heure. Parfois, à peine ma bougie éteinte, mes yeux se fermaient.\n",
    "de": "Es war einmal ein Müller, der hatte eine schöne Tochter. Größe und Übermut führten ihn dazu.\n",
    "ja": "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。\n"
    "何でも薄暗いじめじめした所でニャーニャー泣いていた事だけは記憶している。吾輩はここで始めて人間というものを見た。\n",
    "zh": "話說天下大勢，分久必合，合久必分。周末七國分爭，並入於秦。及秦滅之後，楚、漢分爭。\n",
    "pl": "Litwo! Ojczyzno moja! ty jesteś jak zdrowie. Ile cię trzeba cenić, ten tylko się dowie, kto cię stracił.\n"
    "Dziś piękność twą w całej ozdobie widzę i opisuję, bo tęsknię po tobie. Panno święta, co Jasnej bronisz\n"
    "Częstochowy i w Ostrej świecisz Bramie! Ty, co gród zamkowy nowogródzki ochraniasz z jego wiernym ludem!\n",
    "en": "It was worth £5, and the café on the corner knew it; a naïve visitor paid £10 for the same.\n",
}


# --- encodings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("language", ["fr", "en"])
def test_unicode_in_every_form(encoding: str, language: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(TEXTS[language].encode(encoding))
    assert read_document(tmp_path / "a.txt") == TEXTS[language]
    assert find_documents([tmp_path]).paths == [tmp_path / "a.txt"]


@pytest.mark.parametrize(
    ("language", "encoding"),
    [("ru", "koi8-r"), ("ru", "cp1251"), ("fr", "cp1252"), ("de", "latin-1"), ("ja", "shift_jis"), ("ja", "euc_jp"),
     ("zh", "big5"), ("zh", "gb18030"), ("pl", "iso8859-2"), ("pl", "cp1250"), ("en", "cp1252")],
)  # fmt: skip
@pytest.mark.parametrize("ascii_before", [0, 3000])
def test_other_encodings_are_detected(language: str, encoding: str, ascii_before: int, tmp_path: Path) -> None:
    text = "A line of plain English, as licences are.\n" * ascii_before + TEXTS[language]
    (tmp_path / "a.txt").write_bytes(text.encode(encoding))
    found = find_documents([tmp_path])
    assert found.text(tmp_path / "a.txt") == text
    assert list(found.detected) == [tmp_path / "a.txt"]


def test_an_encoding_that_is_given_holds(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"caf\xe9 \x80")
    (tmp_path / "b.txt").write_bytes("ã".encode("utf-16"))
    (tmp_path / "c.html").write_bytes("<p>Привет".encode("koi8-r"))
    assert read_document(tmp_path / "a.txt", Options(encoding="cp1252")) == "café €"
    assert read_document(tmp_path / "b.txt", Options(encoding="cp1252")) == "ã"  # its mark says more
    assert read_document(tmp_path / "c.html", Options(encoding="koi8-r")) == "Привет"
    with pytest.raises(ValueError, match=r"a\.txt is not UTF-8 text \(byte 3\): give its encoding with --encoding"):
        read_document(tmp_path / "a.txt", Options(encoding="utf-8"))
    for name in ("nothing", "hex", "rot13", ""):
        with pytest.raises(ValueError, match="is no encoding of text"):
            Options(encoding=name)


def test_damaged_utf8_is_not_taken_for_another_encoding(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes((TEXTS["ru"] * 9).encode() + b"\xff\n")
    with pytest.raises(ValueError, match="is not UTF-8 text"):
        read_document(tmp_path / "a.txt")


def test_binary_files_stay_binary(tmp_path: Path) -> None:
    contents = (
        b"\x7fELF\2\1\1\0",
        bytes(range(128, 256)) * 40,
        b"\xff\xd8\xff\xe0" + b"\1\2\3\xfe" * 999,
        b"a\0b\0\0c" * 99,
    )
    for number, content in enumerate(contents):
        (tmp_path / str(number)).write_bytes(content)
        with pytest.raises(ValueError, match=r"is a binary file|is not UTF-8 text"):
            read_document(tmp_path / str(number))


# --- kinds of files -------------------------------------------------------------------------------------------------


def test_epub_is_its_chapters_in_reading_order(tmp_path: Path) -> None:
    make_epub(
        tmp_path / "a.epub", {"b%20c.xhtml": "<h1>One</h1><p>First.", "a.xhtml": "<h1>Two</h1><p>Second &amp; last."}
    )
    assert read_document(tmp_path / "a.epub") == "One\n\nFirst.\n\nTwo\n\nSecond & last."


def test_odd_epubs(tmp_path: Path) -> None:
    locked = '<e xmlns:c="x"><c:CipherReference URI="OEBPS/a.xhtml"/></e>'
    make_epub(tmp_path / "locked.epub", {"a.xhtml": "x"}, **{"META-INF/encryption.xml": locked})
    make_epub(
        tmp_path / "fonts.epub", {"a.xhtml": "x"}, **{"META-INF/encryption.xml": locked.replace("a.xhtml", "f.otf")}
    )
    bomb = '<!DOCTYPE a [<!ENTITY b "bbbbbbbb">]><a>&b;</a>'
    make_zip(tmp_path / "bomb.epub", {"META-INF/container.xml": bomb})
    make_zip(tmp_path / "empty.epub", {"a": "b"})
    (tmp_path / "no.epub").write_bytes(b"PK\3\4 nothing")
    found = find_documents([tmp_path])
    assert [path.name for path in found.paths] == ["fonts.epub"]
    described = describe_left_out(found)
    for said in ("locked.epub is an encrypted EPUB (DRM)", "bomb.epub cannot be read as EPUB (ParseError it declares",
                 "empty.epub cannot be read as EPUB", "no.epub cannot be read as EPUB (BadZipFile"):  # fmt: skip
        assert said in described


def test_what_unpacks_to_too_much_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fot.documents import zipped

    make_epub(tmp_path / "a.epub", {"a.xhtml": "x"})
    monkeypatch.setattr(zipped, "MOST_BYTES", 100)
    with pytest.raises(ValueError, match=r"a\.epub unpacks to more than"):
        read_document(tmp_path / "a.epub")


def test_docx_is_its_text_with_tables(tmp_path: Path) -> None:
    cells = "".join(f"<w:tc>{paragraph(text)}</w:tc>" for text in ("a", "b"))
    make_docx(tmp_path / "a.docx", paragraph("Mr. Elton") + f"<w:tbl><w:tr>{cells}</w:tr></w:tbl>" + paragraph("end"))
    text = read_document(tmp_path / "a.docx")
    assert text.split() == ["Mr.", "Elton", "a", "b", "end"]
    make_docx(tmp_path / "rows.docx", f"<w:tbl>{2 * f'<w:tr>{cells}</w:tr>'}</w:tbl>")
    assert read_document(tmp_path / "rows.docx") == "a\tb\na\tb"
    (tmp_path / "b.docx").write_bytes(b"\xd0\xcf\x11\xe0 as encrypted ones begin")
    with pytest.raises(ValueError, match=r"b\.docx cannot be read as DOCX \(BadZipFile"):
        read_document(tmp_path / "b.docx")


def test_notebooks_are_cells_and_printed_text(tmp_path: Path) -> None:
    picture = {"data": {"image/png": "iVBOR" * 9000, "text/plain": "<Figure size 640x480 with 1 Axes>"}}
    cells = [
        {"cell_type": "markdown", "source": ["# Title\n", "text"]},
        {"cell_type": "code", "source": "print(1)", "outputs": [{"text": ["1\n"]}, picture]},
        {"cell_type": "code", "source": "f()", "outputs": [{"data": {"text/html": "<b>", "text/plain": "b"}},
                                                           {"traceback": ["\x1b[0;31mValueError\x1b[0m", "x"]}]},
    ]  # fmt: skip
    (tmp_path / "a.ipynb").write_text(json.dumps({"nbformat": 4, "cells": cells}))
    assert read_document(tmp_path / "a.ipynb") == "# Title\ntext\n\nprint(1)\n\n1\n\nf()\n\nb\n\nValueError\nx"
    (tmp_path / "old.ipynb").write_text(
        json.dumps({"worksheets": [{"cells": [{"cell_type": "code", "input": "x = 1"}]}]})
    )
    assert read_document(tmp_path / "old.ipynb") == "x = 1"
    for content in ("{}", "[]", "nothing", '{"cells": 3}', '{"cells": [3]}'):
        (tmp_path / "b.ipynb").write_text(content)
        with pytest.raises(ValueError, match=r"b\.ipynb cannot be read as a notebook"):
            read_document(tmp_path / "b.ipynb")


def test_json_lines_are_one_field(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [{"text": "one", "m": {"b": "uno"}}, {"m": {"b": ["dos", "tres"]}}, {"text": "two\u2028", "n": 3}]
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n")
    assert read_document(path) == "one\n\ntwo\u2028"
    assert read_document(path, Options(field="m.b")) == "uno\n\ndos\ntres"
    assert read_document(path, Options(field="n")) == "3"
    with pytest.raises(
        ValueError, match=r"has no text in the field 'body'; it has text, m, n: choose one with --field"
    ):
        read_document(path, Options(field="body"))
    path.write_text('{"text": "x"}\n{')
    with pytest.raises(ValueError, match=r"a\.jsonl is not JSON Lines \(line 2\)"):
        read_document(path)


def _message(subject: str, plain: str | None, page: str | None) -> EmailMessage:
    message = EmailMessage()
    message["From"], message["To"], message["Subject"] = "Emma <emma@example.com>", "knightley@example.com", subject
    if plain is not None:
        message.set_content(plain)
    if page is not None:
        (message.add_alternative if plain else message.set_content)(page, subtype="html")
    return message


def test_mail_is_headers_and_text(tmp_path: Path) -> None:
    one = _message("Größe", "plain text", "<p>as a page</p>")
    one.add_attachment(b"\0\1" * 500, maintype="image", subtype="png", filename="box hill.png")
    two = _message("two", None, "<p>only <b>a</b> page</p>")
    (tmp_path / "a.eml").write_bytes(one.as_bytes())
    text = read_document(tmp_path / "a.eml")
    assert text.startswith("From: Emma <emma@example.com>\nTo: knightley@example.com\nSubject: Größe\n\nplain text")
    assert text.endswith("Attachment: box hill.png")
    assert "as a page" not in text
    for name in ("box.mbox", "Inbox"):
        box = mailbox.mbox(tmp_path / name)
        box.add(one)
        box.add(two)
        box.close()
        text = read_document(tmp_path / name)
        assert text.count("From: Emma") == 2
        assert text.endswith("only a page")
    for text in ("From here to there\n\nFrom me.", "quoted:\n>From here\n>>From there"):  # mailboxes quote such lines
        box = mailbox.mbox(tmp_path / "from.mbox")
        box.clear()
        box.add(_message("lines", text, None))
        box.close()
        unquoted = (tmp_path / "from.mbox").read_bytes()
        if text.startswith("quoted"):  # as mboxrd does it, which can be undone
            (tmp_path / "from.mbox").write_bytes(unquoted.replace(b"\n>", b"\n>>"))
        assert read_document(tmp_path / "from.mbox").endswith("\n\n" + text)
    folder = mailbox.Maildir(tmp_path / "Mail")
    folder.add(two)
    found = find_documents([tmp_path / "Mail"])
    assert [found.text(path)[-11:] for path in found.paths] == ["only a page"]


@pytest.mark.parametrize("name", ["a.zip", "a.tar.gz", "a.TGZ", "a.7z", "notes"])
def test_archives_are_refused_by_name(name: str, tmp_path: Path) -> None:
    make_zip(tmp_path / name, {"a.txt": "x"})
    with pytest.raises(ValueError, match=rf"{name} is an archive: unpack it and give the folder"):
        read_document(tmp_path / name)
    (tmp_path / "b.txt").write_text("x")
    found = find_documents([tmp_path])
    assert found.paths == [tmp_path / "b.txt"]
    assert describe_left_out(found) == f"1 archives; {tmp_path}/{name} is an archive"
