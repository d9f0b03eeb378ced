"""``fot eval questions``."""

import argparse
from pathlib import Path
from typing import Any

from fot.commands.options import about, add_memory_options, check_writable, finish, load, named_path, positive


def add(kinds: Any) -> None:
    parser = kinds.add_parser(
        "questions",
        help="ask ordinary questions about novels, and check answers and listed passages",
        description="Ask the package's questions about novels, in several ways: from the memory alone; with passages "
        "read again that attention, BM25 or both found; without any text; and with the right passage given. Count "
        "right answers, and how often a listed passage holds the answer.",
    )
    parser.add_argument("model", help="alias, folder, GGUF file or hub id")
    parser.add_argument(
        "--book",
        dest="books",
        action="append",
        required=True,
        type=_book,
        metavar="NAME=PATH",
        help="a book, and its UTF-8 text or the folder of its memory (give the option once for each book); names: "
        "northanger_abbey, persuasion, pride_and_prejudice, sherlock_holmes",
    )
    add_memory_options(parser)
    parser.add_argument("--rows", type=_rows, metavar="ROW,ROW,...",
                        help="ways to answer: memory, attention, bm25, both, without text, right passage given "
                        "(default: all)")  # fmt: skip
    parser.add_argument(
        "--max-new-tokens", type=positive, default=48, metavar="N", help="most tokens in an answer (default: 48)"
    )
    parser.add_argument(
        "--passages", type=positive, default=5, metavar="N", help="number of passages to list (default: 5)"
    )
    parser.add_argument(
        "--json", type=named_path, metavar="OUT", help="file to write the results to, with every answer"
    )
    parser.set_defaults(command=_eval_questions)


def _eval_questions(args: argparse.Namespace) -> int:
    check_writable(args.json)
    from fot.evaluation import questions

    rows = _check_rows(args.rows or questions.ROWS)
    asked = sum(len(questions.load_questions(book)) for book, _ in args.books)  # names an unknown book
    model = load(args)
    from fot.evaluation.report import questions_table
    from fot.progress import progress_bar

    memories = {book: _memory(model, path) for book, path in args.books}
    with progress_bar(total=asked * len(rows), unit="answer", desc="questions") as bar:
        log = bar.write if args.verbose else lambda line: None
        found = questions.run(
            model,
            memories,
            rows=rows,
            num_passages=args.passages,
            max_new_tokens=args.max_new_tokens,
            report=lambda result: log(_line(result)),
            progress=bar,
        )
    tokens = {book: len(memory) for book, memory in memories.items()}
    result = {**about(model, args.model), "tokens": tokens, **found}
    return finish(questions_table(result), result, args.json)


def _line(result: Any) -> str:
    from fot.inspection.texts import one_line

    listed = f", listed at {result.listed}" if result.listed else ""
    said = "right" if result.correct else "wrong"
    return one_line(f"{result.row}: {result.question} {result.answer!r} ({said}{listed})")


def _memory(model: Any, path: Path) -> Any:
    """The memory in a folder, or a new one of a text."""
    from memory import Memory

    if path.is_dir():
        memory = Memory.open(path)
        model.check_memory(memory)
        return memory
    memory = model.new_memory()
    model.ingest(path, memory)
    return memory


def _check_rows(rows: Any) -> list[str]:
    from fot.evaluation.questions import ROWS

    unknown = [row for row in rows if row not in ROWS]
    if unknown:
        raise ValueError(f"--rows names {unknown[0]!r}: choose among {', '.join(ROWS)}")
    return list(rows)


def _rows(text: str) -> list[str]:
    return [row.strip() for row in text.split(",")]


def _book(text: str) -> tuple[str, Path]:
    name, equals, path = text.partition("=")
    if not (name and equals and path):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME=PATH, such as persuasion=persuasion.txt")
    return name, named_path(path)
