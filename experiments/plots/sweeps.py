"""The pictures of the sweeps, drawn from the contents of their summary.json."""

import itertools
from typing import Any

import numpy as np

from experiments.plots.lines import (
    ACCURACY_LABEL,
    as_drawn,
    at_mean,
    counted,
    draw_level,
    draw_lines,
    grouped,
    log_ticks,
    seeds_note,
)
from experiments.plots.style import log_axis, new_figure

LABELS = {  # of the columns of the comparison's rows
    "test_accuracy": ACCURACY_LABEL,
    "ece": "expected calibration error, log scale",
    "fgsm_accuracy": "accuracy on FGSM images, 8/255 (%), log scale of the error",
    "asked": "density (% of the weights that are kept)",
    "flops": "FLOPs of one forward pass (kept weights only)",
}
PARTS = {  # of `pruning_only`: the column on the x axis, and its label
    "width": ("width", "units or channels of each hidden layer"),
    "depth": ("depth", "hidden layers, equal parameters at each depth"),
    "narrow": ("depth", "hidden layers, all narrow"),
    "data": ("train_images", "training images, equal steps with each"),
}
FORMS = {"product": "the nearest product", "subset-sum": "the nearest sum of products"}  # of the construction
SIZES = {"cnn": "channels of each hidden layer", "resnet": "channels of the first stage"}  # of networks, by their width

Rows = list[dict[str, Any]]


def comparison(summary: dict):
    """Draws test accuracy by density and by FLOPs, and with --assess calibration and robustness, of every method."""
    rows, config = summary["rows"], summary["config"]
    panels = [("test_accuracy", "asked"), ("test_accuracy", "flops")]
    panels += [(name, "asked") for name in ("ece", "fgsm_accuracy") if all(name in row for row in rows)]
    note = seeds_note(summary)
    title = f"{config['model']} on {summary['dataset']} · {counted(config['epochs'], 'epoch')} · {note}"
    figure = new_figure(title, 12.4, 4.3 * (len(panels) // 2) + 1.1)
    for ax, (y, x) in zip(figure.subplots(-(-len(panels) // 2), 2).ravel(), panels, strict=True):
        _compared(ax, rows, x, y)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    return figure


def _compared(ax, rows: Rows, x: str, y: str) -> None:
    """One panel of the comparison."""
    accuracy = y.endswith("accuracy")
    masked = [row for row in rows if row["asked"] < 1]
    groups = grouped(masked if x == "asked" else at_mean(masked, "method", "asked", x), "method", x, y)
    if groups:
        draw_lines(ax, groups, LABELS[x], LABELS[y], accuracy)
        places = {place for points in groups.values() for place in points}
        log_ticks(ax, places, percent=True) if x == "asked" else ax.set_xscale("log")
        ax.tick_params(which="both", labelsize=8)
    drawn = [row[y] for row in masked]
    without = dict.fromkeys(row["method"] for row in rows if row["asked"] == 1)  # those that take no density
    for method, marker in zip(without, itertools.cycle("*X^v"), strict=False):
        own = [row for row in rows if row["method"] == method]
        if all(row["density"] == 1 for row in own):
            values = [row[y] for row in own]
            draw_level(ax, values, f"{method}, all weights", accuracy)
        elif y == "test_accuracy" or not any("test_sampled_accuracy" in row for row in own):
            # Of sampled masks, other figures are of the deterministic mask, which is not what was learned.
            values = [row.get("test_sampled_accuracy", row[y]) for row in own]
            place = float(np.mean([row["density" if x == "asked" else x] for row in own]))
            label = f"{method}, {'drawn masks, ' * ('test_sampled_accuracy' in own[0])}density learned"
            level = as_drawn(np.mean(values), accuracy)
            ax.plot(place, level, marker, color="black", markersize=11, label=label)
        else:
            continue
        drawn += values
    log_axis(ax, as_drawn(drawn, accuracy), accuracy=accuracy)


def distributions(summary: dict):
    """Draws one network under random and other masks by density: accuracy, and with --assess what else is measured."""
    config = summary["config"]
    rows = [row for row in summary["rows"] if row["part"] == "distribution"]
    rows = at_mean(rows, "name", "asked", "density")  # uniform+ keeps more than requested
    for row in rows:
        row["noise"] = row.get("ood_auroc", {}).get("noise")
        row["flow"] = row.get("gradient_flow", [None])[-1]
    masked = [row for row in rows if row["asked"] < 1]
    randoms = [row for row in masked if row["name"].startswith("random")]
    reference = [row for row in randoms if row["name"] == "random, erk"] or randoms
    others = [row for row in masked if not row["name"].startswith("random")] + reference
    names = [*dict.fromkeys(row["name"] for row in (*reference, *others, *randoms))]
    panels = [
        ("random masks, by distribution", randoms, "test_accuracy", ACCURACY_LABEL),
        ("random masks and others", others, "test_accuracy", ACCURACY_LABEL),
        ("calibration", others, "ece", "expected calibration error"),
        ("noise against test images", others, "noise", "AUROC of the highest probability"),
        ("robustness", others, "fgsm_accuracy", LABELS["fgsm_accuracy"]),
        ("gradient flow after training", others, "flow", "norm of the gradient over the kept weights"),
    ]
    panels = [panel for panel in panels if all(row.get(panel[2]) is not None for row in rows)]
    lines, columns = (2, 3) if len(panels) > 2 else (1, 2)
    network = f"{_described(config)}, on {summary['dataset']}"
    title = f"{network} · {counted(config['epochs'], 'epoch')} · {seeds_note(summary)}"
    figure = new_figure(title, 5 * columns, 4.25 * lines + 1)
    for ax, (heading, chosen, y, label) in zip(figure.subplots(lines, columns).ravel(), panels, strict=False):
        accuracy = y.endswith("accuracy")
        draw_lines(ax, grouped(chosen, "name", "density", y), LABELS["asked"], label, accuracy, names)
        dense = [row[y] for row in rows if row["name"] == "dense"]
        if dense:
            draw_level(ax, dense, "dense", accuracy)
        if accuracy:
            log_axis(ax, as_drawn([*dense, *(row[y] for row in chosen)], True), accuracy=True)
        log_ticks(ax, [row["asked"] for row in masked], percent=True)
        ax.set_title(heading, fontsize=10)
    shown = {label: line for ax in figure.axes[:2] for line, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=5, fontsize=9, frameon=False)
    return figure


def _described(config: dict) -> str:
    """The network of a sweep in words."""
    if config["model"] == "resnet":
        return f"ResNet-{config['depth']} of width {config['width']}"
    return f"{config['model']}, {config['depth']} hidden layers of {config['width']}"


def sizes(summary: dict):
    """Draws accuracy by width, a panel for each depth: dense, and randomly pruned to each density.

    Returns None for a sweep without sizes.
    """
    config = summary["config"]
    rows = [row for row in summary["rows"] if row["part"] == "size"]
    depths = sorted({row["depth"] for row in rows})
    if not rows:
        return None
    network = f"{config['model']} on {summary['dataset']}"
    title = f"random pruning by size · {network} · {counted(config['epochs'], 'epoch')} · {seeds_note(summary)}"
    figure = new_figure(title, 5.6 * len(depths) + 1, 4.6)
    for ax, depth in zip(figure.subplots(1, len(depths), squeeze=False, sharey=True)[0], depths, strict=True):
        chosen = [row for row in rows if row["depth"] == depth]
        label = SIZES.get(config["model"], "units of each hidden layer")
        draw_lines(ax, grouped(chosen, "name", "width", "test_accuracy"), label, ACCURACY_LABEL, True)
        log_ticks(ax, [row["width"] for row in chosen])
        ax.set_title(f"ResNet-{depth}" if config["model"] == "resnet" else f"hidden layers: {depth}", fontsize=10)
    # All panels share the axis.
    log_axis(figure.axes[0], as_drawn([row["test_accuracy"] for row in rows], True), accuracy=True)
    figure.axes[0].legend(fontsize=8, edgecolor="none")
    return figure


def learned(summary: dict):
    """Draws the accuracy of edge-popup by width, by depth at equal parameters, by depth when narrow, and by images."""
    config, rows = summary["config"], summary["rows"]
    parts = [part for part in PARTS if any(row["part"] == part for row in rows)]
    columns = min(2, len(parts))
    lines = -(-len(parts) // columns)
    what = f"edge-popup at density {config['density']:g} on {summary['dataset']}"
    title = f"{what} · {counted(config['epochs'], 'epoch')} · {seeds_note(summary)}"
    figure = new_figure(title, 6 * columns, 4.4 * lines + 0.6)
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    for ax in axes[len(parts) :]:
        ax.set_visible(False)
    for ax, part in zip(axes, parts, strict=False):
        x, label = PARTS[part]
        chosen = [row for row in rows if row["part"] == part]
        draw_lines(ax, grouped(chosen, "name", x, "test_accuracy"), label, ACCURACY_LABEL, True)
        log_ticks(ax, [row[x] for row in chosen])
        ax.legend(fontsize=8, edgecolor="none")
    return figure


def construction(summary: dict):
    """Draws the errors of weights and logits, and the test accuracy, of networks pruned to be like a target."""
    built = summary["construction"]
    units = "-".join(map(str, built["target"].get("units", (784, 32, 10))))
    what = f"a trained {units} MLP in a random one twice as deep"
    figure = new_figure(f"{what} · {summary['dataset']} · {seeds_note(summary)}", 14, 4.4)
    panels = (
        ("weight_error", "mean weight error (part of the layer's largest), log scale"),
        ("output_error", "mean error of the logits (part of their deviation), log scale"),
        ("test_accuracy", ACCURACY_LABEL),
    )
    rows = [row | {"form": FORMS.get(row["form"], row["form"])} for row in built["rows"]]
    for ax, (y, label) in zip(figure.subplots(1, 3), panels, strict=True):
        accuracy, drawn = y == "test_accuracy", [row[y] for row in rows]
        x = "random products to choose from, for each weight of the target"
        draw_lines(ax, grouped(rows, "form", "width", y), x, label, accuracy)
        if accuracy:
            target = built["target"]["accuracy"]
            draw_level(ax, [target], f"the target: {target:.2%}", accuracy)
            drawn.append(target)
        log_axis(ax, as_drawn(drawn, accuracy), accuracy=accuracy)
        ax.legend(fontsize=8, edgecolor="none")
    return figure
