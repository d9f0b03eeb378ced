"""What building a memory from a text, an EPUB and a PDF costs beside the ingest of the same tokens alone.

    OMP_NUM_THREADS=1 python benchmarks/build_speed.py persuasion.txt --tokens 20000 --json OUT.json

The EPUB and the PDF (of one line for each line of the text) are made here. Each build finds and parses the file,
tokenises, ingests and writes the memory to disk, as ``fot memory build`` does after it has loaded the model; ``ids``
ingests token ids into a memory in RAM. Kinds take turns; the least time of each counts, and ratios are of this run
alone. The time of parsing and tokenising alone is measured besides.
"""

import argparse
import json
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from fot import FoTForCausalLM
from fot.documents import add_documents, find_documents
from fot.documents.read import read_document
from fot.machine import describe_machine
from memory import Memory

LINES = 50  # of a page


def write_epub(path: Path, text: str) -> None:
    """An EPUB of one chapter, a paragraph for each of the text."""
    paragraphs = "".join(f"<p>{part.replace('&', '&amp;').replace('<', '&lt;')}</p>" for part in text.split("\n\n"))
    package = (
        '<package xmlns="http://www.idpf.org/2007/opf" version="3.0"><manifest>'
        '<item id="a" href="a.xhtml" media-type="application/xhtml+xml"/></manifest>'
        '<spine><itemref idref="a"/></spine></package>'
    )
    container = (
        '<container xmlns="urn:oasis:names:tc:opendocument:xmlns:container"><rootfiles>'
        '<rootfile full-path="a.opf"/></rootfiles></container>'
    )
    files = {
        "META-INF/container.xml": container,
        "a.opf": package,
        "a.xhtml": f"<html><body>{paragraphs}</body></html>",
    }
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in files.items():
            file.writestr(name, content)


def write_pdf(path: Path, text: str) -> None:
    """A PDF of this text in a standard font."""
    from pypdf import PdfWriter
    from pypdf.generic import DecodedStreamObject, DictionaryObject, NameObject

    writer, lines = PdfWriter(), text.splitlines()
    font = {"/Type": "/Font", "/Subtype": "/Type1", "/BaseFont": "/Helvetica", "/Encoding": "/WinAnsiEncoding"}
    named = DictionaryObject({NameObject(key): NameObject(value) for key, value in font.items()})
    fonts = DictionaryObject({NameObject("/F1"): writer._add_object(named)})
    for start in range(0, len(lines), LINES):
        page, stream = writer.add_blank_page(595, 842), DecodedStreamObject()
        shown = [line.translate({40: "\\(", 41: "\\)", 92: "\\\\"}) for line in lines[start : start + LINES]]
        drawn = "".join(f"({line}) Tj T*\n" for line in shown)
        stream.set_data(f"BT /F1 10 Tf 14 TL 50 780 Td\n{drawn}ET".encode("cp1252", "replace"))
        page[NameObject("/Resources")] = DictionaryObject({NameObject("/Font"): fonts})
        page[NameObject("/Contents")] = writer._add_object(stream)
    writer.write(path)


def main() -> None:
    """Parse, measure, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--model", default="smollm2-135m-fot")
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    model: Any = FoTForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    whole = args.text.read_text(encoding="utf-8")
    ends = model.tokenizer(whole, return_offsets_mapping=True, add_special_tokens=False)["offset_mapping"]
    text = whole[: ends[min(args.tokens, len(ends)) - 1][1]]
    ids = list(model.tokenizer(text).input_ids)
    with tempfile.TemporaryDirectory() as folder:
        files = {kind: Path(folder) / f"book.{kind}" for kind in ("txt", "epub", "pdf")}
        files["txt"].write_text(text, encoding="utf-8")
        write_epub(files["epub"], text)
        write_pdf(files["pdf"], text)

        def build(path: Path, number: int) -> int:
            target = Path(folder) / f"{path.suffix}{number}"
            found = find_documents([path], later=True)
            model.new_memory().save(target)
            with Memory.open(target, "a") as memory:
                added = add_documents(model, memory, found, bar=lambda **options: tqdm(**options | {"disable": True}))
                memory.prepare()
                memory.flush()
            return added.tokens

        def reading(path: Path) -> int:
            return len(model.tokenizer(read_document(path)).input_ids)

        seconds: dict[str, tuple[float, float]] = {}
        tokens: dict[str, int] = {}

        def measure(name: str, work: Callable[[], int]) -> None:
            wall, cpu = time.perf_counter(), time.process_time()
            tokens[name] = work()
            now = time.perf_counter() - wall, time.process_time() - cpu
            seconds[name] = tuple(map(min, now, seconds.get(name, now)))  # type: ignore[assignment]

        for number in range(args.repeats):
            measure("ids", lambda: model.ingest(ids, model.new_memory(), progress=False))
            for kind, path in files.items():
                measure(kind, lambda path=path, number=number: build(path, number))  # type: ignore[misc]
                measure(f"read {kind}", lambda path=path: reading(path))  # type: ignore[misc]
    rate = {name: (wall / tokens[name], cpu / tokens[name]) for name, (wall, cpu) in seconds.items()}
    table = [
        {
            "what": name,
            "tokens": tokens[name],
            "wall_s": seconds[name][0],
            "cpu_s": seconds[name][1],
            "wall_ratio": rate[name][0] / rate["ids"][0],
            "cpu_ratio": rate[name][1] / rate["ids"][1],
        }
        for name in seconds
    ]
    print(f"{'what':<10}{'tokens':>8}{'wall s':>9}{'CPU s':>9}{'a token, wall':>15}{'CPU':>7}  times ids")
    for row in table:
        print(
            f"{row['what']:<10}{row['tokens']:>8,}{row['wall_s']:>9.2f}{row['cpu_s']:>9.2f}{row['wall_ratio']:>15.3f}"
            f"{row['cpu_ratio']:>7.3f}"
        )
    if args.json:
        args.json.write_text(json.dumps({"machine": describe_machine(), "table": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
