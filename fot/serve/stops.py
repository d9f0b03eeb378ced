"""The text of an answer as it comes, up to a stop string."""

from collections.abc import Callable, Sequence


class StopText:
    """Takes text in pieces and hands it on, without what may still turn out to be a stop string.

    Args:
        stops: the answer ends before the first of these.
        on_text: called with text that is sure.
        strip: leave out white space at the start and at the end of the whole.

    Attributes:
        text: what was handed on.
        stopped: whether a stop string came.
    """

    def __init__(self, stops: Sequence[str], on_text: Callable[[str], None], *, strip: bool = False) -> None:
        self._stops = [stop for stop in stops if stop]
        self._on_text = on_text
        self._strip = strip
        self._held = ""
        self.text = ""
        self.stopped = False

    def feed(self, piece: str) -> None:
        """One more piece."""
        if self.stopped:
            return
        self._held += piece
        found = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            self._held = self._held[: min(found)]
            self.finish()
        else:
            self._hand_on(len(self._held) - self._doubtful())

    def finish(self) -> None:
        """No more comes: what is held is sure."""
        if self._strip:
            self._held = self._held.rstrip()
        self._hand_on(len(self._held))

    def _hand_on(self, length: int) -> None:
        sure, self._held = self._held[:length], self._held[length:]
        if self._strip and not self.text:
            sure = sure.lstrip()
        if self._strip:  # white space at the end waits for what follows
            kept = sure.rstrip()
            sure, self._held = kept, sure[len(kept) :] + self._held
        if sure:
            self.text += sure
            self._on_text(sure)

    def _doubtful(self) -> int:
        """How many characters at the end may begin a stop string."""
        return max(
            (size for stop in self._stops for size in range(1, len(stop)) if self._held.endswith(stop[:size])),
            default=0,
        )
