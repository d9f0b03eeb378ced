"""Documents, good and odd."""

import zipfile
from pathlib import Path
from typing import Any

HTML = "<html><head><title>Emma</title><style>p {}</style><script>var x;</script></head><body><p>Mr. <b>Weston</b></p>"


def make_folder(place: Path) -> Path:
    """A folder with documents of several kinds, and some things that are none."""
    files = {
        "b.py": b"print(1)\n",
        "a.md": "# Ä title\r\n".encode(),
        "sub/c.txt": b"\xef\xbb\xbftext",
        "sub/page.html": HTML.encode(),
        "sub/deep/d.py": b"x = 1\n",
        "picture.png": b"\x89PNG\0\0\0",
        "latin.txt": "café!".encode("latin-1"),
        "empty.txt": b" \n",
        ".hidden": b"x",
        ".git/config": b"x",
    }
    for name, content in files.items():
        (place / "docs" / name).parent.mkdir(parents=True, exist_ok=True)
        (place / "docs" / name).write_bytes(content)
    return place / "docs"


def names(found: Any, folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in found.paths]


def make_pdf(path: Path, text: str) -> None:
    """A PDF of one page with one line."""
    from pypdf import PdfWriter
    from pypdf.generic import DecodedStreamObject, DictionaryObject, NameObject

    writer = PdfWriter()
    page = writer.add_blank_page(300, 300)
    font = DictionaryObject(
        {
            NameObject("/Type"): NameObject("/Font"),
            NameObject("/Subtype"): NameObject("/Type1"),
            NameObject("/BaseFont"): NameObject("/Helvetica"),
        }
    )
    fonts = DictionaryObject({NameObject("/F1"): writer._add_object(font)})
    page[NameObject("/Resources")] = DictionaryObject({NameObject("/Font"): fonts})
    stream = DecodedStreamObject()
    stream.set_data(f"BT /F1 12 Tf 20 200 Td ({text}) Tj ET".encode())
    page[NameObject("/Contents")] = writer._add_object(stream)
    writer.write(path)


def encrypted_pdf(path: Path, password: str) -> None:
    from pypdf import PdfReader, PdfWriter

    make_pdf(path, "Mr. Elton")
    writer = PdfWriter(clone_from=PdfReader(path))
    writer.encrypt(user_password=password, owner_password="owner", algorithm="AES-256")
    writer.write(path)


def pdf_with_surrogate(path: Path) -> None:
    """A PDF whose font says that A is half a surrogate pair, as fonts with damaged tables do."""
    from pypdf import PdfReader, PdfWriter
    from pypdf.generic import DecodedStreamObject, NameObject

    make_pdf(path, "A man")
    writer = PdfWriter(clone_from=PdfReader(path))
    table = DecodedStreamObject()
    table.set_data(b"1 begincodespacerange <00> <FF> endcodespacerange\n1 beginbfchar <41> <D800> endbfchar")
    writer.pages[0]["/Resources"]["/Font"]["/F1"][NameObject("/ToUnicode")] = writer._add_object(table)
    writer.write(path)


def make_zip(path: Path, files: dict[str, str]) -> None:
    with zipfile.ZipFile(path, "w") as file:
        for name, content in files.items():
            file.writestr(name, content)


def make_epub(path: Path, chapters: dict[str, str], **more: str) -> None:
    """An EPUB with these pages, the reading order that of the names backwards, and a table of contents."""
    names = sorted(chapters)
    items = [f'<item id="i{n}" href="{name}" media-type="application/xhtml+xml"/>' for n, name in enumerate(names)]
    items.append('<item id="nav" href="nav.xhtml" media-type="application/xhtml+xml" properties="nav"/>')
    spine = ['<itemref idref="nav"/>', *(f'<itemref idref="i{n}"/>' for n in reversed(range(len(names))))]
    package = (
        '<package xmlns="http://www.idpf.org/2007/opf" version="3.0">'
        f"<manifest>{''.join(items)}</manifest><spine>{''.join(spine)}</spine></package>"
    )
    container = (
        '<container xmlns="urn:oasis:names:tc:opendocument:xmlns:container"><rootfiles>'
        '<rootfile full-path="OEBPS/a.opf"/></rootfiles></container>'
    )
    pages = {
        f"OEBPS/{name.replace('%20', ' ')}": f"<html><head><title>Book</title></head><body>{text}</body></html>"
        for name, text in chapters.items()
    }
    nav = {"OEBPS/nav.xhtml": "<html><body>Contents</body></html>"}
    make_zip(path, {"META-INF/container.xml": container, "OEBPS/a.opf": package} | nav | pages | more)


def make_docx(path: Path, body: str) -> None:
    """A DOCX file with this body in WordprocessingML."""
    word = 'xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main"'
    kind = "application/vnd.openxmlformats-officedocument.wordprocessingml.document.main+xml"
    relation = "http://schemas.openxmlformats.org/officeDocument/2006/relationships/officeDocument"
    make_zip(
        path,
        {
            "[Content_Types].xml": '<Types xmlns="http://schemas.openxmlformats.org/package/2006/content-types">'
            f'<Override PartName="/word/document.xml" ContentType="{kind}"/></Types>',
            "_rels/.rels": '<Relationships xmlns="http://schemas.openxmlformats.org/package/2006/relationships">'
            f'<Relationship Id="r1" Type="{relation}" Target="word/document.xml"/></Relationships>',
            "word/document.xml": f"<w:document {word}><w:body>{body}</w:body></w:document>",
        },
    )


def paragraph(text: str) -> str:
    return f"<w:p><w:r><w:t>{text}</w:t></w:r></w:p>"
