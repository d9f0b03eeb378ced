"""Read a book into a memory file once, then ask it questions.

    python examples/ask_a_book.py emma.txt "Who is the vicar of Highbury?" "Who lives at Hartfield?"

The memory is kept in emma.memory: the second run opens it and answers at once, and ``fot ask``, ``fot chat`` and
``fot inspect`` take it, too. Interrupted, reading goes on next time where it was. fetch_novels.py has some books.
"""

import argparse
from pathlib import Path
from typing import Any

from tqdm import tqdm

import fot
from fot.ask import ask
from fot.documents import add_document, read_document


def open_memory(model: Any, name: str, book: Path, folder: Path) -> fot.Memory:
    """The memory of a book; what is missing of it is read first."""
    if not folder.exists():
        empty = model.new_memory()
        empty.metadata |= {"model": name, "memory": model.memory_config.to_dict()}  # so that `fot ask` finds the model
        empty.save(folder)
    with fot.Memory.open(folder, mode="a") as memory, tqdm(unit="tok", desc=book.name, disable=None) as bar:
        read = add_document(model, memory, book.name, read_document(book), progress=bar)
        memory.prepare()  # the index is made now and kept, not made at each first question
        memory.flush()
    print(f"{folder}: {read:,} tokens read now" if read else f"{folder}: opened as it was")
    return fot.Memory.open(folder)


def main() -> None:
    """Open, ask, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("book", type=Path, help="text, PDF or HTML")
    parser.add_argument("questions", nargs="+", metavar="QUESTION")
    parser.add_argument("--model", default="smollm2-135m-fot")
    parser.add_argument("--memory", type=Path, help="folder of the memory (default: BOOK with the suffix .memory)")
    parser.add_argument("--tokens", type=int, default=64, help="longest answer")
    args = parser.parse_args()

    model = fot.FoTForCausalLM.from_pretrained(args.model)
    memory = open_memory(model, args.model, args.book, args.memory or args.book.with_suffix(".memory"))
    print(memory.describe())
    for question in args.questions:
        print(f"\n> {question}")
        answer = ask(
            model,
            memory,
            question,
            max_new_tokens=args.tokens,
            num_passages=3,
            on_text=lambda part: print(part, end="", flush=True),
        )
        print(f"\nfirst token after {answer.first_token_seconds:.1f} s, from these passages:")
        for passage in answer.passages:
            print(f"{passage.share:6.1%} at {passage.start:,}: {passage.text}")


if __name__ == "__main__":
    main()
