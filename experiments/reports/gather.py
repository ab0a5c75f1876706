"""Our results, from the files of runs and from the figures that the project keeps: one record for each network."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from experiments.config.presets import CIFAR, MNIST
from experiments.config.run import Run
from experiments.config.settings import changed, flat
from experiments.run.names import CHANGE_NO_RESULT, FIRST_NAMES, plain


class Result(NamedTuple):
    """One trained network.

    Attributes:
      settings: of its run, by flat name; beside them "network" and "round" of a ticket, and "tasks" of many.
      seed: (seed,), or (seed, trial).
      accuracy: on the test images, a fraction.
      density: the fraction of the weights that it keeps.
      epochs: passes over the training images; None where steps are counted.
      command: what trained it.
      device: what it was trained on.
      date: the day on which it was finished, as 2026-01-31; "" of results of earlier versions.
    """

    settings: Mapping[str, Any]
    seed: tuple[int, ...]
    accuracy: float
    density: float | None
    epochs: int | None
    command: str
    device: str
    date: str


def results(folders: list[Path]) -> tuple[list[Result], list[str]]:
    """(every result in the JSON files of these folders, each once; the files that could not be read).

    Of a run's directory only summary.json is read.
    """
    found: dict[str, Result] = {}
    damaged = []
    for file in (file for folder in folders for file in sorted(folder.rglob("*.json"))):
        if (file.parent / "summary.json").exists() and file.name != "summary.json":
            continue
        try:
            for result in _within(json.loads(file.read_text()), ""):
                found.setdefault(json.dumps(result[:3], sort_keys=True, default=str), result)
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
    command = value["command"] if isinstance(value.get("command"), str) else command
    if not isinstance(value.get("config"), dict):
        for item in value.values():
            yield from _within(item, command)
    elif "networks" in value:
        yield from _tickets(value, command)
    elif "tasks" in value and "mean_accuracy" in value:
        settings = _settings(value["config"], value) | {"tasks": len(value["tasks"])}
        yield _result(value, settings, value["mean_accuracy"], None, command)
    elif "test_accuracy" in value and "epochs" in value:
        settings = _settings(value["config"], value)
        accuracy = value.get("test_sampled_accuracy", value["test_accuracy"])
        yield _result(value, settings, accuracy, value["density"], command or command_of(settings))


def _tickets(summary: dict, command: str) -> Iterator[Result]:
    settings = _settings(summary["config"], summary)
    rounds = max(network["round"] for network in summary["networks"])
    for network in summary["networks"]:
        labels = {"network": network["network"], "round": network["round"], "last": network["round"] == rounds}
        result = _result(summary, settings | labels, network["early_stop_test_accuracy"], network["density"], command)
        yield result._replace(seed=(*result.seed, network["trial"]), epochs=None)


def _result(summary: dict, settings: dict, accuracy: float, density: float | None, command: str) -> Result:
    known = {name: str(summary.get(name, "")) for name in ("device", "date")}
    seed = (summary.get("seed", settings.get("seed", 0)),)
    return Result(settings, seed, float(accuracy), density, settings.get("epochs"), command, **known)


def _settings(config: dict, summary: dict) -> dict[str, Any]:
    """The settings by their present names; those that are newer than the run have the values of their defaults."""
    renamed = {old: new for new, old in FIRST_NAMES.items()}
    stored = {renamed.get(name, name): value for name, value in config.items()}
    return plain(flat(Run())) | stored | {"dataset": summary["dataset"]}


def command_of(settings: Mapping[str, Any]) -> str:
    """The command of a run, from its settings: what differs from the defaults of its preset and method."""
    cifar = settings["dataset"].startswith("cifar")
    recipes, usual = (CIFAR, "quick") if cifar else (MNIST, "best")
    preset = settings["preset"] if (settings["preset"], settings["method"]) in recipes else usual
    base = changed(Run(), **recipes[preset, settings["method"]])
    base = changed(base, method=settings["method"], preset=preset)
    if cifar:
        base = changed(base, model="resnet-20", dataset="cifar10")
    shown = {name for name in flat(base) if name not in {*CHANGE_NO_RESULT, "evaluate", "seed"}}
    values = plain(flat(base)) | ({} if cifar else {"dataset": "mnist"})
    flags = {name: settings[name] for name in flat(base) if name in shown and settings[name] != values[name]}
    head = {"model": settings["model"]} if cifar else {}
    head |= {"method": settings["method"]} if settings["method"] != "edge-popup" else {}
    head |= {"preset": preset} if preset != usual else {}
    words = [f"python -m experiments.{'cifar' if cifar else 'mnist'}"]
    words += [_flag(name, value) for name, value in (head | flags).items() if value is not None]
    return " ".join(words)


def _flag(name: str, value: Any) -> str:
    name = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    return f"--{name} {' '.join(map(str, value)) if isinstance(value, list) else value}"
