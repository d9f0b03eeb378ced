"""``fot memory``."""

import argparse
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fot.commands import memory_check
from fot.commands.options import (
    add_memory_options,
    check_writable,
    load,
    load_for,
    load_tokenizer,
    named_path,
    open_memory,
)


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "memory",
        help="create and maintain memories: build, append, sync, info, drop, compact, check, verify",
        description="Create and maintain memories. A memory is a folder: read documents into it once, then ask "
        "about them with fot ask as often as you like.",
    )
    kinds = parser.add_subparsers(title="what to do", required=True, metavar="WHAT")
    build = kinds.add_parser("build", help="read documents into a new memory", description="Read documents into a new "
                             "memory. A document is text, Markdown, source code, PDF, HTML, EPUB, DOCX, a Jupyter "
                             "notebook, JSON Lines, a message or a mailbox. A folder stands for all documents in "
                             "it: files that are hidden, ignored (.gitignore, .fotignore), secret or generated are "
                             "left out.")  # fmt: skip
    build.add_argument("memory", type=named_path, metavar="OUT", help="folder to create")
    _add_document_options(build)
    build.add_argument("--model", default="smollm2-135m-fot", metavar="NAME",
                       help="alias, folder, GGUF file or hub id (default: smollm2-135m-fot)")  # fmt: skip
    build.set_defaults(command=_build)
    append = kinds.add_parser(
        "append",
        help="add documents; skip those that the memory holds already",
        description="Add documents. Documents that the memory holds already are skipped, "
        "and a document that was interrupted is continued.",
    )
    append.add_argument("memory", type=named_path, metavar="MEMORY")
    _add_document_options(append)
    append.add_argument("--model", metavar="NAME", help="model to use (default: the model that made the memory)")
    append.set_defaults(command=_append)
    sync = kinds.add_parser(
        "sync",
        help="read again what has changed on disk",
        description="Read again what has changed in the files and folders that a memory was made of: changed documents "
        "are read again, new ones are added, those that are gone are dropped, and those that moved are renamed.",
    )
    sync.add_argument("memory", type=named_path, metavar="MEMORY")
    sync.add_argument("--dry-run", action="store_true", help="list what would be done, and do nothing")
    sync.add_argument("--model", metavar="NAME", help="model to use (default: the model that made the memory)")
    add_memory_options(sync)
    sync.set_defaults(command=_sync)
    info = kinds.add_parser("info", help="show what a memory holds", description="Show what a memory holds.")
    info.add_argument("memory", type=named_path, metavar="MEMORY")
    info.add_argument("--json", type=named_path, metavar="OUT", help="also write it to this file")
    drop = kinds.add_parser(
        "drop", help="remove documents", description="Remove documents. Their space is freed by compact."
    )
    drop.add_argument("memory", type=named_path, metavar="MEMORY")
    drop.add_argument("names", nargs="+", metavar="NAME", help="name of a document, as info shows it")
    compact = kinds.add_parser("compact", help="free the space of dropped documents",
                               description="Write the memory anew, without the dropped documents.")  # fmt: skip
    compact.add_argument("memory", type=named_path, metavar="MEMORY")
    compact.add_argument("--by-cluster", action="store_true",
                         help="write vectors cluster after cluster, for a memory larger than RAM")  # fmt: skip
    memory_check.add(kinds)
    verify = kinds.add_parser(
        "verify",
        help="compare every byte with the checksums",
        description="Compare every byte with the checksums. The exit status is 1 if one differs.",
    )
    verify.add_argument("memory", type=named_path, metavar="MEMORY")
    for command, function in ((info, _info), (drop, _drop), (compact, _compact), (verify, _verify)):
        command.add_argument("-v", "--verbose", action="store_true", help="print what is chosen automatically, and why")
        command.set_defaults(command=function)


def _add_document_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", type=named_path, nargs="+", metavar="FILE", help="files and folders to read")
    parser.add_argument("--include", nargs="+", default=[], metavar="GLOB",
                        help="read only these files from folders, for example --include '*.py' '*.md'")  # fmt: skip
    parser.add_argument(
        "--exclude", nargs="+", default=[], metavar="GLOB", help="skip these files and folders inside folders"
    )
    parser.add_argument("--encoding", metavar="NAME",
                        help="encoding of text files without a byte order mark (default: detected)")  # fmt: skip
    parser.add_argument("--field", metavar="NAME",
                        help="field of the objects in JSON Lines files to read (default: text)")  # fmt: skip
    parser.add_argument("--ignored", action="store_true",
                        help="also read what .gitignore and .fotignore name")  # fmt: skip
    parser.add_argument("--secrets", action="store_true", help="also read .env, key files and the like from folders")
    parser.add_argument("--generated", action="store_true",
                        help="also read minified and generated files, node_modules and the like")  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="list what would be read, with its tokens; read nothing")
    add_memory_options(parser)


def _options(args: argparse.Namespace) -> Any:
    from fot.documents import Options

    return Options(args.encoding, args.field, args.ignored, args.secrets, args.generated)


def _build(args: argparse.Namespace) -> int:
    from fot import __version__
    from fot.documents import find_documents

    if (args.memory / "manifest.json").exists():
        raise ValueError(f"{args.memory} is already a memory: add to it with fot memory append, or choose another name")
    if args.memory.exists() and not args.memory.is_dir():
        raise ValueError(f"{args.memory} is a file; a memory is a folder: choose another name")
    check_writable(args.memory / "manifest.json" if args.memory.exists() else args.memory)
    found = find_documents(args.files, args.include, args.exclude, _options(args), later=True)
    if args.dry_run:
        return _list_documents(found, load_tokenizer(args.model))
    model = load(args)
    from memory import Memory

    empty = model.new_memory()
    empty.metadata["fot"] = __version__
    empty.save(args.memory)
    with Memory.open(args.memory, "a") as memory:
        return _read(args, model, memory, found)


def _append(args: argparse.Namespace) -> int:
    from fot.documents import find_documents

    found = find_documents(args.files, args.include, args.exclude, _options(args), later=True)
    if args.dry_run:
        from fot.hub import memory_folder
        from memory import Memory

        made_by = args.model or Memory.open(memory_folder(args.memory)).metadata.get("model")
        return _list_documents(found, load_tokenizer(made_by))
    memory, model = open_memory(args, "a")
    with memory:
        return _read(args, model, memory, found)


def _list_documents(found: Any, tokenizer: Any) -> int:
    """Print what would be read, with the tokens of each, and what not."""
    from io import StringIO

    from fot.ingest import text_pieces
    from fot.inspection.texts import one_line

    total = listed = 0
    for path in found.paths:
        try:
            text = found.text(path)
        except (ValueError, OSError, ImportError) as error:
            found.leave_out(path, error)
            continue
        listed += 1
        tokens = sum(len(piece.ids) for piece in text_pieces(StringIO(text, newline=""), len(text), tokenizer))
        total += tokens
        print(f"{tokens:>11,}  {one_line(path.as_posix())}")
    print(f"{total:>11,}  tokens in {listed:,} documents; nothing was read into a memory")
    _say_left_out(found)
    return 0


def _say_left_out(found: Any) -> None:
    from fot.documents import describe_left_out
    from fot.inspection.texts import one_line

    for path, encoding in found.detected.items():
        print(f"{one_line(path.as_posix())} was read as {encoding}; if that is wrong, say --encoding")
    if found.left_out:
        print(f"left out: {one_line(describe_left_out(found))}")


def _read(args: argparse.Namespace, model: Any, memory: Any, found: Any) -> int:
    """Read documents into an open memory, with one bar over all; then say what it holds."""
    from fot.documents import add_documents, note_sources

    note_sources(memory, args.memory, args.files, args.include, args.exclude, found.options)
    with _going_on(memory, _to_go_on(args)) as status:
        added = add_documents(model, memory, found)
        _finish(memory, added)
    print(f"{args.memory}: {len(memory.documents()):,} documents, {memory.describe()}")
    _say_left_out(found)
    return status[0]


def _finish(memory: Any, added: Any) -> None:
    memory.prepare()  # asking needs the index; making it is part of building
    memory.flush()
    same = f"; {added.same:,} documents were already in the memory" if added.same else ""
    print(f"{added.tokens:,} tokens read{same}")


@contextmanager
def _going_on(memory: Any, command: str) -> Iterator[list[int]]:
    """Within, Ctrl-C leaves a memory with all that was read; gives the exit status, in a list."""
    status = [0]
    try:
        yield status
    except KeyboardInterrupt:
        memory.flush()
        print(f"interrupted; to continue, run: {command}", file=sys.stderr)
        status[0] = 130


def _sync(args: argparse.Namespace) -> int:
    from fot.documents import carry_out, plan_sync
    from fot.hub import memory_folder
    from memory import Memory

    mode = "r" if args.dry_run else "a"
    args.memory = memory_folder(args.memory, mode)
    with Memory.open(args.memory, mode, index=args.index, top_k=args.top_k) as memory:
        plan, status = plan_sync(memory, args.memory), [0]
        _print_plan(plan)
        if plan and not args.dry_run:
            with _going_on(memory, shlex.join(["fot", "memory", "sync", str(args.memory)])) as status:
                _finish(memory, carry_out(plan, load_for(args, memory), memory))
            print(f"{args.memory}: {len(memory.documents()):,} documents, {memory.describe()}")
        else:
            print(f"{args.memory}: {'nothing was done' if plan else 'up to date'}")
    _say_left_out(plan.left_out())
    return status[0]


def _print_plan(plan: Any) -> None:
    from fot.inspection.texts import one_line

    for what, names in (("changed", plan.changed), ("new", plan.new), ("gone", plan.gone)):
        for name in names:
            print(f"{what + ':':9}{one_line(name)}")
    for old, new in plan.rename.items():
        print(f"{'moved:':9}{one_line(old)} -> {one_line(new)}")


def _to_go_on(args: argparse.Namespace) -> str:
    """The command that reads the rest of what was asked for."""
    parts = ["fot", "memory", "append", args.memory, *args.files]
    for option, globs in (("--include", args.include), ("--exclude", args.exclude)):
        parts += [option, *globs] if globs else []
    for option, value in (("--encoding", args.encoding), ("--field", args.field)):
        parts += [option, value] if value else []
    parts += [f"--{name}" for name in ("ignored", "secrets", "generated") if getattr(args, name)]
    return shlex.join(map(str, parts))


def _info(args: argparse.Namespace) -> int:
    check_writable(args.json)
    from fot.hub import memory_folder
    from memory import Memory
    from memory.atomic import write_json
    from memory.manifest import read_manifest

    folder = memory_folder(args.memory)
    described = _describe(Memory.open(folder), read_manifest(folder))
    _print(described)
    if args.json:
        write_json(args.json, described)
    return 0


def _drop(args: argparse.Namespace) -> int:
    from fot.hub import memory_folder
    from memory import Memory

    with Memory.open(memory_folder(args.memory, "a"), "a") as memory:
        known = memory.documents()
        for name in args.names:
            if name not in known:
                raise ValueError(f"{args.memory} holds no document {name!r}, so nothing was dropped: fot memory info "
                                 "lists them")  # fmt: skip
        dropped = memory.drop_documents(args.names)
    print(f"{dropped:,} tokens dropped; fot memory compact {args.memory} frees their space")
    return 0


def _compact(args: argparse.Namespace) -> int:
    from fot.hub import memory_folder
    from fot.progress import progress_bar
    from memory import Memory
    from memory.manifest import read_manifest

    with Memory.open(memory_folder(args.memory, "a"), "a") as memory:
        before = sum(part.bytes for part in read_manifest(args.memory).files())
        with progress_bar(total=len(memory), unit="tok", unit_scale=True, desc="compact") as bar:
            memory.compact(by_cluster=args.by_cluster, progress=bar.update)
    after = sum(part.bytes for part in read_manifest(args.memory).files())
    print(f"{before / 1e6:,.1f} MB before, {after / 1e6:,.1f} MB now")
    return 0


def _verify(args: argparse.Namespace) -> int:
    from fot.hub import memory_folder
    from memory.disk import verify
    from memory.manifest import read_manifest

    folder = memory_folder(args.memory)
    problems = verify(folder)
    for problem in problems:
        print(f"fot: {problem}", file=sys.stderr)
    if not problems:
        print(f"{args.memory}: {len(read_manifest(folder).files()):,} parts, all unchanged")
    return 1 if problems else 0


def _describe(memory: Any, manifest: Any) -> dict[str, Any]:
    from fot.documents.record import FILES
    from fot.fingerprint import MADE_WITH

    counts = memory.documents()
    return {
        "tokens": len(memory),
        "bytes": sum(part.bytes for part in manifest.files()),
        "parts": len(manifest.files()),
        "dropped_tokens": manifest.tokens() - len(memory),
        "documents": [
            {"name": name, "tokens": counts[name], "complete": note.complete, "sha256": note.sha256}
            for name, note in memory.notes.items()
        ],
        "layers": list(memory.layers),
        "num_key_value_heads": memory.num_key_value_heads,
        "head_dim": memory.head_dim,
        "key_dtype": memory.key_dtype,
        "value_dtype": memory.value_dtype,
        "index": manifest.index,
        "top_k": memory.top_k,
        "by_cluster": manifest.by_cluster,
        "fingerprint": memory.fingerprint,
        "metadata": {name: value for name, value in memory.metadata.items() if name not in (MADE_WITH, FILES)},
        "written_by": manifest.written_by,
        "created": manifest.created,
        "changed": manifest.changed,
    }


def _print(described: dict[str, Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from fot.inspection.texts import one_line

    table = Table(box=box.SIMPLE_HEAD, show_header=False)
    rows = {
        "tokens": f"{described['tokens']:,}",
        "size": f"{described['bytes'] / 1e6:,.1f} MB in {described['parts']:,} parts",
        "dropped": f"{described['dropped_tokens']:,} tokens, until fot memory compact frees their space",
        "layers": f"{', '.join(map(str, described['layers']))}; {described['num_key_value_heads']} key-value heads of "
        f"{described['head_dim']}",
        "stored as": f"{described['key_dtype']} keys, {described['value_dtype']} values, index {described['index']}"
        + (", cluster after cluster" if described["by_cluster"] else ""),
        "model": str(described["metadata"].get("model", "not known")),
        "weights": described["fingerprint"] or "not known",
        "written": f"{described['changed']} by {described['written_by']}",
    }
    for name, value in rows.items():
        table.add_row(name, one_line(value))
    documents = Table(box=box.SIMPLE_HEAD)
    documents.add_column("document", overflow="fold")
    documents.add_column("tokens", justify="right")
    for document in described["documents"]:
        documents.add_row(
            one_line(document["name"]), f"{document['tokens']:,}" + ("" if document["complete"] else ", incomplete")
        )
    console = Console()
    console.print(table, markup=False)
    console.print(documents, markup=False)
