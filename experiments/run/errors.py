"""Errors that a command reports as one paragraph, without a traceback."""

import textwrap


class UserError(Exception):
    """What the user can correct: bad input, missing data, a full disk. The message says how."""


Rule = tuple[str, bool, str]  # a setting, whether it is valid, what it must be


def require(config, *rules: Rule) -> None:
    """Raises UserError for the first rule that a config breaks."""
    for name, valid, says in rules:
        if not valid:
            raise UserError(f"--{name.replace('_', '-')} must be {says}; got {getattr(config, name)}.")


def ways_out(first: str) -> str:
    """What a user can do about a run's directory that is damaged: this, or what always works."""
    return (
        f"{first}, or begin anew: move the directory away, or give --restart (mnist, cifar, lottery, "
        "many_tasks), which moves all that is in it to a folder of its own."
    )


class Infeasible(UserError):
    """Well-formed settings that no masks can meet together. A sweep leaves such a cell out."""


class Diverged(UserError):
    """Training whose loss, or what learns, is not finite. A sweep leaves such a cell out."""


class InUse(UserError):
    """Another live process is using the work directory."""


class DataError(UserError):
    """The images are missing or damaged. The message says why, and what to do next."""


def brief(error: Exception) -> str:
    """One line about an error that another library raised."""
    return textwrap.shorten(f"{type(error).__name__}: {error}", 300)
