"""The picture of many tasks in one network, drawn from the contents of summary.json."""

from typing import Any

import numpy as np

from experiments.plots.lines import counted, draw_level, log_ticks
from experiments.plots.style import BLUE, ORANGE, new_figure, style_axes

INFERENCE = {  # of the rows of "growth": {column: (label, colour, marker)}
    "one_shot": ("one gradient", ORANGE, "o"),
    "binary": ("binary search", BLUE, "s"),
}
MEGABYTE = 1e6


def many_tasks(summary: dict[str, Any]):
    """Draws the accuracy of each task, the size of the file, and the error of the inferred task, by number of tasks."""
    config, growth = summary["config"], summary["growth"]
    units = "-".join(map(str, summary["units"]))
    what = f"{counted(len(summary['tasks']), 'task')} in one random network {units} · permuted {summary['dataset']}"
    title = f"{what} · {summary['method']} · {counted(config['epochs'], 'epoch')} a task"
    inferred = [row for row in growth if "one_shot" in row]
    figure = new_figure(f"{title} · seed {summary['seed']}", 14 if inferred else 9.5, 4.4)
    axes = figure.subplots(1, 3 if inferred else 2)
    _accuracies(axes[0], summary)
    _sizes(axes[1], summary)
    if inferred:
        _errors(axes[2], inferred, min(config["inferred_images"], summary["images"]), summary["split"])
    return figure


def _accuracies(ax, summary: dict[str, Any]) -> None:
    split = summary["split"]
    values = [100 * record[f"{split}_accuracy"] for record in summary["tasks"]]
    ax.plot([record["task"] for record in summary["tasks"]], values, "o", color=BLUE, markersize=4)
    style_axes(ax, "task", f"{split} accuracy (%)")
    draw_level(ax, [np.mean(values)], f"mean: {np.mean(values):.2f} %")
    ax.set_ylim(min(values) - 0.5, max(values) + 0.5)
    ax.set_xlim(-0.5, len(values) - 0.5)
    ax.locator_params(axis="x", integer=True, min_n_ticks=1)
    ax.legend(fontsize=8, edgecolor="none")


def _sizes(ax, summary: dict[str, Any]) -> None:
    places = [row["tasks"] for row in summary["growth"]]
    sizes = [row["file_bytes"] / MEGABYTE for row in summary["growth"]]
    dense = [summary["dense_bytes"] * place / MEGABYTE for place in places]
    each = summary["bytes_per_task"]
    ax.plot(places, dense, "s--", color=ORANGE, markersize=4, label="a dense network for each task, float32")
    ax.plot(places, sizes, "o-", color=BLUE, markersize=4, label=f"one file of masks, {each:,.0f} bytes a further task")
    style_axes(ax, "tasks", "size (megabytes), log scale")
    ax.set_yscale("log")
    log_ticks(ax, places)
    ax.legend(fontsize=8, edgecolor="none")


def _errors(ax, rows: list[dict[str, Any]], images: int, split: str) -> None:
    places = [row["tasks"] for row in rows]
    for column, (label, colour, marker) in INFERENCE.items():
        wrong = [100 * (1 - row[column]) for row in rows]
        ax.plot(places, wrong, f"{marker}-", color=colour, markersize=4, label=label)
    guessed = [100 * (1 - 1 / place) for place in places]
    ax.plot(places, guessed, ":", color="black", linewidth=1.3, label="a guess")
    style_axes(ax, "tasks", f"task inferred wrongly (% of {images:,} {split} images)")
    log_ticks(ax, places)
    ax.set_ylim(-3, 103)
    ax.legend(fontsize=8, edgecolor="none")
