"""Results as tables."""

import math
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.table import Table

from fot.evaluation.drawing import render
from fot.evaluation.growing import DIFFERENCES


def passkey_table(result: dict[str, Any]) -> str:
    """The passkey results as a table: one row a length, the plain model on the right."""
    table = Table(box=box.SIMPLE_HEAD, title=f"passkey, {result['model']} ({result['dtype']}), seed {result['seed']}")
    for name in ("tokens", "accuracy", "ingest tok/s", "s/trial", "memory MB", "peak RSS MB"):
        table.add_column(name, justify="right")
    table.add_column("without memory", justify="right")
    table.add_column("s/trial", justify="right")
    with_memory = {entry["length"]: entry for entry in result["results"]}
    without = {entry["length"]: entry for entry in result["baseline"]}
    for length in sorted(with_memory | without):
        ours, plain = with_memory.get(length), without.get(length)
        table.add_row(
            f"{length:,}",
            _accuracy(ours),
            _number(ours and ours["ingest_tokens_per_second"], "{:,.0f}"),
            _number(ours and ours["seconds_per_trial"], "{:.1f}"),
            _number(ours and ours["memory_bytes"] / 1e6, "{:,.1f}"),
            _number(ours and ours["peak_rss_bytes"] / 1e6, "{:,.0f}"),
            _accuracy(plain),
            _number(plain and plain["seconds_per_trial"], "{:.1f}"),
        )
    return render(table) + _note(result)


def dictionary_table(result: dict[str, Any]) -> str:
    """Dictionary lookup as a table: one row a length."""
    table = Table(box=box.SIMPLE_HEAD, title=f"dictionary lookup, {result['model']}, seed {result['seed']}")
    for name in ("tokens", "answer tokens right", "answers right", "answers", "seconds", "memory MB", "peak RSS MB"):
        table.add_column(name, justify="right")
    for entry in result["results"]:
        table.add_row(
            f"{entry['length']:,}",
            f"{entry['accuracy']:.1%}",
            f"{entry['exact']:.1%}",
            str(entry["answers"]),
            f"{entry['seconds']:.0f}",
            f"{entry['memory_bytes'] / 1e6:,.0f}",
            f"{entry['peak_rss_bytes'] / 1e6:,.0f}",
        )
    return render(table) + _note(result)


def needles_table(result: dict[str, Any]) -> str:
    """Needles as a table: one row a kind; for each length with the memory and, where it can, with the whole text.

    In chat, a whole text is only asked with the beginning of the answer given; so that share is shown for all.
    """
    chat = result["chat"]
    names = ("correct", "begun", "tokens_right") if chat else ("correct", "tokens_right")
    wholly = (None, *names[1:]) if chat else names
    told = "answers right / with their beginning given / tokens of them" if chat else "answers right / tokens of them"
    title = f"needles, {result['model']} ({result['dtype']}), seed {result['seed']}: {told}"
    table = Table(box=box.SIMPLE_HEAD, title=title)
    table.add_column("needle")
    entries = result["results"]
    for entry in entries:
        table.add_column(f"{entry['length']:,} tokens", justify="right")
        if entry["kinds"]["all"]["whole_text"]:
            table.add_column("in one context", justify="right")
    table.add_column("without memory", justify="right")
    for kind in dict.fromkeys(kind for entry in entries for kind in entry["kinds"]):
        found, cells = [entry["kinds"].get(kind) for entry in entries], []
        for shares, entry in zip(found, entries, strict=True):
            cells.append(_shares(shares, names))
            if entry["kinds"]["all"]["whole_text"]:
                cells.append(_shares(shares and shares["whole_text"], wholly))
        plain = [shares["without"] | {"questions": shares["questions"]} for shares in found if shares]
        total = sum(shares["questions"] for shares in plain)
        joint = {name: sum(shares[name] * shares["questions"] for shares in plain) / total for name in names}
        table.add_row(kind, *cells, _shares(joint, names))
    return render(table) + _note(result)


def questions_table(result: dict[str, Any]) -> str:
    """Questions about novels as a table: one row a way to answer, shares with their 95 % intervals."""
    table = Table(box=box.SIMPLE_HEAD, title=f"questions about novels, {result['model']} ({result['dtype']})")
    table.add_column("")
    for name in ("questions", "answered", "95 %", "passage listed", "95 %"):
        table.add_column(name, justify="right")
    for row, counts in result["rows"].items():
        cells = [row, str(counts["questions"])]
        for what in ("correct", "listed"):
            interval = counts.get(f"{what}_interval")
            cells += (
                [f"{counts[what] / counts['questions']:.0%}", f"{interval[0]:.0%}-{interval[1]:.0%}"]
                if interval
                else ["", ""]
            )
        table.add_row(*cells)
    return render(table) + _note(result)


def heads_table(result: dict[str, Any], count: int) -> str:
    """The heads that find passages best, one a row, and the setting that chooses them."""
    table = Table(box=box.SIMPLE_HEAD, title=f"retrieval heads, {result['model']}, seed {result['seed']}")
    for name in ("layer", "head", "1 / rank", "first"):
        table.add_column(name, justify="right")
    for head in result["heads"][:count]:
        table.add_row(str(head["layer"]), str(head["head"]), f"{head['rank']:.2f}", f"{head['first']:.0%}")
    return f"{render(table)}\nretrieval_heads={[list(pair) for pair in result['retrieval_heads']]}"


def ruler_table(result: dict[str, Any]) -> str:
    """Questions about long texts: a row a task and length, a column a condition."""
    title = f"long texts, {result['model']} ({result['dtype']}), seed {result['seed']}: share of what was expected"
    table = Table(box=box.SIMPLE_HEAD, title=title)
    for name in ("task", "tokens", "trials", "memory", "wholly right (95 %)", "in one context", "without the text"):
        table.add_column(name, justify="left" if name == "task" else "right")
    for entry in result["results"]:
        memory, others = entry["memory"], (entry["in_context"], entry["without"])
        cells = [_number(other and other["score"], "{:.0%}") for other in others]
        table.add_row(entry["task"], f"{entry['length']:,}", str(len(entry["trials"])), f"{memory['score']:.0%}",
                      _share_with_interval(memory["whole"], memory["interval"]), *cells)  # fmt: skip
    return render(table) + _note(result)


def few_shot_table(result: dict[str, Any]) -> str:
    """Share of right labels, a row a number of examples."""
    table = Table(box=box.SIMPLE_HEAD, title=f"labels, {result['model']} ({result['dtype']}), seed {result['seed']}")
    for name in ("examples", "tokens", "of them stored", "questions", "right, with memory (95 %)",
                 "without it (95 %)", "in one context (95 %)"):  # fmt: skip
        table.add_column(name, justify="right")
    for entry in result["results"]:
        cells = [one and _share_with_interval(one["accuracy"], one["interval"])
                 for one in (entry["memory"], entry["local"], entry["in_context"])]  # fmt: skip
        numbers = entry["examples"], entry["length"], entry["stored"], entry["memory"]["trials"]
        table.add_row(*(f"{number:,}" for number in numbers), *(cell or "-" for cell in cells))
    return render(table) + _note(result)


def _share_with_interval(share: float, interval: tuple[float, float]) -> str:
    return f"{share:.0%} ({interval[0]:.0%}-{interval[1]:.0%})"


def layers_table(result: dict[str, Any]) -> str:
    """The best sets of memory layers, one a row."""
    table = Table(box=box.SIMPLE_HEAD, title=f"memory layers, {result['model']} ({result['dtype']})")
    for column in ("memory layers", "loss of answers", "answer tokens right"):
        table.add_column(column, justify="right")
    for entry in result["results"]:
        layers = ",".join(map(str, entry["layers"])) or "none"
        table.add_row(layers, f"{entry['loss']:.2f}", f"{entry['tokens_right']:.0%}")
    return render(table)


def perplexity_table(result: dict[str, Any]) -> str:
    """Perplexity within windows as a table: one row a text; the untouched model and the rise beside it."""
    model, *base = result["models"]
    table = Table(box=box.SIMPLE_HEAD, title=f"perplexity, windows of {result['window']:,} tokens")
    table.add_column("text", justify="right")
    table.add_column("tokens", justify="right")
    for entry in result["models"]:
        table.add_column(entry["model"], justify="right", overflow="fold")
    if base:
        table.add_column("rise", justify="right")
    for name, row in _perplexities(model).items():
        others = [_perplexities(entry).get(name) for entry in base]
        cells = [_number(other["perplexity"] if other else None, "{:.3f}") for other in [row, *others]]
        rise = [_number(row["perplexity"] / other["perplexity"] - 1 if other else None, "{:+.2%}") for other in others]
        table.add_row(name, f"{row['tokens']:,}", *cells, *rise)
    return render(table) + _note(result)


def growing_table(result: dict[str, Any]) -> str:
    """Perplexity by tokens of memory: a table a model, and one a text where there are several."""
    tables = []
    for entry in result["models"]:
        texts = entry["texts"]
        places = sum(text["places"] for text in texts.values())
        named = {f"{entry['model']}, {len(texts)} texts, {places} places": entry["rows"]}
        if len(texts) < 2:
            named = {f"{entry['model']}, {name}, {text['places']} places": text["rows"] for name, text in texts.items()}
        else:
            named |= {f"{entry['model']}, {name}": text["rows"] for name, text in texts.items()}
        tables += [_growing(f"perplexity, {title}", rows) for title, rows in named.items()]
    return "\n".join(tables) + _note(result)


def _growing(title: str, rows: list[dict[str, Any]]) -> str:
    table = Table(box=box.SIMPLE_HEAD, title=title)
    halves = {"inside": "", "start": ", at the start", "weighted": ", weighted"}
    others = any(row["others"] for row in rows)
    table.add_column("tokens before", justify="right")
    if others:
        table.add_column("of other texts", justify="right")
    for half in halves.values():
        for kind in ("memory", "plain"):
            table.add_column(kind + half, justify="right")
    for row in rows:
        cells = [row[kind] and row[kind][half] for half in halves for kind in ("memory", "plain")]
        beside = [f"{row['others']:,}"] if others else []
        table.add_row(f"{row['tokens']:,}", *beside, *(_number(cell, "{:.2f}") for cell in cells))
    return render(table) + _differences(rows, others)


def _differences(rows: list[dict[str, Any]], others: bool) -> str:
    """By how much memory's perplexity is higher than others, where there are pairs of places."""
    paired = [name for name in DIFFERENCES if any(row[name] for row in rows)]
    if not paired:
        return ""
    table = Table(box=box.SIMPLE_HEAD, title="perplexity of the memory beside others, with standard error")
    for name in ("tokens before", *["of other texts"] * others, *(DIFFERENCES[name] for name in paired)):
        table.add_column(name, justify="right")
    for row in rows:
        beside = [f"{row['others']:,}"] if others else []
        table.add_row(f"{row['tokens']:,}", *beside, *(_percent(*row[name]) if row[name] else "" for name in paired))
    return "\n" + render(table)


def _percent(difference: float, error: float) -> str:
    """By how much a perplexity is higher, from a difference of losses and its standard error."""
    return f"{math.expm1(difference):+.2%} ± {error:.2%}"


def distraction_table(result: dict[str, Any]) -> str:
    """Positive attention mass as two tables: pooled, a column a model; and by layer, a column a number of contexts."""
    counts, models = result["contexts"], result["models"]
    pooled = Table(
        box=box.SIMPLE_HEAD,
        title=f"attention to the positive window, {result['what']}: of memory if all of it "
        "weighs alike / as the model weighs it (of all attention)",
    )
    pooled.add_column("contexts", justify="right")
    pooled.add_column("1/contexts", justify="right")
    layers = Table(box=box.SIMPLE_HEAD, title="the same by layer, of memory if all of it weighs alike")
    layers.add_column("model", overflow="fold")
    layers.add_column("layer", justify="right")
    for entry in models:
        pooled.add_column(entry["model"], justify="right", overflow="fold")
    for number, count in enumerate(counts):
        layers.add_column(str(count), justify="right")
        found = [entry["results"][number] for entry in models if entry["results"]]
        cells = (f"{x['to_memory']:.1%} / {x['weighed']:.1%} ({x['of_all']:.1%})" for x in found)
        pooled.add_row(str(count), f"{1 / count:.1%}", *cells)
    for entry in models:
        for layer in entry["results"][0]["layers"] if entry["results"] else ():
            shares = [row["layers"][layer]["to_memory"] for row in entry["results"]]
            layers.add_row(entry["model"], str(layer), *(f"{share:.1%}" for share in shares))
    return render(pooled) + "\n" + render(layers) + _note(result)


def harness_table(result: dict[str, Any]) -> str:
    """Scores of the harness's tasks: one row a metric."""
    table = Table(box=box.SIMPLE_HEAD, title=f"lm-evaluation-harness, {result['model']} ({result['dtype']})")
    table.add_column("task", overflow="fold")
    for name in ("version", "shots", "documents"):
        table.add_column(name, justify="right")
    table.add_column("metric", overflow="fold")
    for name in ("score", "standard error"):
        table.add_column(name, justify="right")
    for entry in result["results"]:
        about = [
            str(entry[name] if entry[name] is not None else "-") for name in ("task", "version", "shots", "documents")
        ]
        for metric, score in entry["metrics"].items():
            value = score["value"]
            shown = f"{value:.4f}" if isinstance(value, float) else str(value)
            table.add_row(*about, metric, shown, _number(score["stderr"], "{:.4f}"))
            about = [""] * len(about)
    return render(table) + _note(result)


def _accuracy(entry: dict[str, Any] | None) -> str:
    if entry is None:
        return "-"
    trials = entry["trials"]
    return f"{entry['accuracy']:.0%} ({sum(trial['correct'] for trial in trials)}/{len(trials)})"


def _shares(entry: dict[str, Any] | None, names: Sequence[str | None]) -> str:
    if entry is None:
        return "-"
    return " / ".join("-" if name is None else f"{entry[name]:.0%}" for name in names)


def _perplexities(entry: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Rows of one model's results: a text each, and all texts together."""
    joint = {"all": entry | {"tokens": _tokens(entry)}} if len(entry["texts"]) > 1 else {}
    return entry["texts"] | joint


def _tokens(entry: dict[str, Any]) -> int:
    return sum(text["tokens"] for text in entry["texts"].values())


def _note(result: dict[str, Any]) -> str:
    return "\ninterrupted: finished trials only" if result["interrupted"] else ""


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)
