"""The one kind of error that a command reports as a paragraph, without a traceback."""


class UserError(Exception):
    """What the user can mend: bad input, missing data, a disk that is full. The message says how."""


class Infeasible(UserError):
    """Settings that are well-formed, but that no mask can meet together. A sweep leaves such a cell out."""


class InUse(UserError):
    """A work directory that another process, which is alive, is working in."""
