"""The picture of our results beside published figures."""

import itertools
from typing import Any

from experiments.plots.lines import ACCURACY_LABEL, as_drawn, log_ticks
from experiments.plots.style import COLOURS, MARKERS, log_axis, new_figure, style_axes

LEGEND_WIDTH = 130  # characters of its font across the figure


def published(title: str, points: list[dict[str, Any]]):
    """Draws accuracy by density: ours as filled marks with the range of the seeds, the published as hollow marks.

    Args:
      title: of the experiment.
      points: {"name", "density", "published" (a fraction or None), "accuracies" (of our seeds, maybe none), "variant"}.

    Returns:
      The figure; None where ours are at fewer than two densities, so that a table says as much.
    """
    points = [point for point in points if point["density"]]
    if len({point["density"] for point in points if point["accuracies"]}) < 2:
        return None
    names = list(dict.fromkeys(point["name"] for point in points if point["accuracies"]))
    points = [point for point in points if point["name"] in names]
    figure = new_figure(title, 8.6, 5)
    ax = figure.subplots()
    drawn: list[float] = []
    for i, name in enumerate(names):
        own = [point for point in points if point["name"] == name]
        colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
        _ours(ax, own, name, colour, marker)
        known = [point for point in own if point["published"] is not None]
        places = [point["density"] for point in known]
        errors = as_drawn([point["published"] for point in known], True)
        label = f"{name}, published" if known else None
        ax.plot(places, errors, marker, color="none", markeredgecolor=colour, markersize=9, label=label)
        drawn += [*errors, *(e for point in own for e in as_drawn(point["accuracies"], True))]
    style_axes(ax, "density (% of the weights that are kept)", ACCURACY_LABEL)
    log_axis(ax, drawn, accuracy=True)
    log_ticks(ax, [point["density"] for point in points], percent=True)
    longest = max(len(label) for label in ax.get_legend_handles_labels()[1])
    columns = max(1, LEGEND_WIDTH // (longest + 8))  # a mark takes the room of eight characters
    figure.legend(loc="outside lower center", ncols=columns, fontsize=8, frameon=False)
    return figure


def _ours(ax, points: list[dict[str, Any]], name: str, colour: str, marker: str) -> None:
    """A mark for each way in which a network was run, and a line over the densities of each way."""
    variants = dict.fromkeys(point["variant"] for point in points if point["accuracies"])
    for style, variant in zip(itertools.cycle(("-", "--", "-.", ":")), variants, strict=False):
        own = sorted((p for p in points if p["variant"] == variant and p["accuracies"]), key=lambda p: p["density"])
        places, errors = [p["density"] for p in own], [as_drawn(p["accuracies"], True) for p in own]
        means = [float(e.mean()) for e in errors]
        low, high = ([abs(m - f(e)) for m, e in zip(means, errors, strict=True)] for f in (min, max))
        label = f"{name}, {variant}" if variant else name
        ax.errorbar(places, means, (low, high), fmt=f"{marker}{style}", color=colour, markersize=5, label=label)
