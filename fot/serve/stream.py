"""Work in the thread of the model as events for a client, who may leave at any time."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import StreamingResponse
from fastapi.sse import format_sse_event

from fot.serve.errors import ApiError
from fot.serve.line import Stopped
from fot.serve.server import Server, server_of, told

T = TypeVar("T")

LOOK = 0.2  # seconds between looks at whether the client is still there
PING = 10.0  # seconds without an event after which the client is told that all is well

Send = Callable[[Any], None]
DONE = "[DONE]"


async def answer(request: Request, work: Callable[[Stopped], T]) -> T:
    """What some work gives, done when its turn comes; given up when the client leaves.

    Raises:
        ApiError: the line is full, or the work failed.
    """
    server = server_of(request)
    task = asyncio.ensure_future(server.line.run(work))
    try:
        while not task.done():
            await asyncio.wait({task}, timeout=LOOK)
            if not task.done() and await request.is_disconnected():
                raise ApiError(499, "the client has left")  # nobody reads it
    finally:
        if not task.done():
            task.cancel()
    try:
        return task.result()
    except Exception as error:
        raise told(error, server.settings) from error


async def events(
    request: Request,
    work: Callable[[Send], Callable[[Stopped], T]],
    last: Callable[[T], Iterator[Any]],
    end: str | None = DONE,
    done: Callable[[], None] = lambda: None,
) -> StreamingResponse:
    """Events that some work sends, and those that come of its result, as the client gets them.

    A full line is told as an error with its own status: the answer begins when there is a place.

    Args:
        request: of the client.
        work: gives, for a function that sends an object, what is done with one that says whether to stop.
        last: the objects to send at the end.
        end: the last event's data.
        done: called once the work has ended, or will not begin: the line is full, or the client left while it waited.
    """
    server = server_of(request)
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[Any] = asyncio.Queue()

    def send(item: Any) -> None:
        loop.call_soon_threadsafe(queue.put_nowait, item)

    task = asyncio.ensure_future(server.line.run(work(send)))
    task.add_done_callback(lambda _: done())
    await asyncio.sleep(0)  # into the line, or not
    if task.done():
        task.result()
    return StreamingResponse(
        _events(request, server, task, queue, last, end),
        media_type="text/event-stream",
        headers={"X-Accel-Buffering": "no"},
    )


async def _events(
    request: Request,
    server: Server,
    task: "asyncio.Task[T]",
    queue: "asyncio.Queue[Any]",
    last: Callable[[T], Iterator[Any]],
    end: str | None,
) -> AsyncIterator[bytes]:
    quiet = 0.0
    try:
        while not (task.done() and queue.empty()):
            try:
                item = await asyncio.wait_for(queue.get(), LOOK)
            except asyncio.TimeoutError:
                quiet += LOOK
                if await request.is_disconnected():
                    return
                if quiet >= PING:
                    quiet = 0.0
                    yield format_sse_event(comment="ping")
                continue
            quiet = 0.0
            yield _event(item)
        try:
            for item in last(task.result()):
                yield _event(item)
        except Exception as error:
            yield _event(told(error, server.settings).body())
        if end is not None:
            yield format_sse_event(data_str=end)
    finally:
        if not task.done():
            task.cancel()


def _event(item: Any) -> bytes:
    return format_sse_event(data_str=json.dumps(item, ensure_ascii=False))
