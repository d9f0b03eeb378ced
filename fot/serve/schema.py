"""Requests of the OpenAI interface: what is understood, what is passed over, what is refused by name."""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from fot.chat import Message
from fot.sampling import Sampling
from fot.serve.errors import ApiError

# They change no answer.
PASSED_OVER = {
    *("metadata", "parallel_tool_calls", "prompt_cache_key", "prompt_cache_retention", "safety_identifier"),
    *("service_tier", "store", "user", "verbosity"),
}
# These values ask for nothing.
NOTHING: Mapping[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "functions": ([],),
}
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
MOST_STOPS = 4
MOST_CHOICES = 8
MOST_TOKENS = 8192
MOST_LOGPROBS = 20


class StreamOptions(BaseModel):
    include_usage: bool = False


class Common(BaseModel):
    """What both kinds of requests have."""

    model_config = ConfigDict(extra="allow")

    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1, le=MOST_TOKENS)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    n: int | None = Field(None, ge=1, le=MOST_CHOICES)
    stop: str | list[str] | None = None

    @field_validator("stop")
    @classmethod
    def _few_stops(cls, stop: str | list[str] | None) -> str | list[str] | None:
        if isinstance(stop, list) and len(stop) > MOST_STOPS:
            raise ValueError(f"at most {MOST_STOPS} stop strings")
        return stop

    def check_rest(self) -> None:
        """Raise ApiError, which names it, for a parameter that would change the answer and is not understood."""
        for name, value in (self.model_extra or {}).items():
            if value is None or name in PASSED_OVER or any(value == nothing for nothing in NOTHING.get(name, ())):
                continue
            raise ApiError(400, f"{name} is not supported: leave it out", param=name, code="unsupported_parameter")

    @property
    def stops(self) -> list[str]:
        """The stop strings."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])

    @property
    def choices(self) -> int:
        """Answers wanted."""
        return self.n or 1

    def sampling(self, choice: int) -> Sampling:
        """How the tokens of one of the answers are drawn. Greedily, unless a temperature is asked for."""
        seed = None if self.seed is None else (self.seed + choice) % 2**63
        return Sampling(self.temperature or 0.0, 1.0 if self.top_p is None else self.top_p, seed)


class TextPart(BaseModel):
    model_config = ConfigDict(extra="allow")

    type: str
    text: str | None = None


class ChatMessage(BaseModel):
    model_config = ConfigDict(extra="allow")

    role: str
    content: str | list[TextPart] | None = None

    def turn(self) -> Message:
        """The message as chat templates take it.

        Raises:
            ApiError: another role, or a part that is no text.
        """
        if self.role not in ROLES:
            raise ApiError(
                400, f"messages: the role {self.role!r} is not supported: use {', '.join(ROLES)}", param="messages"
            )
        if (self.model_extra or {}).get("tool_calls"):
            raise ApiError(
                400, "messages: tool_calls are not supported", param="messages", code="unsupported_parameter"
            )
        parts = [TextPart(type="text", text=self.content)] if isinstance(self.content, str) else self.content or []
        for part in parts:
            if part.type != "text":
                raise ApiError(
                    400, f"messages: content of type {part.type!r} is not supported: send text", param="messages"
                )
        return {"role": ROLES[self.role], "content": "\n".join(part.text or "" for part in parts)}


class ChatRequest(Common):
    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1, le=MOST_TOKENS)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)

    def turns(self) -> list[Message]:
        """The messages; the last is the user's.

        Raises:
            ApiError: it is not, or one is not understood.
        """
        turns = [message.turn() for message in self.messages]
        if turns[-1]["role"] != "user":
            raise ApiError(400, "messages: the last must be the user's", param="messages")
        return turns


class CompletionRequest(Common):
    prompt: str | list[str] | list[int] | list[list[int]]
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    max_tokens: int | None = Field(None, ge=0, le=MOST_TOKENS)

    def prompts(self) -> list[str | list[int]]:
        """Each prompt, as text or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [[int(token) for token in self.prompt]]
        return list(self.prompt)  # type: ignore[arg-type]
