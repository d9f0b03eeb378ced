"""The OpenAI interface: models, conversations and completions."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from fot.sampling import Scored
from fot.serve import wire
from fot.serve.answering import Chat, Reply, complete, score_prompt
from fot.serve.errors import ApiError
from fot.serve.library import Entry
from fot.serve.line import Stopped
from fot.serve.schema import ChatRequest, Common, CompletionRequest
from fot.serve.server import Server, server_of
from fot.serve.stream import Send, answer, events

router = APIRouter()

COMPLETION_TOKENS = 16  # where a request for a completion does not say, as OpenAI has it


@router.get("/v1/models")
async def list_models(request: Request) -> dict[str, Any]:
    """All memories, and the bare models."""
    return {"object": "list", "data": [wire.model_card(entry) for entry in server_of(request).library.entries()]}


@router.get("/v1/models/{name:path}")
async def get_model(request: Request, name: str) -> dict[str, Any]:
    """One of them."""
    return wire.model_card(_entry(server_of(request), name))


@router.post("/v1/chat/completions")
async def chat_completions(request: Request, asked: ChatRequest) -> Response:
    """The next turn of a conversation with a memory."""
    asked.check_rest()
    server = server_of(request)
    entry, turns = _entry(server, asked.model), asked.turns()
    if asked.top_logprobs is not None and not asked.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs", param="top_logprobs")
    logprobs = bool(asked.logprobs)
    chat = Chat(
        entry,
        server.conversations,
        turns,
        max_tokens=asked.max_completion_tokens or asked.max_tokens or server.settings.max_tokens,
        stops=asked.stops,
        samplings=[asked.sampling(choice) for choice in range(asked.choices)],
        top_logprobs=(asked.top_logprobs or 0) if logprobs else None,
    )
    answer_id = wire.new_id("chatcmpl")
    if not asked.stream:
        replies = await answer(request, chat)
        choices = [wire.chat_choice(entry, number, reply, logprobs) for number, reply in enumerate(replies)]
        whole = wire.envelope(answer_id, "chat.completion", entry, choices) | {
            "usage": wire.usage(replies, asked.choices)
        }
        return JSONResponse(whole)

    def piece(choices: list[dict[str, Any]]) -> dict[str, Any]:
        return wire.envelope(answer_id, "chat.completion.chunk", entry, choices)

    def work(send: Send) -> Chat:
        for choice in range(asked.choices):
            send(piece([wire.chat_delta(choice, {"role": "assistant", "content": ""}, None)]))

        def on_text(number: int, text: str, scored: list[Scored]) -> None:
            known = wire.chat_logprobs(entry, scored) if logprobs else None
            send(piece([wire.chat_delta(number, {"content": text}, None, known)]))

        return replace(chat, on_text=on_text)

    def last(replies: list[Reply]) -> Iterator[dict[str, Any]]:
        for number, reply in enumerate(replies):
            cited = wire.annotations(entry, reply.passages)
            yield piece([wire.chat_delta(number, {"annotations": cited} if cited else {}, reply.finish)])
        yield from _usage_piece(asked, piece([]), replies)

    return await events(request, work, last)


@router.post("/v1/completions")
async def completions(request: Request, asked: CompletionRequest) -> Response:
    """Texts that go on from prompts, with a memory."""
    asked.check_rest()
    server = server_of(request)
    entry, prompts, answer_id = _entry(server, asked.model), asked.prompts(), wire.new_id("cmpl")
    if asked.stream and asked.echo:
        raise ApiError(400, "echo is not supported in a stream: leave one of them out", param="echo")
    if not prompts:
        raise ApiError(400, "the prompt is empty", param="prompt")
    jobs = [(prompt, choice) for prompt in prompts for choice in range(asked.choices)]
    send_nothing: Send = lambda item: None  # noqa: E731

    def piece(choices: list[dict[str, Any]]) -> dict[str, Any]:
        return wire.envelope(answer_id, "text_completion", entry, choices)

    def work(send: Send, stopped: Stopped) -> list[Reply]:
        replies = []
        written = [0] * len(jobs)  # characters of each text so far
        for number, (prompt, choice) in enumerate(jobs):

            def on_text(text: str, scored: list[Scored], number: int = number) -> None:
                known = None
                if asked.logprobs is not None:
                    known = wire.completion_logprobs(entry, scored, written[number])
                    written[number] += sum(map(len, known["tokens"]))
                send(piece([wire.completion_choice(number, text, None, known)]))

            replies.append(
                complete(
                    entry,
                    prompt,
                    max_tokens=COMPLETION_TOKENS if asked.max_tokens is None else asked.max_tokens,
                    stops=asked.stops,
                    sampling=asked.sampling(choice),
                    top_logprobs=asked.logprobs,
                    on_text=on_text,
                    stopped=stopped,
                )
            )
        return replies

    if asked.stream:

        def last(replies: list[Reply]) -> Iterator[dict[str, Any]]:
            for number, reply in enumerate(replies):
                yield piece([wire.completion_choice(number, "", reply.finish)])
            yield from _usage_piece(asked, piece([]), replies)

        return await events(request, lambda send: partial(work, send), last)

    def whole(stopped: Stopped) -> tuple[list[Reply], list[dict[str, Any]]]:
        replies = work(send_nothing, stopped)
        pairs = enumerate(zip(jobs, replies, strict=True))
        return replies, [_choice(entry, asked, number, prompt, reply) for number, ((prompt, _), reply) in pairs]

    replies, choices = await answer(request, whole)
    return JSONResponse(piece(choices) | {"usage": wire.usage(replies, asked.choices)})


def _choice(
    entry: Entry, asked: CompletionRequest, number: int, prompt: str | list[int], reply: Reply
) -> dict[str, Any]:
    """A whole completion, with the prompt in front of it if that is asked for."""
    text = prompt if isinstance(prompt, str) else entry.model.tokenizer.decode(prompt)
    before = text if asked.echo else ""
    logprobs = None
    if asked.logprobs is not None:
        scored = score_prompt(entry, prompt, asked.logprobs) if asked.echo else []
        logprobs = wire.completion_logprobs(entry, [*scored, *reply.scored])
    return wire.completion_choice(number, before + reply.text, reply.finish, logprobs)


def _usage_piece(asked: Common, piece: dict[str, Any], replies: list[Reply]) -> Iterator[dict[str, Any]]:
    """The last piece of a stream, if the client asked for counts."""
    if asked.stream_options is not None and asked.stream_options.include_usage:
        yield piece | {"usage": wire.usage(replies, asked.choices)}


def _entry(server: Server, name: str) -> Entry:
    try:
        return server.library[name]
    except KeyError as error:
        raise ApiError(404, str(error.args[0]), param="model", code="model_not_found") from error
