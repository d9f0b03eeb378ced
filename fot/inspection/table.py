"""A trace as the paper's inspection table: what each token looked at, in its context (arXiv 2307.03170)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from rich import box
from rich.table import Table
from rich.text import Text

from fot.inspection.passages import make_passage
from fot.inspection.result import Trace
from fot.inspection.texts import one_line, printable

# Tokens shown on either side of a hit.
CONTEXT = 4


@dataclass(frozen=True)
class Row:
    """One hit of one query token: its place in ``Trace.found`` (query, layer, head, rank)."""

    query: int
    layer: int
    head: int
    rank: int


def hits_table(
    trace: Trace, *, layer: int | None = None, head: int | None = None, top: int = 3, prompt: bool = False
) -> Table:
    """The hits with most attention, for each token of the answer when it was chosen.

    Args:
        trace: what to show.
        layer: a memory layer; None for all.
        head: a query head; None for all.
        top: hits shown for each token; a slot that several heads hit is shown for the head that looks most at it.
        prompt: show prompt tokens, too, when they were read.

    Raises:
        ValueError: a layer or head that the trace does not have.
    """
    layers, heads = _chosen("layer", layer, trace.layers), _chosen("head", head, range(trace.found.local.shape[2]))
    # No padding beside the box's own spaces, and no column cut short: it must fit 80 characters.
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=0)
    table.add_column("token", overflow="fold", min_width=8)
    table.add_column("on\nmemory", justify="right", no_wrap=True)
    table.add_column("retrieved, in its context", overflow="fold", ratio=1)
    for name in ("kNN", "focus", "attention", "layer.\nhead"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("document, position", overflow="fold", min_width=10)
    for query, position in enumerate(trace.found.positions.tolist()):
        chooses = position + 1 < len(trace.tokens) and trace.tokens[position + 1].is_generated
        if chooses:
            _add_rows(table, trace, query, "", position + 1, _strongest(trace, query, layers, heads, top))
        elif prompt:
            _add_rows(table, trace, query, "read ", position, _strongest(trace, query, layers, heads, top))
    return table


def check_choice(what: str, one: int | None, all_: Sequence[int]) -> None:
    """Raise ValueError if ``one`` layer or head is wanted and not there."""
    if one is not None and one not in all_:
        raise ValueError(f"{what} {one} is not among those traced: choose one of {', '.join(map(str, all_))}")


def _chosen(what: str, one: int | None, all_: Sequence[int]) -> list[int]:
    """Places of the wanted layers or heads."""
    check_choice(what, one, all_)
    return list(range(len(all_))) if one is None else [list(all_).index(one)]


def _strongest(trace: Trace, query: int, layers: list[int], heads: list[int], top: int) -> list[Row]:
    share = trace.found.share[query][np.ix_(layers, heads)]  # (l, h, K)
    rows: list[Row] = []
    seen: set[tuple[int, int]] = set()
    for flat in np.argsort(-share, axis=None, kind="stable"):
        layer, head, rank = (int(number) for number in np.unravel_index(flat, share.shape))
        row = Row(query, layers[layer], heads[head], rank)
        at = (row.query, row.layer, row.head, row.rank)
        slot = (int(trace.found.memory[at]), int(trace.found.slot[at]))
        if slot[0] < 0 or len(rows) == top:
            break
        if slot not in seen:
            seen.add(slot)
            rows.append(row)
    return rows


def _add_rows(table: Table, trace: Trace, query: int, verb: str, place: int, rows: list[Row]) -> None:
    """The hits of one token; what they have in common stands in the first row."""
    name = verb + repr(trace.tokens[place].text)[1:-1]
    on_memory = f"{1 - trace.found.local[query].mean():.1%}"
    if not rows:
        table.add_row(Text(name), on_memory, "nothing retrieved", end_section=True)
    for number, row in enumerate(rows):
        found, at = trace.found, (row.query, row.layer, row.head, row.rank)
        which, slot = int(found.memory[at]), int(found.slot[at])
        passage = make_passage(
            trace.memories[which], slot, slot + 1, 0.0, trace.tokenizer, own=which == trace.own, context=CONTEXT
        )
        shown = Text(passage.text)
        shown.stylize("bold reverse", *passage.marked)
        table.add_row(
            Text(one_line(name) or name, style="bold") if number == 0 else "",
            on_memory if number == 0 else "",
            shown,
            f"{found.knn_score[at]:.1%}",
            f"{found.focus_score[at]:.2f}",
            f"{found.share[at]:.1%}",
            f"{trace.layers[row.layer]}.{row.head}",
            Text(f"{printable(passage.document)}, {slot:,}"),
            end_section=number == len(rows) - 1,
        )
