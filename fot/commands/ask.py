"""``fot ask`` and ``fot chat``."""

import argparse
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from fot.commands.options import add_memory_options, named_path, open_memory, positive
from fot.files import check_unicode

# As in fot.ask, which loads torch.
REREAD = ("auto", "attention", "bm25", "both", "off")


def add(commands: Any) -> None:
    ask = commands.add_parser(
        "ask",
        help="ask a memory a question, and list the passages that the answer used",
        description="Find the passages of a memory that a question is about, read the best of them again, and answer. "
        "Then list the passages.",
    )
    _add_options(ask)
    ask.add_argument("question", help="the question; it must be shorter than the local window")
    ask.set_defaults(command=_ask)
    chat = commands.add_parser(
        "chat",
        help="hold a conversation with a memory",
        description="Hold a conversation with a memory. Older turns of the conversation move to a second memory, "
        "which is not saved. The memory in the folder does not change.",
    )
    _add_options(chat)
    chat.set_defaults(command=_chat)


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("memory", type=named_path, help="folder of a memory, made by fot memory build")
    parser.add_argument("--model", metavar="NAME", help="model to ask (default: the model that made the memory)")
    add_memory_options(parser)
    parser.add_argument(
        "--max-new-tokens", type=positive, default=128, metavar="N", help="most tokens in an answer (default: 128)"
    )
    parser.add_argument(
        "--passages", type=positive, default=5, metavar="N", help="number of passages to list (default: 5)"
    )
    parser.add_argument(
        "--reread",
        choices=REREAD,
        default="auto",
        help="how to find the passages that are read again with the question: by the model's attention, by the words "
        "of the question (bm25), or by both; off reads none again (default: auto: both, if they fit the window)",
    )
    parser.add_argument(
        "--plain", action="store_true", help="use no chat template; ask the question as you would ask a base model"
    )


def _ask(args: argparse.Namespace) -> int:
    from fot.ask import Conversation

    memory, model = open_memory(args)
    conversation = Conversation(model, memory, use_chat_template=False if args.plain else None)
    _turn(args, conversation, args.question)
    return 0


def _chat(args: argparse.Namespace) -> int:
    from fot.ask import Conversation

    memory, model = open_memory(args)
    conversation = Conversation(model, memory, use_chat_template=False if args.plain else None)
    print(
        f"{memory.describe()}\nType a question. Ctrl-C ends an answer, Ctrl-D ends the conversation.", file=sys.stderr
    )
    while True:
        try:
            text = _typed()
        except EOFError:
            print()
            return 0
        if not text.strip():
            continue
        try:
            with _interruptible() as interrupted:
                _turn(args, conversation, text, stop=interrupted)
        except ValueError as error:  # too long a turn, for instance: the conversation is as it was before
            print(f"fot: {error}", file=sys.stderr)


def _typed() -> str:
    """A line of the terminal or the pipe before us.

    Raises:
        EOFError: there is no more.
        ValueError: it is not UTF-8.
    """
    try:
        text = input("> ")
    except UnicodeDecodeError as error:
        raise ValueError("what was typed is not UTF-8 text: convert it to UTF-8") from error
    check_unicode(text, "what was typed")
    return text


@contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Within, Ctrl-C does nothing but make the function given return True."""
    pressed: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: pressed.append(number))
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)


def _turn(args: argparse.Namespace, conversation: Any, text: str, **options: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    from fot.inspection.texts import printable

    answer = conversation.say(
        text,
        max_new_tokens=args.max_new_tokens,
        num_passages=args.passages,
        reread=args.reread,
        on_text=lambda part: print(printable(part), end="", flush=True),
        **options,
    )
    print("\n")
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("share", justify="right")
    table.add_column("document")
    table.add_column("position", justify="right")
    table.add_column("passage", ratio=1)
    for number, passage in enumerate(answer.passages):
        style = "bold" if number < answer.read_again else None
        table.add_row(
            f"{passage.share:.1%}", printable(passage.document), f"{passage.start:,}", passage.text, style=style
        )
    # Texts and names may hold what rich takes for markup.
    Console(highlight=False, soft_wrap=False).print(table if answer.passages else "the memory is empty", markup=False)
    if answer.read_again:
        print(f"read again: the first {answer.read_again}", file=sys.stderr)
    rest = answer.answer_tokens - 1
    rate = f", then {rest / (answer.seconds - answer.first_token_seconds):.1f} tokens a second" if rest > 0 else ""
    print(
        f"{answer.prompt_tokens} tokens in the prompt, first token after {answer.first_token_seconds:.1f} s{rate}",
        file=sys.stderr,
    )
