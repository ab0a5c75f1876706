"""Finished runs: read from their directories, and grouped by their settings."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from experiments.config.run import Run as Settings
from experiments.config.settings import neutral
from experiments.plots.style import split_of
from experiments.run import schemas
from experiments.run.errors import UserError
from experiments.run.files import parsed, read_text
from experiments.run.names import CHANGE_NO_RESULT, NO_SETTINGS, by_present_names

Run = tuple[dict, list[dict]]  # the contents of summary.json and of metrics.jsonl

# The same images come in another order from another source; that does not set runs apart.
IGNORED = {*CHANGE_NO_RESULT, *NO_SETTINGS, "seed"}


def read_runs(paths: Iterable[Path]) -> list[Run]:
    """Returns the runs in these directories.

    Raises:
      UserError: a run is unfinished or damaged.
    """
    return [_read_run(Path(path)) for path in paths]


def _read_run(path: Path) -> Run:
    """One run; UserError if it is unfinished or damaged."""
    try:
        summary = parsed(read_text(path / "summary.json"), schemas.Compared)
        records = [parsed(line, schemas.Record) for line in read_text(path / "metrics.jsonl").splitlines()]
        if [record["epoch"] for record in records] != list(range(summary["epochs"] + 1)):
            raise ValueError(f"metrics.jsonl does not hold the epochs 0 to {summary['epochs']} in order")
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} does not hold a finished run: {error}. Give its command again to finish it, or leave it out."
        ) from error
    return summary, records


def split_of_all(runs: Iterable[Run]) -> str:
    """Returns the split, "validation" or "test", that all runs are evaluated on after their epochs.

    Raises:
      UserError: they are not evaluated on the same images.
    """
    measured = {(summary["dataset"], split_of(records)) for summary, records in runs}
    if len(measured) > 1:
        kinds = "; ".join(sorted(f"{dataset}, {split} images" for dataset, split in measured))
        raise UserError(f"these runs were measured on different images ({kinds}); compare those of one kind only.")
    [(_, split)] = measured
    return split


def by_settings(runs: list[Run]) -> dict[str, list[Run]]:
    """Returns {label: runs that differ in nothing but the seed}.

    A label names the method, the density, and the settings that tell its group from others. A setting that has been
    renamed, or that an older run does not have yet, counts as what it is now.
    """
    groups: dict[str, dict[int, Run]] = {}
    for summary, records in runs:
        settings = _settings(summary["config"])
        key = json.dumps({name: v for name, v in settings.items() if name not in IGNORED}, sort_keys=True)
        groups.setdefault(key, {})[summary["seed"]] = summary, records  # a run that is given twice counts once
    several_models = len({summary["model"] for summary, _ in runs}) > 1
    by_name: dict[str, list[list[Run]]] = {}
    for by_seed in groups.values():
        members = list(by_seed.values())
        by_name.setdefault(_name(members, several_models), []).append(members)
    return {
        label: members
        for name, same in by_name.items()
        for label, members in zip(_labels(name, same), same, strict=True)
    }


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a run by their present names, with those that it does not have yet at their neutral values."""
    settings = by_present_names(config)
    return settings | {name: value for name, value in neutral(Settings).items() if name not in settings}


def _name(members: list[Run], with_model: bool) -> str:
    """The method, the mean density, and the model if it is to tell groups apart."""
    summary = members[0][0]
    name = summary["method"]
    if name != "dense":
        name += f", density {np.mean([summary['density'] for summary, _ in members]):.3g}"
    return f"{name}, {summary['model']}" if with_model else name


def _labels(name: str, groups: list[list[Run]]) -> list[str]:
    """The labels of groups of the same name, with the settings that tell them apart."""
    configs = [_settings(members[0][0]["config"]) for members in groups]
    first = configs[0]
    differing = [k for k in first if k not in IGNORED and any(config.get(k) != first[k] for config in configs)]
    if 1 < len(groups) == len({config.get("preset") for config in configs}):
        differing = ["preset"]
    return [", ".join([name, *(f"{k} {config.get(k)}" for k in differing)]) for config in configs]
