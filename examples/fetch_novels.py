"""Fetch Jane Austen's six novels as plain text files: prose for the shipped recipe, and a book to question.

    pip install rdata
    apt-get download r-cran-janeaustenr        # Debian or Ubuntu; no root needed
    python examples/fetch_novels.py r-cran-janeaustenr_*.deb novels

The package carries the texts of Project Gutenberg, in R's own format, which ``rdata`` reads. Any other folder of
UTF-8 text files serves a recipe as well.
"""

import argparse
import struct
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

import rdata

TITLES = {
    "emma": "Emma",
    "mansfieldpark": "Mansfield Park",
    "northangerabbey": "Northanger Abbey",
    "persuasion": "Persuasion",
    "prideprejudice": "Pride and Prejudice",
    "sensesensibility": "Sense and Sensibility",
}


def read_lazy_data(folder: Path) -> dict[str, list[str]]:
    """The character vectors of an R package's lazy-load data base (``Rdata.rdx`` with offsets, ``Rdata.rdb``)."""
    places = rdata.read_rds(folder / "Rdata.rdx")["variables"]
    data = (folder / "Rdata.rdb").read_bytes()
    found = {}
    for name, (start, length) in places.items():
        block = data[int(start) : int(start) + int(length)]
        (size,) = struct.unpack(">I", block[:4])
        raw = zlib.decompress(block[4:])
        if len(raw) != size:
            raise ValueError(f"{name} unpacks to {len(raw)} bytes, {size} are announced: fetch the package again")
        found[str(name)] = list(rdata.conversion.convert(rdata.parser.parse_data(raw)))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("package", type=Path, help="the .deb, or the folder of an installed janeaustenr")
    parser.add_argument("out", type=Path, help="folder for the text files")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.package
        if folder.is_file():
            subprocess.run(["dpkg", "-x", str(folder), scratch], check=True)
            folder = Path(scratch) / "usr/lib/R/site-library/janeaustenr"
        novels = read_lazy_data(folder / "data")
    given.out.mkdir(parents=True, exist_ok=True)
    for name, title in TITLES.items():
        text = "\n".join(line for line in novels[name] if isinstance(line, str)) + "\n"
        file = given.out / f"{title.lower().replace(' ', '_')}.txt"
        file.write_text(text, encoding="utf-8")
        print(f"{file}: {len(text):,} characters")
    return 0


if __name__ == "__main__":
    sys.exit(main())
