"""The MCP server: assistants ask memories, and find passages in them."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import quote

from mcp.server.mcpserver import MCPServer
from mcp.server.mcpserver.exceptions import ToolError

from fot import __version__
from fot.serve.answering import Chat, Conversations
from fot.serve.library import Entry, Library
from fot.serve.wire import cited

MOST_PASSAGES = 20
MOST_TOKENS = 2048

INSTRUCTIONS = (
    "Each memory holds documents that a language model has read. 'ask' answers a question from them, and names the "
    "passages that the answer was read from. 'passages' finds passages without an answer: prefer it where you want to "
    "read for yourself. The answering model is small: check its answers against the passages."
)


def create_server(library: Library) -> MCPServer:
    """A server of what is in the library.

    Tools ``ask`` and ``passages``; each memory is a resource, ``memory://NAME``, that lists its documents.
    """
    names = [entry.name for entry in library.entries() if entry.memory is not None]
    server, turn = MCPServer("fot", instructions=INSTRUCTIONS, version=__version__), threading.Lock()

    def chosen(memory: str | None) -> Entry:
        name = names[0] if memory is None and len(names) == 1 else memory
        if name not in names:
            raise ToolError(f"choose a memory: there are {', '.join(names) or 'none'}")
        return library[name]

    @contextmanager
    def in_turn() -> Iterator[None]:
        """One question at a time; what is wrong with it is told to the assistant."""
        with turn:
            try:
                yield
            except ValueError as error:
                raise ToolError(str(error)) from error

    @server.tool()
    def ask(question: str, memory: str | None = None, max_tokens: int = 256) -> dict[str, Any]:
        """Answer a question from the documents of a memory.

        Args:
            question: what to find out; shorter than a page.
            memory: which one; may be left out if there is only one.
            max_tokens: most tokens in the answer.
        """
        entry = chosen(memory)
        with in_turn():
            turns, most = [{"role": "user", "content": question}], max(1, min(max_tokens, MOST_TOKENS))
            (reply,) = Chat(entry, Conversations(0), turns, most)(lambda: False)
        return {"memory": entry.name, "answer": reply.text, "passages": [cited(one) for one in reply.passages]}

    @server.tool()
    def passages(question: str, memory: str | None = None, count: int = 5) -> dict[str, Any]:
        """Find the passages of a memory that a question is about; the best come first.

        Args:
            question: what the passages are to be about.
            memory: which one; may be left out if there is only one.
            count: how many, 20 at most.
        """
        entry = chosen(memory)
        with in_turn():
            found = entry.blank.find(question, max(1, min(count, MOST_PASSAGES)))
        return {"memory": entry.name, "passages": [cited(one) for one in found]}

    for name in names:
        _add_resource(server, library, name)
    return server


def _add_resource(server: MCPServer, library: Library, name: str) -> None:
    """The memory's documents, as a resource."""
    entry = library[name]
    about = f"{entry.tokens:,} tokens in {len(entry.documents()):,} documents"

    @server.resource(f"memory://{quote(name)}", name=name, description=about, mime_type="application/json")
    def documents() -> dict[str, Any]:
        entry = library[name]
        return {"memory": entry.name, "tokens": entry.tokens, "documents": entry.documents()}
