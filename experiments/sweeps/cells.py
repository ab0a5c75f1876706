"""Many runs of `experiments.mnist`, each a cell of a sweep: one is trained, or finished, or read, after the other.

A cell lies in a directory named after its settings. A sweep that is interrupted goes on where it was, and one that is
widened, or another that asks for the same cell, finds it there.
"""

import dataclasses
import shutil
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from experiments import mnist
from experiments.data import load as data
from experiments.plots.style import COLOURS, MARKERS, log_axis, style_axes
from experiments.run import display
from experiments.run.errors import Diverged, Infeasible, InUse, UserError
from experiments.run.files import write_json
from experiments.run.workdir import default_path
from experiments.training import fit as runner

NEVER = 10**9  # a cell takes seconds: it is saved when it ends
FIGURES = {"test_accuracy", "test_loss", "density", "parameters", "flops", "epochs", "steps", "train_seconds"}
FIGURES |= {"test_sampled_accuracy"}  # of methods that draw masks
JUDGED = {"ece", "brier", "fgsm_accuracy", "ood_auroc", "gradient_flow"}


class Cell(NamedTuple):
    """One run and what the sweep calls it: its place on the axes and in the legend."""

    labels: Mapping[str, Any]
    config: mnist.Config


def cell(labels: Mapping[str, Any], method: str, **settings) -> Cell:
    """A run of a method's best recipe with these settings in place of its own.

    Raises:
      UserError: a setting is out of range.
    """
    config = mnist.Config(**{**mnist.defaults("best", method), "checkpoint_every": NEVER, **settings})
    config.check()
    return Cell(labels, config)


def run(
    cells: Iterable[Cell], dataset: data.Dataset, folder: Path, strangers: data.Dataset | None = None
) -> list[dict]:
    """A row for each cell, in their order: its labels, its seed and its figures.

    Each cell leaves its files in a directory of `folder`; a finished one is read from there. One that cannot be had, or
    whose training diverges, is left out, and its line says why.
    """
    rows, cells = [], list(cells)
    with _Display(len(cells)) as shown:
        for labels, config in cells:
            config = mnist.settled(config, dataset.name)
            path = folder / default_path(config, "cells").name
            began, fresh = time.perf_counter(), not (path / "summary.json").exists()
            summary = None
            while not summary:
                try:
                    summary = runner.fit(replace(config, workdir=str(path)), dataset, "cells", strangers, alone=False)
                except InUse as error:  # another sweep trains this cell: it will be there
                    shown.wait(error)
                    time.sleep(1)
                except (Infeasible, Diverged) as error:
                    shown.left_out(labels, config.seed, error)
                    break
            if not summary:
                continue
            if fresh:
                shutil.rmtree(path / "checkpoints", ignore_errors=True)  # the summary is what a sweep needs
            row = {**labels, "seed": config.seed}
            row |= {name: summary[name] for name in sorted((FIGURES | JUDGED) & set(summary))}
            rows.append(row)
            shown.cell(labels, config.seed, summary, time.perf_counter() - began if fresh else None)
    return rows


def open_data(config) -> data.Dataset:
    """The data set that a sweep's settings name; a warning that comes with it is shown."""
    dataset = data.load(config.dataset, config.data_dir)
    if dataset.warning:
        display.show_warning(dataset.warning)
    return dataset


def carry_out(config, grid: Iterable[Cell], dataset: data.Dataset, **more) -> tuple[Path, dict]:
    """Runs, or finishes, the cells of a sweep and writes its summary.json: settings, versions, `more`, a row a cell.

    Returns:
      The sweep's directory, which its settings name, and the summary. The cells lie in cells/ beside that directory.
    """
    path = Path(config.workdir).expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {path} ({error}); name another with --workdir") from error
    strangers = data.load_strangers(config, dataset.name) if hasattr(config, "strangers") else None
    summary = {
        "dataset": dataset.name,
        "data_source": dataset.source,
        "config": dataclasses.asdict(config),
        "versions": runner.versions(),
        **more,
        "rows": run(grid, dataset, path.parent / "cells", strangers),
    }
    write_json(path / "summary.json", summary)
    return path, summary


def grouped(rows: list[dict], by: str, x: str, y: str) -> dict[Any, dict[Any, list[float]]]:
    """{group: {x: the values of y, of all seeds}}, in the rows' order; rows without x or y are left out."""
    groups = {}
    for row in rows:
        if row.get(x) is not None and row.get(y) is not None:
            groups.setdefault(row[by], {}).setdefault(row[x], []).append(row[y])
    return groups


def at_mean(rows: list[dict], by: str, at: str, x: str) -> list[dict]:
    """The rows with `x` replaced by its mean over the seeds of a group: one place on the axis for all of them."""
    means = {}
    for row in rows:
        means.setdefault((row[by], row[at]), []).append(row[x])
    return [row | {x: float(np.mean(means[row[by], row[at]]))} for row in rows]


def seeds(number: int) -> str:
    """What a title says of the lines that are drawn."""
    return f"mean of {number} seeds, band from lowest to highest" if number > 1 else "1 seed"


def draw_lines(
    ax,
    groups: Mapping[Any, Mapping[Any, list[float]]],
    x: str,
    y: str,
    accuracy: bool = False,
    names: list | None = None,
) -> None:
    """A line for each group: the mean over the seeds, in a band from the lowest to the highest.

    With `accuracy` the values are fractions, drawn in percent on a log scale of the error. `names`: all that the
    figure shows, in an order that gives each its colour in every panel.
    """
    drawn = []
    for name, points in groups.items():
        i = (names or list(groups)).index(name)
        at = sorted(points)
        values = [np.array(points[place]) for place in at]
        values = [100 * (1 - v) for v in values] if accuracy else values
        colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
        style = "-" if i < len(COLOURS) else "--"
        means = [v.mean() for v in values]
        ax.plot(at, means, style, color=colour, marker=marker, markersize=4, linewidth=1.3, label=str(name))
        ax.fill_between(at, [v.min() for v in values], [v.max() for v in values], color=colour, alpha=0.15, linewidth=0)
        drawn += [value for v in values for value in v]
    style_axes(ax, x, y)
    if accuracy:
        log_axis(ax, drawn, accuracy=True)


def log_ticks(ax, values: Iterable[float], percent: bool = False) -> None:
    """A log x axis with a tick at each value that is not too near the one before."""
    values = sorted(set(values))
    values = [v for before, v in zip([0, *values], values, strict=False) if v > 1.15 * before]
    ax.set_xscale("log")
    ax.set_xticks(values, [f"{100 * v:g}" if percent else f"{v:g}" for v in values])
    ax.set_xticks([], minor=True)


def show_table(title: str, groups: Mapping[Any, Mapping[Any, list[float]]], head: str) -> None:
    """Means of fractions over the seeds, in percent: a line for each group, a column for each x."""
    columns = sorted({x for points in groups.values() for x in points})
    table = Table(title=title)
    table.add_column(head)
    for x in columns:
        table.add_column(f"{x:g}", justify="right")
    for name, points in groups.items():
        means = [float(np.mean(points[x])) if x in points else None for x in columns]
        table.add_row(escape(str(name)), *("" if m is None else f"{m:.2%}" for m in means))
    Console(file=sys.stdout).print(table)


class _Display:
    """A line for each cell, and on a terminal a bar over all of them."""

    def __init__(self, cells: int):
        self._console, self._cells, self._done, self._waited = Console(file=sys.stdout), cells, 0, None
        self._progress = Progress(
            TextColumn("cell {task.completed}/{task.total}"),
            BarColumn(bar_width=None),
            TimeRemainingColumn(compact=True),
            TextColumn("left"),
            console=self._console,
            disable=not self._console.is_terminal,
            expand=True,
        )
        self._task = self._progress.add_task("cells", total=cells)

    def __enter__(self):
        self._progress.__enter__()
        return self

    def __exit__(self, *error):
        self._progress.__exit__(*error)

    def cell(self, labels: Mapping[str, Any], seed: int, summary: dict, seconds: float | None) -> None:
        took = "found finished" if seconds is None else f"{seconds:.0f} s"
        self._line(labels, seed, f"test accuracy {summary['test_accuracy']:.2%}  {took}")

    def wait(self, why: Exception) -> None:
        """Says why, once for each cell."""
        if self._waited != self._done:
            self._waited = self._done
            self._console.print(f"waiting: {why}", highlight=False, markup=False, soft_wrap=True)

    def left_out(self, labels: Mapping[str, Any], seed: int, why: Exception) -> None:
        self._line(labels, seed, f"left out: {why}")

    def _line(self, labels: Mapping[str, Any], seed: int, text: str) -> None:
        self._done += 1
        self._progress.update(self._task, completed=self._done)
        what = "  ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in labels.values())
        line = f"{self._done:>4}/{self._cells}  {what}  seed {seed}  {text}"
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)
