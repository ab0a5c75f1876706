"""Our results, from the files of runs and from the figures that the project keeps: one record for each network."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from experiments.config.settings import flat
from experiments.reports.commands import CONFIGS, NO_FLAG, Kind, command_of
from experiments.run.names import by_present_names, plain
from experiments.run.workdir import REPLACED

CHANGE_NOTHING_HERE = {*NO_FLAG, "data", "assess", "ood", "shifted", "trials", "inferred_images", "temperature"}


class Result(NamedTuple):
    """One trained network.

    Attributes:
      kind: what made it: a "run" of `mnist` or `cifar`, `lottery` a "ticket" or control, `many_tasks` all its "tasks".
      settings: by flat name; beside them "network", "round" and "last" of a ticket.
      seed: (seed,), or (seed, trial).
      accuracy: on the test images, a fraction.
      density: the fraction of the weights that it keeps.
      epochs: passes over the training images; None where steps are counted.
      command: what trained it, without its seed.
      device: what it was trained on.
      date: the day on which it was finished, as 2026-01-31; "" of results of earlier versions.
    """

    kind: Kind
    settings: Mapping[str, Any]
    seed: tuple[int, ...]
    accuracy: float
    density: float | None
    epochs: int | None
    command: str
    device: str
    date: str

    def way(self) -> str:
        """What is the same for all seeds of one network."""
        kept = {name: value for name, value in self.settings.items() if name not in CHANGE_NOTHING_HERE}
        return json.dumps([self.kind, kept], sort_keys=True)


def results(folders: list[Path]) -> tuple[list[Result], list[str]]:
    """(every result in the JSON files of these folders, each seed once; the files that could not be read).

    Of a run's directory only summary.json is read, and nothing of what --restart put aside. Of a seed that lies in two
    places, the first counts.
    """
    found: dict[tuple, Result] = {}
    damaged = []
    files = [(root, file) for root in folders for file in sorted(root.rglob("*.json"))]
    for root, file in files:
        if (file.parent / "summary.json").exists() and file.name != "summary.json":
            continue
        if any(part.startswith(f"{REPLACED}-") for part in file.relative_to(root).parts):
            continue
        try:
            for result in _within(json.loads(file.read_text()), ""):
                found.setdefault((result.way(), result.seed), result)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            damaged.append(str(file))
    return list(found.values()), damaged


def _within(value: Any, command: str) -> Iterator[Result]:
    """The results in a JSON value; a command stands beside the summary that it made."""
    if isinstance(value, list):
        for item in value:
            yield from _within(item, command)
    if not isinstance(value, dict):
        return
    command = re.sub(r" --seed \d+", "", value["command"]) if isinstance(value.get("command"), str) else command
    if not isinstance(value.get("config"), dict):
        for item in value.values():
            yield from _within(item, command)
    elif "networks" in value:
        yield from _tickets(value, command)
    elif "tasks" in value and "mean_accuracy" in value:
        if value["split"] == "test":
            settings = _settings("tasks", value) | {"tasks": len(value["tasks"])}
            yield _result("tasks", value, settings, value["mean_accuracy"], None, command)
    elif "test_accuracy" in value and "epochs" in value:
        accuracy = value.get("test_sampled_accuracy", value["test_accuracy"])
        yield _result("run", value, _settings("run", value), accuracy, value["density"], command)


def _tickets(summary: dict, command: str) -> Iterator[Result]:
    settings = _settings("ticket", summary) | {"dataset": summary.get("tickets_from", summary["dataset"])}
    rounds = max(network["round"] for network in summary["networks"])
    for network in summary["networks"]:
        labels = {"network": network["network"], "round": network["round"], "last": network["round"] == rounds}
        accuracy, density = network["early_stop_test_accuracy"], network["density"]
        result = _result("ticket", summary, settings, accuracy, density, command)
        yield result._replace(settings=settings | labels, seed=(*result.seed, network["trial"]), epochs=None)


def _result(kind: Kind, summary: dict, settings: dict, accuracy: float, density: float | None, command: str) -> Result:
    seed = (summary.get("seed", settings.get("seed", 0)),)
    known = (str(summary.get(name, "")) for name in ("device", "date"))
    command = command or command_of(kind, settings)
    return Result(kind, settings, seed, float(accuracy), density, settings.get("epochs"), command, *known)


def _settings(kind: Kind, summary: dict) -> dict[str, Any]:
    """The settings by their present names; those that are newer than the run have the values of their defaults."""
    return plain(flat(CONFIGS[kind]())) | by_present_names(summary["config"]) | {"dataset": summary["dataset"]}
