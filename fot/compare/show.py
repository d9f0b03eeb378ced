"""What a comparison came to: a table and a picture of each task."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich import box
from rich.table import Table

from fot.compare.catalogue import METHODS
from fot.compare.cost import Cost
from fot.compare.panel import MEMORY
from fot.compare.results import Row, Trial
from fot.compare.tuned import Tuned
from fot.evaluation.drawing import new_figure, render, save_figure

SCORES = {
    "passkey": "right",
    "perplexity": "perplexity",
    "needles": "right",
    "fluency": "repeated 4-grams",
}
SHARES = {
    "repeated_ngrams": "repeated 4-grams",
    "newline_runs": "line breaks in runs",
    "unlikely_tokens": "unlikely tokens",
}
UNTUNED = {method.name: "no, wants it" if method.wants_tuning else "no" for method in METHODS}


def tables(
    rows: Sequence[Row],
    trained_length: int,
    missing: Mapping[str, str],
    whole_up_to: int,
    tuned: Mapping[str, Tuned] | None = None,
) -> str:
    """A table a task, and why methods are not in it.

    Args:
        rows: of results.
        trained_length: tokens of the longest text that the model was trained on.
        missing: methods that cannot be had, and why.
        whole_up_to: longest text for methods that attend to all of it.
        tuned: tuned checkpoints by their names.
    """
    parts = [_table(task, [row for row in rows if row.task == task], trained_length, tuned or {}) for task in SCORES]
    notes = [f"{name}: left out, {reason}" for name, reason in missing.items()]
    if any(row.length > whole_up_to for row in rows):
        notes.append(f"methods that attend to the whole text: up to {whole_up_to:,} tokens (--whole-up-to)")
    return "\n".join([part for part in parts if part] + notes)


def _table(task: str, rows: Sequence[Row], trained_length: int, tuned: Mapping[str, Tuned]) -> str:
    if not rows:
        return ""
    table = Table(box=box.SIMPLE_HEAD, title=task)
    table.add_column("method")
    table.add_column("tuned")
    names = ("trained\nlength", "tokens", SCORES[task], "95 %", "trials", "cache\nB/token", "tok/s", "peak RSS\nMB")
    for name in names:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            row.method,
            f"yes, {tuned[row.method].method}" if row.method in tuned else UNTUNED[row.method],
            f"{tuned[row.method].trained_length if row.method in tuned else trained_length:,}",
            f"{row.length:,}",
            score_text(row.task, row.score),
            f"{score_text(row.task, row.low)} - {score_text(row.task, row.high)}",
            str(row.trials),
            f"{row.bytes_per_token:,.0f}",
            f"{row.tokens_per_second:,.0f}",
            f"{row.peak_rss_bytes / 1e6:,.0f}",
        )
    return render(table)


def score_text(task: str, score: float) -> str:
    return (f"{score:.2f}" if score < 1e5 else f"{score:.1e}") if task == "perplexity" else f"{score:.0%}"


def pictures(folder: Path, rows: Sequence[Row], title: str, trained_length: int) -> list[Path]:
    """Draw each task's score by length, a line a method, into ``TASK.png`` in a folder; returns their paths.

    Raises:
        ImportError: matplotlib is not installed.
    """
    made = []
    for task in dict.fromkeys(row.task for row in rows):
        figure = new_figure(9, 5)
        axes = figure.subplots()
        mine = [row for row in rows if row.task == task]
        for number, name in enumerate(dict.fromkeys(row.method for row in mine)):
            line = [row for row in mine if row.method == name]
            scores = [row.score for row in line]
            spread = [[row.score - row.low for row in line], [row.high - row.score for row in line]]
            axes.errorbar(
                [row.length for row in line],
                scores,
                yerr=[[max(0.0, one) for one in side] for side in spread],
                fmt="os^Dv"[number // 10 % 5] + "-",
                color=f"C{number % 10}",
                capsize=3,
                label=name,
            )
        lengths = sorted({row.length for row in mine})
        axes.axvline(trained_length, color="0.6", linestyle="--", linewidth=0.8)
        axes.set(xscale="log", xlabel="tokens (dashed: trained length)", ylabel=SCORES[task], title=f"{task}, {title}")
        axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
        axes.minorticks_off()
        if task == "perplexity":
            axes.set_yscale("log")
        else:
            axes.set_ylim(-0.05, 1.05)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize="small")
        made.append(folder / f"{task}.png")
        save_figure(figure, made[-1])
    return made


def picture_along(folder: Path, trials: Sequence[Trial], title: str) -> list[Path]:
    """Draw the shares of fluency along the longest texts that were written, a line a method, into a folder.

    Args:
        folder: gets ``fluency_along.png``.
        trials: of all tasks and lengths.
        title: what was measured.

    Returns:
        its path; nothing if no text was written.

    Raises:
        ImportError: matplotlib is not installed.
    """
    # Results from before there were stretches have none.
    written = [trial for trial in trials if trial["task"] == "fluency" and "by_stretch" in trial["figures"]]
    longest = max((trial["length"] for trial in written), default=0)
    groups: dict[str, list[list[dict[str, float]]]] = {}
    for trial in written:
        if trial["length"] == longest:
            groups.setdefault(trial["method"], []).append(trial["figures"]["by_stretch"])
    if not groups:
        return []
    figure = new_figure(11, 4)
    for axes, (share, name) in zip(figure.subplots(1, len(SHARES)), SHARES.items(), strict=True):
        for method, texts in groups.items():
            ends = [stretch["end"] for stretch in texts[0]]
            means = [sum(stretch[share] for stretch in same) / len(same) for same in zip(*texts, strict=True)]
            axes.plot(ends, means, "o-", markersize=3, label=method)
        axes.set(xlabel="tokens written", title=f"share of {name}")
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_formatter(lambda tokens, _: f"{tokens / 1000:g}k")  # 100,000 would run into the next label
    figure.suptitle(f"fluency by stretches, {title}")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    path = folder / "fluency_along.png"
    save_figure(figure, path)
    return [path]


def cost_table(costs: Mapping[str, Cost], model: str, tokens: int, missing: Mapping[str, str]) -> str:
    """What a text costs, a row a method; times are extrapolated."""
    table = Table(box=box.SIMPLE_HEAD, title=f"a text of {tokens:,} tokens, {model}")
    table.add_column("method")
    for name in ("GFLOP to read", "MFLOP a token", "kept MB", "s to read", "ms a token"):
        table.add_column(name, justify="right")
    for name, found in costs.items():
        figures = (
            (found.read_flops, 1e9), (found.token_flops, 1e6), (found.kept_bytes, 1e6),
            (found.read_seconds, 1), (found.token_seconds, 1e-3),
        )  # fmt: skip
        table.add_row(name, *("-" if value is None else f"{value / unit:,.1f}" for value, unit in figures))
    notes = [f"{name}: left out, {reason}" for name, reason in missing.items()]
    notes.append("FLOPs of attention alone; - where it depends on text or index, or was not measured")
    return "\n".join([render(table), *notes])


Panel = Mapping[str, Mapping[int, float | None]]


def positions_table(kinds: Panel, trained_length: int, steps: int) -> str:
    """Perplexity of bytes, a row a kind of positions, a column a length."""
    title = f"trained from scratch on {trained_length} bytes, {steps} steps: perplexity of bytes by bytes read"
    table = Table(box=box.SIMPLE_HEAD, title=title)
    table.add_column("positions")
    for length in next(iter(kinds.values()), {}):
        table.add_column(f"{length:,}", justify="right")
    for kind, found in kinds.items():
        table.add_row(kind, *("-" if value is None else score_text("perplexity", value) for value in found.values()))
    return render(table)


def positions_picture(path: Path, kinds: Panel, trained_length: int) -> None:
    """Draw perplexity against length, a line a kind of positions.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure = new_figure(9, 5)
    axes = figure.subplots()
    for kind, found in kinds.items():
        known = {length: value for length, value in found.items() if value is not None}
        remembers = kind.endswith(MEMORY)
        color = f"C{list(kinds).index(kind.removesuffix(MEMORY)) // 2}"
        axes.plot(list(known), list(known.values()), "s:" if remembers else "o-", color=color, label=kind)
    axes.axvline(trained_length, color="0.6", linestyle="--", linewidth=0.8)
    axes.set(xscale="log", yscale="log", xlabel="bytes (dashed: trained length)", ylabel="perplexity of bytes")
    for which in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        which("{x:g}")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))  # beside the lines, many of which lie together
    save_figure(figure, path)
