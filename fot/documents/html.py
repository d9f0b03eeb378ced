"""The text of an HTML page: all of it, words whole, blocks on lines of their own.

selectolax (the HTML5 parser Lexbor) parses, the walk over its tree is ours. It is quick, has no needs of its own, and
reads damage as browsers do; BeautifulSoup with html.parser is 20 times slower, rejects a page for ``<![`` and turns a
last ``AT&T`` into ``ATT``. No extractor gave all of a page's text: inscriptis lays the cells of a row side by side,
which mixes the lines of pages laid out by tables, and gives nothing of a page nested deeper than libxml2's limit;
resiliparse drops text in forms and drawings; html-text and trafilatura lose indentation, or what is no article. (The
versions of late 2026.)
"""

import re
from collections.abc import Iterator
from typing import Any

from fot.documents.encoding import MARKS

# What is in them is no part of the page as it is read.
DROPPED = {"iframe", "noembed", "noframes", "noscript", "script", "style", "template"}

# Elements that begin and end a line, and those with an empty line around them; all others are within a line.
LINES = {
    *("address", "article", "aside", "body", "button", "caption", "center", "dd", "details", "dialog", "dir", "div"),
    *("dt", "fieldset", "figcaption", "footer", "form", "head", "header", "hgroup", "html", "legend", "li", "main"),
    *("menu", "nav", "ol", "optgroup", "option", "search", "section", "select", "summary", "svg", "tbody", "text"),
    *("textarea", "tfoot", "thead", "tr", "ul"),
}
PARAGRAPHS = {
    *("blockquote", "dl", "figure", "h1", "h2", "h3", "h4", "h5", "h6", "hr", "listing", "p", "plaintext", "pre"),
    *("table", "title", "xmp"),
}
AS_IT_STANDS = {"listing", "plaintext", "pre", "textarea", "xmp"}

# White space of HTML. No-break spaces are none of it, and become spaces all the same: they are about layout. So are
# soft hyphens, which would break words.
SPACE = re.compile(r"[ \t\n\r\f]+")
LAYOUT = str.maketrans({"\xa0": " ", "\xad": None})

# What a page says of its encoding stands near its start.
DECLARED = re.compile(rb"""charset\s*=\s*["']?\s*([\w.:-]+)|encoding\s*=\s*["']([\w.:-]+)""", re.IGNORECASE)

# Parsing a page takes time that grows with the square of its depth: 100,000 elements within one another take minutes.
DEEPEST = 4096
TAG = re.compile(r"<(/?)([a-zA-Z][^\s/>]*)[^>]*>")
# Those that are never open, or that others close, so that they do not nest without a word.
CLOSED_BY_OTHERS = {
    *("area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "param", "source", "track", "wbr"),
    *("body", "colgroup", "dd", "dt", "head", "html", "li", "optgroup", "option", "p", "rb", "rp", "rt", "rtc"),
    *("tbody", "td", "tfoot", "th", "thead", "tr"),
}


def html_text(content: bytes, *, title: bool = True) -> str:
    """The text of a page, in its encoding.

    Cells of a table's row stand on one line, with tabs between them, unless a cell has lines of its own.

    Args:
        content: of the page.
        title: whether the title in the page's head is part of its text.

    Raises:
        ImportError: selectolax is missing.
    """
    from selectolax.lexbor import LexborHTMLParser

    page, dropped = _Page(), DROPPED if title else DROPPED | {"title"}
    for node, inside in _walk(LexborHTMLParser(_shallow(decode(content))).root, dropped):
        if node.is_text_node:
            page.write(node.text_content or "")
        elif inside:
            page.open(node.tag or "")
        else:
            page.close(node.tag or "")
    return "".join(page.parts).strip("\n")


def decode(content: bytes) -> str:
    """A page as text: by its byte order mark, as UTF-8 if it is that, as it declares, or as Windows-1252."""
    for mark, encoding in MARKS:
        if content.startswith(mark):
            return content.decode(encoding, "replace").removeprefix("\ufeff")
    declared = DECLARED.search(content[:4096])
    named = (declared[1] or declared[2]).decode("ascii", "replace") if declared else "utf-8"
    encodings = ["utf-8"] if named.lower().startswith("utf") else ["utf-8", named]
    for encoding in encodings:  # UTF-8 first: pages that were converted keep old declarations
        try:
            return content.decode(encoding)
        except (UnicodeError, LookupError):  # another encoding; one that Python does not know
            continue
    return content.decode("windows-1252", "replace")


def _shallow(page: str) -> str:
    """The page without the tags of elements deeper than ``DEEPEST``; rules take the place of those that break lines."""
    parts, depth, done, broken = [], 0, 0, False
    for tag in TAG.finditer(page):
        name = tag[2].lower()
        if name in CLOSED_BY_OTHERS:
            continue
        depth += -min(depth, 1) if tag[1] else 1
        if depth + bool(tag[1]) > DEEPEST:
            between, done = page[done : tag.start()], tag.end()
            breaks, broken = name in LINES | PARAGRAPHS, broken and not between.strip()
            parts += [between, "<hr>" if breaks and not broken else ""]
            broken = broken or breaks
    return "".join([*parts, page[done:]])


def _walk(root: Any, dropped: set[str]) -> Iterator[tuple[Any, bool]]:
    """Texts and elements, before (True) and after (False) what is in them; texts come once.

    Without recursion: damaged pages nest thousands deep.
    """
    node, depth = root, 0
    while node is not None:
        child = None
        if node.tag not in dropped:
            yield node, True
            child = node.first_child
        if child is not None:
            node, depth = child, depth + 1
            continue
        while True:
            if node.is_element_node and node.tag not in dropped:
                yield node, False
            if depth == 0:
                return
            if node.next is not None:
                node = node.next
                break
            node, depth = node.parent, depth - 1


class _Page:
    """Text as it is laid out.

    Attributes:
        parts: of the text so far.
        breaks: line ends owed before the next text.
        space: a space is owed before the next text of this line.
        rows: of each open table row, the innermost last, whether it is still ``empty``, one ``line`` or ``lines``.
        tabs: owed before the first text of a cell, which stays on the line of its row; None: not at a cell's start.
        kept: how many open elements keep their white space.
    """

    def __init__(self) -> None:
        self.parts: list[str] = []
        self.breaks = 0
        self.space = False
        self.rows: list[str] = []
        self.tabs: int | None = None
        self.kept = 0

    def open(self, name: str) -> None:
        if name == "tr":
            self.tabs = None
        if name in ("td", "th"):
            self._open_cell()
        elif name == "br" and self.kept:
            self._put("\n")
        else:
            self._break(name)
        if name == "tr":
            self.rows.append("empty")
        if name in AS_IT_STANDS:
            self.kept += 1

    def close(self, name: str) -> None:
        if name in AS_IT_STANDS:
            self.kept -= 1
        if name == "tr":
            self.tabs = None
            if self.rows.pop() == "line":  # paragraphs in its cells take no empty line
                self.breaks = min(self.breaks, 1)
            self.rows[-1:] = ["lines"] * len(self.rows[-1:])  # of a table in a cell
        if name != "br":
            self._break(name)

    def write(self, text: str) -> None:
        """Text as it stands in the source of the page."""
        text = text.translate(LAYOUT)
        if self.kept:
            self._put(text)
            return
        words = SPACE.sub(" ", text)
        self.space = self.space or words.startswith(" ")
        if words.strip(" "):
            self._put(words.strip(" "))
            self.space = words.endswith(" ")

    def _put(self, text: str) -> None:
        broken = self.breaks > 0 or "\n" in text
        if self.breaks and self.parts:
            there = len(self.parts[-1]) - len(self.parts[-1].rstrip("\n"))  # at the end of a <pre>
            self.parts.append("\n" * (self.breaks - there))
        if self.tabs is not None:
            self.parts.append("\t" * self.tabs)
        elif self.space and self.parts and not self.breaks:
            self.parts.append(" ")
        if self.rows:
            first = self.rows[-1] == "empty"
            if broken and not (first and "\n" not in text):
                self.rows[-1] = "lines"
            elif first:
                self.rows[-1] = "line"
        self.parts.append(text)
        self.breaks, self.space, self.tabs = 0, False, None

    def _break(self, name: str) -> None:
        wanted = self.breaks + 1 if name == "br" else 2 if name in PARAGRAPHS else 1 if name in LINES else 0
        if wanted and self.tabs is None:  # else a cell's first line goes on the line of its row
            self.breaks, self.space = max(self.breaks, wanted), False

    def _open_cell(self) -> None:
        row = self.rows[-1] if self.rows else "lines"
        if row == "lines":
            self._break("tr")
        elif self.tabs is not None:  # the cell before is empty
            self.tabs += 1
        else:
            self.tabs = 0 if row == "empty" else 1
            self.breaks = self.breaks if row == "empty" else 0
        self.space = False
