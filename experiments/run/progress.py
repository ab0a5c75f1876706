"""A progress bar on a terminal; elsewhere only the lines that are said."""

import sys
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn


class Bar:
    """A context manager around long work.

    Args:
      label: what stands before the bar; "{task.fields[NAME]}" is replaced by a field.
      total: the units of the work.
      completed: how many of them are behind it.
      quiet: whether it shows nothing at all.
      fields: their first values; "figures" stands behind the bar.
    """

    def __init__(self, label: str, total: int, completed: int = 0, quiet: bool = False, **fields: Any):
        self.console = Console(file=sys.stdout, quiet=quiet)
        self._progress = Progress(
            TextColumn(label),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(compact=True),
            TextColumn("left"),
            console=self.console,
            disable=quiet or not self.console.is_terminal,
            expand=True,
        )
        self._task = self._progress.add_task("", total=total, completed=completed, **{"figures": "", **fields})

    def __enter__(self):
        self._progress.__enter__()
        return self

    def __exit__(self, *error):
        self._progress.__exit__(*error)

    def say(self, text: str) -> None:
        """A line above the bar."""
        whole = not self.console.is_terminal  # lines in a file; on a terminal they end between words
        self.console.print(text, highlight=False, markup=False, soft_wrap=whole)

    def update(self, **changes: Any) -> None:
        """New values of the fields, or of "completed"."""
        self._progress.update(self._task, **changes)
