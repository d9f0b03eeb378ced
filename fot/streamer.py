"""The text of an answer while it is generated."""

import time
from collections.abc import Callable
from typing import Any

from transformers import TextStreamer

from fot.sampling import Scorer

OnText = Callable[[str], None]


class Streamer(TextStreamer):
    """Hands on text as it becomes final, and notes when the first token came."""

    def __init__(
        self, tokenizer: Any, on_text: OnText | None, on_first_token: Callable[[], None], scorer: Scorer | None
    ) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._on_text = on_text
        self._on_first_token = on_first_token
        self._prompt_seen = False
        self.scorer = scorer
        self.first_token: float | None = None

    def put(self, value: Any) -> None:
        if self._prompt_seen and self.first_token is None:
            self.first_token = time.perf_counter()
            self._on_first_token()
        if self._prompt_seen and self.scorer is not None:
            self.scorer.chosen(int(value))
        self._prompt_seen = True
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if self._on_text is not None and text:
            self._on_text(text)
