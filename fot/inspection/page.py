"""A trace as one web page that needs nothing else: no network, no fonts, no scripts of others."""

import html
import json
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from fot.inspection.passages import document_name
from fot.inspection.result import MEMORY_STRIDE, Trace
from fot.inspection.strip import run_of
from fot.inspection.texts import token_texts
from memory import Memory
from memory.atomic import write_bytes

# The data of a page stays below this many bytes: fewer hits of each head are shown if need be.
DATA_BYTES = 1_500_000
HIT_LIMITS = (8, 6, 4, 3, 2, 1)

# Tokens of context on either side of a hit.
CONTEXT = 8

# Documents listed one by one.
DOCUMENTS = 200


def write_page(
    path: Path, trace: Trace, *, title: str = "Inspection", model: str = "", name: Callable[[str], str] = str
) -> None:
    """Write a page that shows a trace: tokens, what each looked at, the whole memory, its documents.

    Args:
        path: of the page.
        trace: what to show.
        title: heading of the page.
        model: name of the model, shown below the heading.
        name: what to call a document.

    Raises:
        OSError: the file cannot be written.
    """
    for limit in HIT_LIMITS:
        data = _embeddable(_renamed(page_data(trace, limit), name) | {"title": title, "model": model})
        if len(data) <= DATA_BYTES:
            break
    parts = files("fot.inspection")
    page = Template((parts / "page.html").read_text("utf-8")).substitute(
        title=html.escape(title),
        style=(parts / "page.css").read_text("utf-8"),
        script=(parts / "page.js").read_text("utf-8"),
        data=data.decode(),
    )
    write_bytes(Path(path), page.encode())


def page_data(trace: Trace, limit: int) -> dict[str, Any]:
    """What the page shows, as JSON; ``limit`` hits of each token, layer and head.

    Hits are [layer, head, region, token in the region, score, kNN score, share, focus score, passage], where layers,
    regions and passages are counted from 0. A region is a stretch of one document around some hits. Passages are
    those of ``Trace.ranked``, in that order.
    """
    found = trace.found
    keep = found.memory[..., :limit] >= 0
    ranks = _ranks(trace, limit)
    regions, where = _regions(trace, limit, ranks)
    queries = []
    for query in range(len(found.positions)):
        hits = []
        for layer, head, rank in np.argwhere(keep[query]).tolist():
            at = (query, layer, head, rank)
            numbers = (found.score[at], found.knn_score[at], found.share[at], found.focus_score[at])
            slot = int(found.memory[at]), int(found.slot[at])
            hits.append([layer, head, *where[slot], *(_short(number) for number in numbers), int(ranks[at])])
        local = [[_short(share) for share in heads] for heads in found.local[query]]
        queries.append({"position": int(found.positions[query]), "local": local, "hits": hits})
    return {
        "layers": list(trace.layers),
        "heads": int(found.local.shape[2]),
        "tokens": [[token.text, int(token.is_generated)] for token in trace.tokens],
        "queries": queries,
        "regions": regions,
        "limit": limit,
        "complete": trace.complete,
        "coverage": _short(trace.coverage),
        "memories": [_strip(trace, number, memory) for number, memory in enumerate(trace.memories) if len(memory)],
        "documents": _documents(trace),
    }


def _renamed(data: dict[str, Any], name: Callable[[str], str]) -> dict[str, Any]:
    """The same with other names of documents."""
    for region in data["regions"]:
        region["document"] = name(region["document"])
    for memory in data["memories"]:
        memory["boundaries"] = [[name(document), start] for document, start in memory["boundaries"]]
    for document in data["documents"]:
        document["name"] = name(document["name"])
    return data


def _ranks(trace: Trace, limit: int) -> np.ndarray:
    """(Q, L, H, limit) int64: which passage of ``Trace.ranked`` holds each hit; -1 for no hit."""
    memory, slot = trace.found.memory[..., :limit], trace.found.slot[..., :limit]
    ranks = np.full(memory.shape, -1)
    for query, hit in enumerate(memory >= 0):
        passages = [
            (number * MEMORY_STRIDE + start, rank) for rank, (number, start, _, _) in enumerate(trace.ranked(query))
        ]
        if passages:  # they do not overlap
            starts, order = np.asarray(sorted(passages)).T
            slots = (memory[query] * MEMORY_STRIDE + slot[query])[hit]
            ranks[query][hit] = order[np.searchsorted(starts, slots, side="right") - 1]
    return ranks


def _regions(
    trace: Trace, limit: int, ranks: np.ndarray
) -> tuple[list[dict[str, Any]], dict[tuple[int, int], tuple[int, int]]]:
    """Stretches of text around the hits shown, and (memory, slot) -> (region, token in it)."""
    regions: list[dict[str, Any]] = []
    where = {}
    memory_of, slot_of = trace.found.memory[..., :limit], trace.found.slot[..., :limit]
    shown = {(query, rank) for query, *_, rank in zip(*np.nonzero(ranks >= 0), ranks[ranks >= 0], strict=True)}
    passages = {trace.ranked(query)[rank][:3] for query, rank in shown}
    for number, memory in enumerate(trace.memories):
        # Whole passages: the page merges their hits, which lie in one region so.
        inside = [np.arange(start, stop) for which, start, stop in passages if which == number]
        slots = np.unique(np.concatenate([slot_of[memory_of == number], *inside]))
        runs = memory.document_runs()
        open_until, run = 0, -1
        for slot, its_run in zip(slots.tolist(), run_of(runs, slots).tolist(), strict=True):
            document, first, last = runs[its_run]
            if its_run != run or slot - CONTEXT > open_until:
                regions.append({"memory": number, "document": document_name(document, own=number == trace.own)})
                regions[-1]["start"] = max(first, slot - CONTEXT)
            open_until, run = min(last, slot + CONTEXT + 1), its_run
            regions[-1]["stop"] = open_until
            where[number, slot] = (len(regions) - 1, slot - regions[-1]["start"])
    for region in regions:
        _add_text(region, trace.memories[region["memory"]], trace.tokenizer)
    return regions, where


def _add_text(region: dict[str, Any], memory: Memory, tokenizer: Any) -> None:
    start, stop = region["start"], region.pop("stop")
    region["texts"] = token_texts(tokenizer, memory.token_ids(slice(start, stop)).tolist())
    first, last = memory.source(start).span, memory.source(stop - 1).span
    region["span"] = [first[0], last[1]] if first and last else None


def _strip(trace: Trace, number: int, memory: Memory) -> dict[str, Any]:
    """Where attention went in one memory, a layer a row."""
    strip = trace.strips[number]
    used = -(-len(memory) // strip.width)
    return {
        "number": number,
        "own": number == trace.own,
        "tokens": len(memory),
        "width": strip.width,
        "mass": [[_short(mass) for mass in layer[:used]] for layer in strip.bins],
        "boundaries": [
            [document_name(document, own=number == trace.own), start]
            for document, start, _ in memory.document_runs()[:DOCUMENTS]
        ],
    }


def _documents(trace: Trace) -> list[dict[str, Any]]:
    """Tokens and mass (a number a layer) of each document, most mass first; the lightest added up in one."""
    tokens: dict[str, int] = {}
    masses: dict[str, np.ndarray] = {}
    for number, (memory, strip) in enumerate(zip(trace.memories, trace.strips, strict=True)):
        for document, start, stop in memory.document_runs():
            name = document_name(document, own=number == trace.own)
            tokens[name] = tokens.get(name, 0) + stop - start
            masses.setdefault(name, np.zeros(len(trace.layers)))
        for document, mass in strip.documents.items():
            masses[document_name(document, own=number == trace.own)] += mass
    order = sorted(masses, key=lambda name: -masses[name].sum())
    rows = [(name, tokens[name], masses[name]) for name in order[:DOCUMENTS]]
    rest = order[DOCUMENTS:]
    if rest:
        mass = np.sum([masses[name] for name in rest], axis=0)
        rows.append((f"{len(rest):,} more documents", sum(tokens[name] for name in rest), mass))
    return [{"name": name, "tokens": size, "mass": [_short(one) for one in mass]} for name, size, mass in rows]


def _short(number: float) -> float:
    """Three significant digits are what the page shows."""
    return float(f"{number:.3g}")


def _embeddable(data: dict[str, Any]) -> bytes:
    """JSON that can stand in a script element: nothing in it ends the element or begins a comment."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text.encode("utf-8", errors="replace")  # names of files may hold what is no Unicode
