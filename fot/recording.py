"""Who takes note of what a model attends to: known in the thread that asked for it, and nowhere else."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

from torch import Tensor


class Recorder(Protocol):
    """What attention and caches tell: see ``fot.trace.Recorder``."""

    def follow(self, cache: Any) -> None:
        """Called before each ``forward`` with its cache."""

    def note(self, layer: int, queries: Tensor, lses: list[Tensor], local: Any, scale: float) -> None:
        """Called by the attention of each memory layer; without ``lses`` in the one that a window ends at."""

    def settle(self) -> None:
        """Called before a memory grows."""


# (model, recorder), the latest last. A new thread starts with none.
_RECORDINGS: ContextVar[tuple[tuple[Any, Recorder], ...]] = ContextVar("recordings", default=())


def recorder_of(model: Any) -> Recorder | None:
    """The recorder of this model in this thread; None for nobody."""
    return next((recorder for recorded, recorder in reversed(_RECORDINGS.get()) if recorded is model), None)


@contextmanager
def recording(model: Any, recorder: Recorder) -> Iterator[None]:
    """Within, and in this thread, the recorder takes note of what the model attends to."""
    token = _RECORDINGS.set((*_RECORDINGS.get(), (model, recorder)))
    try:
        yield
    finally:
        _RECORDINGS.reset(token)
