"""The questions of the papers about tickets, each a sweep of the same experiment, with one picture."""

import numpy as np
from rich.console import Console
from rich.table import Table

from experiments.config.settings import changed
from experiments.config.tickets import Lottery
from experiments.data.source import Dataset
from experiments.plots.style import COLOURS, MARKERS, new_figure, save, style_axes
from experiments.run import schemas
from experiments.run.workdir import Workdir
from experiments.tickets import rounds
from experiments.tickets.plots import KINDS, PANELS, band, remaining_axis
from supermask_jax import lottery, saliency
from supermask_jax.initializers import signed_deviation
from supermask_jax.trees import leaf_key

SWEEPS = {  # name: (setting, its values, what the axis says)
    "early": ("prune_at", (0.01, 0.03, 0.1, 0.3, 1.0), "part of training after which the masks are drawn"),
    "rewind": ("rewind_step", (0, 30, 100, 300, 1000), "step that is rewound to"),
    "rounds": ("rounds", (1, 2, 4, 8), "rounds to the same density"),
    "criterion": (
        "criterion",
        ("large_final", "large_init_large_final", "magnitude_increase", "movement", "large_init", "random"),
        "mask criterion",
    ),
}
SWEEP_DENSITY = 0.1  # of the tickets that are compared, where --density does not say
FIGURES = ("validation_accuracy", "test_accuracy")
UNTRAINED_DENSITIES = (0.9, 0.7, 0.5, 0.3, 0.2, 0.1, 0.05)


def run(config: Lottery, dataset: Dataset) -> dict:
    """Runs, or resumes, every value of the sweep in a directory of its own; returns the summary."""
    workdir = rounds.open_workdir(config, dataset, schema=schemas.SweepSummary)
    summary = workdir.summary()
    if not summary:
        rows = (
            untrained(config, dataset, workdir) if config.sweep == "untrained" else compared(config, dataset, workdir)
        )
        summary = {
            "sweep": config.sweep,
            "dataset": dataset.name,
            "model": config.model.model,
            "rows": rows,
            "seed": config.seed,
            "config": workdir.config(),
            "data_source": dataset.source,
        }
        picture = draw_untrained if config.sweep == "untrained" else draw
        workdir.finish(summary, lambda: save(picture(summary), workdir.path / "sweep.png"))
    show(summary, workdir.path)
    return summary


def compared(config: Lottery, dataset: Dataset, workdir: Workdir) -> list[dict]:
    """A row for each network of the last round: the value of the sweep, the kind, the trial and its figures.

    All prune in one shot, but the sweep over the number of rounds.
    """
    setting, values, _ = SWEEPS[config.sweep]
    rows = []
    values = [value for value in values if setting != "rewind_step" or value < config.tickets.steps]
    folders = [str(workdir.path / f"{setting}-{value}") for value in values]
    every = [changed(config, **changes_of(config, v), workdir=f) for v, f in zip(values, folders, strict=True)]
    for one in every:
        one.check()  # all of them, before the first is trained
    for value, one in zip(values, every, strict=True):
        summary = rounds.run(one, dataset)
        last = [record for record in summary["networks"] if record["round"] == one.tickets.rounds]
        names = ("trial", "network", "density", *(name for name, _, _ in PANELS), "instability")
        rows += [{"value": value, **{name: r[name] for name in names if name in r}} for r in last]
    return rows


def changes_of(config: Lottery, value) -> dict:
    """The settings of one value of a sweep, as far as they are not the sweep's own."""
    setting = SWEEPS[config.sweep][0]
    density = config.tickets.density or SWEEP_DENSITY  # which takes the place of the fractions
    changes = {"rounds": 1, "stability": setting == "rewind_step", "density": density, "conv_fraction": None}
    return changes | {"sweep": "none", setting: value}


def untrained(config: Lottery, dataset: Dataset, workdir: Workdir) -> list[dict]:
    """Accuracies of masks on weights that were never trained: every criterion, at several densities.

    The masks are drawn once, from a trained network; kept weights are their initial values, or the signs of these at
    one size. Zhou et al. 2019, section 4.
    """
    rows = []
    full_only = changed(config, rounds=0, controls=())
    with rounds.Experiment(full_only, dataset, None, workdir) as experiment:
        for trial in range(config.tickets.trials):
            [outcome] = experiment.rounds(trial)
            start = experiment.initial(trial)
            initial = start.weights
            full = lottery.full_masks(initial)
            starts = {"initial weights": initial, "signed constants": signed_deviation(initial)}
            for name in (*saliency.CRITERIA, *saliency.RANKED, "random"):
                experiment.stop_if_asked()
                key = leaf_key(experiment.key(trial), name)
                scores = saliency.criterion(name, initial, outcome.trained.weights, masks=full, key=key)
                for density in UNTRAINED_DENSITIES:
                    masks = lottery.prune_by(scores, full, round(1 - density, 12), scope="layer")
                    for label, weights in starts.items():
                        figures = experiment.evaluate(start._replace(weights=weights), masks)
                        rows.append({"criterion": name, "density": density, "start": label, "trial": trial, **figures})
    return rows


def draw(summary: dict):
    """The networks of the last round against the sweep's values: accuracies, early stopping, instability."""
    _, _, label = SWEEPS[summary["sweep"]]
    rows = summary["rows"]
    values = list(dict.fromkeys(row["value"] for row in rows))
    panels = [*PANELS]
    if summary["sweep"] == "rewind":
        panels[2] = ("instability", 1, "instability (0: both copies end alike)")
    density = 100 * np.mean([row["density"] for row in rows])
    title = f"{summary['sweep']} · {summary['model']} on {summary['dataset']} · {density:.3g} % of the weights left"
    figure = new_figure(title, 12, 4.4)
    axes = figure.subplots(1, len(panels))
    for ax, (name, scale, says) in zip(axes, panels, strict=True):
        for kind, (kind_label, colour, marker) in KINDS.items():
            points = [
                [scale * r[name] for r in rows if r["value"] == v and r["network"] == kind and name in r]
                for v in values
            ]
            if any(points):
                at = [i for i, point in enumerate(points) if point]
                band(ax, at, [points[i] for i in at], colour, marker, kind_label)
        style_axes(ax, label, says)
        ax.set_xticks(range(len(values)), [str(v).replace("_", "\n") for v in values])
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    return figure


def draw_untrained(summary: dict):
    """Accuracy of masks on untrained weights against density, a line for each criterion."""
    rows = summary["rows"]
    starts = list(dict.fromkeys(row["start"] for row in rows))
    names = list(dict.fromkeys(row["criterion"] for row in rows))
    title = f"masks on weights that were never trained · {summary['model']} on {summary['dataset']}"
    figure = new_figure(title, 11, 5)
    axes = figure.subplots(1, len(starts), sharey=True)
    for ax, start in zip(axes, starts, strict=True):
        for i, name in enumerate(names):
            values = [
                [
                    100 * r["test_accuracy"]
                    for r in rows
                    if (r["criterion"], r["start"], r["density"]) == (name, start, d)
                ]
                for d in UNTRAINED_DENSITIES
            ]
            percents = [100 * d for d in UNTRAINED_DENSITIES]
            band(ax, percents, values, COLOURS[i % len(COLOURS)], MARKERS[(i // len(COLOURS) + i) % len(MARKERS)], name)
        style_axes(ax, "weights remaining (%)", "test accuracy (%)")
        ax.set_title(start, fontsize=10)
        remaining_axis(ax, [100 * d for d in UNTRAINED_DENSITIES])
        ax.set_ylim(0, 100)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return figure


def show(summary: dict, path) -> None:
    """The rows as a table of means, and where the files are."""
    rows = summary["rows"]
    untrained = summary["sweep"] == "untrained"
    table = Table(
        title=f"{summary['sweep']}: {summary['model']} on {summary['dataset']}, test accuracy, mean of trials"
    )
    table.add_column("criterion" if untrained else SWEEPS[summary["sweep"]][0])
    across = [row["start"] if untrained else row["network"] for row in rows]
    columns = list(dict.fromkeys(across))
    for column in columns:
        table.add_column(column, justify="right")
    key = "criterion" if untrained else "value"
    lines = list(dict.fromkeys(row[key] for row in rows))
    for line in lines:
        cells = []
        for column in columns:
            of_cell = [r for r, c in zip(rows, across, strict=True) if c == column and r[key] == line]
            if untrained:  # the density is chosen by validation images, the accuracy is of test images
                mean = {
                    d: np.mean([[r[f] for f in FIGURES] for r in of_cell if r["density"] == d], axis=0)
                    for d in UNTRAINED_DENSITIES
                }
                best = max(mean, key=lambda d: mean[d][0])
                cells.append(f"{mean[best][1]:.1%} at {best:g}")
            else:
                accuracies = [r["early_stop_test_accuracy"] for r in of_cell]
                cells.append(f"{np.mean(accuracies):.2%}" if accuracies else "")
        table.add_row(str(line), *cells)
    console = Console()
    console.print(table)
    console.print(f"files: {path}", highlight=False, markup=False, soft_wrap=True)
