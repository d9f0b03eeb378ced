"""The page that shows a trace, in a real browser where there is one."""

import html
import json
import re
import shutil
import subprocess
from collections import Counter
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from inspection_demo import demo_trace

import fot.inspection.page
from fot.inspection.page import page_data, write_page
from fot.inspection.result import Token, Trace

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
TITLE = 'Is <b>this</b> "safe" & sound?'
# What a script run in the page finds out is left in an attribute.
REPORT = "document.body.setAttribute('data-found', JSON.stringify(found));"


@lru_cache
def demo() -> Trace:
    return demo_trace(20_000)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "page.html"
    write_page(path, demo(), title=TITLE, model="a model")
    return path


def embedded(path: Path) -> dict[str, Any]:
    """The data inside a page."""
    return json.loads(path.read_text("utf-8").split('type="application/json">')[1].split("</script>")[0])


def browse(path: Path, script: str, *, address: str = "") -> Any:
    """What ``script`` leaves in ``found`` when it is run at the end of the page."""
    changed = path.with_name(f"scripted-{path.name}")
    ending = f"<script>{script}</script></body>"
    changed.write_text(path.read_text("utf-8").replace("</body>", ending), "utf-8")
    assert CHROMIUM is not None
    options = [
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--virtual-time-budget=1000",
        "--window-size=1400,900",
    ]
    command = [
        CHROMIUM,
        *options,
        f"--user-data-dir={path.parent / 'profile'}",
        "--dump-dom",
        f"file://{changed}{address}",
    ]
    dom = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    found = re.search(r'data-found="(.*?)"', dom)
    assert found is not None, dom[-2000:]
    return json.loads(html.unescape(found[1]))


def test_nothing_is_loaded_from_elsewhere(page: Path) -> None:
    content = page.read_text("utf-8").replace("http://www.w3.org/2000/svg", "")  # a name, not an address
    assert not re.search(r"https?:|\bsrc=|<link|@import|url\(|\bfetch\(|XMLHttp|import\(", content)
    assert "default-src 'none'" in content
    assert html.escape(TITLE) in content
    assert "<b>this" not in content


def test_small_for_a_large_memory(tmp_path: Path) -> None:
    trace = demo_trace(262_144, answer=" word and another," * 15)
    assert sum(token.is_generated for token in trace.tokens) == 60
    write_page(tmp_path / "page.html", trace)
    assert (tmp_path / "page.html").stat().st_size < 2_000_000


def test_fewer_hits_if_they_would_not_fit(tmp_path: Path, page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fot.inspection.page.DATA_BYTES", 300_000)
    write_page(tmp_path / "page.html", demo())
    assert page.stat().st_size > (tmp_path / "page.html").stat().st_size < 350_000
    data = embedded(tmp_path / "page.html")
    assert 1 <= data["limit"] < embedded(page)["limit"]
    per_head = Counter((hit[0], hit[1]) for hit in data["queries"][3]["hits"])
    assert set(per_head.values()) == {data["limit"]}


def test_data_is_what_was_recorded() -> None:
    trace, data = demo(), page_data(demo(), 4)
    found, memory = trace.found, trace.memories[0]
    hits = iter(data["queries"][7]["hits"])
    for layer, head, rank in np.ndindex(4, 9, 4):
        at, hit = (7, layer, head, rank), next(hits)
        assert hit[:2] == [layer, head]
        region, slot = data["regions"][hit[2]], int(found.slot[at])
        assert region["start"] + hit[3] == slot
        assert region["texts"][hit[3]] == trace.tokenizer.decode([memory.token_ids([slot])[0]])
        assert region["document"] == memory.source(slot).document
        expected = [found.score[at], found.knn_score[at], found.share[at], found.focus_score[at]]
        assert hit[4:8] == pytest.approx(expected, rel=5e-3)
        _, start, stop, _ = trace.ranked(7)[hit[8]]
        assert start <= slot < stop
    assert sum(sum(entry["mass"]) for entry in data["documents"]) == pytest.approx(trace.strips[0].bins.sum(), rel=0.01)


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
def test_passages_are_those_of_the_trace_in_its_order() -> None:
    """The page's own program lists them, and they are what ``Trace.passages`` says of each token of the answer."""
    trace, data = demo(), page_data(demo(), 32)  # all hits that were recorded
    program = (Path(fot.inspection.page.__file__).parent / "page.js").read_text("utf-8")
    function = re.search(r"function passagesOf.*?\n}\n", program, re.DOTALL)
    assert function is not None
    script = f"""
      const data = JSON.parse(require('fs').readFileSync(0));
      const chosenLayers = () => data.layers.map((_, i) => i), chosenHeads = () => [...Array(data.heads).keys()];
      const memoryShare = () => 1;
      {function[0]}
      const listed = data.queries.map((query) => passagesOf(query).slice(0, 8).map((one) =>
        [data.regions[one.region].memory, data.regions[one.region].start + one.start, one.stop - one.start]));
      console.log(JSON.stringify(listed));
    """
    done = subprocess.run(["node", "-e", script], input=json.dumps(data), capture_output=True, text=True, check=True)
    listed, compared = json.loads(done.stdout), 0
    for place, token in enumerate(trace.tokens):
        if token.is_generated:
            passages = trace.passages(8, token=place)
            assert listed[place - 1] == [[0, one.start, one.stop - one.start] for one in passages]
            compared += len(passages)
    assert compared > 50


def test_passages_of_one_token_are_part_of_its_own_mass() -> None:
    trace = demo()
    first = next(place for place, token in enumerate(trace.tokens) if token.is_generated)
    every = trace.passages(10_000, token=first)
    assert 0 < sum(passage.share for passage in every) <= 1 + 1e-6
    assert trace.passages(3, token=first) == every[:3]
    assert trace.passages(3, token=first) != trace.passages(3)


@needs_browser
def test_a_token_in_the_address_is_shown(page: Path) -> None:
    trace, data = demo(), embedded(page)
    place = next(i for i, token in enumerate(trace.tokens) if token.is_generated) + 9
    script = """
      const text = (all) => [...document.querySelectorAll(all)].map((one) => one.textContent);
      const found = {title: text('#panel-title')[0], facts: text('#panel-facts')[0], documents: text('.source b'),
        excerpts: text('.excerpt'), marks: text('li:first-child mark'), options: text('[aria-selected="true"]'),
        bars: text('#documents b'), strip: document.querySelector('#strip svg').getAttribute('aria-label')};
    """
    found = browse(page, script + REPORT, address=f"#token={place}")
    word = trace.tokens[place].text.strip()
    assert found["title"] == f"Looked at when choosing “{word}”"
    assert found["options"] == [word]
    assert found["facts"].startswith(f"{100 * (1 - trace.found.local[place - 1].mean()):.1f}% of the attention")
    passages = trace.passages(100, token=place)
    # The page may hold fewer hits of each head than the trace, and then lists the passages of those, in the same order.
    held = sorted({hit[8] for hit in data["queries"][place - 1]["hits"] if hit[8] >= 0})
    assert held
    assert found["documents"] == [passages[rank].document for rank in held[:8]]
    strongest = next(hit for hit in data["queries"][place - 1]["hits"] if hit[8] == 0)
    region = data["regions"][strongest[2]]
    assert found["excerpts"][0].strip("… \u00a0") in " ".join("".join(region["texts"]).split())
    assert {mark.strip() for mark in found["marks"]} <= {text.strip() for text in region["texts"]}
    assert found["bars"][0] == f"{100 * next(iter(trace.documents().values())):.1f}%"
    assert "20,000 tokens" in found["strip"]


@needs_browser
def test_keys_pointer_and_filters(page: Path) -> None:
    script = """
      const found = {}, token = (number) => document.getElementById('token-' + number);
      const text = (name) => document.getElementById(name).textContent;
      const press = (key) => {
        document.activeElement.dispatchEvent(new KeyboardEvent('keydown', {key, bubbles: true}));
        return document.activeElement.id;
      };
      token(5).click();
      found.moved = [press('ArrowRight'), press('ArrowRight'), press('ArrowLeft'), location.hash];
      found.far = [press('End'), press('Home')];
      found.down = press('ArrowDown');
      found.up = press('ArrowUp');
      token(8).dispatchEvent(new PointerEvent('pointerover', {bubbles: true, pointerType: 'mouse'}));
      found.hover = text('panel-title');
      found.pooled = text('panel-facts');
      for (const [name, value] of [['layer', '1'], ['head', '4']]) {
        document.getElementById(name).value = value;
        document.getElementById(name).dispatchEvent(new Event('change'));
      }
      found.filtered = text('panel-facts');
      found.where = [...document.querySelectorAll('.scores div:last-child dd')].map((one) => one.textContent);
      token(8).parentElement.parentElement.dispatchEvent(new PointerEvent('pointerleave'));
      found.left = text('panel-title');
    """
    found, trace = browse(page, script + REPORT), demo()
    words = [token.text.strip() for token in trace.tokens]
    assert found["moved"] == ["token-6", "token-7", "token-6", "#token=6"]
    assert found["far"] == [f"token-{len(words) - 1}", "token-0"]
    assert found["down"] not in ("token-0", "token-1")
    assert found["up"] == "token-0"
    assert found["hover"] == f"Looked at when reading “{words[8]}”"
    assert found["pooled"].startswith(f"{100 * (1 - trace.found.local[8].mean()):.1f}%")
    assert found["filtered"].startswith(f"{100 * (1 - trace.found.local[8, 1, 4]):.1f}%")
    assert set(found["where"]) == {"layer 12, head 4"}
    assert found["left"] == f"Looked at when reading “{words[0]}”"


@needs_browser
def test_fits_the_screen(page: Path) -> None:
    """In frames, since a browser's own window is no narrower than 500 pixels."""
    measure = "<script>parent.postMessage([document.documentElement.scrollWidth, innerWidth], '*')</script></body>"
    (page.parent / "inner.html").write_text(page.read_text("utf-8").replace("</body>", measure), "utf-8")
    frames = [
        f"<iframe src='inner.html' style='width:{width}px;height:800px;border:0'></iframe>"
        for width in (320, 390, 1280)
    ]
    outer = page.parent / "frames.html"
    outer.write_text(f"<body>{''.join(frames)}</body>")
    script = f"const found = []; addEventListener('message', (event) => {{ found.push(event.data); {REPORT} }});"
    sizes = browse(outer, script)
    assert sorted(inside for _, inside in sizes) == [320, 390, 1280]
    assert all(scroll <= inside for scroll, inside in sizes)


@needs_browser
def test_hostile_text_stays_text(tmp_path: Path) -> None:
    hostile = "</script><script>window.owned=1</script><!--<script> ' \" \\ \u2028 \x00\x07 $title \U0001f98a \n"
    trace = demo_trace(2_000, prompt="one two three", answer=" four five")
    tokens = [Token(0, hostile, False), *trace.tokens[1:]]
    trace.tokenizer._texts[trace.memories[0].token_ids([0])[0]] = hostile
    write_page(tmp_path / "page.html", replace(trace, tokens=tokens), title=hostile)
    script = """
      const found = {owned: window.owned === 1, title: document.title, scripts: document.scripts.length,
        token: document.getElementById('token-0').textContent};
    """
    found = browse(tmp_path / "page.html", script + REPORT, address="#token=0")
    assert not found["owned"]
    assert found["scripts"] == 3  # data, program, and this test's
    assert found["token"] == hostile.replace("\n", "↵\n")
    assert "window.owned" in found["title"]


@needs_browser
def test_nothing_in_memory(tmp_path: Path) -> None:
    trace = demo_trace(2_000, prompt="one two three", answer=" four five")
    empty = replace(trace.found, memory=np.full_like(trace.found.memory, -1), local=np.ones_like(trace.found.local))
    write_page(tmp_path / "page.html", replace(trace, found=empty, memories=[], strips=[]))
    script = "const found = document.getElementById('panel-facts').textContent;"
    shown = browse(tmp_path / "page.html", script + REPORT, address="#token=4")
    assert shown == "0% of the attention went to memory, 100.0% stayed in the local window. No memory was retrieved."
