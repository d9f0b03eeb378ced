"""Memories made from files that a client sends, with progress."""

import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from starlette.datastructures import UploadFile

from fot.documents import Documents, add_documents
from fot.documents.read import read
from fot.documents.record import State
from fot.progress import Unseen
from fot.serve import wire
from fot.serve.errors import ApiError
from fot.serve.library import OnDisk
from fot.serve.line import Stopped
from fot.serve.server import Server, server_of
from fot.serve.stream import Send, events
from memory import Memory

router = APIRouter()

NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,63}")
ODD = re.compile(r"[\x00-\x1f\x7f/\\:]")
MOST_BYTES = 1 << 28  # of all files of an upload
MOST_AROUND = 1 << 20  # bytes of a request around its files


class Left(Exception):  # noqa: N818  nothing is wrong
    """The client has left."""


@router.post("/api/memories/{name}")
async def make_memory(request: Request, name: str) -> Response:
    """Make a memory of the files, and serve it. The events tell how far it is, and what could not be read."""
    server = server_of(request)
    _target(server, name)  # before the files are sent
    folder = await _received(request)

    def work(send: Send) -> Callable[[Stopped], dict[str, Any]]:
        return partial(_make, server, name, folder, send)

    def last(result: dict[str, Any]) -> Iterator[dict[str, Any]]:
        yield result

    return await events(request, work, last, end=None, done=lambda: shutil.rmtree(folder, ignore_errors=True))


async def _received(request: Request) -> Path:
    """A new folder with the files of a request, each in a folder of its own, named by its place among them.

    Raises:
        ApiError: there are none, or too many bytes of them.
    """
    too_large = ApiError(413, f"the files have more than {MOST_BYTES >> 20} MiB: send fewer at a time", param="files")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > MOST_BYTES + MOST_AROUND:
        raise too_large
    async with request.form() as form:
        uploads = [upload for upload in form.getlist("files") if isinstance(upload, UploadFile)]
        if not uploads:
            raise ApiError(400, "there are no files: send some, each as a part named files", param="files")
        if sum(upload.size or 0 for upload in uploads) > MOST_BYTES:
            raise too_large
        folder = Path(tempfile.mkdtemp(prefix="fot-upload-"))
        try:
            for number, upload in enumerate(uploads):
                place = folder / str(number) / _file_name(upload.filename)
                place.parent.mkdir()
                with open(place, "wb") as file:
                    shutil.copyfileobj(upload.file, file)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    return folder


def _target(server: Server, name: str) -> Path:
    """The folder of a new memory.

    Raises:
        ApiError: none can be made, or not under this name.
    """
    if server.settings.new_memories is None:
        raise ApiError(403, "this server makes no memories: start it with --new FOLDER")
    if not NAME.fullmatch(name):
        raise ApiError(400, "a name has letters, digits, dots, dashes and underscores, 64 at most", param="name")
    target = server.settings.new_memories / f"{name}.memory"
    if name in server.library or target.exists():
        raise ApiError(409, f"there is a memory {name!r} already: choose another name", param="name")
    return target


def _file_name(name: str | None) -> str:
    """The name of a file that a client sent, without folders."""
    return ODD.sub("_", re.split(r"[/\\]", name or "")[-1]).strip(". ")[-200:] or "file"


def _make(server: Server, name: str, folder: Path, send: Send, stopped: Stopped) -> dict[str, Any]:
    """Read the files into a new memory; without any text, or if the client leaves, there is none."""
    target = _target(server, name)  # once more: while this one waited, another may have taken the name
    model = server.library.entries()[0].model
    found, wrong = Documents(), []
    for path in sorted(folder.glob("*/*"), key=lambda path: int(path.parent.name)):
        try:
            found.add(path, read(path), State.of(path))
        except (ValueError, OSError, ImportError) as error:
            wrong.append(str(error).replace(f"{path.parent}/", "").removesuffix("; nothing was stored"))
    if not found.paths:
        raise ApiError(400, f"no file with text: {'; '.join(wrong)}", param="files")
    names = _names(found.paths)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        model.new_memory().save(target)
        with Memory.open(target, "a") as memory:
            add_documents(model, memory, found, names.__getitem__, lambda **options: _Bar(send, stopped, **options))
            memory.prepare()
            memory.flush()
    except BaseException:
        shutil.rmtree(target, ignore_errors=True)
        raise
    place = OnDisk(target)
    return {"done": wire.model_card(server.library.add(name, model, place.open(), place)), "left_out": wrong}


def _names(paths: list[Path]) -> dict[Path, str]:
    """The names of documents: those of the files, with numbers where several have one."""
    names: dict[Path, str] = {}
    for path in paths:
        name, number = path.name, 1
        while name in names.values():
            number += 1
            name = f"{path.stem} ({number}){path.suffix}"
        names[path] = name
    return names


class _Bar(Unseen):
    """A progress bar that a client sees; it ends the work when the client has left."""

    def __init__(self, send: Send, stopped: Stopped, **options: Any) -> None:
        super().__init__(**options)
        self._send_event, self._stopped = send, stopped

    def moved(self) -> None:
        """Tell the client.

        Raises:
            Left: the client has left.
        """
        if self._stopped():
            raise Left
        self._send_event(
            {
                "file": self.doing,
                "tokens": int(self.n),
                "total": int(max(self.total or 0, self.n)),
                "tokens_per_second": round(self.rate(), 1),
                "seconds_left": round(self.seconds_left(), 1),
            }
        )
