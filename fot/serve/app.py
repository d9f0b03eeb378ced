"""The HTTP server: who may ask, what is asked, and how errors are told."""

import hmac
from collections import OrderedDict
from typing import Any
from urllib.parse import urlsplit

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fot.serve import openai, pages, uploads
from fot.serve.errors import LOOPBACK, ApiError
from fot.serve.library import Library
from fot.serve.line import Line
from fot.serve.server import Server, Settings, server_of, told

SAFE_HEADERS = [(b"x-content-type-options", b"nosniff"), (b"cache-control", b"no-store")]
OPEN = ("/", "/page.js", "/page.css", "/health")  # they tell nothing, and ask for the key
OPEN_BELOW = "/inspections/"  # names that nobody guesses


def create_app(library: Library, settings: Settings | None = None) -> FastAPI:
    """The application.

    Args:
        library: what is served.
        settings: how.
    """
    settings = settings or Settings()
    app = FastAPI(title="fot", docs_url=None, redoc_url=None, openapi_url=None)
    app.state.server = Server(library, settings, Line(1, settings.waiting))
    app.state.inspections = OrderedDict()
    for module in (openai, pages, uploads):
        app.include_router(module.router)
    app.add_middleware(Guard, key=settings.api_key)
    app.add_exception_handler(ApiError, _tell)  # type: ignore[arg-type]
    app.add_exception_handler(RequestValidationError, _tell_invalid)  # type: ignore[arg-type]
    app.add_exception_handler(HTTPException, _tell_http)  # type: ignore[arg-type]
    app.add_exception_handler(Exception, _tell_defect)
    return app


class Guard:
    """Lets in those who may ask.

    Without a key, only pages that came from this server may ask, under the names of this machine: else any web page
    that its user visits could.
    """

    def __init__(self, app: ASGIApp, key: str | None) -> None:
        self._app, self._key = app, key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        error = self._objection(Request(scope))

        async def send_safely(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", []), *SAFE_HEADERS]}
            await send(message)

        app = self._app if error is None else JSONResponse(error.body(), error.status)
        await app(scope, receive, send_safely)

    def _objection(self, request: Request) -> ApiError | None:
        host, origin = request.headers.get("host", ""), request.headers.get("origin")
        if self._key is not None:
            given = request.headers.get("authorization", "").removeprefix("Bearer ").encode()
            path = request.url.path
            free = path in OPEN or path.startswith(OPEN_BELOW)
            if not free and not hmac.compare_digest(given, self._key.encode()):
                return ApiError(401, "a valid API key is needed", code="invalid_api_key")
        elif urlsplit(f"//{host}").hostname not in LOOPBACK:
            return ApiError(403, "this server answers under the name of this machine alone", code="wrong_host")
        if origin and urlsplit(origin).netloc != host:
            return ApiError(403, "pages of other servers may not ask", code="wrong_origin")
        return None


async def _tell(request: Request, error: ApiError) -> JSONResponse:
    return JSONResponse(error.body(), error.status)


async def _tell_invalid(request: Request, error: RequestValidationError) -> JSONResponse:
    first: dict[str, Any] = dict(error.errors()[0])
    place = [str(part) for part in first["loc"] if part != "body"]
    message = f"{'.'.join(place) or 'the request'}: {first['msg']}"
    return JSONResponse(ApiError(400, message, param=place[0] if place else None).body(), 400)


async def _tell_http(request: Request, error: HTTPException) -> JSONResponse:
    return JSONResponse(ApiError(error.status_code, str(error.detail)).body(), error.status_code)


async def _tell_defect(request: Request, error: Exception) -> JSONResponse:
    wrong = told(error, server_of(request).settings)
    return JSONResponse(wrong.body(), wrong.status)
