"""Documents, good and odd."""

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
