"""Errors as OpenAI's clients know them."""

from collections.abc import Iterable
from typing import Any

# Names of this machine, which no other machine reaches.
LOOPBACK = ("127.0.0.1", "localhost", "::1")
# Requests that may wait for the model, unless the server's user says otherwise; one more is an error.
MOST_WAITING = 32

TYPES = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error",
         404: "invalid_request_error", 413: "invalid_request_error", 429: "rate_limit_error"}  # fmt: skip


class ApiError(Exception):
    """Something that a client is told.

    Attributes:
        status: of HTTP.
        message: what is wrong, and what to do.
        param: the parameter that it is about.
        code: a word for programs.
    """

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> dict[str, Any]:
        """As JSON."""
        kind = TYPES.get(self.status, "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def without_paths(message: str, paths: Iterable[str]) -> str:
    """A message without the folders of this machine."""
    for path in sorted(paths, key=len, reverse=True):
        if len(path) > 1:  # "/" is in every message about a share
            message = message.replace(path, "...")
    return message
