"""The web page's own interface: what there is, inspections, uploads with progress."""

import concurrent.futures
import io
import json
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from document_helpers import make_zip
from fastapi import Request
from fastapi.testclient import TestClient
from serve_helpers import make_library, make_model, running
from transformers import PreTrainedTokenizerFast

from fot.serve import pages, uploads
from fot.serve.app import create_app
from fot.serve.library import Library
from fot.serve.server import Settings
from memory import Memory


@pytest.fixture
def client(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Iterator[TestClient]:
    library = make_library(make_model(tokenizer), tmp_path)
    with TestClient(create_app(library, Settings(new_memories=tmp_path / "new")), base_url="http://localhost") as made:
        yield made


def library_of(client: TestClient) -> Library:
    app: Any = client.app
    return app.state.server.library


def test_the_page_needs_nothing_else(client: TestClient) -> None:
    page = client.get("/")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert page.headers["x-content-type-options"] == "nosniff"
    for name in ("page.css", "page.js"):
        assert name in page.text
        assert client.get(f"/{name}").status_code == 200
    for text in (page.text, client.get("/page.js").text, client.get("/page.css").text):
        assert "http://" not in text
        assert "https://" not in text


def test_memories_are_listed_with_titles(client: TestClient) -> None:
    found = client.get("/api/memories").json()
    assert [one["id"] for one in found["memories"]] == ["emma", "empty", "tiny"]
    assert set(found["memories"][0]["titles"]) == {"emma.txt", "other.txt"}
    assert found["can_make"]


def test_inspections(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    made = client.post("/api/inspections", json={"model": "emma", "question": "</script>Who?"})
    page = client.get(made.json()["page"])
    assert page.headers["content-security-policy"].startswith("sandbox allow-scripts; default-src 'none'")
    assert "</script>Who?" not in page.text
    assert "emma.txt" in page.text
    assert "/home/somebody" not in page.text
    monkeypatch.setattr(pages, "INSPECTED_TOKENS", 1)
    for _ in range(9):
        client.post("/api/inspections", json={"model": "tiny", "question": "x"})
    assert client.get(made.json()["page"]).status_code == 404
    assert client.post("/api/inspections", json={"model": "no", "question": "x"}).status_code == 404


def send(client: TestClient, name: str, files: list[tuple[str, bytes]]) -> tuple[int, list[dict[str, Any]]]:
    parts = [("files", (file, io.BytesIO(content))) for file, content in files]
    answer = client.post(f"/api/memories/{name}", files=parts)
    if not answer.headers["content-type"].startswith("text/event-stream"):
        return answer.status_code, [answer.json()]
    return 200, [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: ")]


def test_uploads_become_a_memory(client: TestClient, tmp_path: Path) -> None:
    text = b"The garden is green, and tea is at five.\n" * 40
    make_zip(tmp_path / "a.zip", {"a": "x"})
    files = [("../../etc/a.txt", text), ("dir/a.txt", b"another text"), ("no.zip", (tmp_path / "a.zip").read_bytes())]
    status, sent = send(client, "garden", files)
    assert status == 200
    *progress, done = sent
    assert done["left_out"] == ["no.zip is an archive: unpack it and give the folder"]
    assert done["done"]["id"] == "garden"
    assert [one["tokens"] for one in progress] == sorted(one["tokens"] for one in progress)
    assert progress[-1]["tokens"] == done["done"]["tokens"]
    assert {one["file"] for one in progress} == {"a.txt"}
    assert all(one["total"] >= one["tokens"] and one["seconds_left"] >= 0 for one in progress)
    assert client.get("/v1/models/garden").json()["documents"] == 2
    assert set(library_of(client)["garden"].documents()) == {"a.txt", "a (2).txt"}
    asked = client.post(
        "/v1/chat/completions",
        json={"model": "garden", "messages": [{"role": "user", "content": "Tea?"}], "max_tokens": 3},
    )
    assert asked.status_code == 200
    opened = Memory.open(tmp_path / "new" / "garden.memory")
    assert str(tmp_path) not in json.dumps(opened.metadata.get("files"))
    assert str(tmp_path) not in json.dumps(sent)


@pytest.mark.parametrize("name", ["emma", "a%2Fb", "..", ".hidden", "x" * 65, "a b"])
def test_odd_names_are_refused(name: str, client: TestClient, tmp_path: Path) -> None:
    status, _ = send(client, name, [("a.txt", b"text")])
    assert status in (400, 404, 405, 409)
    assert not list((tmp_path / "new").glob("*")) if (tmp_path / "new").exists() else True


def test_uploads_without_text_leave_nothing(
    client: TestClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, sent = send(client, "new", [("a.bin", b"\0\1\2"), ("b.pdf", b"nothing")])
    assert sent[-1]["error"]["message"].startswith(
        "no file with text: a.bin is a binary file, not text; b.pdf cannot be read"
    )
    monkeypatch.setattr(uploads, "MOST_BYTES", 10)
    status, sent = send(client, "new", [("a.txt", b"more than ten bytes")])
    assert status == 413
    assert "new" not in library_of(client)
    assert not list((tmp_path / "new").glob("*"))


def test_a_client_that_leaves_stops_the_reading(
    client: TestClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Leaving(uploads._Bar):
        def update(self, n: float | None = 1) -> None:
            self._stopped = lambda: True
            super().update(n)

    monkeypatch.setattr(uploads, "_Bar", Leaving)
    send(client, "new", [("a.txt", b"text " * 900)])
    assert "new" not in library_of(client)
    assert not list((tmp_path / "new").glob("*"))


def test_a_large_upload_is_refused_before_it_is_read(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "MOST_BYTES", 10)
    monkeypatch.setattr(Request, "form", None)
    assert send(client, "new", [("a.txt", b"a" * (uploads.MOST_AROUND + 11))])[0] == 413


def test_an_upload_without_files(client: TestClient) -> None:
    answer = client.post("/api/memories/new", data={"files": "text"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "files")


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """How many folders of uploads there are."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    return lambda: len(list((tmp_path / "temporary").glob("fot-upload-*")))


def test_a_full_line_keeps_no_files(client: TestClient, folders: Callable[[], int]) -> None:
    app: Any = client.app
    app.state.server.line._inside = 99
    assert send(client, "new", [("a.txt", b"text")])[0] == 429
    assert folders() == 0


def test_uploads_that_wait(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, folders: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that takes the name of another does it no harm; one whose client leaves the line leaves no files."""
    make, go = uploads._make, threading.Event()

    def make_later(*args: Any) -> dict[str, Any]:
        assert go.wait(30)
        return make(*args)

    def wait_for(count: int) -> None:
        end = time.monotonic() + 10
        while folders() != count and time.monotonic() < end:
            time.sleep(0.02)
        assert folders() == count

    monkeypatch.setattr(uploads, "_make", make_later)
    library = make_library(make_model(tokenizer), tmp_path)
    with (
        running(library, Settings(new_memories=tmp_path / "new")) as (address, _),
        concurrent.futures.ThreadPoolExecutor(2) as pool,
    ):
        url, files = f"{address}/api/memories/garden", {"files": ("a.txt", b"Tea is at five.")}
        sent = [pool.submit(httpx2.post, url, files=files, timeout=60) for _ in range(2)]
        wait_for(2)
        left = httpx2.Request("POST", url, files=files)
        with socket.create_connection((left.url.host, left.url.port)) as connection:
            head = "".join(f"{name}: {value}\r\n" for name, value in left.headers.items())
            connection.sendall(f"POST /api/memories/garden HTTP/1.1\r\n{head}\r\n".encode() + left.read())
            wait_for(3)
        wait_for(2)
        go.set()
        texts = sorted((one.result().text for one in sent), key=len)
        wait_for(0)
    assert any("there is a memory 'garden' already" in text for text in texts)
    assert any('"done"' in text for text in texts)
    assert len(Memory.open(tmp_path / "new" / "garden.memory")) == library["garden"].tokens > 0


def test_a_server_may_make_no_memories(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    library = make_library(make_model(tokenizer), tmp_path)
    with TestClient(create_app(library), base_url="http://localhost") as client:
        assert not client.get("/api/memories").json()["can_make"]
        assert send(client, "new", [("a.txt", b"text")])[0] == 403
