"""Processes of Python that need not load torch anew: copies of ``fork_server.py``, used as those of ``subprocess``."""

import atexit
import contextlib
import functools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from subprocess import CompletedProcess, TimeoutExpired

import fork_server

SERVER = Path(__file__).with_name("fork_server.py")
# Code after which fot's own packages, and FAISS, are imported anew.
FORGET = (
    "import sys; own = ('fot', 'memory', 'training', 'faiss')\n"
    "for name in list(sys.modules): name.split('.')[0] in own and sys.modules.pop(name)\n"
)


_copied: list[socket.socket] = []  # where one asks the server that is a copy of this process


def copy_this_process() -> None:
    """Have a copy of this process as the server. It has no test yet, and loads here what it needs there as well."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # which pytest would show, though nobody's test is at work
        fork_server.preload()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pid = os.fork()
    if not pid:
        fork_server.forget_tests(theirs)
        fork_server.answer(theirs)
    theirs.close()

    def end() -> None:
        ours.close()
        os.waitpid(pid, 0)

    atexit.register(end)
    _copied.append(ours)


@functools.cache
def _server() -> socket.socket:
    """Where one asks the server, which starts at the first request and ends with this process."""
    if _copied:
        return _copied[0]
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        number = theirs.fileno()
        command = [sys.executable, str(SERVER), str(number)]
        server = subprocess.Popen(command, pass_fds=[number], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)

    def end() -> None:
        ours.close()
        server.wait()

    atexit.register(end)
    return ours


class Fork:
    """``python WORDS`` in a copy of a process that has torch. It leads a session of its own.

    Args:
        words: ``-m MODULE``, ``-c CODE`` or a file, and what follows it.
        cwd: its folder; this process's by default.
        more: variables beside those of this process.

    Attributes:
        pid: its id.
        returncode: None while it runs, else its exit status, or the number of a signal below 0.
    """

    def __init__(self, *words: str | Path, cwd: Path | None = None, more: Mapping[str, str] | None = None) -> None:
        request = {"words": [str(word) for word in words], "cwd": str(cwd or Path.cwd()),
                   "environment": {**os.environ, **(more or {})}}  # fmt: skip
        self._printed = [tempfile.TemporaryFile() for _ in range(2)]  # noqa: SIM115
        status, theirs = os.pipe()
        self._status = open(status)  # noqa: SIM115
        with open(os.devnull) as nothing:
            files = [file.fileno() for file in (nothing, *self._printed)]
            socket.send_fds(_server(), [json.dumps(request).encode()], [*files, theirs])
        os.close(theirs)
        self.pid = int(self._status.readline())
        self.returncode: int | None = None

    @property
    def stdout(self) -> str:
        """What it has printed by now."""
        return self._text(0)

    @property
    def stderr(self) -> str:
        """What it has said by now."""
        return self._text(1)

    def _text(self, number: int) -> str:
        file = self._printed[number].fileno()
        return os.pread(file, os.fstat(file).st_size, 0).decode()

    def poll(self) -> int | None:
        """Exit status, or None while it runs."""
        if self.returncode is None and select.select([self._status], [], [], 0)[0]:
            self.returncode = int(self._status.readline())
        return self.returncode

    def wait(self, timeout: float = 600) -> int:
        """Exit status. After so many seconds it and its children are killed, and TimeoutExpired is raised."""
        if not select.select([self._status], [], [], timeout)[0]:
            os.killpg(self.pid, signal.SIGKILL)
            raise TimeoutExpired(f"process {self.pid}", timeout, self.stdout, self.stderr)
        status = self.poll()
        assert status is not None
        return status

    def send_signal(self, number: signal.Signals) -> None:
        """To it alone, if it still runs."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)


def run(*words: str | Path, cwd: Path | None = None, more: Mapping[str, str] | None = None) -> CompletedProcess[str]:
    """``subprocess.run([sys.executable, *words], capture_output=True, text=True)``, but for loading torch."""
    process = Fork(*words, cwd=cwd, more=more)
    return CompletedProcess(words, process.wait(), process.stdout, process.stderr)


def run_ranks(count: int, *words: str | Path, timeout: float = 600) -> str:
    """``python WORDS`` on several processes that torch.distributed joins, as torchrun starts them; what they printed.

    Each has to end well. When time is out, all are killed.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [Fork(*words, more=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(count)]
    deadline = time.monotonic() + timeout
    try:
        statuses = [rank.wait(max(deadline - time.monotonic(), 0)) for rank in ranks]
    finally:
        for rank in ranks:
            rank.send_signal(signal.SIGKILL)
    assert not any(statuses), (statuses, *(rank.stderr[-2000:] for rank in ranks))
    return "".join(rank.stdout for rank in ranks)
