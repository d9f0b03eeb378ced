"""Read a folder of source code into a memory, then ask about it, or let a line be completed; see which lines answered.

    python examples/search_a_codebase.py fot "What does attach_memory return?" --include "*.py"
    python examples/search_a_codebase.py fot "def weights_fingerprint(" --complete --include "*.py"

The memory is kept in a folder (--memory). The next run reads only files that are new or have changed, and forgets those
that are gone.
"""

import argparse
import hashlib
from pathlib import Path
from typing import Any

import torch

import fot
from fot.ask import ask
from fot.documents import add_document, find_documents, read_document
from fot.trace import Passage, record


def update(model: Any, memory: fot.Memory, texts: dict[str, str]) -> None:
    """Make a memory hold these files, name -> text, and no others."""
    model.check_memory(memory)
    read = 0
    for name, note in list(memory.notes.items()):
        if name not in texts or note.sha256 != hashlib.sha256(texts[name].encode()).hexdigest():
            memory.drop_document(name)
    for name, text in texts.items():
        read += add_document(model, memory, name, text) > 0
    print(f"{read} of {len(texts)} files read now; {memory.describe()}")


def complete(model: Any, memory: fot.Memory, line: str, tokens: int) -> tuple[str, list[Passage]]:
    """How a line of code goes on, and the passages that carried most attention meanwhile."""
    ids = torch.tensor([model.tokenizer(line).input_ids])
    with record(model) as recorder:
        output = model.generate(ids, memory=memory, max_new_tokens=tokens, do_sample=False)
    return line + model.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True), recorder.passages(8)


def lines(passage: Passage, texts: dict[str, str]) -> str:
    """``file:12-14`` of a passage; ``(prompt)`` of one that is no file's."""
    if passage.span is None:
        return passage.document
    first, last = (texts[passage.document].count("\n", 0, place) + 1 for place in passage.span)
    return f"{passage.document}:{first}" + (f"-{last}" if last > first else "")


def main() -> None:
    """Read, ask, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("text", help="a question, or with --complete the beginning of a line")
    parser.add_argument("--complete", action="store_true")
    parser.add_argument("--include", nargs="+", default=[], metavar="GLOB", help="only such files")
    parser.add_argument("--model", default="smollm2-135m-fot")
    parser.add_argument("--memory", type=Path, default=Path("codebase.memory"))
    parser.add_argument("--tokens", type=int, default=48, help="longest answer")
    args = parser.parse_args()

    paths = find_documents([args.folder], args.include).paths
    texts = {path.relative_to(args.folder).as_posix(): read_document(path) for path in paths}
    model = fot.FoTForCausalLM.from_pretrained(args.model)
    if not args.memory.exists():
        model.new_memory().save(args.memory)
    with fot.Memory.open(args.memory, mode="a") as memory:
        update(model, memory, texts)
        if args.complete:
            text, passages = complete(model, memory, args.text, args.tokens)
        else:
            answer = ask(model, memory, args.text, max_new_tokens=args.tokens, num_passages=8)
            text, passages = answer.text, answer.passages
    print(f"{text}\n")
    for passage in passages:
        print(f"{passage.share:6.1%} {lines(passage, texts)}  {passage.text}")


if __name__ == "__main__":
    main()
