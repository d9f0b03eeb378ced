"""``fot mcp``, by the client of the same package."""

import asyncio
import json
import os
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import forks
import pytest
from conftest import ModelMaker
from mcp import Client, StdioServerParameters, stdio_client
from serve_helpers import make_library, make_model
from transformers import PreTrainedTokenizerFast

from fot.cli import main
from fot.serve.library import Library
from fot.serve.mcp import create_server


@pytest.fixture(scope="module")
def library(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Library:
    return make_library(make_model(tokenizer), tmp_path_factory.mktemp("memories"))


def with_client(server: Any, use: Callable[[Client], Awaitable[Any]]) -> Any:
    async def run() -> Any:
        async with Client(server) as client:
            return await use(client)

    return asyncio.run(run())


def content(result: Any) -> dict[str, Any]:
    return result.structured_content or json.loads(result.content[0].text)


def test_tools_and_resources(library: Library) -> None:
    entry = library["emma"]

    async def use(client: Client) -> None:
        assert {tool.name for tool in (await client.list_tools()).tools} == {"ask", "passages"}
        listed = {str(one.uri): one for one in (await client.list_resources()).resources}
        assert set(listed) == {"memory://emma", "memory://empty"}
        assert f"{entry.tokens:,} tokens in 2 documents" in listed["memory://emma"].description
        read = json.loads((await client.read_resource("memory://emma")).contents[0].text)
        assert set(read["documents"]) == {"emma.txt", "other.txt"}
        assert sum(read["documents"].values()) == entry.tokens
        found = content(
            await client.call_tool("passages", {"question": "Who is the vicar?", "memory": "emma", "count": 2})
        )
        wanted = [(passage.document, passage.text) for passage in entry.blank.find("Who is the vicar?", 2)]
        assert [(one["document"], one["text"]) for one in found["passages"]] == wanted
        assert wanted[0][0] in ("emma.txt", "other.txt")
        asked = content(await client.call_tool("ask", {"question": "Who is it?", "memory": "emma", "max_tokens": 5}))
        said = entry.blank.anew().say("Who is it?", max_new_tokens=5)
        assert asked["answer"] == said.text
        assert [one["text"] for one in asked["passages"]] == [passage.text for passage in said.passages]
        wrong = await client.call_tool("ask", {"question": "Who?"})
        assert wrong.is_error
        assert "choose a memory: there are emma, empty" in wrong.content[0].text
        wrong = await client.call_tool("ask", {"question": "word " * 300, "memory": "emma"})
        assert "tokens, but the window has 256" in wrong.content[0].text
        assert "/home/somebody" not in json.dumps([asked, found, read])

    with_client(create_server(library), use)


# ``python -m fot``, with two named pipes as its input and output.
PIPED = """
import os, runpy, sys
for number, how in ((0, os.O_RDONLY), (1, os.O_WRONLY)):
    os.dup2(os.open(sys.argv.pop(1), how), number)
runpy.run_module("fot", run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize("anew", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["copied", "anew"])
def test_the_command_speaks_over_pipes(
    anew: bool, make_plain: ModelMaker, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """What is printed elsewhere must not get between."""
    make_plain().save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    (tmp_path / "a.txt").write_text("Tea is at five.\n" * 30)
    options = ["--mem-layers", "1,3", "--local-context", "64", "--dtype", "float32", "--device", "cpu"]
    build = ["memory", "build", str(tmp_path / "a.memory"), str(tmp_path / "a.txt"), "--model", str(tmp_path / "tiny")]
    assert main([*build, *options]) == 0
    words = ["mcp", str(tmp_path / "a.memory"), "--dtype", "float32"]
    root = str(Path(__file__).parent.parent)
    if anew:
        command = StdioServerParameters(
            command=sys.executable,
            args=["-m", "fot", *words],
            env=dict(os.environ) | {"PYTHONPATH": root},
            cwd=str(tmp_path),
        )
    else:
        pipes = [tmp_path / name for name in ("in", "out")]
        for pipe in pipes:
            os.mkfifo(pipe)
        process = forks.Fork("-c", PIPED, *pipes, *words, cwd=tmp_path)
        command = StdioServerParameters(command="sh", args=["-c", "cat out & exec cat > in"], cwd=str(tmp_path))

    async def use(client: Client) -> None:
        found = content(await client.call_tool("passages", {"question": "When is tea?"}))
        assert "Tea is at five." in found["passages"][0]["text"]

    with_client(stdio_client(command), use)
    if not anew:
        assert process.wait(60) == 0, process.stderr
