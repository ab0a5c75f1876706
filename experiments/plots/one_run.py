"""The pictures of one run, which it leaves in its work directory."""

import math
from pathlib import Path

import numpy as np

from experiments.plots.style import (
    BLUE,
    COLOURS,
    GREY,
    ORANGE,
    diamond,
    epoch_axis,
    evenly,
    log_axis,
    natural,
    new_figure,
    save,
    split_of,
    stages,
    style_axes,
    title_of,
)

MAX_HISTOGRAMS, MAX_KERNELS, KERNELS_PER_ROW = 12, 64, 8
SMALLEST_IMAGE = 8  # pixels along each side of what is taken for an image

Arrays = dict[str, np.ndarray]


def draw_run(path: Path, summary: dict, records: list[dict], weights: Arrays, scores: Arrays, masks: Arrays) -> None:
    """Writes the pictures of a finished run: curves.png, layers.png, kernels.png, flips.png and assessment.png.

    A picture that would have no meaning is left out.

    Args:
      path: the work directory.
      summary, records: the contents of summary.json and of metrics.jsonl.
      weights, scores, masks: {path: float32 array} at the end; of a dense network there are no scores and no masks.
    """
    pictures = {
        "curves.png": curves(summary, records),
        "layers.png": layers(summary, weights, scores, masks),
        "kernels.png": kernels(summary, weights, masks),
        "flips.png": flips(summary, records),
        "assessment.png": assessment(summary),
    }
    for name, figure in pictures.items():
        if figure is not None:
            save(figure, path / name)


def curves(summary: dict, records: list[dict]):
    """Accuracy (percent, on a log scale of the error) and loss (nats) over epochs; epoch 0 is before training."""
    figure = new_figure(title_of(summary), 10, 4.2)
    split = split_of(records)
    before, _ = stages(summary["method"])
    for ax, measure in zip(figure.subplots(1, 2), ("accuracy", "loss"), strict=True):
        percent, drawn = measure == "accuracy", []
        lines = [(split, BLUE, split), ("train", ORANGE, "train, mean over the epoch")]
        if f"{split}_sampled_{measure}" in records[0]:
            lines.append((f"{split}_sampled", COLOURS[2], f"{split}, mean of sampled masks"))
        for name, colour, label in lines:
            at = {r["epoch"]: r[f"{name}_{measure}"] for r in records if f"{name}_{measure}" in r}
            epochs, values = list(at), np.array(list(at.values()))
            first, last = (f"{value:.2%}" if percent else f"{value:.4f}" for value in values[[0, -1]])
            values = 100 * (1 - values) if percent else values
            ax.plot(epochs, values, color=colour, marker="o", markersize=3.5, label=f"{label}: {last} at the end")
            if name == split:
                diamond(ax, values[0], colour, label=f"{split}, before training ({before}): {first}")
            drawn.extend(values)
        style_axes(ax, "epoch", "accuracy (%), log scale of the error" if percent else "loss (nats), log scale")
        log_axis(ax, drawn, accuracy=percent)
        epoch_axis(ax, 0, records[-1]["epoch"])
        ax.legend(fontsize=8, edgecolor="none")
    return figure


def layers(summary: dict, weights: dict, scores: dict, masks: dict):
    """Density of each layer in percent, and histograms of scores, for at most MAX_HISTOGRAMS layers.

    The threshold is the smallest score that is kept; it is drawn where scores are ranked. Where there are no scores, or
    where they are the masks themselves, the histograms are of the weights' magnitudes.
    """
    names = sorted(summary["layers"], key=natural)
    shown = evenly(names, MAX_HISTOGRAMS)
    columns = 3 if len(shown) > 4 else min(2, len(shown))
    rows = -(-len(shown) // columns)
    figure = new_figure(title_of(summary), 5 + 2.7 * columns, max(2.3 * rows, 0.2 * len(names)) + 1.4)
    left, right = figure.subfigures(1, 2, width_ratios=(5, 2.7 * columns))

    ax, at, size = left.subplots(), range(len(names)), 7 if len(names) > MAX_HISTOGRAMS else 9
    counts = [summary["layers"][name] for name in names]
    kept = ax.barh(at, [100 * count["density"] for count in counts], height=0.6, color=BLUE, label="kept", zorder=2)
    dropped = ax.barh(at, 100, height=0.6, color=str(GREY), label="dropped")
    for y, count in enumerate(counts):
        ax.text(102, y, f"{count['kept']:,} of {count['size']:,}", va="center", fontsize=size)
    style_axes(ax, "density (% of the layer's weights that are kept)", "")
    ax.set(xlim=(0, 100), ylim=(len(names) - 0.5, -0.5))
    ax.set_yticks(at, names, fontsize=size)
    ax.set_title("weights kept in each layer", fontsize=10)

    grid = right.subplots(rows, columns, squeeze=False).ravel()
    for ax, name in zip(grid, shown, strict=False):
        _histogram(ax, weights[name], scores.get(name), masks.get(name))
        ax.set_title(name, fontsize=9)
    for ax in grid[len(shown) :]:
        ax.set_visible(False)
    which = f"{len(shown)} of the {len(names)} layers, evenly spaced" if len(shown) < len(names) else "all layers"
    right.suptitle(f"histograms of {which}", fontsize=10)
    if masks:
        right.legend(handles=[kept, dropped], loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return figure


def _histogram(ax, weight: np.ndarray, score: np.ndarray | None, mask: np.ndarray | None) -> None:
    """One layer's scores or weights: those that are kept, and stacked on them those that are dropped."""
    kept = np.ones(weight.shape, bool) if mask is None else mask == 1
    of, values, threshold = "weight magnitude", np.abs(weight), None
    if score is not None and not np.array_equal(score, mask):
        score = np.broadcast_to(score, weight.shape)  # a neuron has one score for all its weights
        of, values = "score magnitude", np.abs(score)
        for by, ranked in ("score magnitude", values), ("score", score):  # methods rank by the one or by the other
            if 0 < kept.sum() < kept.size and ranked[kept].min() >= ranked[~kept].max():
                of, values, threshold = by, ranked, ranked[kept].min()
                break
    edges = np.linspace(min(values.min(), 0), max(values.max(), 0) or 1, 41)
    (below, _), (all_, _) = np.histogram(values[kept], edges), np.histogram(values, edges)
    ax.stairs(below, edges, fill=True, color=BLUE)
    ax.stairs(all_, edges, baseline=below, fill=True, color=str(GREY))
    if threshold is not None:
        ax.axvline(threshold, color="black", linestyle="--", linewidth=1)
        label = f" threshold\n {threshold:.3g}"
        ax.text(threshold, 0.98, label, transform=ax.get_xaxis_transform(), va="top", fontsize=8)
    style_axes(ax, of, "weights per bin")
    ax.set_ylim(0, 1.3 * all_.max())  # room for the threshold's label
    ax.locator_params(axis="x", nbins=4, steps=[1, 2, 5, 10])
    ax.locator_params(axis="y", integer=True)
    ax.yaxis.set_major_formatter("{x:,.0f}")


def kernels(summary: dict, weights: dict, masks: dict):
    """The first layer's weights as pictures, before and after masking; None where it does not see the image.

    Of a convolution (HWIO) each picture is an output channel. Of a dense layer on a square image each picture is a
    unit. Up to 3 input channels stand side by side.
    """
    names = list(summary["layers"])
    # In a ResNet the blocks may sort before the stem, but only the stem sees an image's 1 or 3 channels.
    name = next((name for name in names if weights[name].ndim == 4 and weights[name].shape[2] in (1, 3)), names[0])
    kernel = _as_convolution(weights[name])
    if kernel is None:
        return None
    most = MAX_KERNELS if weights[name].ndim == 4 else MAX_KERNELS // 2
    tiles = _tiles(kernel, most)
    panels = {"after training": np.ones(tiles.shape, bool)}
    if name in masks:
        kept = _tiles(_as_convolution(masks[name]), most) == 1
        panels = {"before masking": np.ones(tiles.shape, bool), "after masking": kept}
    count, height, width = tiles.shape
    panel_height = 5.2 * -(-count // KERNELS_PER_ROW) * height / (min(count, KERNELS_PER_ROW) * width)
    figure = new_figure(title_of(summary), 5.2 * len(panels) + 1, panel_height + 1, layout="compressed")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    limit = 1.25 * np.abs(tiles).max() or 1  # the ends of the colour scale are too dark to tell red from blue
    for ax, (text, kept) in zip(axes, panels.items(), strict=True):
        image = ax.imshow(_mosaic(np.where(kept, tiles, np.nan)), "RdBu_r", vmin=-limit, vmax=limit)
        ax.imshow(_mosaic(np.where(kept, np.nan, GREY)), "gray", vmin=0, vmax=1)
        ax.set(xticks=[], yticks=[], facecolor="0.25")
        ax.set_title(f"{text}: {kept.sum():,} weights", fontsize=10)
    figure.colorbar(image, ax=axes, label="weight")
    caption, channels = f"{name}: {count} of {kernel.shape[-1]} outputs", kernel.shape[2]
    if channels > 1:
        caption += f", input channels 1 to {min(channels, 3)} of {channels} side by side"
    figure.supxlabel(caption + ("; grey: masked out" if name in masks else ""), fontsize=10)
    return figure


def _as_convolution(kernel: np.ndarray) -> np.ndarray | None:
    """The kernel as [height, width, channels, outputs].

    Of a dense layer this is its view of the whole image: square, of 1 or 3 channels. None if its inputs are no such
    image.
    """
    if kernel.ndim == 4:
        return kernel
    for channels in (1, 3):
        side = math.isqrt(len(kernel) // channels)
        if kernel.ndim == 2 and side * side * channels == len(kernel) and side >= SMALLEST_IMAGE:
            return kernel.reshape(side, side, channels, -1)
    return None


def _tiles(kernel: np.ndarray, most: int) -> np.ndarray:
    """[n, height, channels * width] pictures of the first outputs of a kernel [height, width, channels, outputs]."""
    kernel = kernel[:, :, :3, :most]
    return kernel.transpose(3, 0, 2, 1).reshape(kernel.shape[3], kernel.shape[0], -1)


def _mosaic(tiles: np.ndarray) -> np.ndarray:
    """The pictures in rows of KERNELS_PER_ROW, enlarged where they are small, with NaN between them."""
    enlarge, columns = max(1, 24 // tiles.shape[1]), min(len(tiles), KERNELS_PER_ROW)
    tiles = tiles.repeat(enlarge, axis=1).repeat(enlarge, axis=2)
    tiles = np.pad(tiles, ((0, -len(tiles) % columns), (1, 1), (1, 1)), constant_values=np.nan)
    _, height, width = tiles.shape
    return tiles.reshape(-1, columns, height, width).swapaxes(1, 2).reshape(-1, columns * width)


def flips(summary: dict, records: list[dict]):
    """Mask bits that flipped in each epoch, in percent of the layer's size; None where there are no masks."""
    records = [record for record in records if record.get("flips")]
    if not any(any(record["flips"].values()) for record in records):  # no masks, or masks that never change
        return None
    from matplotlib import colormaps

    figure = new_figure(title_of(summary), 8, 4.4)
    ax = figure.subplots()
    epochs = [record["epoch"] for record in records]
    names = sorted(records[0]["flips"], key=natural)
    named = evenly(names, len(COLOURS) - 1)  # the last, black, is that of the sum
    few = len(named) == len(names)
    counts = np.array([[record["flips"][name] for name in names] for record in records])
    sizes = np.array([summary["layers"][name]["size"] for name in names])
    for i, name in enumerate(names):
        colour = COLOURS[i] if few else colormaps["viridis"](i / (len(names) - 1))
        label = name if name in named else None
        ax.plot(epochs, 100 * counts[:, i] / sizes[i], "o-", color=colour, markersize=4, linewidth=1.2, label=label)
    total = 100 * counts.sum(axis=1) / sizes.sum()
    ax.plot(epochs, total, "s--", color="black", markersize=4, label="all layers together")
    style_axes(ax, "epoch", "mask bits flipped in the epoch (% of the layer), log scale")
    log_axis(ax, [*(100 * counts / sizes).ravel(), *total])
    epoch_axis(ax, epochs[0], epochs[-1])
    heading = None if few else f"{len(named)} of the {len(names)} layers"
    ax.legend(title=heading, title_fontsize=8, fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.01, 1))
    return figure


def assessment(summary: dict):
    """The reliability diagram, and the gradient flow over epochs; None for a run without --assess."""
    if "reliability" not in summary:
        return None
    figure = new_figure(title_of(summary), 10, 4.4)
    left, right = figure.subplots(1, 2)
    count, confidence, accuracy = (
        np.array(summary["reliability"][name]) for name in ("count", "confidence", "accuracy")
    )
    edges, some = np.linspace(0, 1, len(count) + 1), count > 0
    width = edges[1]
    left.bar(100 * (edges[:-1] + width / 2)[some], 100 * accuracy[some], width=96 * width, color=BLUE, label="accuracy")
    left.plot(100 * confidence[some], 100 * confidence[some], "_", color=ORANGE, markersize=14, label="mean confidence")
    left.plot([0, 100], [0, 100], color="black", linestyle=":", linewidth=1)
    for at, height, number in zip(edges[:-1][some] + width / 2, accuracy[some], count[some], strict=True):
        left.text(100 * at, 100 * height + 1, f"{number:,.0f}", ha="center", fontsize=7)
    style_axes(left, "confidence: the highest probability (%)", "accuracy (%)")
    left.set(xlim=(0, 100), ylim=(0, 112))
    left.set_title(f"reliability: expected calibration error {summary['ece']:.2%}; numbers: images", fontsize=10)
    left.legend(fontsize=8, edgecolor="none", loc="lower right")
    flow = summary["gradient_flow"]
    right.plot(range(len(flow)), flow, "o-", color=BLUE, markersize=4)
    style_axes(right, "epoch", "norm of the gradient over the kept weights, log scale")
    log_axis(right, flow)
    epoch_axis(right, 0, len(flow) - 1)
    right.set_title("gradient flow", fontsize=10)
    return figure
