"""What a command reports as a paragraph, without a traceback."""

import textwrap


class UserError(Exception):
    """What the user can mend: bad input, missing data, a disk that is full. The message says how."""


def require(config, *rules: tuple[str, bool, str]) -> None:
    """Raises UserError for the first rule (setting, whether it is valid, what it must be) that a config breaks."""
    for name, valid, says in rules:
        if not valid:
            raise UserError(f"--{name.replace('_', '-')} must be {says}; got {getattr(config, name)}.")


class Infeasible(UserError):
    """Settings that are well-formed, but that no mask can meet together. A sweep leaves such a cell out."""


class Diverged(UserError):
    """Training whose loss, or what learns, is not finite. A sweep leaves such a cell out."""


class InUse(UserError):
    """A work directory that another process, which is alive, is working in."""


class DataError(UserError):
    """The images asked for cannot be had; the message says why and what to do next."""


def brief(error: Exception) -> str:
    """A line about an error of another's making."""
    return textwrap.shorten(f"{type(error).__name__}: {error}", 300)
