"""What a sweep prints: a line for each cell, on a terminal a bar over all of them, and a table at the end."""

import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from experiments.plots.lines import Groups
from experiments.run.progress import Bar


class Display(Bar):
    """A context manager around the training of so many cells."""

    def __init__(self, cells: int):
        super().__init__("cell {task.completed}/{task.total}", cells)
        self._cells, self._done, self._waited = cells, 0, None

    def cell(self, labels: Mapping[str, Any], seed: int, summary: dict, seconds: float | None) -> None:
        """Prints the line of a finished cell; seconds: that it took, None if it was finished before."""
        took = "finished before" if seconds is None else f"{seconds:.0f} s"
        emptied = summary.get("emptied")
        collapse = f"  layer collapse: nothing is kept of {', '.join(emptied)}" if emptied else ""
        self._line(labels, seed, f"test accuracy {summary['test_accuracy']:.2%}  {took}{collapse}")

    def wait(self, why: Exception) -> None:
        """Prints why the sweep waits, once for each cell."""
        if self._waited != self._done:
            self._waited = self._done
            self.say(f"waiting: {why}")

    def left_out(self, labels: Mapping[str, Any], seed: int, why: Exception) -> None:
        """Prints the line of a cell that is left out."""
        self._line(labels, seed, f"left out: {why}")

    def _line(self, labels: Mapping[str, Any], seed: int, text: str) -> None:
        self._done += 1
        self.update(completed=self._done)
        what = "  ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in labels.values())
        line = f"{self._done:>4}/{self._cells}  {what}  seed {seed}  {text}"
        self.say(line)


def show_table(title: str, groups: Groups, head: str) -> None:
    """Prints the means of fractions over the seeds, in percent: a line for each group, a column for each x.

    Args:
      title: of the table.
      groups: see `experiments.plots.lines.grouped`.
      head: what the columns are.
    """
    columns = sorted({x for points in groups.values() for x in points})
    table = Table(title=title)
    table.add_column(head)
    for x in columns:
        table.add_column(f"{x:g}", justify="right")
    for name, points in groups.items():
        means = [float(np.mean(points[x])) if x in points else None for x in columns]
        table.add_row(escape(str(name)), *("" if m is None else f"{m:.2%}" for m in means))
    Console(file=sys.stdout).print(table)
