"""Who takes note of what a model attends to: known in the thread that asked for it, and nowhere else."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fot.trace import Recorder

# (model, recorder), the latest last. A new thread starts with none.
_RECORDINGS: "ContextVar[tuple[tuple[Any, Recorder], ...]]" = ContextVar("recordings", default=())


def recorder_of(model: Any) -> "Recorder | None":
    """The recorder of this model in this thread; None for nobody."""
    return next((recorder for recorded, recorder in reversed(_RECORDINGS.get()) if recorded is model), None)


@contextmanager
def recording(model: Any, recorder: "Recorder") -> Iterator[None]:
    """Within, and in this thread, the recorder takes note of what the model attends to."""
    token = _RECORDINGS.set((*_RECORDINGS.get(), (model, recorder)))
    try:
        yield
    finally:
        _RECORDINGS.reset(token)
