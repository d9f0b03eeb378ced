"""Imports what most processes of the tests need, once; then its copies go on as ``python ARGUMENTS`` would.

Loading torch and transformers takes seconds, which is most of what a short run does. ``forks.py`` starts it and asks:
a program of its own, or a copy of a worker that has collected no test yet.

python tests/fork_server.py NUMBER_OF_A_SOCKET
"""

import atexit
import gc
import json
import os
import runpy
import signal
import socket
import sys
import threading
import traceback
import warnings
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

PRELOADED = ("peft", "transformers.models.llama.modeling_llama", "fot.loading", "training.train")


def serve(asked: socket.socket) -> dict[str, Any]:
    """Wait for requests. Each is returned in a copy of this process, which has the files sent with it as its own."""
    keepers = 0
    while True:
        request, files, _, _ = socket.recv_fds(asked, 2**20, 4)
        while keepers and os.waitpid(-1, os.WNOHANG)[0]:  # so that their time counts as this process's
            keepers -= 1
        if not request:  # whoever asked has ended
            sys.exit()
        keepers += 1
        if not os.fork():
            asked.close()
            keep_a_copy(*files)
            return json.loads(request)
        for file in files:
            os.close(file)


def keep_a_copy(stdin: int, stdout: int, stderr: int, status: int) -> None:
    """Returns in a child with these files. This process writes the child's id, and how it ended, into ``status``."""
    child = os.fork()
    if child:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # when nobody wants to know
        for file in (stdin, stdout, stderr):
            os.close(file)
        os.write(status, f"{child}\n".encode())
        os.write(status, f"{os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}\n".encode())
        os._exit(0)
    os.setsid()
    for number, file in enumerate((stdin, stdout, stderr)):
        os.dup2(file, number)
    for file in (stdin, stdout, stderr, status):
        os.close(file)


def go_on(words: list[str], cwd: str, environment: dict[str, str]) -> None:
    """What ``python WORDS`` does: a module (-m), code (-c) or a file."""
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[1:1] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    kind, *rest = words
    if kind == "-m":
        sys.argv, sys.path[0] = rest, cwd
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.argv, sys.path[0] = ["-c", *rest[1:]], ""
        sys.modules["__main__"] = ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec"), vars(sys.modules["__main__"]))
    else:
        sys.argv, sys.path[0] = words, str(Path(kind).parent)
        runpy.run_path(kind, run_name="__main__")


def end(work: Callable[[], None]) -> NoReturn:
    """Work, and then end as Python does, but for taking down its modules, which would copy all of their memory."""
    status = 0
    try:
        work()
    except SystemExit as exit_:
        status = exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
        if isinstance(exit_.code, str):
            print(exit_.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def preload() -> None:
    """Nothing of it becomes garbage."""
    gc.disable()
    for name in PRELOADED:
        import_module(name)


def answer(asked: socket.socket) -> NoReturn:
    """Be the server, and then, in each copy, the process that it was asked for."""
    gc.freeze()
    gc.enable()
    end(lambda: go_on(**serve(asked)))


def forget_tests(asked: socket.socket) -> None:
    """Make a copy of a worker of pytest what a new process would be, with the files 0 to 2 and ``asked`` alone."""
    os.closerange(3, asked.fileno())
    os.closerange(asked.fileno() + 1, 1024)
    sys.stdin = sys.__stdin__ = open(0, closefd=False)  # type: ignore[misc]  # noqa: SIM115
    sys.stdout = sys.__stdout__ = open(1, "w", closefd=False)  # type: ignore[misc]  # noqa: SIM115
    sys.stderr = sys.__stderr__ = open(  # type: ignore[misc]  # noqa: SIM115
        2, "w", buffering=1, errors="backslashreplace", closefd=False
    )
    warnings.resetwarnings()
    for category in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
        warnings.simplefilter("ignore", category)
    sys.unraisablehook, threading.excepthook = sys.__unraisablehook__, threading.__excepthook__
    sys.meta_path[:] = [finder for finder in sys.meta_path if not type(finder).__module__.startswith("_pytest")]
    tests = Path(__file__).parent
    sys.path[:] = [str(tests), *(place for place in sys.path if Path(place) not in (tests, tests.parent, Path()))]


if __name__ == "__main__":
    preload()
    answer(socket.socket(fileno=int(sys.argv[1])))
