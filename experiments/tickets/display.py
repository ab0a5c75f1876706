"""What `experiments.lottery` shows: progress over all its networks, a line for each, a table at the end."""

import sys

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from experiments.run.progress import Bar
from experiments.tickets.plots import KINDS, by_density


class Display(Bar):
    """A context manager around the training of so many networks, each of so many steps."""

    def __init__(self, networks: int, steps: int):
        label = "network {task.fields[number]}/{task.fields[networks]}"
        super().__init__(label, networks * steps, number=1, networks=networks, figures="compiling")
        self._steps, self._networks, self._finished = steps, networks, 0

    def step(self, name: str, step: int, figures: dict | None) -> None:
        """A network is at this step, and was measured there; with no figures, it was resumed from it."""
        if figures is None:
            self.say(f"{name}: resumes from step {step}")
            return
        text = f"{name}  test accuracy {figures['test_accuracy']:.2%}"
        completed = self._finished * self._steps + step
        self.update(completed=completed, number=self._finished + 1, figures=text)

    def network(self, record: dict) -> None:
        """A network is finished."""
        self._finished += 1
        self.update(completed=self._finished * self._steps)
        self.say(
            f"{self._finished:>4}/{self._networks}  trial {record['trial']}  round {record['round']:>2}  "
            f"{record['density']:>6.1%} left  {record['network']:<7} "
            f"test accuracy {record['early_stop_test_accuracy']:.2%} at early stopping, step "
            f"{record['early_stop_step']:,}; {record['test_accuracy']:.2%} at the end"
        )


def show_summary(summary: dict, path) -> None:
    """A row for each density: the mean over the trials, with the lowest and the highest."""
    trials = summary["config"]["trials"]
    title = f"{summary['model']} on {summary['dataset']}: test accuracy at early stopping, mean of {trials} trials"
    table = Table(title=title, caption="in brackets: lowest and highest; then the step of early stopping")
    kinds = [kind for kind in KINDS if any(r["network"] == kind for r in summary["networks"])]
    for column in ("weights left", *kinds):
        table.add_column(column, justify="right")
    points = {kind: {r[0]["round"]: r for _, r in by_density(summary["networks"], kind)} for kind in kinds}
    for number, records in points["ticket"].items():
        cells = [_cell(points[kind][number]) if number in points[kind] else "" for kind in kinds]
        table.add_row(f"{records[0]['density']:.1%}", *cells)
    console = Console(file=sys.stdout)
    console.print(table)
    console.print(f"files: {escape(str(path))}", highlight=False, soft_wrap=True)


def _cell(records: list[dict]) -> str:
    accuracies = [record["early_stop_test_accuracy"] for record in records]
    steps = [record["early_stop_step"] for record in records]
    spread = f" ({min(accuracies):.2%} - {max(accuracies):.2%})" if len(records) > 1 else ""
    return f"{sum(accuracies) / len(accuracies):.2%}{spread}  {sum(steps) / len(steps):,.0f}"
