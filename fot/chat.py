"""Conversations as a tokenizer's chat template writes them."""

from collections.abc import Sequence
from typing import Any

Message = dict[str, str]


def has_template(tokenizer: Any) -> bool:
    """Whether the tokenizer has a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def prompt_ids(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """Ids of a conversation up to where the model is to answer."""
    return list(
        tokenizer.apply_chat_template(list(messages), tokenize=True, add_generation_prompt=True, return_dict=False)
    )


def starts_with(ids: Sequence[int], beginning: Sequence[int]) -> bool:
    """Whether ``ids`` begin with ``beginning`` and go on."""
    return len(beginning) < len(ids) and list(ids[: len(beginning)]) == list(beginning)
