"""Questions that wait for one memory are answered together, each as it would be alone."""

import concurrent.futures
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx2
import openai
import pytest
from serve_helpers import make_library, make_model, running
from test_serve_line import Held, _leaving, requests_there, wait_for
from transformers import PreTrainedTokenizerFast

from fot import together
from fot.serve import answering
from fot.serve.library import Library
from fot.serve.line import MOST_JOINED
from fot.serve.server import Settings

QUESTIONS = ("Who is the vicar?", "When is tea?", "What left the harbour?", "Who saw the ship?")
FIRST = {"model": "tiny", "messages": [{"role": "user", "content": "Hold on."}], "max_tokens": 1}


@pytest.fixture(scope="module")
def library(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Library:
    return make_library(make_model(tokenizer, window=1024), tmp_path_factory.mktemp("memories"))


@pytest.fixture(scope="module")
def server(library: Library) -> Iterator[str]:
    with running(library, Settings(max_tokens=8, waiting=12)) as (address, _):
        yield address


def ask(address: str, number: int, **options: Any) -> Any:
    """An answer without what no two answers share; of a stream, its pieces joined."""
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
    options = {"model": "emma", "messages": [{"role": "user", "content": QUESTIONS[number % 4]}]} | options
    if not options.get("stream"):
        done = client.chat.completions.create(**options).model_dump()
        return {name: done[name] for name in ("choices", "usage")}
    chunks = [chunk.model_dump() for chunk in client.chat.completions.create(**options)]
    *pieces, last = [one["choices"][0] for one in chunks if one["choices"]]
    text = "".join(piece["delta"]["content"] or "" for piece in pieces)
    return (
        text,
        last["finish_reason"],
        last["delta"].get("annotations"),
        [chunk["usage"] for chunk in chunks if chunk["usage"]],
    )


def at_once(address: str, held: Held, asked: list[dict[str, Any]]) -> list[Any]:
    """Answers to requests that wait behind another, in this order, or the errors there were."""
    with concurrent.futures.ThreadPoolExecutor(len(asked) + 1) as pool:
        pool.submit(ask, address, 0, **FIRST)
        wait_for(1, address)
        jobs = []
        for number, options in enumerate(asked):
            jobs.append(pool.submit(ask, address, number, **options))
            wait_for(number + 2, address)
        held.go.set()
        return [job.exception() or job.result() for job in jobs]


def joined(address: str) -> int:
    return int(httpx2.get(f"{address}/health").json()["joined"])


def test_each_gets_what_it_gets_alone(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole and streamed, with probabilities, stop strings and lengths of their own."""
    whole = ask(server, 1)["choices"][0]["message"]["content"]
    usage = {"stream": True, "stream_options": {"include_usage": True}}
    asked: list[dict[str, Any]] = [
        {"max_tokens": 3, "logprobs": True, "top_logprobs": 2},
        {"stop": whole[4:6], "seed": 3},
        {"max_tokens": 30, **usage},
        {"messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": QUESTIONS[3]}], **usage},
    ]
    wanted = [ask(server, number, **options) for number, options in enumerate(asked)]
    before = joined(server)
    found = at_once(server, Held(monkeypatch), asked)
    assert joined(server) == before + 4 == before + MOST_JOINED
    _same(found, wanted)
    assert wanted[1]["choices"][0]["finish_reason"] == "stop"
    turns = [*asked[3]["messages"], {"role": "assistant", "content": found[3][0]}, {"role": "user", "content": "Why?"}]
    assert ask(server, 0, messages=turns)["choices"]  # the conversation is known, and goes on


def _same(found: Any, wanted: Any) -> None:
    if isinstance(wanted, dict):
        assert found.keys() == wanted.keys()
        found, wanted = list(found.values()), list(wanted.values())
    if isinstance(wanted, list | tuple):
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            _same(one, other)
    else:
        assert found == (pytest.approx(wanted, abs=1e-4) if isinstance(wanted, float) else wanted)


def test_who_cannot_be_joined_goes_alone(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other memories, drawn answers, several answers, later turns; and no batch is larger than it may be."""
    later = [
        *({"role": role, "content": "Well."} for role in ("user", "assistant")),
        {"role": "user", "content": "Why?"},
    ]
    asked: list[dict[str, Any]] = [
        *({"model": name} for name in ("tiny", "empty")),
        *({"temperature": 1.5, "seed": 1, "model": "emma"}, {"n": 2}, {"messages": later}),
        *({} for _ in range(MOST_JOINED + 1)),
    ]
    wanted = [ask(server, number, **options) for number, options in enumerate(asked)]
    before = joined(server)
    found = at_once(server, Held(monkeypatch), asked)
    _same([one["choices"] for one in found], [one["choices"] for one in wanted])  # a known turn has more cached tokens
    assert joined(server) == before + MOST_JOINED


def test_errors_are_of_one(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = ask(server, 0)
    long = {"messages": [{"role": "user", "content": "why " * 1024}]}
    first, second, third = at_once(
        server, Held(monkeypatch), [{}, long, {"messages": [{"role": "user", "content": QUESTIONS[0]}]}]
    )
    _same([first, third], [wanted, wanted])
    assert isinstance(second, openai.BadRequestError)
    assert "the question has" in str(second)

    def broken(turns: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(answering, "say_together", broken)
    for error in at_once(server, Held(monkeypatch), [{}, {"stream": True}]):
        assert isinstance(error, openai.APIError)
        assert "the server failed" in str(error)
    monkeypatch.undo()
    wait_for(0, server)
    _same(ask(server, 0), wanted)


def test_a_client_that_leaves_a_batch_does_not_stop_it(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, sizes, go, held = ask(server, 1, max_tokens=40), list[int](), threading.Event(), Held(monkeypatch)
    put = together._Streamers.put

    def slow(self: Any, value: Any) -> None:
        sizes.append(len(self._rows))
        put(self, value)
        if len(sizes) == 5:
            go.wait(20)

    monkeypatch.setattr(together._Streamers, "put", slow)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        pool.submit(ask, server, 0, **FIRST)
        wait_for(1, server)
        leaving = _leaving(
            server, {"model": "emma", "messages": [{"role": "user", "content": QUESTIONS[0]}], "max_tokens": 40}
        )
        wait_for(2, server)
        staying = pool.submit(ask, server, 1, max_tokens=40)
        wait_for(3, server)
        held.go.set()
        while len(sizes) < 5:
            time.sleep(0.02)
        leaving.close()
        time.sleep(1)  # the server looks now and then
        go.set()
        _same(staying.result(), wanted)
        wait_for(0, server)
    assert sizes[:5] == [2] * 5
    assert sizes[-1] == 1
    assert sizes.count(2) < 10


def test_a_full_line_is_full(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those who are answered together count as so many."""
    held = Held(monkeypatch)
    with (
        running(library, Settings(max_tokens=2, waiting=2)) as (address, _),
        concurrent.futures.ThreadPoolExecutor(3) as pool,
    ):
        pool.submit(ask, address, 0, **FIRST)
        wait_for(1, address)
        jobs = [pool.submit(ask, address, number) for number in range(2)]
        wait_for(3, address)
        with pytest.raises(openai.RateLimitError, match="3 requests run or wait"):
            ask(address, 2)
        held.go.set()
        assert all(job.result()["choices"] for job in jobs)
        wait_for(0, address)
        assert requests_there(address) == 0
        assert joined(address) == 2
