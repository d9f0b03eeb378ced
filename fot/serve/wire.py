"""Answers in the words of the OpenAI interface."""

import time
import uuid
from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

from fot.sampling import Scored
from fot.serve.answering import Reply
from fot.serve.library import Entry
from fot.trace import Passage


def new_id(kind: str) -> str:
    """A name for an answer."""
    return f"{kind}-{uuid.uuid4().hex}"


def model_card(entry: Entry) -> dict[str, Any]:
    """An entry as clients list it."""
    return {
        "id": entry.name,
        "object": "model",
        "created": entry.created,
        "owned_by": "fot",
        "tokens": entry.tokens,
        "documents": len(entry.documents()),
        "has_memory": entry.memory is not None,
    }


def usage(replies: Sequence[Reply], choices: int) -> dict[str, Any]:
    """Tokens of all answers, so many to each prompt, which counts once. Tokens of the memory count as cached."""
    firsts = replies[::choices]
    prompt, cached = sum(one.prompt_tokens for one in firsts), sum(one.cached_tokens for one in firsts)
    answer = sum(reply.answer_tokens for reply in replies)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": answer,
        "total_tokens": prompt + answer,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def annotations(entry: Entry, passages: Sequence[Passage]) -> list[dict[str, Any]]:
    """Passages as citations; what is ours stands under ``passage``."""
    found = []
    for passage in passages:
        place = f"#char={passage.span[0]},{passage.span[1]}" if passage.span else ""  # RFC 5147
        citation = {
            "start_index": 0,
            "end_index": 0,
            "title": passage.document,
            "url": f"fot://{quote(entry.name)}/{quote(passage.document)}{place}",
        }
        ours = {
            "document": passage.document,
            "text": passage.text,
            "share": round(passage.share, 4),
            "span": passage.span,
            "marked": passage.marked,
        }
        found.append({"type": "url_citation", "url_citation": citation, "passage": ours})
    return found


def cited(passage: Passage) -> dict[str, Any]:
    """A passage for programs that know no citations."""
    return {"document": passage.document, "text": passage.text, "characters": passage.span}


def envelope(answer_id: str, kind: str, entry: Entry, choices: list[dict[str, Any]]) -> dict[str, Any]:
    """What is around every answer and every piece of one."""
    return {
        "id": answer_id,
        "object": kind,
        "created": int(time.time()),
        "model": entry.name,
        "system_fingerprint": None if entry.memory is None else entry.memory.fingerprint or None,
        "choices": choices,
    }


def chat_choice(entry: Entry, number: int, reply: Reply, with_logprobs: bool) -> dict[str, Any]:
    """One whole answer of a conversation."""
    message = {
        "role": "assistant",
        "content": reply.text,
        "refusal": None,
        "annotations": annotations(entry, reply.passages),
    }
    logprobs = chat_logprobs(entry, reply.scored) if with_logprobs else None
    return {"index": number, "message": message, "logprobs": logprobs, "finish_reason": reply.finish}


def chat_delta(number: int, delta: dict[str, Any], finish: str | None, logprobs: Any = None) -> dict[str, Any]:
    """A piece of an answer of a conversation."""
    return {"index": number, "delta": delta, "logprobs": logprobs, "finish_reason": finish}


def chat_logprobs(entry: Entry, scored: Sequence[Scored]) -> dict[str, Any]:
    """Probabilities of tokens, as conversations give them."""

    def one(token: int, logprob: float) -> dict[str, Any]:
        text = _text(entry, token)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    content = [
        one(each.token, each.logprob) | {"top_logprobs": [one(token, logprob) for token, logprob in each.top]}
        for each in scored
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(entry: Entry, scored: Sequence[Scored | int], offset: int = 0) -> dict[str, Any]:
    """Probabilities of tokens, as completions give them; ``offset`` is where in the text the first one begins."""
    tokens, logprobs, tops, offsets = [], [], [], []
    for each in scored:
        text = _text(entry, each if isinstance(each, int) else each.token)
        tokens.append(text)
        logprobs.append(None if isinstance(each, int) else each.logprob)
        # Several tokens may have one text, such as halves of characters: the likeliest of them counts.
        top = None if isinstance(each, int) else {_text(entry, token): value for token, value in reversed(each.top)}
        tops.append(top)
        offsets.append(offset)
        offset += len(text)
    return {"tokens": tokens, "token_logprobs": logprobs, "top_logprobs": tops, "text_offset": offsets}


def completion_choice(number: int, text: str, finish: str | None, logprobs: Any = None) -> dict[str, Any]:
    """One answer to a prompt, or a piece of one."""
    return {"index": number, "text": text, "logprobs": logprobs, "finish_reason": finish}


def _text(entry: Entry, token: int) -> str:
    return str(entry.model.tokenizer.decode([token], clean_up_tokenization_spaces=False))
