"""Short answers, and the plain model for a while."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fot.greedy import one_greedy_answer
from fot.model import attach_memory, detach_memory


def greedy_answer(model: Any, ids: Sequence[int], length: int, **options: Any) -> str:
    """What the model writes after a prompt, always the likeliest token: at most ``length`` tokens, as text.

    Args:
        model: with ``tokenizer``.
        ids: the prompt.
        length: most tokens of the answer.
        options: for ``generate``, such as ``memory``.
    """
    prompt = torch.tensor([list(ids)], device=model.device)
    output: Tensor = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=length,
        **(one_greedy_answer(model) | options),
    )
    return model.tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)


@contextmanager
def without_memory(model: Any) -> Iterator[Any]:
    """The plain model, with its tokenizer. It has its memory layers again after the block."""
    settings, tokenizer = model.memory_config, model.tokenizer
    plain: Any = detach_memory(model)
    plain.tokenizer = tokenizer
    try:
        yield plain
    finally:
        attach_memory(plain, settings)
        plain.tokenizer = tokenizer
