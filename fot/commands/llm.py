"""A plugin of the program ``llm`` (https://llm.datasette.io): each memory in the user's folder is a model.

    llm -m fot/emma "Who is the vicar of Highbury?"

``llm`` imports this whenever it starts, so what loads torch is imported when a question comes.
"""

import argparse
import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import llm
from pydantic import Field

from fot.commands.options import add_memory_options, open_memory
from fot.memories import kept_memories

if TYPE_CHECKING:
    from fot.chat import Message
    from fot.serve.answering import Conversations, Reply
    from fot.serve.library import Entry

T = TypeVar("T")


@llm.hookimpl
def register_models(register: Callable[[llm.Model], None]) -> None:
    """Each memory is a model."""
    for name, folder in kept_memories().items():
        register(MemoryModel(name, folder))


class MemoryModel(llm.Model):
    """A memory with the model that made it.

    Args:
        name: of the memory.
        folder: in which it is.
    """

    can_stream = True

    class Options(llm.Options):
        max_tokens: int = Field(512, ge=1, le=8192, description="Most tokens in the answer")
        temperature: float = Field(0.0, ge=0, le=2, description="0 takes the likeliest token each time")
        top_p: float = Field(1.0, gt=0, le=1, description="Draw from the likeliest tokens of this probability")
        seed: int | None = Field(None, ge=-(2**63), lt=2**63, description="Of the draws")

    def __init__(self, name: str, folder: Path) -> None:
        self.model_id = f"fot/{name}"
        self._name, self._folder = name, folder

    def __str__(self) -> str:
        return f"fot memory: {self.model_id}"

    def execute(
        self, prompt: Any, stream: bool, response: llm.Response, conversation: llm.Conversation | None
    ) -> Iterator[str]:
        """Pieces of the answer. The passages go into the response's JSON, which ``llm logs --json`` shows."""
        from fot.sampling import Sampling
        from fot.serve.answering import Chat
        from fot.serve.wire import cited

        turns, options = turns_of(prompt.messages), prompt.options
        entry, conversations = self._opened
        sampling = Sampling(options.temperature, options.top_p, options.seed)

        def work(on_text: Callable[[str], None], stopped: Callable[[], bool]) -> "Reply":
            (reply,) = Chat(
                entry,
                conversations,
                turns,
                options.max_tokens,
                samplings=[sampling],
                on_text=lambda number, text, scored: on_text(text),
            )(stopped)
            return reply

        reply = yield from in_pieces(work)
        response.set_usage(
            input=reply.prompt_tokens, output=reply.answer_tokens, details={"cached_tokens": reply.cached_tokens}
        )
        response.response_json = {
            "finish_reason": reply.finish,
            "passages": [cited(passage) for passage in reply.passages],
        }

    @cached_property
    def _opened(self) -> "tuple[Entry, Conversations]":
        """The memory, opened at the first question, and conversations with it, which go on without being read again."""
        from fot.serve.answering import Conversations
        from fot.serve.library import Entry

        parser = argparse.ArgumentParser()
        add_memory_options(parser)
        memory, model = open_memory(argparse.Namespace(**vars(parser.parse_args([])), memory=self._folder, model=None))
        return Entry(self._name, model, memory), Conversations()


def turns_of(messages: Iterable[Any]) -> "list[Message]":
    """Messages of ``llm`` as chat templates take them.

    Raises:
        ValueError: a part that is no text, such as the result of a tool.
    """
    turns: list[Message] = []
    for message in messages:
        texts = [part.text for part in message.parts if part.to_dict()["type"] == "text"]
        if len(texts) < len(message.parts) or message.role not in ("system", "user", "assistant"):
            raise ValueError(f"a message of {message.role} is not text alone, and fot's models read nothing else")
        turns.append({"role": message.role, "content": "\n".join(texts)})
    if not turns or turns[-1]["role"] != "user":
        raise ValueError("there is no question: give one, as in llm -m fot/NAME 'Who is it?'")
    return turns


def in_pieces(
    work: Callable[[Callable[[str], None], Callable[[], bool]], T],
) -> Generator[str, None, T]:
    """Do some work in a thread, and yield the texts that it hands on; returns its result.

    Args:
        work: is given a function that takes a text, and one that says whether to stop, since nobody reads on.
    """
    texts: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    left = threading.Event()
    with ThreadPoolExecutor(1) as thread:
        future = thread.submit(work, texts.put, left.is_set)
        future.add_done_callback(lambda _: texts.put(None))
        try:
            while (text := texts.get()) is not None:
                yield text
        finally:
            left.set()
    return future.result()
