"""``fot serve`` and ``fot mcp``: memories for other programs."""

import argparse
import os
from pathlib import Path
from typing import Any

from fot.commands.options import add_memory_options, load, load_for, named_path, positive, whole
from fot.serve.errors import LOOPBACK, MOST_WAITING

KEY_VARIABLE = "FOT_API_KEY"


def add(commands: Any) -> None:
    serve = commands.add_parser(
        "serve",
        help="serve memories to programs that speak the OpenAI interface, with a web page",
        description="Serve memories over HTTP: each is a model of the OpenAI interface, and the page at / asks them. "
        "The server changes no memory. If another command changes one (fot memory sync), the next question reads it as "
        "it is then.",
    )
    _add_memories(serve)
    serve.add_argument("--host", default="127.0.0.1", metavar="NAME",
                       help="address to listen at (default: 127.0.0.1; any other needs a key)")  # fmt: skip
    serve.add_argument("--port", type=whole, default=8321, metavar="N", help="port to listen at (default: 8321)")
    serve.add_argument("--api-key", metavar="KEY",
                       help=f"key that clients must give (default: ${KEY_VARIABLE})")  # fmt: skip
    serve.add_argument("--waiting", type=whole, default=MOST_WAITING, metavar="N",
                       help="requests that may wait for the model; more get status 429 "
                       f"(default: {MOST_WAITING})")  # fmt: skip
    serve.add_argument("--max-new-tokens", type=positive, default=512, metavar="N",
                       help="most tokens in an answer, where the client does not say (default: 512)")  # fmt: skip
    serve.add_argument("--new", type=named_path, metavar="FOLDER",
                       help="folder for memories made from uploads (default: $FOT_MEMORIES, or "
                       "~/.local/share/fot/memories)")  # fmt: skip
    serve.add_argument("--no-uploads", action="store_true", help="make no memories from uploads")
    serve.set_defaults(command=_serve)
    mcp = commands.add_parser(
        "mcp",
        help="serve memories to assistants over the Model Context Protocol",
        description="Serve memories over the Model Context Protocol, on standard input and output: tools that ask a "
        "memory and find passages in it. The memories do not change.",
    )
    _add_memories(mcp)
    mcp.set_defaults(command=_mcp)


def _add_memories(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("memories", nargs="*", metavar="MEMORY",
                        help="folder of a memory, or NAME=FOLDER to serve it under another name")  # fmt: skip
    parser.add_argument("--model", metavar="NAME",
                        help="model to use (default: the models that made the memories; smollm2-135m-fot if there are "
                        "none)")  # fmt: skip
    add_memory_options(parser)


def _library(args: argparse.Namespace) -> Any:
    """The memories, each model loaded once, and the models alone."""
    from fot.hub import memory_folder
    from fot.memories import short_name
    from fot.serve.library import Library, OnDisk

    library, models = Library(), dict[str, Any]()
    for given in args.memories:
        name, _, folder = given.rpartition("=") if "=" in given and not Path(given).exists() else ("", "", given)
        place = OnDisk(memory_folder(Path(folder)), index=args.index, top_k=args.top_k)
        memory = place.open()
        wanted = argparse.Namespace(**vars(args) | {"memory": Path(folder)})
        known = f"{args.model or memory.metadata.get('model')} {memory.metadata.get('memory')}"
        if known not in models:
            models[known] = load_for(wanted, memory)
        models[known].check_memory(memory)
        library.add(name or short_name(folder), models[known], memory, place)
    if not models:
        args.model = args.model or "smollm2-135m-fot"
        models[args.model] = load(args)
    for model in models.values():
        name = short_name(model.loaded_as)
        if name not in library:
            library.add(name, model, None)
    return library


def _serve(args: argparse.Namespace) -> int:
    try:
        import uvicorn

        from fot.serve.app import create_app
        from fot.serve.server import Settings
    except ImportError as error:
        raise ImportError(f"fot serve needs {error.name}: pip install 'fot[serve]'") from error
    from fot.memories import memories_dir

    key = args.api_key or os.environ.get(KEY_VARIABLE) or None
    if args.host not in LOOPBACK and key is None:
        raise ValueError(
            f"{args.host} may be reached from other machines: give a key with --api-key or ${KEY_VARIABLE}, or serve "
            "this machine alone (leave out --host)"
        )
    library = _library(args)
    new = None if args.no_uploads else args.new or memories_dir()
    private = [str(Path(given.rpartition("=")[2]).absolute()) for given in args.memories]
    settings = Settings(key, args.waiting, args.max_new_tokens, new)
    settings.private_paths += private
    host = f"[{args.host}]" if ":" in args.host else args.host
    print(f"serving {', '.join(entry.name for entry in library.entries())} at http://{host}:{args.port}", flush=True)
    uvicorn.run(
        create_app(library, settings),
        host=args.host,
        port=args.port,
        log_level="info" if args.verbose else "warning",
        timeout_graceful_shutdown=5,  # then answers that are on their way are stopped
    )
    return 0


def _mcp(args: argparse.Namespace) -> int:
    try:
        from fot.serve.mcp import create_server
    except ImportError as error:
        raise ImportError(f"fot mcp needs {error.name}: pip install 'fot[mcp]'") from error
    create_server(_library(args)).run("stdio")
    return 0
