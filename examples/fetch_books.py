"""Fetch novels of Standard Ebooks (CC0) as plain text files: long prose to train on, and some to measure with.

    python examples/fetch_books.py books
    python examples/fetch_books.py held_out --held-out    # the books that training must not see
    python examples/fetch_books.py books --from clones    # from clones in clones/NAME; no network needed

Each book is a git repository of github.com/standardebooks. Paragraphs are separated by an empty line.
"""

import argparse
import re
import sys
from pathlib import Path
from xml.etree import ElementTree

from clones import read_files, write

HOST = "https://github.com/standardebooks/"
TITLES = [
    "agatha-christie_the-mysterious-affair-at-styles",
    "alexandre-dumas_the-count-of-monte-cristo_chapman-and-hall",
    "anne-bronte_the-tenant-of-wildfell-hall",
    "anthony-trollope_barchester-towers",
    "charles-dickens_a-tale-of-two-cities",
    "charles-dickens_bleak-house",
    "charles-dickens_david-copperfield",
    "charles-dickens_great-expectations",
    "charles-dickens_oliver-twist",
    "charlotte-bronte_jane-eyre",
    "e-m-forster_howards-end",
    "edith-wharton_the-age-of-innocence",
    "elizabeth-gaskell_north-and-south",
    "emily-bronte_wuthering-heights",
    "fyodor-dostoevsky_crime-and-punishment_constance-garnett",
    "g-k-chesterton_the-innocence-of-father-brown",
    "george-eliot_middlemarch",
    "george-eliot_silas-marner",
    "george-eliot_the-mill-on-the-floss",
    "henry-james_the-portrait-of-a-lady",
    "herman-melville_moby-dick",
    "jack-london_the-sea-wolf",
    "joseph-conrad_lord-jim",
    "l-m-montgomery_anne-of-green-gables",
    "leo-tolstoy_anna-karenina_constance-garnett",
    "leo-tolstoy_war-and-peace_louise-maude_aylmer-maude",
    "louisa-may-alcott_little-women",
    "mark-twain_the-adventures-of-huckleberry-finn",
    "mary-shelley_frankenstein",
    "nathaniel-hawthorne_the-scarlet-letter",
    "oscar-wilde_the-picture-of-dorian-gray",
    "robert-louis-stevenson_treasure-island",
    "thomas-hardy_far-from-the-madding-crowd",
    "thomas-hardy_tess-of-the-durbervilles",
    "wilkie-collins_the-moonstone",
    "wilkie-collins_the-woman-in-white",
    "william-makepeace-thackeray_vanity-fair",
]
# Kept out of training: what `fot eval` measures.
HELD_OUT = ["anthony-trollope_the-warden", "bram-stoker_dracula", "h-g-wells_the-war-of-the-worlds"]

# Files that are about the book, and notes, whose places in the text are left out, too.
_NO_PART = {"titlepage", "imprint", "halftitlepage", "colophon", "uncopyright", "endnotes", "loi", "toc", "dedication"}
_BLOCKS = {
    "p",
    "h1",
    "h2",
    "h3",
    "h4",
    "h5",
    "h6",
    "li",
    "dt",
    "dd",
    "tr",
    "hr",
    "section",
    "header",
    "footer",
    "blockquote",
    "article",
    "figure",
}
_TYPE = "{http://www.idpf.org/2007/ops}type"
_SPACES = str.maketrans({
    **dict.fromkeys("\u2060\u200e\ufeff\u00ad", ""),  # word joiner and other marks without a width
    **dict.fromkeys("\u00a0\u200a\u2009\u202f\u2002", " "),
})  # fmt: skip


def text_of(files: dict[str, str]) -> str:
    """The text of a book, its chapters in their order.

    Args:
        files: ``content.opf`` and the chapters of a repository, by path.
    """
    (package,) = (path for path in files if path.endswith("/content.opf"))
    folder, spine = package.removesuffix("content.opf"), []
    for item in ElementTree.fromstring(files[package]).iter("{http://www.idpf.org/2007/opf}itemref"):
        name = item.get("idref", "")
        if name.removesuffix(".xhtml") not in _NO_PART:
            spine.append(f"{folder}text/{name}")
    return "\n\n".join(chapter_text(files[path]) for path in spine) + "\n"


def chapter_text(page: str) -> str:
    """The text of a page of XHTML: headings and paragraphs, an empty line after each; verses have lines."""
    body = ElementTree.fromstring(page).find("{*}body")
    if body is None:
        raise ValueError(f"a chapter without a body: {page[:80]!r}")
    text = "".join(_pieces(body)).translate(_SPACES)
    text = re.sub("(?<=[“‘]) +(?=[“‘])|(?<=[”’]) +(?=[”’])", "", text)  # hair spaces between quotation marks
    blocks = ("\n".join(line.strip() for line in block.split("\n")).strip() for block in text.split("\n\n"))
    return "\n\n".join(re.sub(" +", " ", block) for block in blocks if block)


def _pieces(element: ElementTree.Element) -> list[str]:
    """The text of an element and of all in it, with two line breaks around blocks and one for a break."""
    tag = element.tag.rpartition("}")[2]
    if tag == "br":
        return ["\n"]
    if "noteref" in element.get(_TYPE, ""):
        return []
    inner = [_line(element.text)]
    for child in element:
        inner += [*_pieces(child), _line(child.tail)]
    if tag in ("td", "th"):
        inner.append(" ")
    return ["\n\n", *inner, "\n\n"] if tag in _BLOCKS else inner


def _line(text: str | None) -> str:
    # Only XML's own white space: \s would also take the spaces that quotation marks are told by.
    return re.sub("[ \t\r\n]+", " ", text or "")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder for the text files")
    parser.add_argument("--held-out", action="store_true", help="the books kept out of training, instead of the others")
    parser.add_argument("--from", dest="clones", type=Path, help="folder with clones; else git fetches them")
    given = parser.parse_args()
    for name in HELD_OUT if given.held_out else TITLES:
        text = text_of(read_files(HOST + name, ["src/epub/content.opf", "src/epub/text"], given.clones))
        write(given.out / f"{name}.txt", text, f"{len(text):,} characters")
    return 0


if __name__ == "__main__":
    sys.exit(main())
