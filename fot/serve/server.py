"""What all requests share: what is served, how the server behaves, and how it tells of errors."""

import logging
from dataclasses import dataclass, field
from pathlib import Path

from fastapi import Request

from fot.serve.answering import Conversations
from fot.serve.errors import MOST_WAITING, ApiError, without_paths
from fot.serve.library import Library
from fot.serve.line import Line

logger = logging.getLogger(__name__)


@dataclass
class Settings:
    """How the server behaves.

    Attributes:
        api_key: that clients must give; None: any client on this machine may ask.
        waiting: requests that may wait for the model.
        max_tokens: in an answer, where the client does not say.
        new_memories: folder for memories made from uploads; None: none can be made.
        private_paths: what must not be in an answer.
    """

    api_key: str | None = None
    waiting: int = MOST_WAITING
    max_tokens: int = 512
    new_memories: Path | None = None
    private_paths: list[str] = field(default_factory=lambda: [str(Path.home()), str(Path.cwd())])


@dataclass
class Server:
    """What all requests share."""

    library: Library
    settings: Settings
    line: Line
    conversations: Conversations = field(default_factory=Conversations)


def server_of(request: Request) -> Server:
    """What all requests share."""
    server: Server = request.app.state.server
    return server


def told(error: BaseException, settings: Settings) -> ApiError:
    """An error as a client may see it. What it can't mend is logged, and told without detail."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ValueError):
        return ApiError(400, without_paths(str(error), settings.private_paths))
    logger.error("an answer failed", exc_info=error)
    return ApiError(500, "the server failed; its log says how", code="internal_error")
