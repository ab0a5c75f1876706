"""From a frozen dataclass of sections to flags: presets, `--help`, choices, renamed flags. Imports nothing heavy."""

import argparse
import contextlib
import difflib
import inspect
import os
import shutil
import sys
import textwrap
import typing
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import docstring_parser  # tyro reads docstrings with it

if os.environ.get("NO_COLOR"):  # tyro knows another variable, which it reads when it is imported
    os.environ.setdefault("PYTHON_TYRO_ANSI_CODES", "False")
import tyro

from experiments.config import settings
from experiments.run.errors import UserError

RENAMED = {"--judge": "--assess", "--no-judge": "--no-assess", "--strangers": "--ood"}  # for one version


def parser(config_type: type, defaults: Callable[..., dict] = lambda: {}) -> Callable:
    """parse(prog, args) -> the settings of a command; for `experiments.run.command_line.run`.

    Args:
      config_type: a frozen dataclass of sections, with a method `check`.
      defaults: from a choice of the user (its parameters: preset, method, model, density, as far as it has them) to
        {flat name: value}, the values in place of the fields' own defaults. What the user does not choose, it is not
        given.
    """
    return partial(_parse, config_type, defaults)


def _parse(config_type: type, defaults: Callable[..., dict], prog: str, args: list[str]):
    """The preset's settings, overridden by the flags, then checked.

    Raises:
      UserError: a setting is out of range, or nothing reads an option that is set.
    """
    args = [_renamed(arg) for arg in args]
    asked = inspect.signature(defaults).parameters
    chosen = _choices(config_type, args, asked)
    base = settings.changed(config_type(), **defaults(**{k: v for k, v in chosen.items() if k in asked}))
    # tyro breaks no description into lines, so that a terminal would, within words. It keeps breaks before an indent.
    columns, text = shutil.get_terminal_size().columns, inspect.getdoc(config_type) or ""
    describes = textwrap.fill(text, columns, subsequent_indent="  ")
    options = {"default": base, "prog": prog, "description": describes, "config": (tyro.conf.OmitArgPrefixes,)}
    with _docstrings_in_one_piece():
        config = tyro.cli(config_type, args=args, **options)
    config.check()
    settings.refuse_unread(config, base)
    return config


@contextlib.contextmanager
def _docstrings_in_one_piece() -> Iterator[None]:
    """Joins the lines of the docstrings that `--help` shows: tyro keeps a break before every line that is indented."""
    read = docstring_parser.parse_from_object

    def joined(of: object) -> docstring_parser.Docstring:
        found = read(of)
        for part in found.params:
            part.description = " ".join((part.description or "").split()) or None
        return found

    docstring_parser.parse_from_object = joined
    try:
        yield
    finally:
        docstring_parser.parse_from_object = read


def _renamed(arg: str) -> str:
    """The flag's present name, for a flag that had another."""
    name, sign, value = arg.partition("=")
    if name in RENAMED:
        print(f"warning: {name} is called {RENAMED[name]} now", file=sys.stderr)
    return RENAMED.get(name, name) + sign + value


def _choices(config_type: type, args: list[str], asked: Iterable[str]) -> dict[str, str | float]:
    """The flags of fields with a fixed set of values, and of the numbers asked for, read ahead of the rest: presets
    depend on them, and a wrong value of a fixed set gets an answer that names the nearest right one."""
    scan = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    valid = {}
    for field in settings.fields(config_type):
        fixed = typing.get_origin(field.type) is typing.Literal
        if fixed or field.name in asked:
            valid[field.name] = typing.get_args(field.type) if fixed else None
            scan.add_argument("--" + field.name.replace("_", "-"), dest=field.name, nargs="?")
    chosen = {k: v for k, v in vars(scan.parse_known_args(args)[0]).items() if v is not None}
    for name in [name for name in chosen if valid[name] is None]:
        try:
            chosen[name] = float(chosen[name])
        except ValueError:  # the parser of all flags says what is wrong
            del chosen[name]
    for name, value in chosen.items():
        if valid[name] is not None and value not in valid[name]:
            near = [v for v in valid[name] if v.startswith(value.lower())]
            near = near or difflib.get_close_matches(value.lower(), valid[name], n=1, cutoff=0.3)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise UserError(f"no {name.replace('_', ' ')} {value!r}: {hint}There are: {', '.join(valid[name])}.")
    return chosen
