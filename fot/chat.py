"""Conversations as a tokenizer's chat template writes them."""

import re
from collections.abc import Sequence
from itertools import takewhile
from typing import Any

from jinja2.exceptions import TemplateError

Message = dict[str, str]

# How a question is put to a model that has no chat template.
PLAIN_TURN = "\nQuestion: {question}\nAnswer:"
PLAIN_STOP = "\n"


def has_template(tokenizer: Any) -> bool:
    """Whether the tokenizer has a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def prompt_ids(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """Ids of a conversation up to where the model is to answer."""
    return list(
        tokenizer.apply_chat_template(list(messages), tokenize=True, add_generation_prompt=True, return_dict=False)
    )


def first_turn_ids(tokenizer: Any, content: str, templated: bool) -> list[int]:
    """Ids of a conversation that begins with this turn of the user, in the chat template or without one."""
    if templated:
        return prompt_ids(tokenizer, [{"role": "user", "content": content}])
    return list(tokenizer(PLAIN_TURN.format(question=content.strip())).input_ids)


def plain_ids(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """Ids of a conversation without a template, as later turns go on from it."""
    ids: list[int] = []
    for message in messages:
        content = message["content"].strip()
        if message["role"] == "user":
            text = PLAIN_TURN.format(question=content)
        else:  # an answer goes on behind "Answer:", and ends its line
            text = f" {content}{PLAIN_STOP}" if message["role"] == "assistant" else f"{content}{PLAIN_STOP}"
        ids += tokenizer(text, add_special_tokens=not ids).input_ids
    return ids


def template_marks(tokenizer: Any) -> list[list[int]]:
    """Ids of what the chat template puts before, between and behind turns; none without a template.

    A default system message is among them: it is no turn of anybody.
    """
    if not has_template(tokenizer):
        return []
    roles, marks = ("system", "user", "assistant", "user"), dict[str, None]()
    turns = [{"role": role, "content": f"Turn{number}."} for number, role in enumerate(roles)]
    for conversation in (turns[1:], turns):
        try:
            text = str(tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True))
        except TemplateError:  # a template without system messages, or for one question alone
            continue
        marks |= dict.fromkeys(mark for mark in re.split(r"Turn\d\.", text) if mark)
    return [list(tokenizer(mark, add_special_tokens=False).input_ids) for mark in marks]


def are_marks(ids: Sequence[int], marks: Sequence[Sequence[int]]) -> list[bool]:
    """Which of these ids belong to marks of a template. One that the end of the ids cuts off counts, too."""
    found = [False] * len(ids)
    for mark in marks:
        for start in range(len(ids)):
            stop = min(len(ids), start + len(mark))
            if list(ids[start:stop]) == list(mark[: stop - start]):
                found[start:stop] = [True] * (stop - start)
    return found


def question_text(tokenizer: Any, question: str) -> str:
    """One question in the chat template, up to where the model is to answer."""
    message = {"role": "user", "content": question}
    return str(tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True))


def lasting(tokenizer: Any, messages: Sequence[Message], ids: Sequence[int]) -> int:
    """How many of ``ids``, the prompt of a conversation, will begin every later prompt of it.

    Not all where the prompt opens what earlier turns do not keep, such as an answer's reasoning.
    """
    answered = [*messages, {"role": "assistant", "content": "x"}]
    try:
        later = tokenizer.apply_chat_template(answered, tokenize=True, return_dict=False)
    except TemplateError:  # a template for one question alone
        return len(ids)
    same = (one == other for one, other in zip(ids, later, strict=False))
    return sum(takewhile(bool, same))


def starts_with(ids: Sequence[int], beginning: Sequence[int]) -> bool:
    """Whether ``ids`` begin with ``beginning`` and go on."""
    return len(beginning) < len(ids) and list(ids[: len(beginning)]) == list(beginning)
