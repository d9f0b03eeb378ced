"""The OpenAI interface, as its own client uses it, on a real server."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from serve_helpers import make_library, make_model, running
from transformers import PreTrainedTokenizerFast

from fot.ask import Conversation
from fot.memories import short_name
from fot.retrieval.prompt import titles
from fot.serve import answering
from fot.serve.library import Library
from fot.serve.server import Settings
from fot.serve.stops import StopText

QUESTION = [{"role": "user", "content": "Who is the vicar?"}]


@pytest.fixture(scope="module")
def library(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Library:
    return make_library(make_model(tokenizer), tmp_path_factory.mktemp("memories"))


@pytest.fixture(scope="module")
def server(library: Library) -> Iterator[tuple[str, Any]]:
    with running(library, Settings(max_tokens=12)) as found:
        yield found


@pytest.fixture(scope="module")
def client(server: tuple[str, Any]) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server[0]}/v1", api_key="none", max_retries=0)


def test_models_are_memories_and_the_bare_model(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["emma", "empty", "tiny"]
    assert client.models.retrieve("emma").owned_by == "fot"
    with pytest.raises(openai.NotFoundError, match="the model 'austen' does not exist; there are emma, empty, tiny"):
        client.models.retrieve("austen")


def test_an_answer_is_that_of_ask(client: openai.OpenAI, library: Library) -> None:
    entry = library["emma"]
    wanted = Conversation(entry.model, entry.memory, title=entry.blank.title).say(
        "Who is the vicar?", max_new_tokens=12
    )
    done = client.chat.completions.create(model="emma", messages=QUESTION)
    choice = done.choices[0]
    assert choice.message.content == wanted.text
    assert choice.finish_reason == ("stop" if wanted.ended else "length")
    usage = done.usage
    assert usage.prompt_tokens_details.cached_tokens == len(entry.memory)
    assert usage.prompt_tokens == len(entry.memory) + wanted.prompt_tokens
    assert usage.completion_tokens == wanted.answer_tokens
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    cited = choice.message.annotations
    assert [one.url_citation.title for one in cited] == [passage.document for passage in wanted.passages]
    assert cited[0].url_citation.url.startswith(f"fot://emma/{cited[0].url_citation.title}#char=")
    assert {one.url_citation.title for one in cited} <= {"emma.txt", "other.txt"}
    assert cited[0].passage["text"] == wanted.passages[0].text


@pytest.mark.parametrize("name", ["emma", "empty", "tiny"])
def test_a_stream_is_the_same_answer(name: str, client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model=name, messages=QUESTION)
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(client.chat.completions.create(model=name, messages=QUESTION, **options))
    *pieces, finish, usage = chunks
    assert "".join(chunk.choices[0].delta.content or "" for chunk in pieces) == whole.choices[0].message.content
    assert finish.choices[0].finish_reason == whole.choices[0].finish_reason
    assert usage.usage == whole.usage
    cited = getattr(finish.choices[0].delta, "annotations", None) or []
    assert [one["url_citation"] for one in cited] == [
        one.url_citation.model_dump() for one in whole.choices[0].message.annotations
    ]
    assert len({chunk.id for chunk in chunks}) == 1
    without = list(client.chat.completions.create(model=name, messages=QUESTION, stream=True))
    assert all(chunk.usage is None for chunk in without)


def test_conversations_go_on(client: openai.OpenAI, server: tuple[str, Any], library: Library) -> None:
    """What was read is not read again; answers are those of one conversation."""
    entry, messages = library["emma"], [{"role": "system", "content": "Be kind."}]
    wanted, cached = Conversation(entry.model, entry.memory, title=entry.blank.title), []
    wanted.go_back_to(messages)
    for text in ("Who is the vicar?", "And when is tea?", "Who said so?"):
        messages.append({"role": "user", "content": text})
        done = client.chat.completions.create(model="emma", messages=messages)
        answer = wanted.say(text, max_new_tokens=12)
        assert done.choices[0].message.content == answer.text
        cached.append(done.usage.prompt_tokens_details.cached_tokens - entry.tokens)
        assert cached[-1] == answer.known_tokens
        messages.append({"role": "assistant", "content": done.choices[0].message.content})
    assert cached[0] == 0
    assert cached[1] > 0
    again = client.chat.completions.create(model="emma", messages=messages[:-1])  # the last answer anew
    assert again.choices[0].message.content == messages[-1]["content"]
    other = [*messages[:2], {"role": "assistant", "content": "It was changed."}, *messages[3:-1]]
    changed = client.chat.completions.create(model="emma", messages=other)
    fresh = Conversation(entry.model, entry.memory, title=entry.blank.title)
    fresh.go_back_to(other[:-1])
    assert changed.choices[0].message.content == fresh.say("Who said so?", max_new_tokens=12).text
    for number in range(2 * answering.MOST_CONVERSATIONS):
        content = f"Question {number}"
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": content}], max_tokens=1)
    assert len(server[1].state.server.conversations) == answering.MOST_CONVERSATIONS


def test_sampling(client: openai.OpenAI) -> None:
    def texts(**options: Any) -> list[str | None]:
        done = client.chat.completions.create(model="emma", messages=QUESTION, **options)
        return [choice.message.content for choice in done.choices]

    drawn = texts(temperature=1.5, seed=1, n=3)
    assert len(set(drawn)) == 3
    assert texts(temperature=1.5, seed=1, n=3) == drawn
    assert texts(temperature=1.5, seed=2) == drawn[1:2]
    assert texts(temperature=1.5, top_p=1e-6, seed=1) == texts() == texts(temperature=0, seed=9)
    assert texts(temperature=1.5) != texts(temperature=1.5)


def test_stop_strings(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="emma", messages=QUESTION).choices[0].message.content
    stop = whole[4:6]
    wanted = whole[: whole.index(stop)].rstrip()
    done = client.chat.completions.create(model="emma", messages=QUESTION, stop=["not there", stop])
    assert (done.choices[0].message.content, done.choices[0].finish_reason) == (wanted, "stop")
    chunks = client.chat.completions.create(model="emma", messages=QUESTION, stop=stop, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == wanted


def test_a_stop_string_on_the_last_token(client: openai.OpenAI, library: Library) -> None:
    """The answer ends by it, and the conversation goes on without it."""
    for seed in range(99):
        options: dict[str, Any] = {"max_tokens": 4, "temperature": 1.0, "seed": seed}
        text = client.chat.completions.create(model="emma", messages=QUESTION, **options).choices[0].message.content
        if text[-1:].isascii() and text[-1:].isalnum() and text[-1] not in text[:-1]:
            break
    done = client.chat.completions.create(model="emma", messages=QUESTION, stop=text[-1], **options)
    assert (done.choices[0].message.content, done.choices[0].finish_reason) == (text[:-1].rstrip(), "stop")
    entry, history = library["emma"], [*QUESTION, {"role": "assistant", "content": done.choices[0].message.content}]
    fresh = Conversation(entry.model, entry.memory, title=entry.blank.title)
    fresh.go_back_to(history)
    wanted = fresh.say("Who else?", max_new_tokens=12)
    again = client.chat.completions.create(model="emma", messages=[*history, {"role": "user", "content": "Who else?"}])
    assert again.choices[0].message.content == wanted.text
    assert again.usage.prompt_tokens_details.cached_tokens == entry.tokens


@pytest.mark.parametrize(
    "pieces", [["a", "b", "c"], ["ab", "c"], [" a b", "\n\n", "c  "], ["", "a<e", "nd", ">b"], ["<e", "n", "x"]]
)
@pytest.mark.parametrize("stops", [[], ["<end>"], ["b", "c"], ["<en>", "<end"]])
def test_text_up_to_a_stop(pieces: list[str], stops: list[str]) -> None:
    for strip in (False, True):
        handed: list[str] = []
        text = StopText(stops, handed.append, strip=strip)
        for piece in pieces:
            text.feed(piece)
        text.finish()
        whole = "".join(pieces)
        ends = [whole.index(stop) for stop in stops if stop in whole]
        wanted = whole[: min(ends, default=len(whole))]
        assert "".join(handed) == text.text == (wanted.strip() if strip else wanted)
        assert text.stopped == bool(ends)


def test_logprobs(client: openai.OpenAI) -> None:
    done = client.chat.completions.create(model="emma", messages=QUESTION, logprobs=True, top_logprobs=3)
    content = done.choices[0].logprobs.content
    assert len(content) == done.usage.completion_tokens
    for token in content:
        assert token.logprob <= 0
        assert len(token.top_logprobs) == 3
        assert token.top_logprobs[0].logprob >= token.logprob
    assert content[0].token == content[0].top_logprobs[0].token  # greedy, and nothing was said before
    chunks = list(client.chat.completions.create(model="emma", messages=QUESTION, logprobs=True, stream=True))
    streamed = [one for c in chunks if c.choices and c.choices[0].logprobs for one in c.choices[0].logprobs.content]
    assert [one.logprob for one in streamed] == [one.logprob for one in content]


def test_completions(client: openai.OpenAI, library: Library) -> None:
    entry, tokenizer = library["emma"], library["emma"].model.tokenizer
    prompt = "The vicar of"
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    wanted = tokenizer.decode(
        entry.model.generate(ids, memory=entry.memory, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :],
        skip_special_tokens=True,
    )
    done = client.completions.create(model="emma", prompt=prompt, max_tokens=8)
    assert done.choices[0].text == wanted
    assert done.usage.prompt_tokens_details.cached_tokens == entry.tokens
    assert client.completions.create(model="emma", prompt=ids[0].tolist(), max_tokens=8).choices[0].text == wanted
    streamed = client.completions.create(model="emma", prompt=prompt, max_tokens=8, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == wanted
    several = client.completions.create(model="emma", prompt=[prompt, "Tea is"], max_tokens=8, n=2)
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in several.choices[:2]] == [wanted, wanted]


def test_streamed_completions_count_as_whole_ones(client: openai.OpenAI) -> None:
    """Usage of all prompts, and the place of each token in its text."""
    options: dict[str, Any] = {"prompt": ["The vicar of", "Tea"], "max_tokens": 8, "n": 2, "logprobs": 1}
    whole = client.completions.create(model="emma", **options)
    *chunks, usage = client.completions.create(
        model="emma", stream=True, stream_options={"include_usage": True}, **options
    )
    assert usage.usage == whole.usage
    for number, choice in enumerate(whole.choices):
        pieces = [chunk.choices[0].logprobs for chunk in chunks if chunk.choices[0].index == number]
        offsets = [offset for piece in pieces if piece for offset in piece.text_offset]
        assert offsets == choice.logprobs.text_offset


def test_echoed_prompts_have_probabilities(client: openai.OpenAI, library: Library) -> None:
    """As lm-eval asks: ids in, the probability of each out."""
    entry = library["emma"]
    ids = entry.model.tokenizer("The vicar of Highbury", return_tensors="pt").input_ids
    done = client.completions.create(model="emma", prompt=ids[0].tolist(), max_tokens=1, logprobs=1, echo=True)
    found = done.choices[0].logprobs
    logits = entry.model(ids, memory=entry.memory, use_cache=False).logits[0].float().log_softmax(-1)
    wanted = logits[:-1].gather(1, ids[0, 1:, None])[:, 0]
    assert found.token_logprobs[0] is None
    assert found.token_logprobs[1:-1] == pytest.approx(wanted.tolist(), abs=1e-4)
    assert len(found.tokens) == ids.shape[1] + 1
    many = client.completions.create(model="emma", prompt=ids[0].tolist(), max_tokens=1, logprobs=20, echo=True)
    for place, top in enumerate(many.choices[0].logprobs.top_logprobs[1:-1]):  # half characters share one text
        assert len(top) < 20
        assert max(top.values()) == pytest.approx(logits[place].max().item(), abs=1e-4)
    alone = client.completions.create(model="emma", prompt="The vicar", max_tokens=0, logprobs=2, echo=True)
    assert alone.choices[0].text == "The vicar"
    assert alone.usage.completion_tokens == 0


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"presence_penalty": 1}, "presence_penalty"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"extra_body": {"min_p": 0.1}}, "min_p"),
        ({"temperature": 3}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 100}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "many"}, "max_tokens"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages"),
        ({"messages": []}, "messages"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(options: dict[str, Any], param: str, client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        client.chat.completions.create(**{"model": "emma", "messages": QUESTION} | options)
    assert raised.value.param == param
    assert param in str(raised.value)


def test_what_changes_no_answer_is_passed_over(client: openai.OpenAI) -> None:
    wanted = client.chat.completions.create(model="emma", messages=QUESTION).choices[0].message.content
    parts = [{"role": "user", "content": [{"type": "text", "text": QUESTION[0]["content"]}]}]
    done = client.chat.completions.create(
        model="emma", messages=parts, user="x", metadata={"a": "b"}, store=False, frequency_penalty=0, tools=[],
        response_format={"type": "text"}, max_completion_tokens=12,
    )  # fmt: skip
    assert done.choices[0].message.content == wanted


def test_questions_that_are_too_long_are_refused_without_paths(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match=r"the question has .* tokens, but the window has 256"):
        client.chat.completions.create(model="emma", messages=[{"role": "user", "content": "word " * 300}])
    with pytest.raises(openai.BadRequestError, match="the question is empty"):
        client.chat.completions.create(model="emma", messages=[{"role": "user", "content": " "}])
    stream = client.chat.completions.create(model="emma", messages=[{"role": "user", "content": " "}], stream=True)
    with pytest.raises(openai.APIError, match="the question is empty"):
        list(stream)


def test_no_answer_tells_of_the_machine(server: tuple[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does a failure: not its folders, not its code."""
    seen = []
    for path in ("/v1/models", "/api/memories", "/health", "/nowhere", "/"):
        seen.append(httpx2.get(server[0] + path).text)
    body = {"model": "emma", "messages": QUESTION}
    seen.append(httpx2.post(f"{server[0]}/v1/chat/completions", json=body).text)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError(f"{Path.home()}/secret is broken")

    monkeypatch.setattr(Conversation, "say", fail)
    failed = httpx2.post(f"{server[0]}/v1/chat/completions", json=body)
    assert failed.status_code == 500
    monkeypatch.setattr(
        Conversation, "say", lambda *args, **kwargs: (_ for _ in ()).throw(ValueError(f"{Path.home()}/a"))
    )
    seen += [failed.text, httpx2.post(f"{server[0]}/v1/chat/completions", json=body).text]
    for text in seen:
        for secret in ("/home/somebody", "/somewhere", str(Path.home()) + "/", str(Path.cwd()), "Traceback"):
            assert secret not in text


def test_keys_hosts_and_origins(library: Library) -> None:
    with running(library, Settings(api_key="secret")) as (address, _):
        for key, status in (("secret", 200), ("wrong", 401), ("secre", 401)):
            answer = httpx2.get(f"{address}/v1/models", headers={"Authorization": f"Bearer {key}"})
            assert answer.status_code == status
        assert httpx2.get(f"{address}/v1/models").json()["error"]["code"] == "invalid_api_key"
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{address}/v1", api_key="x", max_retries=0).models.list()
        assert httpx2.get(f"{address}/").status_code == 200
    with running(library) as (address, _):
        for headers, status in (({"Host": "evil.example"}, 403), ({"Origin": "http://evil.example"}, 403),
                                ({"Origin": address}, 200), ({"Host": "localhost"}, 200)):  # fmt: skip
            assert httpx2.get(f"{address}/v1/models", headers=headers).status_code == status


def test_memories_do_not_change(library: Library, client: openai.OpenAI, tmp_path: Path) -> None:
    memory = library["emma"].memory
    assert memory is not None
    before = len(memory)
    for text in ("a" * 200, "b" * 200):
        client.chat.completions.create(model="emma", messages=[{"role": "user", "content": text}], max_tokens=30)
    assert len(memory) == before
    with pytest.raises(ValueError, match="opened read-only"):
        memory.drop_document(next(iter(memory.documents())))


def test_names_and_titles() -> None:
    assert [short_name(name) for name in ("a/emma.memory", "my books", "x/smollm2-135m-fot", "..")][:3] == [
        "emma",
        "my-books",
        "smollm2-135m-fot",
    ]
    title = titles(["/home/u/b/a.txt", "/home/u/b/c/d.txt", "e.txt"])
    assert [title(name) for name in ("/home/u/b/a.txt", "/home/u/b/c/d.txt", "e.txt")] == ["a.txt", "c/d.txt", "e.txt"]
    assert titles(["../../x/y.txt"])("../../x/y.txt") == "y.txt"
    assert titles(["/a/b.txt"])("(prompt)") == "(prompt)"
    library = Library()
    library._entries["a"] = None  # type: ignore[assignment]
    with pytest.raises(ValueError, match="two memories are named 'a': name one of them otherwise, as in OTHER=a"):
        library.add("a", None, None)
