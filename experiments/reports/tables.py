"""Which of our results stand beside which published figure, and how far apart they are."""

import math
import statistics
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from experiments.reports import commands
from experiments.reports.gather import CHANGE_NOTHING_HERE, Result
from experiments.reports.published import Experiment, Figure

SHOWN_ELSEWHERE = {"model", "method", "dataset", "epochs"}  # in the figure's own words, or in a column


class Row(NamedTuple):
    """A published figure beside the mean of our runs with the same settings; without runs, beside nothing."""

    figure: Figure
    variant: str  # in which settings its runs differ from the usual ones
    accuracies: tuple[float, ...]
    density: float | None
    epochs: int | None
    command: str
    device: str
    date: str

    @property
    def mean(self) -> float | None:
        return statistics.fmean(self.accuracies) if self.accuracies else None

    @property
    def spread(self) -> tuple[float, float] | None:
        """The lowest and the highest, of several."""
        return (min(self.accuracies), max(self.accuracies)) if len(self.accuracies) > 1 else None

    @property
    def difference(self) -> float | None:
        """Ours minus the published figure."""
        known = self.mean is not None and self.figure.accuracy is not None
        return self.mean - self.figure.accuracy if known else None

    @property
    def cut_short(self) -> bool:
        """Whether our training is shorter than the published one."""
        return bool(self.epochs and self.figure.epochs and self.epochs < self.figure.epochs)


def rows(experiment: Experiment, results: Iterable[Result]) -> list[Row]:
    """The rows of an experiment's table: of each figure, one for each way in which it was run."""
    results, made = list(results), []
    for figure in experiment.figures:
        ways: dict[str, list[Result]] = {}
        for result in results:
            if result.kind == figure.kind and fits(figure.settings, result.settings):
                ways.setdefault(result.way(), []).append(result)
        made += [_row(figure, runs) for runs in ways.values()]
        if not ways:
            made.append(Row(figure, "", (), None, None, "", "", ""))
    return made


def fits(asked: Mapping[str, Any], settings: Mapping[str, Any]) -> bool:
    """Whether a run has the settings of a figure; densities may differ by a hundredth of themselves."""
    return all(
        math.isclose(settings.get(name) or 0, value, rel_tol=0.01)
        if name == "density" and value
        else settings.get(name) == value
        for name, value in asked.items()
    )


def _row(figure: Figure, runs: list[Result]) -> Row:
    runs = sorted(runs, key=lambda run: run.seed)
    first, last = runs[0], max(runs, key=lambda run: run.date)
    accuracies = tuple(run.accuracy for run in runs)
    variant = _variant(figure, first)
    return Row(figure, variant, accuracies, first.density, first.epochs, first.command, last.device, last.date)


def _variant(figure: Figure, run: Result) -> str:
    """The settings of a run that are not the usual ones, nor those that its figure asks for."""
    usual = run.settings | {"preset": ""}  # our own recipe, whatever preset the run names
    _, differing = commands.flags(run.kind, usual)
    skipped = {*figure.settings, *SHOWN_ELSEWHERE, *CHANGE_NOTHING_HERE}
    return ", ".join(_told(name.replace("_", " "), value) for name, value in differing.items() if name not in skipped)


def _told(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return name if value else f"no {name}"
    return f"{name} {' '.join(map(str, value)) if isinstance(value, list) else value}"
