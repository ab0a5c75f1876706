"""The picture of `experiments.bits`: test accuracy against the bytes of the network's file, and the Pareto front."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from experiments.plots.lines import ACCURACY_LABEL, MINIMUM_RATIO, as_drawn, counted, seeds_note
from experiments.plots.style import COLOURS, GREY, MARKERS, log_axis, new_figure, style_axes

MASKS_ONLY = "seed and masks"  # what a file of frozen weights holds
STROKES = {"float32": "-", "int8": "--", "int4": ":"}  # of files with weights
MEANS = ("density", "file_bytes", "test_accuracy")  # what a point has the means of
TICKS = [m * 10**power for power in range(2, 10) for m in (1, 2, 5)]  # bytes


def points(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns a point for the files that differ in the seed alone, in the order of the rows.

    A point has "line", "family", "stored", "network", "asked" of its rows, the number of "seeds", the means of
    "density", "file_bytes" and "test_accuracy", the "lowest" and the "highest" accuracy, and "front": whether no
    point with as few bytes is more accurate, and none with fewer is as accurate.
    """
    alike: dict[tuple, list[Mapping[str, Any]]] = {}
    for row in rows:
        alike.setdefault((row["line"], row["network"], row["asked"]), []).append(row)
    made = []
    for same in alike.values():
        accuracies = [row["test_accuracy"] for row in same]
        point = {name: same[0][name] for name in ("line", "family", "stored", "network", "asked")}
        point |= {name: float(np.mean([row[name] for row in same])) for name in MEANS}
        made.append(point | {"seeds": len(same), "lowest": min(accuracies), "highest": max(accuracies)})
    best = -1.0
    for point in sorted(made, key=lambda point: (point["file_bytes"], -point["test_accuracy"])):
        point["front"] = point["test_accuracy"] > best
        best = max(best, point["test_accuracy"])
    return made


def bits(summary: Mapping[str, Any]):
    """Draws test accuracy by the size of the file: a line for each family and number format, and the Pareto front."""
    config, drawn = summary["config"], summary["points"]
    what = f"{config['model']} on {summary['dataset']}, each evaluated from its file"
    trained = counted(config["epochs"], "epoch")
    if config["train_images"]:
        trained += f" of {config['train_images']:,} images"
    title = f"{what} · {trained} · {seeds_note(summary)}"
    figure = new_figure(title, 9.6, 7.2)
    ax = figure.subplots()
    style_axes(ax, "bytes of the network's file, log scale", ACCURACY_LABEL)
    families = list(dict.fromkeys(point["family"] for point in drawn))
    _draw_front(ax, [point for point in drawn if point["front"]])
    for line in dict.fromkeys(point["line"] for point in drawn):
        chosen = sorted((p for p in drawn if p["line"] == line), key=lambda p: p["file_bytes"])
        at = families.index(chosen[0]["family"])
        colour, marker = COLOURS[at % len(COLOURS)], MARKERS[at % len(MARKERS)]
        places = [point["file_bytes"] for point in chosen]
        means, lows, highs = (as_drawn([p[y] for p in chosen], True) for y in ("test_accuracy", "lowest", "highest"))
        stroke = STROKES.get(chosen[0]["stored"], "-")
        ax.plot(places, means, stroke, color=colour, marker=marker, markersize=4.5, linewidth=1.4, label=line)
        ax.fill_between(places, lows, highs, color=colour, alpha=0.15, linewidth=0)
    log_axis(ax, as_drawn([p[name] for p in drawn for name in ("lowest", "highest")], True), accuracy=True)
    _byte_axis(ax, [point["file_bytes"] for point in drawn])
    figure.legend(loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    return figure


def _draw_front(ax, front: list[Mapping[str, Any]]) -> None:
    """Draws the front as steps, each the accuracy of the best file of at most so many bytes; labels what files keep."""
    front = sorted(front, key=lambda point: point["file_bytes"])
    places, errors = [p["file_bytes"] for p in front], as_drawn([p["test_accuracy"] for p in front], True)
    label = "Pareto front: no file is smaller and as accurate"
    ax.step(places, errors, where="post", color=str(GREY), linewidth=6, alpha=0.6, label=label, zorder=1)
    before = 0.0
    for point, place, error in zip(front, places, errors, strict=True):
        if place > MINIMUM_RATIO * before:  # labels of closer ones would overlap
            _, _, size = point["network"].partition(", ")
            text = size or f"{100 * point['density']:.3g} %"
            ax.annotate(text, (place, error), (-4, 6), textcoords="offset points", fontsize=7, color="0.35", ha="right")
            before = place


def _byte_axis(ax, sizes: list[float]) -> None:
    """A log x axis with ticks in bytes, kB and MB."""
    low, high = min(sizes, default=1e3) / 1.6, max(sizes, default=1e6) * 1.2
    ticks = [tick for tick in TICKS if low <= tick <= high]
    units = ((1e6, "MB"), (1e3, "kB"), (1, "bytes"))
    names = [next(f"{tick / size:g} {unit}" for size, unit in units if tick >= size) for tick in ticks]
    ax.set_xscale("log")
    ax.set_xlim(low, high)
    ax.set_xticks(ticks, names)
    ax.set_xticks([], minor=True)
