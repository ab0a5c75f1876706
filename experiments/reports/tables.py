"""Which of our results stand beside which published figure, and how far apart they are."""

import json
import statistics
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from experiments.reports.gather import Result
from experiments.reports.published import Experiment, Figure

VARIED = (  # settings in which runs beside one figure may differ, in the order in which a row names them
    *("model", "init", "scale_weights", "distribution", "rescale", "batch_size", "learning_rate", "optimizer"),
    *(
        "schedule",
        "weight_decay",
        "shift",
        "flip",
        "train_images",
        "preset",
        "kept",
        "rewind_step",
        "fraction",
        "steps",
    ),
)
NO_VARIANT = {"seed", "data", "data_dir", "workdir", "checkpoint_every", "evaluate", "devices", "parallel"}
NO_VARIANT |= {"shard_scores", "coordinator", "num_processes", "process_id", "assess", "ood", "validation"}


class Row(NamedTuple):
    """A published figure beside the mean of our runs with the same settings; without runs, beside nothing."""

    figure: Figure
    variant: str  # what tells its runs from those of the figure's other rows
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
    made = []
    for figure in experiment.figures:
        ways: dict[str, list[Result]] = {}
        for result in results:
            if fits(figure.settings, result.settings):
                ways.setdefault(_way(result), []).append(result)
        names = _variants([runs[0].settings for runs in ways.values()])
        made += [_row(figure, variant, runs) for variant, runs in zip(names, ways.values(), strict=True)]
        if not ways:
            made.append(Row(figure, "", (), None, None, "", "", ""))
    return made


def fits(asked: Mapping[str, Any], settings: Mapping[str, Any]) -> bool:
    """Whether a run has the settings of a figure; a tuple stands for any of its values."""
    return all(
        settings.get(name) in value if isinstance(value, tuple) else settings.get(name) == value
        for name, value in asked.items()
    )


def _way(result: Result) -> str:
    return json.dumps({k: v for k, v in result.settings.items() if k not in NO_VARIANT}, sort_keys=True)


def _variants(ways: list[Mapping[str, Any]]) -> list[str]:
    """For each way, the settings in which the ways differ."""
    differ = [name for name in VARIED if len({json.dumps(way.get(name)) for way in ways}) > 1]
    return [", ".join(f"{name.replace('_', ' ')} {way.get(name)}" for name in differ) for way in ways]


def _row(figure: Figure, variant: str, runs: list[Result]) -> Row:
    runs = sorted(runs, key=lambda run: run.seed)
    last = max(runs, key=lambda run: run.date)
    accuracies = tuple(run.accuracy for run in runs)
    command = runs[0].command.split(" --seed ")[0]
    return Row(figure, variant, accuracies, runs[0].density, runs[0].epochs, command, last.device, last.date)
