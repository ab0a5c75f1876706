"""The commands that made our results: what a command does without further flags, and which flags gave a result."""

from collections.abc import Mapping
from typing import Any, Literal

from experiments.config import tasks
from experiments.config.presets import CIFAR, CIFAR_MODEL, LOTTERY, MNIST, cifar, is_cifar, recipe
from experiments.config.run import Run, named
from experiments.config.settings import CHOICES, changed, flat, without_unread
from experiments.config.tasks import ManyTasks
from experiments.config.tickets import Lottery
from experiments.run.names import CHANGE_NO_RESULT, plain

Kind = Literal["run", "ticket", "tasks"]
CONFIGS: Mapping[Kind, type] = {"run": Run, "ticket": Lottery, "tasks": ManyTasks}
NO_FLAG = {*CHANGE_NO_RESULT, "seed"}


def without_flags(kind: Kind, settings: Mapping[str, Any]) -> tuple[str, Any]:
    """(the command, its configuration) that a result's own preset gives, or the usual one.

    Args:
      kind: which command made the result.
      settings: of the result, by flat name.
    """
    preset, method, dataset = settings["preset"], settings.get("method"), settings["dataset"]
    if kind == "ticket":
        of_model = (name for name, of in LOTTERY.items() if of.get("model") == settings["model"])
        preset = preset if preset in LOTTERY else next(of_model, "short")
        config = changed(Lottery(), **LOTTERY[preset])
        return _command("lottery", preset, "short"), config
    if kind == "tasks":
        preset = preset if (preset, method) in tasks.RECIPES else tasks.BEST
        return _command("many_tasks", preset, tasks.BEST), changed(ManyTasks(), **tasks.recipe(preset, str(method)))
    recipes, usual, name = (CIFAR, "quick", "cifar") if is_cifar(dataset) else (MNIST, "best", "mnist")
    preset = preset if (preset, method) in recipes else usual
    if name == "mnist":
        return _command(name, preset, usual), changed(Run(), **recipe(MNIST, preset, str(method)))
    of_preset = cifar(preset, str(method), settings["model"])
    config = changed(Run(), **{"dataset": "cifar10", "model": CIFAR_MODEL, **of_preset})
    return _command(name, preset, usual), config


def _command(name: str, preset: str, usual: str) -> str:
    return f"python -m experiments.{name}" + (f" --preset {preset}" if preset != usual else "")


def flags(kind: Kind, settings: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """(the command with its preset, {setting: value} of every flag that a result needs beside it)."""
    command, config = without_flags(kind, settings)
    first = plain(flat(config))
    if first["dataset"] == "auto":
        first["dataset"] = "mnist"  # as it is called once it is found
    chosen = {name: settings[name] for name in (*CHOICES, "flip_alternately") if name in first}
    stored = plain(flat(_as_stored(changed(config, **chosen), settings)))
    needed = {name: value for name, value in chosen.items() if value != first[name]}
    needed |= {name: settings[name] for name, value in stored.items() if settings.get(name, value) != value}
    usual = {"method": "edge-popup" if kind == "run" else "threshold"}
    return command, {
        name: value
        for name, value in ({"method": settings.get("method")} | needed).items()
        if name not in NO_FLAG and value is not None and value != usual.get(name)
    }


def _as_stored(config: Any, settings: Mapping[str, Any]) -> Any:
    """A configuration with neutral values for all that nothing reads, as a result stores it."""
    if isinstance(config, Run):
        return named(config, settings["dataset"])
    if isinstance(config, ManyTasks):
        return tasks.named(config, settings["dataset"])
    usual = config.data.validation or settings.get("validation", 0)  # a tenth of the images, or 5,000
    return changed(without_unread(config), validation=usual)


def command_of(kind: Kind, settings: Mapping[str, Any]) -> str:
    """The command of a result, without its seed."""
    command, needed = flags(kind, settings)
    return " ".join([command, *(_flag(name, value) for name, value in needed.items())])


def _flag(name: str, value: Any) -> str:
    name = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    return f"--{name} {' '.join(map(str, value)) if isinstance(value, list) else value}".rstrip()
