"""The server's page in a real browser: asking, passages, uploads, keyboard, phone, dark, hostile names and texts."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import ENTER, ESCAPE, TAB, Browser, browser, needs_browser
from serve_helpers import make_library, make_model, running
from transformers import PreTrainedTokenizerFast

from fot.serve import pages
from fot.serve.server import Settings
from memory import Memory

pytestmark = needs_browser

ATTACK = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
ANSWERED = "document.querySelectorAll('#turns .more').length"


@pytest.fixture(scope="module")
def window() -> Iterator[Browser]:
    with browser() as found:
        yield found


@pytest.fixture(scope="module")
def address(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    place = tmp_path_factory.mktemp("memories")
    model = make_model(tokenizer)
    library = make_library(model, place)
    hostile = model.new_memory()
    model.ingest(f"The vicar is {ATTACK} here. " * 20, hostile, source=f"{ATTACK}.txt")
    hostile.save(place / "hostile")
    library.add("hostile", model, Memory.open(place / "hostile"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pages, "INSPECTED_TOKENS", 8)
        with running(library, Settings(max_tokens=8, new_memories=place / "new")) as (found, _):
            yield found


@pytest.fixture
def page(window: Browser, address: str) -> Browser:
    window.open(address)
    window.wait("document.querySelectorAll('#memory option').length >= 4")
    return window


def text(page: Browser, selector: str) -> str:
    return str(page.run(f"document.querySelector({selector!r}).innerText"))


def test_asking_by_keyboard_alone(page: Browser) -> None:
    assert page.run("document.activeElement.id") == "question"
    assert "2 documents: emma.txt, other.txt" in text(page, "#facts")
    page.press(*"Who is the vicar?", ENTER)
    page.wait(ANSWERED)
    assert text(page, "#turns li.user") == "Who is the vicar?"
    shown = text(page, "#passages")
    assert "emma.txt" in shown
    assert "characters" in shown
    page.wait("document.activeElement.id === 'question'")
    page.press(*"And when is tea?", ENTER)
    page.wait(f"{ANSWERED} === 2")
    reached = []
    for _ in range(12):
        page.press(TAB)
        reached.append(page.run("document.activeElement.id || document.activeElement.textContent"))
    assert {"memory", "new-chat", "show-upload"} <= set(reached)
    assert {"Passages", "Inspect tokens"} <= set(reached) | {page.run("document.activeElement.textContent")}
    page.click("#new-chat")
    assert page.run("document.querySelectorAll('#turns li').length") == 0
    assert page.complaints() == []


def test_a_token_can_be_inspected(page: Browser) -> None:
    page.type("#question", "Who is the vicar?" + ENTER)
    page.wait(ANSWERED)
    before = page.windows()
    page.click("#turns .more button:nth-of-type(2)")
    page.wait("!document.querySelector('#turns .more button:nth-of-type(2)').disabled")
    (new,) = set(page.windows()) - set(before)
    page.switch(new)
    try:
        page.wait("document.querySelectorAll('.token').length > 5 && location.pathname.startsWith('/inspections/')")
        page.click("#tokens .token:last-child")
        assert page.run("document.querySelectorAll('[aria-selected=true]').length") == 1
    finally:
        page.run("window.close()")
        page.switch(before[0])


def test_hostile_names_and_texts_are_text(page: Browser) -> None:
    page.run("(document.querySelector('#memory').value = 'hostile', "
             "document.querySelector('#memory').dispatchEvent(new Event('change')))")  # fmt: skip
    assert ATTACK in text(page, "#facts")
    page.type("#question", ATTACK + ENTER)
    page.wait(ANSWERED)
    assert ATTACK in text(page, "#turns li.user")
    assert ATTACK in text(page, "#passages")
    assert page.run("document.images.length") == 0
    assert page.run("document.scripts.length") == 1
    assert page.run("document.title") == "fot"
    page.click("#turns .more button:nth-of-type(2)")
    page.wait("!document.querySelector('#turns .more button:nth-of-type(2)').disabled")
    here, *others = page.windows()
    for other in others:
        page.switch(other)
        page.wait("document.querySelectorAll('.token').length > 5")
        assert page.run("document.images.length") == 0
        assert page.run("document.title") != "owned"
        page.run("window.close()")
    page.switch(here)


def test_an_upload_becomes_a_memory(page: Browser, tmp_path: Path) -> None:
    (tmp_path / "garden.txt").write_text("The garden is green. " * 60)
    (tmp_path / "no.bin").write_bytes(b"\0\1")
    page.click("#show-upload")
    assert page.run("document.activeElement.id") == "upload-name"
    page.type("#upload-name", "garden")
    page.type("#upload-files", f"{tmp_path}/garden.txt\n{tmp_path}/no.bin")
    page.click("#upload button[type=submit]")
    page.wait("document.querySelector('#upload-state').textContent.includes('are read')")
    assert "Left out: no.bin is a binary file" in text(page, "#upload-state")
    assert page.run("document.querySelector('#memory').value") == "garden"
    page.type("#question", "What is green?" + ENTER)
    page.wait(ANSWERED)
    assert "garden.txt" in text(page, "#passages")


def test_errors_are_shown(page: Browser) -> None:
    page.type("#question", "word " * 60 + ENTER)
    page.wait("document.querySelector('#turns .wrong')")
    assert "tokens, but the window has 256" in text(page, "#turns .wrong")
    page.press(ESCAPE)
    page.type("#question", "Who?" + ENTER)  # and it goes on
    page.wait(ANSWERED)


@pytest.mark.parametrize("width", [360, 768, 1280])
def test_it_fits(width: int, page: Browser) -> None:
    page.command("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=width < 700)
    try:
        page.click("#show-upload")
        page.type("#question", "Who is the vicar?" + ENTER)
        page.wait(ANSWERED)
        assert page.run("document.documentElement.scrollWidth") <= width
        heights = page.run("[...document.querySelectorAll('header button, header select, #ask button')]"
                           ".map((one) => one.getBoundingClientRect().height).filter(Boolean)")  # fmt: skip
        assert min(heights) >= 44  # what a finger hits
    finally:
        page.command("Emulation.clearDeviceMetricsOverride")


def _brightness(page: Browser, selector: str, name: str) -> float:
    script = f"getComputedStyle(document.querySelector({selector!r})).{name}.match(/\\d+/g).slice(0, 3).map(Number)"
    numbers: Any = page.run(script)
    return sum(numbers) / 3


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark(scheme: str, page: Browser) -> None:
    page.command("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    try:
        ground, ink = _brightness(page, "body", "backgroundColor"), _brightness(page, "body", "color")
        assert (ground < 60 and ink > 200) if scheme == "dark" else (ground > 200 and ink < 60)
    finally:
        page.command("Emulation.setEmulatedMedia", features=[])
