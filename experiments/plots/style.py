"""How the pictures look: colours, figures, axes. No pyplot, which would keep figures alive and may want a display."""

import io
import re
from pathlib import Path

import numpy as np

from experiments.run.files import write_bytes

# Okabe and Ito's, which the colour-blind can tell apart.
COLOURS = BLUE, ORANGE, *_ = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000"
MARKERS = "os^vPXD"
GREY = 0.72  # of what is dropped
DOTS_PER_INCH = 200
FEWEST_TICKS = 2  # of a log axis
USUAL_STAGES = "random subnetwork", "trained subnetwork"  # what a network is called before and after training ...
STAGES = {  # ... except by these methods
    "edge-popup": ("random subnetwork", "learned subnetwork"),
    "bernoulli": ("nothing kept", "learned subnetwork"),
    "threshold": ("random subnetwork", "learned subnetwork"),
    "dense": ("random network", "trained network"),
    "gradual": ("random network", "trained subnetwork"),
}


def stages(method: str) -> tuple[str, str]:
    """What the network of a method is called before and after training."""
    return STAGES.get(method, USUAL_STAGES)


def save(figure, file: Path) -> None:
    """Writes a PNG atomically. The same figure gives the same bytes in every process."""
    write_bytes(file, png(figure))


def png(figure, **more) -> bytes:
    """The bytes of a PNG, which are the same in every process; more: of matplotlib's `savefig`."""
    _fix_layout(figure)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", **({"dpi": DOTS_PER_INCH} | more))
    return stream.getvalue()


def _fix_layout(figure) -> None:
    """Lays the figure out once, and rounds where its axes are: the last bits of the layout differ between processes."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    for ax in figure.axes:
        ax.set_position([round(float(edge), 4) for edge in ax.get_position(original=True).bounds])


def new_figure(title: str, width: float, height: float, layout: str = "constrained"):
    """An empty figure with a title; width and height in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout=layout)
    figure.suptitle(title, fontsize=12)
    return figure


def title_of(summary: dict) -> str:
    """The title of a picture of one run: method, network, data set, density and seed."""
    where = f"{summary['method']} · {summary['model']} on {summary['dataset']}"
    return f"{where} · density {summary['density']:.4g} · seed {summary['seed']}"


def style_axes(ax, x: str, y: str) -> None:
    """Labels the axes, and gives them the grid and the frame that all pictures have."""
    ax.set_xlabel(x, fontsize=9)
    ax.set_ylabel(y, fontsize=9)
    ax.tick_params(labelsize=8)
    ax.grid(color="0.9", linewidth=0.8)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


def diamond(ax, value: float, colour: str, label: str | None = None) -> None:
    """Marks epoch 0: the network before training."""
    ax.plot(0, value, "D", color="white", markeredgecolor=colour, markeredgewidth=1.5, markersize=7, label=label)


def epoch_axis(ax, first: int, last: int) -> None:
    """An x axis of whole epochs."""
    margin = max(0.03 * (last - first), 0.2)
    ax.set_xlim(first - margin, last + margin)
    ax.locator_params(axis="x", integer=True, min_n_ticks=1, steps=[1, 2, 5, 10])


def log_axis(ax, values, accuracy: bool = False) -> None:
    """A log y axis for values >= 0. It is linear below the smallest positive value, so that zeros are drawn too.

    With `accuracy` the values are errors in percent: the ticks show accuracies, and higher is better.
    """
    values = np.asarray(values)
    values = values[np.isfinite(values)]
    positive = values[values > 0] if (values > 0).any() else np.ones(1)
    low, high, zeros = positive.min(), positive.max(), bool((values <= 0).any())
    ax.set_yscale("symlog", linthresh=low, linscale=0.3) if zeros else ax.set_yscale("log")
    bottom, top = -0.1 * low if zeros else low / 1.25, high * 1.25
    powers = range(int(np.floor(np.log10(low))) - 1, int(np.ceil(np.log10(high))) + 1)
    usual = (1, 2, 3, 5, 7) if high < 10 * low else (1, 2, 5) if high < 3e3 * low else (1,)
    for steps in (usual, np.arange(1, 10, 0.5), np.arange(1, 10, 0.1)):
        ticks = [float(f"{m * 10.0**p:.3g}") for p in powers for m in steps if low / 1.25 <= m * 10.0**p <= top]
        if len(ticks) >= FEWEST_TICKS:
            break
    ticks = [0.0] * zeros + ticks
    ax.set_yticks(ticks, [f"{100 - tick if accuracy else tick:g}" for tick in ticks])
    ax.set_yticks([], minor=True)
    ax.set_ylim(*(top, bottom) if accuracy else (bottom, top))


def split_of(records: list[dict]) -> str:
    """The split that epochs are evaluated on: "validation" or "test"."""
    return "validation" if "validation_accuracy" in records[0] else "test"


def evenly(names: list[str], most: int) -> list[str]:
    """At most `most` of the names, the first and the last among them."""
    return [names[i] for i in np.linspace(0, len(names) - 1, min(len(names), most)).round().astype(int)]


def natural(path: str) -> list[tuple[int, str]]:
    """Sorts Conv_2 before Conv_10."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", path)]
