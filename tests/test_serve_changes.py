"""A memory that another process changes while it is served."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from serve_helpers import make_library, make_model, running
from transformers import PreTrainedTokenizerFast

from fot.serve.library import Library
from fot.serve.mcp import create_server
from fot.serve.server import Settings
from memory import Memory

QUESTION = {"role": "user", "content": "Who is the vicar?"}
FOLLOW = {"role": "user", "content": "And where is the ship?"}
NEW = "The new curate of Highbury is Mr Smith, who came by ship.\n" * 12


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerFast) -> Any:
    return make_model(tokenizer)


@pytest.fixture
def library(model: Any, tmp_path: Path) -> Library:
    return make_library(model, tmp_path)


@pytest.fixture
def client(library: Library) -> Iterator[openai.OpenAI]:
    with running(library, Settings(max_tokens=8)) as (address, _):
        yield openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


def change(model: Any, folder: Path) -> int:
    """What ``fot memory sync`` may do: one document goes, another comes. Gives the tokens that it has then."""
    with Memory.open(folder, "a") as memory:
        memory.drop_document("/home/somebody/books/other.txt")
        model.ingest(NEW, memory, source="/home/somebody/books/new.txt")
        memory.flush()
        return len(memory)


def said(client: openai.OpenAI, *messages: Any) -> Any:
    return client.chat.completions.create(model="emma", messages=list(messages), max_tokens=8)


def test_the_next_question_reads_the_memory_as_it_is_now(
    client: openai.OpenAI, model: Any, tmp_path: Path, library: Library
) -> None:
    before = said(client, QUESTION)
    answered = {"role": "assistant", "content": before.choices[0].message.content}
    tokens = change(model, tmp_path / "emma.memory")
    assert client.models.retrieve("emma").tokens == tokens
    assert next(card.tokens for card in client.models.list() if card.id == "emma") == tokens
    after = said(client, QUESTION, answered, FOLLOW)
    assert after.usage.prompt_tokens_details.cached_tokens == tokens  # nothing of what was read with the old memory
    titles = {citation.url_citation.title for citation in after.choices[0].message.annotations}
    assert titles <= {"emma.txt", "new.txt"}
    assert "new.txt" in titles
    fresh = library["emma"].blank.anew()
    fresh.go_back_to([QUESTION, answered])
    assert after.choices[0].message.content == fresh.say(FOLLOW["content"], max_new_tokens=8).text
    again = said(client, QUESTION, answered, FOLLOW, {"role": "assistant", "content": "It sank."}, QUESTION)
    assert again.usage.prompt_tokens_details.cached_tokens >= tokens
    prompt = client.completions.create(model="emma", prompt="The vicar", max_tokens=1)
    assert prompt.usage.prompt_tokens_details.cached_tokens == tokens


def test_a_memory_that_has_not_changed_is_not_opened_again(client: openai.OpenAI, library: Library) -> None:
    entry = library["emma"]
    said(client, QUESTION)
    assert library["emma"] is entry


def test_what_cannot_be_served_leaves_what_was(
    client: openai.OpenAI, tokenizer: Any, tmp_path: Path, library: Library, caplog: pytest.LogCaptureFixture
) -> None:
    """A memory of other weights in its place, then none at all."""
    entry = library["emma"]
    other = make_model(tokenizer, seed=1)
    made = other.new_memory()
    other.ingest("another text", made, source="x.txt")
    with caplog.at_level(logging.WARNING):
        made.save(tmp_path / "emma.memory")
        assert said(client, QUESTION).choices[0].message.content is not None
        (tmp_path / "emma.memory" / "manifest.json").unlink()
        assert said(client, QUESTION).choices[0].message.content is not None
        said(client, QUESTION)
    assert library["emma"] is entry
    warnings = [record.message for record in caplog.records if "served as it was before" in record.message]
    assert len(warnings) == 2  # once for each change, not at every question


def test_assistants_get_it_too(model: Any, tmp_path: Path, library: Library) -> None:
    import asyncio
    import json

    from mcp import Client

    async def read() -> dict[str, int]:
        async with Client(create_server(library)) as client:
            change(model, tmp_path / "emma.memory")
            found = await client.read_resource("memory://emma")
            asked = await client.call_tool("passages", {"question": "Who is the curate?", "memory": "emma"})
            assert "new.txt" in str(asked)
            return dict(json.loads(found.contents[0].text)["documents"])

    assert set(asyncio.run(read())) == {"emma.txt", "new.txt"}
