"""What `experiments.many_tasks` shows: progress over all tasks, a line for each, tables at the end."""

import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from experiments.run.progress import Bar


class Display(Bar):
    """A context manager around the training of so many tasks, each of so many steps."""

    def __init__(self, tasks: int, steps: int, split: str):
        label = "task {task.fields[number]} of {task.fields[tasks]}"
        super().__init__(label, tasks * steps, number=1, tasks=tasks, figures="compiling")
        self._tasks, self._steps, self._split = tasks, steps, split
        self._began, self._trained = time.perf_counter(), 0

    def step(self, task: int, step: int, loss: float) -> None:
        """A task is at this step of its training."""
        self.update(completed=task * self._steps + step, number=task + 1, figures=f"loss {loss:.4f}")

    def task(self, record: dict[str, Any], fresh: bool) -> None:
        """A task is finished: now, or by an earlier run."""
        number = record["task"]
        self._trained += fresh
        left = (time.perf_counter() - self._began) / max(self._trained, 1) * (self._tasks - number - 1)
        took = f"{record['train_seconds']:.1f} s   {left / 60:.1f} min left" if fresh else "finished before"
        self.update(completed=(number + 1) * self._steps)
        accuracy = f"{self._split} accuracy {record[f'{self._split}_accuracy']:.2%}"
        kept = f"{record['density']:.1%} kept"
        self.say(f"{number + 1:>5}/{self._tasks}   task {number:<4} {accuracy}   {kept}   {took}")

    def inferred(self, row: dict[str, Any]) -> None:
        """The tasks of images were inferred among so many."""
        self.say(
            f"{row['tasks']:>5} tasks: the task of one image is right in {row['one_shot']:.1%} by one gradient, "
            f"in {row['binary']:.1%} by binary search"
        )


def show_summary(summary: dict[str, Any], path: Path) -> None:
    """The result as two tables, and where the files are."""
    console, split = Console(file=sys.stdout), summary["split"]
    accuracies = [record[f"{split}_accuracy"] for record in summary["tasks"]]
    table = Table(title=f"{len(accuracies)} tasks, one network, on {summary['dataset']}", show_header=False)
    table.add_row(
        f"{split} accuracy", f"mean {summary['mean_accuracy']:.2%}, {min(accuracies):.2%} to {max(accuracies):.2%}"
    )
    table.add_row("network", f"{'-'.join(map(str, summary['units']))}, {summary['weights']:,} weights")
    table.add_row("file of all masks", f"{summary['file_bytes']:,} bytes")
    table.add_row("a further task", f"{summary['bytes_per_task']:,.0f} bytes; a dense one {summary['dense_bytes']:,}")
    table.add_row("files", escape(str(path)))
    console.print(table)
    rows = [row for row in summary["growth"] if "one_shot" in row]
    if not rows:
        return
    images = min(summary["config"]["inferred_images"], summary["images"])
    table = Table(title=f"task inferred from one image, of {images:,} {split} images")
    for head in ("tasks", "one gradient", "... accuracy", "binary search", "... accuracy", "accuracy if told"):
        table.add_column(head, justify="right")
    for row in rows:
        names = ("one_shot", "one_shot_accuracy", "binary", "binary_accuracy", "told_accuracy")
        table.add_row(str(row["tasks"]), *(f"{row[name]:.1%}" for name in names))
    console.print(table)
