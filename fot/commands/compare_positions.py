"""``fot compare --positions``."""

import argparse
import hashlib
from pathlib import Path

from fot.commands.options import check_plot, find_device


def compare_positions(args: argparse.Namespace) -> int:
    """Train a small decoder with each kind of positions, and read texts longer than those it was trained on."""
    from fot.compare.positions import KINDS

    kinds = list(KINDS) if args.methods in (None, "all") else [name.strip() for name in args.methods.split(",")]
    for name in kinds:
        if name not in KINDS:
            raise ValueError(f"{name!r} is no kind of positions: choose from {', '.join(KINDS)}, or all")
    paths = [*([] if args.model is None else [Path(args.model)]), *args.files]
    if not paths:
        raise ValueError("--positions trains on text: name a text")
    from fot.compare import panel
    from fot.compare.decoder import Size
    from fot.compare.results import append, open_folder
    from fot.compare.show import positions_picture, positions_table
    from fot.files import check_utf8
    from fot.machine import describe_machine
    from fot.progress import progress_bar
    from memory.atomic import write_json

    for path in paths:
        check_utf8(path)
    text = b"\n".join(path.read_bytes() for path in paths)
    lengths = args.lengths or [512, 1024, 2048, 4096, 8192, 16384]
    size = Size(longest=max(lengths))
    settings = {
        "trained": size.trained, "steps": args.steps, "seed": args.seed, "lengths": sorted(lengths),
        "files": [str(path) for path in paths], "text": hashlib.sha256(text).hexdigest(),
    }  # fmt: skip
    args.out.mkdir(parents=True, exist_ok=True)
    picture = args.out / "positions.png"
    check_plot(picture)
    device = find_device(args)
    done = {
        line["kind"]: [{int(length): value for length, value in line[name].items()} for name in ("plain", "memory")]
        for line in open_folder(args.out, settings, resume=args.resume)
    }

    def report(kind: str, read: panel.Read) -> None:
        append(args.out, {"kind": kind, "plain": read[0], "memory": read[1]})

    todo = sum(kind not in done for kind in kinds)
    with progress_bar(total=todo * args.steps, unit="step", desc="positions") as bar:
        found = panel.run(
            text, kinds, lengths, steps=args.steps, size=size, seed=args.seed, progress=bar, device=device, done=done,
            report=report,
        )  # fmt: skip
    write_json(args.out / "positions.json", {**settings, "machine": describe_machine(), **found})
    print(positions_table(found["kinds"], size.trained, args.steps))
    positions_picture(picture, found["kinds"], size.trained)
    print(f"all figures: {args.out / 'positions.json'}; picture: {picture.name}")
    if found["interrupted"]:
        print("interrupted: finished kinds only; go on with --resume")
    return 130 if found["interrupted"] else 0
