"""``fot inspect``."""

import argparse
from typing import Any

from fot.commands.options import add_memory_options, check_plot, check_writable, named_path, open_memory, positive

# Hits recorded of each token, layer and head, for page, JSON and passages; --top may ask for more.
KEPT_HITS = 32


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "inspect",
        help="show which stored tokens an answer attended to",
        description="Answer a prompt and show which stored tokens each token of the answer attended to.",
    )
    parser.add_argument("memory", type=named_path, help="folder of a memory")
    parser.add_argument("prompt", help="text to answer")
    parser.add_argument("--model", metavar="NAME", help="model to ask (default: the model that made the memory)")
    add_memory_options(parser)
    parser.add_argument("--chat", action="store_true", help="put the prompt into the model's chat template")
    parser.add_argument(
        "--max-new-tokens", type=positive, default=32, metavar="N", help="most tokens in the answer (default: 32)"
    )
    parser.add_argument("--layer", type=int, metavar="L", help="show only this memory layer (default: all)")
    parser.add_argument("--head", type=int, metavar="H", help="show only this query head (default: all)")
    parser.add_argument(
        "--top", type=positive, default=3, metavar="K", help="number of hits to show for each token (default: 3)"
    )
    parser.add_argument("--prompt-tokens", action="store_true", help="also show the tokens of the prompt")
    parser.add_argument("--html", type=named_path, metavar="OUT.html", help="file to write a page for the browser to")
    parser.add_argument(
        "--json", type=named_path, metavar="OUT.json", help="file to write everything that was recorded to"
    )
    parser.add_argument(
        "--plot", type=named_path, metavar="OUT.png", help="file to draw the attention by position in memory in"
    )
    parser.set_defaults(command=_inspect)


def _inspect(args: argparse.Namespace) -> int:
    check_writable(args.html, args.json)
    check_plot(args.plot)
    memory, model = open_memory(args)
    from rich.console import Console

    from fot.inspection.page import write_page
    from fot.inspection.plot import position_plot
    from fot.inspection.table import check_choice, hits_table
    from fot.inspection.texts import printable
    from fot.trace import trace

    check_choice("layer", args.layer, model.memory_config.layers)
    check_choice("head", args.head, range(model.config.num_attention_heads))
    kept = max(args.top, KEPT_HITS)
    trace_ = trace(model, args.prompt, memory, max_new_tokens=args.max_new_tokens, top=kept, chat=args.chat)
    table = hits_table(trace_, layer=args.layer, head=args.head, top=args.top, prompt=args.prompt_tokens)
    console = Console(highlight=False)
    console.print(printable(trace_.text.strip()), markup=False)
    console.print(table)
    for passage in trace_.passages(5):
        name = printable(passage.document)
        console.print(f"{passage.share:6.1%}  {name} {passage.start:,}: {passage.text}", markup=False)
    if args.html:
        write_page(args.html, trace_, title=args.prompt, model=args.model)
    if args.json:
        trace_.to_json(args.json)
    if args.plot:
        position_plot(args.plot, trace_)
    return 0
