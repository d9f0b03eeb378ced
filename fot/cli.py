"""The command ``fot``: parse, call one public function, print. The subcommands are in ``fot.commands``."""

import argparse
import functools
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from types import FrameType
from typing import NoReturn

from fot import __version__
from fot.commands import ask, compare, cost, evaluate, info, inspect, memory, merge, passkey, serve, train
from fot.files import check_unicode, shown

LONGEST_MESSAGE = 1000  # characters of an error

Command = Callable[[argparse.Namespace], int]

# What a user can mend; anything else is a defect of ours and keeps its traceback.
USER_ERRORS = (ValueError, OSError, ImportError, KeyError, FloatingPointError)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status (2: bad input, 130: interrupted)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    for argument in argv:
        try:
            check_unicode(argument, f"the argument {shown(argument)!r}")
        except ValueError as error:
            return _refuse(error)
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    # argparse takes overrides only in one place; people write them after options, too
    if rest and not (hasattr(args, "overrides") and all("=" in part and part[0] != "-" for part in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides += rest
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    for name in ("fot", "memory"):
        _set_level(name, logging.INFO if args.verbose else logging.WARNING)
    # pypdf says what it passes over in a file; that the file could not be read, we say.
    _set_level("pypdf", logging.WARNING if args.verbose else logging.CRITICAL)
    command: Command = args.command
    try:
        return command(args)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except USER_ERRORS as error:
        if args.verbose:
            raise
        return _refuse(error)


def _set_level(name: str, level: int) -> None:
    """Of a logger. Setting it goes through all loggers of the process, of which libraries make thousands."""
    logger = logging.getLogger(name)
    if logger.level != level:
        logger.setLevel(level)


def program() -> NoReturn:
    """The program ``fot``: ``main``, and then the end of the process.

    One of several processes that trained together leaves at once, when all is written. To take their group down, or to
    let the interpreter do it, may never end: the destructor of a gloo group holds Python's lock while it waits for its
    threads, and one of them may want the lock to free a tensor.
    """
    terminated = _terminate_like_ctrl_c()
    try:
        status = main()
    except Exception:
        if not _in_a_group():
            raise
        traceback.print_exc()
        status = 1
    if _in_a_group():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    if terminated:  # whoever sent it is to see that it worked
        sys.stdout.flush()
        sys.stderr.flush()
        os.kill(os.getpid(), signal.SIGTERM)
    sys.exit(status)


def _terminate_like_ctrl_c() -> list[int]:
    """Let SIGTERM end a command as Ctrl-C does, so that it keeps what is finished; the next one ends it at once.

    Schedulers send it when a job's time is over, and to a command in the background a shell sends no Ctrl-C.

    Returns:
        a list that will have the signal when it has come.
    """
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        received.append(number)
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, note)
    return received


def _in_a_group() -> bool:
    """Whether this process is one of a group of ``torch.distributed``."""
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_available() and distributed.is_initialized()


def _refuse(error: Exception) -> int:
    """Say in one line what is wrong; what others wrote may be long, and then its middle is left out."""
    from fot.inspection.texts import one_line

    message = one_line(str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error))
    if len(message) > LONGEST_MESSAGE:
        half = LONGEST_MESSAGE // 2
        message = f"{message[:half]} ... {message[-half:]}"
    print(f"fot: {message}", file=sys.stderr)
    return 2


@functools.cache
def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fot", description="External kNN memory for Llama-family models.")
    parser.add_argument("--version", action="version", version=f"fot {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for module in (passkey, info, memory, ask, serve, inspect, train, merge, evaluate, compare, cost):
        module.add(commands)
    return parser


if __name__ == "__main__":
    program()
