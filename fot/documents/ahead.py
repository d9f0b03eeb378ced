"""Work that is done in a thread before it is asked for."""

from collections.abc import Iterable, Iterator
from queue import Empty, Full, Queue
from threading import Event, Thread
from typing import TypeVar

T = TypeVar("T")

_END = object()
_WAIT = 0.1  # seconds between looks at whether anybody still wants more


class _Failed:
    def __init__(self, error: BaseException) -> None:
        self.error = error


def ahead(items: Iterable[T], count: int) -> Iterator[T]:
    """The same items, up to ``count`` of them made in a thread while the one before is used.

    What they raise is raised here. When this iterator is left, the thread ends after the item that it is making.
    """
    queue: Queue[object] = Queue(count)
    left = Event()

    def put(item: object) -> bool:
        while not left.is_set():
            try:
                queue.put(item, timeout=_WAIT)
            except Full:
                continue
            return True
        return False

    def work() -> None:
        try:
            for item in items:
                if not put(item):
                    return
            put(_END)
        except BaseException as error:
            put(_Failed(error))

    Thread(target=work, daemon=True, name="ahead").start()
    try:
        while True:
            try:
                got = queue.get(timeout=_WAIT)  # with a limit, so that Ctrl-C comes through everywhere
            except Empty:
                continue
            if got is _END:
                return
            if isinstance(got, _Failed):
                raise got.error
            yield got  # type: ignore[misc]  # an item
    finally:
        left.set()
