"""Fill a memory with several documents, ask, and see which stored tokens the answer looked at.

    python examples/inspect_hits.py "How is a memory saved?" docs/*.md --out inspection

Prints the passages and the table of hits; writes inspection.html, to be opened in any browser, and inspection.png.
docs/inspection.md tells how to read them.
"""

import argparse
from pathlib import Path

from rich.console import Console

import fot
from fot.documents import read_document
from fot.inspection.page import write_page
from fot.inspection.plot import position_plot
from fot.inspection.table import hits_table
from fot.trace import trace


def main() -> None:
    """Read, ask, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--model", default="smollm2-135m-fot")
    parser.add_argument("--out", type=Path, default=Path("inspection"), help="of page and picture, without suffix")
    parser.add_argument("--tokens", type=int, default=16, help="longest answer")
    args = parser.parse_args()

    model = fot.FoTForCausalLM.from_pretrained(args.model)
    memory = model.new_memory()
    for file in args.files:
        model.ingest(read_document(file), memory, source=file.name)
    print(memory.describe())

    found = trace(model, f"Question: {args.question}\nAnswer:", memory, max_new_tokens=args.tokens)
    print(f"answered: {found.text.strip()}\n{found.memory_share:.1%} of the attention went to memory, of which")
    for name, share in found.documents().items():
        print(f"{share:6.1%} to {name}")
    print("passages with most of it:")
    for passage in found.passages(5):
        print(f"{passage.share:6.1%} {passage.document} {passage.start:,}: {passage.text}")
    Console(highlight=False).print(hits_table(found, top=2))

    page, picture = args.out.with_suffix(".html"), args.out.with_suffix(".png")
    write_page(page, found, title=args.question, model=args.model)
    position_plot(picture, found)
    print(f"written: {page}, {picture}")


if __name__ == "__main__":
    main()
