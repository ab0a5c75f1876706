"""The picture of several finished runs together."""

from collections.abc import Mapping

import numpy as np

from experiments.plots.style import (
    COLOURS,
    MARKERS,
    diamond,
    epoch_axis,
    log_axis,
    new_figure,
    stages,
    style_axes,
)

Run = tuple[dict, list[dict]]  # the contents of summary.json and of metrics.jsonl
ROWS = 3  # of the bar chart, for each group: its label, and a bar before and after training


def together(groups: Mapping[str, list[Run]], split: str):
    """Draws accuracy over epochs, and beside it accuracy before and after training.

    Args:
      groups: {label: runs that differ in nothing but the seed}. A group is one line: the mean over its runs, in a band
        from the lowest to the highest.
      split: what all runs were evaluated on, "validation" or "test".
    """
    runs = [run for members in groups.values() for run in members]
    models = " and ".join(sorted({summary["model"] for summary, _ in runs}))
    title = f"{split} accuracy on {runs[0][0]['dataset']} · {models}"
    figure = new_figure(title, 9, 2.8 + 0.9 * len(groups))
    left, right = figure.subplots(1, 2, width_ratios=(5, 4))
    accuracies = {
        f"{label} ({_seeds(len(members))})": (
            members[0][0]["method"],
            100 * np.array([[record[f"{split}_accuracy"] for record in records] for _, records in members]),
        )
        for label, members in groups.items()
    }
    _over_epochs(left, accuracies)
    _before_and_after(right, accuracies)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=9, frameon=False)
    return figure


def _seeds(number: int) -> str:
    return f"mean of {number} seeds" if number > 1 else "1 seed"


def _over_epochs(ax, accuracies: Mapping[str, tuple[str, np.ndarray]]) -> None:
    """The error of each group over epochs; accuracies: {label: (method, percent [seeds, epochs])}."""
    for i, (label, (_, values)) in enumerate(accuracies.items()):
        colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
        errors, epochs = 100 - values, range(values.shape[1])
        ax.plot(epochs, errors.mean(axis=0), color=colour, marker=marker, markersize=4, label=label)
        ax.fill_between(epochs, errors.min(axis=0), errors.max(axis=0), color=colour, alpha=0.25, linewidth=0)
        diamond(ax, errors[:, 0].mean(), colour)
    style_axes(ax, "epoch", "accuracy (%), log scale of the error")
    log_axis(ax, np.concatenate([100 - values.ravel() for _, values in accuracies.values()]), accuracy=True)
    epoch_axis(ax, 0, max(values.shape[1] for _, values in accuracies.values()) - 1)
    ax.set_title("over epochs; diamonds: before training", fontsize=10)


def _before_and_after(ax, accuracies: Mapping[str, tuple[str, np.ndarray]]) -> None:
    """Two bars for each group; accuracies as in `_over_epochs`."""
    names = {}
    for i, (label, (method, values)) in enumerate(accuracies.items()):
        ax.text(0, ROWS * i - 0.6, label, fontsize=9, va="bottom")
        for y, at, stage in zip((ROWS * i, ROWS * i + 1), (0, -1), stages(method), strict=True):
            names[y], mean = stage, values[:, at].mean()
            ax.barh(y, mean, height=0.9, color=COLOURS[i % len(COLOURS)], alpha=1 if at else 0.5)
            ax.text(102, y, f"{mean:.2f}%", fontsize=9, va="center")
            if len(values) > 1:
                ax.plot(values[:, at], [y] * len(values), "|", color="black", markersize=9)
    several = any(len(values) > 1 for _, values in accuracies.values())
    style_axes(ax, "accuracy (%); strokes: single seeds" if several else "accuracy (%)", "")
    ax.grid(axis="y", visible=False)
    ax.set_yticks(list(names), names.values(), fontsize=9)
    ax.set(xlim=(0, 100), ylim=(ROWS * len(accuracies) - 1.25, -1.25))
    ax.set_title("before and after training", fontsize=10)
