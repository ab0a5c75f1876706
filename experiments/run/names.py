"""Names of runs: which settings make two runs the same, and the directory that is named after them.

A name outlives new settings: one that has the value that it had before it existed is no part of it.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

FIRST_NAMES = {"assess": "judge", "ood": "strangers"}  # of renamed settings: what digests and old files call them
NO_SETTINGS = {"data"}  # what is stored beside them

CHANGE_NO_RESULT = {"data_dir", "workdir", "checkpoint_every", "preset"}  # a preset is only a name for its settings
CHANGE_NO_RESULT |= {"evaluate", "dry_run"}  # with it, nothing is trained
CHANGE_NO_RESULT |= {"restart", "workers", "compilation_cache"}
# Except for the order of sums and, under pmap, the draws of each device: a run may resume with others.
CHANGE_NO_RESULT |= {"devices", "parallel", "shard_scores", "coordinator", "num_processes", "process_id"}


class Settings(NamedTuple):
    """The settings of a run by flat name, and those values that a setting may have without being part of its name."""

    values: Mapping[str, Any]
    neutral: Mapping[str, Any] = MappingProxyType({})

    def digest(self) -> str:
        """Eight characters that stand for all settings that bear on the result."""
        return hashlib.sha256(json.dumps(self._named(FIRST_NAMES), sort_keys=True).encode()).hexdigest()[:8]

    def differing(self, stored: Mapping[str, Any]) -> list[str]:
        """The settings that bear on the result and differ from those that an earlier run stored, with both values."""
        stored = {name: value for name, value in by_present_names(stored).items() if name not in NO_SETTINGS}
        now, before = self._named({}), self._replace(values=stored)._named({})
        return [
            f"{name} (was {before.get(name, self.neutral.get(name))!r}, now {now.get(name, self.neutral.get(name))!r})"
            for name in sorted({*now, *before})
            if now.get(name) != before.get(name)
        ]

    def _named(self, names: Mapping[str, str]) -> dict[str, Any]:
        values = json.loads(json.dumps(dict(self.values)))  # as it is read again: a tuple becomes a list
        if "ood" in values:
            values["ood"] = _first_ood(values["ood"])
        return {
            names.get(name, name): value
            for name, value in values.items()
            if name not in CHANGE_NO_RESULT and (name not in self.neutral or value != plain(self.neutral[name]))
        }


def _first_ood(value: Any) -> Any:
    """The out-of-distribution data sets as they were stored while there was one at most: its name, or "none"."""
    return value if isinstance(value, str) or len(value) > 1 else [*value, "none"][0]


def by_present_names(stored: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that an earlier run stored, by their present names and in their present form."""
    renamed = {old: new for new, old in FIRST_NAMES.items()}
    values = {renamed.get(name, name): value for name, value in stored.items()}
    if isinstance(values.get("ood"), str):  # there was one at most, or "none"
        values["ood"] = [] if values["ood"] == "none" else [values["ood"]]
    return values


def plain(value: Any) -> Any:
    """The value as it is read again from JSON: a tuple becomes a list."""
    return json.loads(json.dumps(value))


def default_path(settings: Settings, experiment: str) -> Path:
    """runs/<experiment>/<method>-<dataset>-d<density>-s<seed>-<digest of all settings that bear on the result>."""
    values = settings.values
    density = f"-d{values['density']:g}" if values["density"] < 1 else ""  # a method that takes none has 1
    name = f"{values['method']}-{values['dataset']}{density}-s{values['seed']}-{settings.digest()}"
    return Path("runs") / experiment / name
