"""Lines with bands: the figures of many runs, by what was varied. Rows are dicts; a group is a line of the picture."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from experiments.plots.style import COLOURS, MARKERS, log_axis, style_axes

Groups = Mapping[Any, Mapping[Any, list[float]]]  # {group: {x: the values of all seeds}}

ACCURACY_LABEL = "test accuracy (%), log scale of the error"
MINIMUM_RATIO = 1.15  # of neighbouring ticks: labels of closer ones would overlap


def grouped(rows: Iterable[Mapping], by: str, x: str, y: str) -> dict[Any, dict[Any, list[float]]]:
    """Returns {group: {x: the values of y, of all seeds}}, in the rows' order; rows without x or y are left out."""
    groups: dict[Any, dict[Any, list[float]]] = {}
    for row in rows:
        if row.get(x) is not None and row.get(y) is not None:
            groups.setdefault(row[by], {}).setdefault(row[x], []).append(row[y])
    return groups


def at_mean(rows: list[dict], by: str, at: str, x: str) -> list[dict]:
    """Returns the rows with `x` replaced by its mean over the rows of the same `by` and `at`.

    Seeds whose `x` differs slightly, as the density of `uniform+` does, share one place on the axis.
    """
    means: dict[tuple, list[float]] = {}
    for row in rows:
        means.setdefault((row[by], row[at]), []).append(row[x])
    return [row | {x: float(np.mean(means[row[by], row[at]]))} for row in rows]


def counted(number: int, noun: str) -> str:
    """The number with its noun, in the plural where there are several."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def seeds_note(summary: Mapping[str, Any]) -> str:
    """The part of a sweep's title that says how many seeds the lines are of, and how many runs are not in them."""
    number, left_out = summary["config"]["seeds"], len(summary.get("left_out", ()))
    note = f"mean of {number} seeds, band from lowest to highest" if number > 1 else counted(number, "seed")
    return f"{note}, {counted(left_out, 'run')} left out" if left_out else note


def as_drawn(values: Any, accuracy: bool) -> np.ndarray:
    """The values as they stand on the y axis: accuracies, which are fractions, as errors in percent."""
    values = np.asarray(values, float)
    return 100 * (1 - values) if accuracy else values


def draw_lines(ax, groups: Groups, x: str, y: str, accuracy: bool = False, names: list | None = None) -> None:
    """Draws a line for each group: the mean over the seeds, in a band from the lowest to the highest.

    Args:
      ax: the axes.
      groups: see `grouped`.
      x, y: the labels of the axes.
      accuracy: the values are fractions; they are drawn in percent on a log scale of the error.
      names: all groups of the figure, in the order of their colours; those of `groups` if None.
    """
    drawn: list[float] = []
    for name, points in groups.items():
        i = (names or list(groups)).index(name)
        places = sorted(points)
        values = [as_drawn(points[place], accuracy) for place in places]
        colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
        style = "-" if i < len(COLOURS) else "--"
        means = [v.mean() for v in values]
        ax.plot(places, means, style, color=colour, marker=marker, markersize=4, linewidth=1.3, label=str(name))
        lows, highs = [v.min() for v in values], [v.max() for v in values]
        ax.fill_between(places, lows, highs, color=colour, alpha=0.15, linewidth=0)
        drawn += [value for v in values for value in v]
    style_axes(ax, x, y)
    if accuracy:
        log_axis(ax, drawn, accuracy=True)


def draw_level(ax, values: list[float], label: str, accuracy: bool = False) -> None:
    """Draws the mean of the values as a dotted line across the axes; see `draw_lines` for `accuracy`."""
    level = float(as_drawn(np.mean(values), accuracy))
    ax.axhline(level, color="black", linestyle=":", linewidth=1.3, label=label)


def log_ticks(ax, values: Iterable[float], percent: bool = False) -> None:
    """Gives the axes a log x axis with a tick at each value, except at those too near to the tick before."""
    ticks: list[float] = []
    for value in sorted(set(values)):
        if not ticks or value > MINIMUM_RATIO * ticks[-1]:
            ticks.append(value)
    ax.set_xscale("log")
    ax.set_xticks(ticks, [f"{100 * v:g}" if percent else f"{v:g}" for v in ticks])
    ax.set_xticks([], minor=True)
