"""Requests wait in a line: a full one refuses, many clients lose nothing, and who leaves frees a place."""

import asyncio
import concurrent.futures
import json
import threading
import time
from typing import Any

import httpx2
import openai
import pytest
from serve_helpers import make_library, make_model, running
from transformers import PreTrainedTokenizerFast

from fot.ask import Conversation
from fot.serve.library import Library
from fot.serve.line import Joint, Line
from fot.serve.server import Settings

QUESTION = [{"role": "user", "content": "Who is the vicar?"}]


@pytest.fixture(scope="module")
def library(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Library:
    return make_library(make_model(tokenizer), tmp_path_factory.mktemp("memories"))


class Held:
    """A model that waits before each answer until it is let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go, self.began, self.stopped = threading.Event(), threading.Semaphore(0), 0
        say = Conversation.say

        def slow(conversation: Any, *args: Any, **kwargs: Any) -> Any:
            self.began.release()
            while not self.go.wait(0.01):
                if kwargs["stop"]():
                    self.stopped += 1
                    break
            return say(conversation, *args, **kwargs)

        monkeypatch.setattr(Conversation, "say", slow)


def requests_there(address: str) -> int:
    return int(httpx2.get(f"{address}/health").json()["requests"])


def wait_for(number: int, address: str) -> None:
    deadline = time.monotonic() + 20
    while requests_there(address) != number:
        assert time.monotonic() < deadline, requests_there(address)
        time.sleep(0.02)


def test_a_full_line_is_429_and_one_goes_at_a_time(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held(monkeypatch)
    with (
        running(library, Settings(waiting=2, max_tokens=2)) as (address, _),
        concurrent.futures.ThreadPoolExecutor(4) as pool,
    ):
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        asked = [
            pool.submit(
                client.chat.completions.create, model="tiny", messages=[{"role": "user", "content": str(number)}]
            )
            for number in range(3)
        ]
        wait_for(3, address)
        for stream in (False, True):
            with pytest.raises(openai.RateLimitError, match="the server is busy: 3 requests run or wait"):
                client.chat.completions.create(model="tiny", messages=QUESTION, stream=stream)
        assert held.began.acquire(timeout=10)
        assert not held.began.acquire(timeout=0.3)
        held.go.set()
        assert all(one.result().choices[0].message.content is not None for one in asked)
        wait_for(0, address)


def test_many_clients_lose_nothing(library: Library) -> None:
    """Each gets its own answer, whole or streamed, whoever else asks or leaves."""

    def work(number: int) -> list[tuple[str, str | None]]:
        messages = [{"role": "user", "content": f"Question {number % 4}?"}]
        name, found = ("emma", "empty", "tiny")[number % 3], []
        for stream in (False, True):
            options: dict[str, Any] = {"model": name, "messages": messages, "stream": stream}
            done = client.chat.completions.create(**options)
            if stream and number % 5 == 0:
                done.close()
            elif stream:
                found.append((f"{name} {number % 4}", "".join(chunk.choices[0].delta.content or "" for chunk in done)))
            else:
                found.append((f"{name} {number % 4}", done.choices[0].message.content))
        return found

    with running(library, Settings(max_tokens=4)) as (address, _), concurrent.futures.ThreadPoolExecutor(16) as pool:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        answers = [answer for one in pool.map(work, range(24)) for answer in one]
        wait_for(0, address)
    assert len(answers) == 24 + 19
    assert len(set(answers)) == len({asked for asked, _ in answers}) == 12  # the same answer to the same question


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_place(stream: bool, library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held(monkeypatch)
    body = {"model": "tiny", "messages": QUESTION, "stream": stream}
    with running(library, Settings(waiting=4, max_tokens=2)) as (address, _):
        running_, waiting = (_leaving(address, body) for _ in range(2))
        wait_for(2, address)
        assert held.began.acquire(timeout=10)
        waiting.close()
        wait_for(1, address)
        assert held.stopped == 0
        running_.close()
        wait_for(0, address)
        assert held.stopped == 1
        held.go.set()
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        assert client.chat.completions.create(model="tiny", messages=QUESTION).choices


def _leaving(address: str, body: dict[str, Any]) -> Any:
    """A connection with a request on it, whose answer nobody waits for."""
    import socket

    host, port = address.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)))
    content = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
    time.sleep(0.1)
    return connection


def test_a_place_is_free_when_all_have_been_told() -> None:
    """Of work done together, too, whatever becomes of it; who is told nothing gets an error."""

    class Pair(Joint[int]):
        def __init__(self, key: str, number: int) -> None:
            self._key, self.number = key, number

        @property
        def key(self) -> str:
            return self._key

        def __call__(self, stopped: Any) -> int:
            if self._key == "first":
                time.sleep(0.2)
            return -self.number

        @classmethod
        def together(cls, jobs: Any) -> None:
            batches.append([work.number for work, _, _ in jobs])
            for work, _, tell in jobs[:-1]:
                tell(ValueError() if work.number == 2 else work.number)
            if jobs[0][0].key == "broken":
                raise KeyError

    async def work() -> list[Any]:
        line, keys = Line(1, 20), ["first", "a", "a", "a", "broken", "broken", "a", "a", "a", "last"]
        found = await asyncio.gather(*(line.run(Pair(key, n)) for n, key in enumerate(keys)), return_exceptions=True)
        assert await line.run(Pair("first", 99)) == -99
        assert (line.length, line.joined) == (0, 4 + 2 + 2)
        return found

    batches = list[list[int]]()
    found = asyncio.run(work())
    assert batches == [[1, 2, 3, 6], [4, 5], [7, 8]]
    assert [one if isinstance(one, int) else type(one) for one in found] == [
        *(0, 1, ValueError, 3, 4, KeyError, RuntimeError, 7, RuntimeError, -9)
    ]
