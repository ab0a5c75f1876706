"""A command's settings as one flat dictionary: how they are changed, stored and compared.

A configuration is a frozen dataclass of sections, which are frozen dataclasses of fields, and of fields of its own.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from experiments.config.registry import DATASETS, DISTRIBUTIONS, METHODS, MODELS, OPTIMIZERS
from experiments.run.errors import UserError

CHOICES: Mapping[str, Mapping[str, Any]] = {  # the fields whose choice decides which other fields are read
    "method": METHODS,
    "distribution": DISTRIBUTIONS,
    "model": MODELS,
    "dataset": DATASETS,
    "optimizer": OPTIMIZERS,
}


def fields(config_type: type) -> Iterator[dataclasses.Field]:
    """Every field of the sections and of the configuration itself, in the order of `--help`."""
    for field in dataclasses.fields(config_type):
        if dataclasses.is_dataclass(field.type):
            yield from dataclasses.fields(field.type)
        else:
            yield field


def flat(config) -> dict[str, Any]:
    """{field: value} over all sections."""
    values = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        values |= flat(value) if dataclasses.is_dataclass(value) else {field.name: value}
    return values


def changed(config, **settings):
    """The configuration with other values, given by the flat names of their fields.

    Raises:
      TypeError: there is no such field.
    """
    own = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            part = {name: settings.pop(name) for name in flat(value) if name in settings}
            own |= {field.name: dataclasses.replace(value, **part)} if part else {}
        elif field.name in settings:
            own[field.name] = settings.pop(field.name)
    if settings:
        raise TypeError(f"{type(config).__name__} has no setting {', '.join(settings)}")
    return dataclasses.replace(config, **own)


def neutral(config_type: type) -> dict[str, Any]:
    """{field: default} of the fields that are no part of a run's name while they have that value.

    These are the fields that were added after the first version of the command, which `ALWAYS_NAMED` lists: their
    defaults do what the program did before there was such a field.
    """
    named = config_type.ALWAYS_NAMED
    return {name: value for name, value in flat(config_type()).items() if name not in named}


def unread(config) -> set[str]:
    """The options that none of the choices of this configuration reads."""
    values, options, read = flat(config), set(), set()
    for field, choices in CHOICES.items():
        if field in values:
            own = {choice: set(getattr(entry, "reads", ())) for choice, entry in choices.items()}
            of_field = set().union(*own.values())
            options |= of_field
            read |= own.get(values[field], of_field)  # a sweep has names of its own, for families of models
    if values.get("method") == "gradual" and values["distribution"] == "global":
        read -= {"rounds", "minimum"}  # it ranks while it trains, and not before
    return (options - read) & set(values)


def refuse_unread(config, default) -> None:
    """Raises UserError for an option that is set although nothing reads it.

    Args:
      config: the settings.
      default: the same configuration with the options as nobody set them.
    """
    values, usual = flat(config), flat(default)
    for name in sorted(unread(config)):
        if values[name] == usual[name]:
            continue
        readers = {
            f"--{field.replace('_', '-')} {choice}"
            for field, choices in CHOICES.items()
            for choice, entry in choices.items()
            if name in getattr(entry, "reads", ()) and field in values
        }
        raise UserError(
            f"nothing reads --{name.replace('_', '-')} here: it goes with {', '.join(sorted(readers))}. Leave it out, "
            "or choose one of those."
        )


def without_unread(config):
    """The configuration with every option that nothing reads at its default, so that one run has one name."""
    usual = flat(type(config)())
    return changed(config, **{name: usual[name] for name in unread(config)})
