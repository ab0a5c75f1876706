"""The picture of `experiments.benchmark --growth`: time and memory of a selection by the number of scores."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments.plots.style import COLOURS, GREY, MARKERS, new_figure, style_axes


def growth(measured: Mapping[str, Any]):
    """Draws milliseconds and bytes by the number of scores, on log scales: what was measured, and the cost model."""
    figure = new_figure("one selection at density 0.5, by the number of scores", 11, 4.8)
    times, memory = figure.subplots(1, 2)
    style_axes(times, "scores, log scale", "milliseconds, log scale")
    style_axes(memory, "scores, log scale", "peak of the process in GB, log scale")
    done = [of for of in measured["trees"] if "seconds" in of]
    for at, devices in enumerate(dict.fromkeys(of["devices"] for of in done)):
        own = [of for of in done if of["devices"] == devices]
        scores = [of["scores"] for of in own]
        look = {"color": COLOURS[at], "marker": MARKERS[at], "markersize": 5, "linewidth": 1.6}
        label = "one device, measured" if devices == 1 else f"{devices} fake devices of the same machine, measured"
        times.plot(scores, [1e3 * np.median(of["seconds"]) for of in own], label=label, **look)
        memory.plot(scores, [of["peak_bytes"] / 1e9 for of in own], label=label, **look)
    scores = {of["tree"]: of["scores"] for of in measured["trees"]}
    sizes = list(scores.values())
    for stroke, chips in zip((":", "-.", "--"), next(iter(measured["pod"].values()), ()), strict=False):
        line = [1e3 * measured["pod"][name][chips] for name in scores]
        times.plot(sizes, line, stroke, color="0.5", linewidth=1.3, label=f"{int(chips):,} chips, cost model")
    memory.plot(sizes, [4 * size / 1e9 for size in sizes], ":", color=str(GREY), label="the scores alone")
    for ax in (times, memory):
        ax.set(xscale="log", yscale="log")
        ax.set_xticks(sizes, [f"{size / 1e6:,.0f} M" for size in sizes])
        ax.set_xticks([], minor=True)
    times.legend(fontsize=8, frameon=False)
    memory.legend(fontsize=8, frameon=False)
    return figure
