"""The text of HTML pages."""

import codecs
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fot.documents.html import decode, html_text


@pytest.mark.parametrize(
    ("page", "text"),
    [
        ("<p>Mr. <b>Elt</b><i>on</i> and Mrs.\n <a href=x>Weston</a>.</p>", "Mr. Elton and Mrs. Weston."),
        ("<p>Hart<!-- no -->field, Box<wbr>Hill, High&shy;bury</p>", "Hartfield, BoxHill, Highbury"),
        ("<p>a <em> b </em> c</p>", "a b c"),
        ("<h1>Emma</h1><p>one<p>two<div>three</div>four", "Emma\n\none\n\ntwo\n\nthree\nfour"),
        ("one<br>two<br/><br>three", "one\ntwo\n\nthree"),
        ("<ul><li>one</li><li>two<ul><li>inner</li></ul></li></ul>", "one\ntwo\ninner"),
        ("<dl><dt>term<dd>meaning</dl>", "term\nmeaning"),
        ("<section>a</section><section>b</section>", "a\nb"),
        ("<select><option>A<option>B</select><button>Go</button><textarea>\n  x\n y</textarea>", "A\nB\nGo\n  x\n y"),
        ("&lt;b&gt; &eacute;&#x1F600; caf&#233; AT&T &bogus; a&nbsp;b", "<b> é😀 café AT&T &bogus; a b"),
        ("a<script>x</script><style>y</style><template><p>z</template><noscript><p>n</p></noscript>b", "ab"),
        ("<svg><text>in a drawing</text></svg>", "in a drawing"),
        ("no tags at\n all", "no tags at all"),
        ("", ""),
    ],
)
def test_words_and_lines(page: str, text: str) -> None:
    assert html_text(page.encode()) == text


def test_pre_is_as_it_stands() -> None:
    code = "def f(x):\n    if x:\n\n\treturn  1"
    for page in (
        f"<pre>{code}</pre>",
        f"<pre>\r\n{code}\r\n</pre>".replace("\n", "\r\n").replace("\r\r", "\r"),
        f"<pre><code>\n{code}\n</code></pre>".replace("if", "<b>if</b>").replace("\n", "<br>", 1),
        f"<ul><li><pre>{code}\n</pre></ul>",
    ):
        assert html_text(page.encode()).strip("\n") == code
    assert html_text(f"<p>before<pre>{code}\n</pre>after".encode()) == f"before\n\n{code}\n\nafter"


@pytest.mark.parametrize(
    ("table", "text"),
    [
        ("<tr><th>name<th>age<tr><td>Emma<td>21", "name\tage\nEmma\t21"),
        ("<tr> <td> <p>Mr. <b>K</b>nightley</p> </td> <td><p>37</p></td> </tr>", "Mr. Knightley\t37"),
        ("<tr><td><p>a</p><td><p>b</p><tr><td><p>c</p><td>d<tr><td><p>e</p>", "a\tb\nc\td\ne"),
        ("<tr><td><p>a</p><p>b</p><td>c<tr><td>d<td>e", "a\n\nb\n\nc\nd\te"),
        ("<tr><td></td><td>x</td><td></td><td>y</td><td></td></tr><tr><td>z</td></tr>", "\tx\t\ty\nz"),
        ("<tr><td>nav<br>igation</td><td><p>long</p><p>text</p></td></tr>", "nav\nigation\n\nlong\n\ntext"),
        ("<tr><td><table><tr><td>a<td>b<tr><td>c<td>d</table><td>e<tr><td>f<td>g", "a\tb\nc\td\n\ne\nf\tg"),
    ],
)
def test_tables_are_readable(table: str, text: str) -> None:
    assert html_text(f"<p>before</p><table>{table}</table>after".encode()) == f"before\n\n{text}\n\nafter"


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("café".encode(), "café"),
        ("\ufeffcafé".encode(), "café"),
        ("café".encode("utf-16"), "café"),
        ("café".encode("utf-32"), "café"),
        (codecs.BOM_UTF32_BE + "café".encode("utf-32-be"), "café"),
        ("<meta charset='iso-8859-7'>καφές".encode("iso-8859-7"), "<meta charset='iso-8859-7'>καφές"),
        ("<meta charset=latin1>café".encode(), "<meta charset=latin1>café"),
        ("<meta charset=nonsense>café “”".encode("cp1252"), "<meta charset=nonsense>café “”"),
        ("<meta charset=utf-8>café".encode("latin-1"), "<meta charset=utf-8>café"),
        ("<meta charset=idna>\xff".encode("latin-1"), "<meta charset=idna>ÿ"),
    ],
)
def test_encodings(content: bytes, text: str) -> None:
    assert decode(content) == text


@pytest.mark.parametrize("page", ["<![ x <p>y", "<p", "<!--", "<table><tr><p>y</tr>", "</p></div></tr>y", "&#xD800;y"])
def test_damaged_pages_have_a_text(page: str) -> None:
    html_text(page.encode()).encode()


def test_deep_pages() -> None:
    assert html_text(("<div>" * 3000 + "deep" + "</div>" * 3000 + "after").encode()) == "deep\nafter"


@pytest.mark.parametrize("name", ["div", "span", "ul"])
def test_the_deepest_pages_take_no_longer(name: str) -> None:
    """A parser looks through all open elements at each tag: the square of 100,000 is minutes."""
    inside = f"<{name}>" * 100_000 + "deep <b>and</b> wide" + f"</{name}>" * 100_000
    start = time.process_time()
    assert html_text(f"<p>before{inside}<p>after<div>a</div><div>b".encode()).split() == [
        *("before" + ("deep" if name == "span" else " deep")).split(),
        *("and", "wide", "after", "a", "b"),
    ]
    assert time.process_time() - start < 5


def test_many_elements_that_nobody_closes_are_not_deep() -> None:
    page = "<p>one<ul><li>two</ul><table><tr><td>three</table>" * 5000
    assert html_text(page.encode()).split() == ["one", "two", "three"] * 5000
    assert "one\n\ntwo\n\nthree\n\none" in html_text(page.encode())


TAGS = ["b", "i", "span", "q", "p", "div", "td", "tr", "table", "li", "ul", "pre", "h2", "br", "button", "x-y"]
PIECES = st.recursive(
    st.text("ab \n\té", max_size=5),
    lambda inner: st.tuples(st.sampled_from(TAGS), st.lists(inner, max_size=4)),
    max_leaves=25,
)


def written(piece: Any) -> tuple[str, str]:
    """A page, and the characters of its text."""
    if isinstance(piece, str):
        return piece, "".join(piece.split())
    name, inner = piece
    pages, texts = zip(*map(written, inner), strict=True) if inner else ((), ())
    return f"<{name}>{''.join(pages)}</{name}>", "".join(texts)


@settings(deadline=None)  # on a loaded machine any example may take long
@given(st.lists(PIECES, max_size=4))
def test_no_character_is_lost_or_invented(pieces: list[Any]) -> None:
    page, text = written(("body", pieces))
    found = html_text(page.encode())
    assert sorted(found.replace("\n", "").replace("\t", "").replace(" ", "")) == sorted(
        text
    )  # tables put texts elsewhere
