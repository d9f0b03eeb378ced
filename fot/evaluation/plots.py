"""Results as pictures."""

from pathlib import Path
from typing import Any

from fot.evaluation.drawing import new_figure, save_figure


def passkey_plot(path: Path, result: dict[str, Any]) -> None:
    """Accuracy by length, and every trial by length and depth, as a picture.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure = new_figure(9, 4)
    left, right = figure.subplots(1, 2, sharex=True)
    for part, label, colour in (("results", "with memory", "tab:blue"), ("baseline", "without", "tab:grey")):
        entries = result[part]
        if entries:
            lengths = [entry["length"] for entry in entries]
            left.plot(lengths, [entry["accuracy"] for entry in entries], "o-", label=label, color=colour)
    left.set(xscale="log", xlabel="tokens", ylabel="accuracy", ylim=(-0.05, 1.05), title=f"passkey, {result['model']}")
    left.legend()
    trials = [trial for entry in result["results"] or result["baseline"] for trial in entry["trials"]]
    for correct, marker, colour in ((True, "o", "tab:green"), (False, "x", "tab:red")):
        chosen = [trial for trial in trials if trial["correct"] == correct]
        right.scatter(
            [trial["length"] for trial in chosen],
            [trial["depth"] for trial in chosen],
            marker=marker,
            color=colour,
            label="right" if correct else "wrong",
        )
    right.set(xlabel="tokens", ylabel="depth of the key", ylim=(1.05, -0.05), title="each trial")
    right.legend()
    save_figure(figure, path)


def growing_plot(path: Path, result: dict[str, Any]) -> None:
    """Perplexity by tokens of memory and of plain context, as a picture.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure = new_figure(6, 4)
    axes = figure.subplots()
    ticks = sorted({row["tokens"] for entry in result["models"] for row in entry["rows"]})
    for number, entry in enumerate(result["models"]):
        for kind, style in (("memory", "o-"), ("plain", "x--")):
            rows = [row for row in entry["rows"] if row[kind] and not row["others"]]
            axes.plot([ticks.index(row["tokens"]) for row in rows], [row[kind]["inside"] for row in rows], style,
                      color=f"C{number}", label=f"{entry['model']}, {kind}")  # fmt: skip
    axes.set(xlabel="tokens before the window", ylabel="perplexity", title="what a memory of the text is worth")
    axes.set_xticks(range(len(ticks)), [f"{tick:,}" for tick in ticks])
    axes.legend()
    save_figure(figure, path)


def distraction_plot(path: Path, result: dict[str, Any]) -> None:
    """Positive attention mass by number of contexts, a line a model, as a picture.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure = new_figure(6, 4)
    axes = figure.subplots()
    counts = result["contexts"]
    axes.plot(counts, [1 / count for count in counts], "--", label="1/contexts", color="tab:grey")
    for entry in result["models"]:
        axes.plot(counts[: len(entry["results"])], [row["to_memory"] for row in entry["results"]], "o-",
                  label=entry["model"])  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="contexts in memory", ylabel="share of attention to memory",
             title=f"attention to the positive window, {result['what']}")  # fmt: skip
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.minorticks_off()
    axes.legend()
    save_figure(figure, path)
