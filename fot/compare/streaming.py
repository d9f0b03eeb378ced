"""StreamingLLM as a library: text without end at constant memory.

    model = AutoModelForCausalLM.from_pretrained(...)
    with attention_sinks(model, attention_sink_size=4, attention_sink_window_size=1020):
        for token in stream(model, prompt_ids):
            ...

Within the block, ``generate`` of transformers does the same if it is handed ``sink_cache(model, 4, 1020)``.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from fot.compare.patterns import Streaming
from fot.compare.readers import CachedReader, written
from fot.compare.sinks import SinkCache
from fot.compare.turned import turned_by


@contextmanager
def attention_sinks(model: Any, attention_sink_size: int = 4, attention_sink_window_size: int = 1020) -> Iterator[Any]:
    """Within, a plain model sees a text's first tokens and its last ones, and no others.

    Args:
        model: of transformers; one with memory after ``fot.detach_memory``.
        attention_sink_size: first tokens; 0 for a sliding window.
        attention_sink_window_size: last tokens, that which is read among them.

    Raises:
        ValueError: sizes that cannot be, or more tokens than the model has positions for.
    """
    check_sizes(model, attention_sink_size, attention_sink_window_size)
    pattern = Streaming(attention_sink_size, attention_sink_window_size)
    with turned_by(model, pattern):
        yield model


def check_sizes(model: Any, sinks: int, window: int) -> None:
    """Raise ValueError if a cache cannot have so many sinks and so long a window."""
    if sinks < 0 or window < 1:
        raise ValueError(f"attention_sink_size is {sinks} and attention_sink_window_size {window}: at least 0 and 1")
    most = model.config.max_position_embeddings
    if sinks + window > most:
        raise ValueError(f"{sinks} sinks and a window of {window} tokens are more than the {most} positions of the "
                         "model: lower attention_sink_window_size")  # fmt: skip


def sink_cache(model: Any, attention_sink_size: int = 4, attention_sink_window_size: int = 1020) -> SinkCache:
    """An empty cache for a model within ``attention_sinks`` of the same sizes."""
    return SinkCache(model.config.num_hidden_layers, attention_sink_size, attention_sink_window_size)


@torch.no_grad()
def stream(
    model: Any,
    ids: Sequence[int],
    attention_sink_size: int = 4,
    attention_sink_window_size: int = 1020,
    generator: torch.Generator | None = None,
) -> Iterator[int]:
    """Tokens after a prompt, without end: within ``attention_sinks`` of the same sizes.

    Args:
        model: see there.
        ids: the prompt, at least one token.
        attention_sink_size: see there.
        attention_sink_window_size: see there.
        generator: draws each token by its probability; None for always the likeliest.
    """
    cache = sink_cache(model, attention_sink_size, attention_sink_window_size)
    reader = CachedReader(model, lambda: cache)
    yield from written(reader, reader.read(ids[:-1], lambda tokens: None), ids[-1:], generator)
