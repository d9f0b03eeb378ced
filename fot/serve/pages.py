"""The web page, and pages of what tokens attended to."""

import tempfile
from collections import OrderedDict
from importlib.resources import files
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from pydantic import BaseModel

from fot.chat import has_template
from fot.inspection.page import write_page
from fot.serve import wire
from fot.serve.errors import ApiError
from fot.serve.line import Stopped
from fot.serve.server import server_of
from fot.serve.stream import answer
from fot.trace import trace

router = APIRouter()

# Everything that the page needs comes from here, and its scripts are in a file of their own.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'"
)
INSPECTION_POLICY = "sandbox allow-scripts; default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'"
KINDS = {"page.html": "text/html", "page.css": "text/css", "page.js": "text/javascript"}

MOST_INSPECTIONS = 8
INSPECTED_TOKENS = 64


@router.get("/")
async def page() -> Response:
    """The page."""
    return _file("page.html")


@router.get("/page.css")
async def style() -> Response:
    """How it looks."""
    return _file("page.css")


@router.get("/page.js")
async def script() -> Response:
    """What it does."""
    return _file("page.js")


@router.get("/health")
async def health(request: Request) -> dict[str, Any]:
    """Whether the server runs, how many requests it has, and how many it has begun together with others."""
    line = server_of(request).line
    return {"status": "ok", "requests": line.length, "joined": line.joined}


@router.get("/api/memories")
async def memories(request: Request) -> dict[str, Any]:
    """What there is to choose from, and whether memories can be made."""
    server = server_of(request)
    listed = [wire.model_card(entry) | {"titles": entry.documents()} for entry in server.library.entries()]
    return {"memories": listed, "can_make": server.settings.new_memories is not None}


class Inspected(BaseModel):
    """What an inspection is asked for."""

    model: str
    question: str


@router.post("/api/inspections")
async def inspect(request: Request, asked: Inspected) -> JSONResponse:
    """Answer a question once more, and record what each token attends to; gives the page's name."""
    server = server_of(request)
    if asked.model not in server.library:
        raise ApiError(404, f"the model {asked.model!r} does not exist", param="model")
    entry = server.library[asked.model]
    titles = entry.blank.title or str

    def work(stopped: Stopped) -> bytes:
        templated = has_template(entry.model.tokenizer)
        found = trace(entry.model, asked.question, entry.memory, max_new_tokens=INSPECTED_TOKENS, chat=templated)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "page.html"
            write_page(path, found, title=asked.question, model=entry.name, name=titles)
            return path.read_bytes()

    content = await answer(request, work)
    pages: OrderedDict[str, bytes] = request.app.state.inspections
    name = wire.new_id("inspection")
    pages[name] = content
    while len(pages) > MOST_INSPECTIONS:
        pages.popitem(last=False)
    return JSONResponse({"page": f"/inspections/{name}"})


@router.get("/inspections/{name}")
async def inspection(request: Request, name: str) -> Response:
    """One of the last inspections."""
    pages: OrderedDict[str, bytes] = request.app.state.inspections
    if name not in pages:
        raise ApiError(404, "this inspection is not kept any more: ask again")
    return HTMLResponse(pages[name], headers={"Content-Security-Policy": INSPECTION_POLICY})


def _file(name: str) -> Response:
    content = (files("fot.serve") / "page" / name).read_bytes()
    return Response(content, media_type=KINDS[name], headers={"Content-Security-Policy": POLICY})
