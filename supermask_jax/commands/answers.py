"""What a subcommand hands back: lines to print, or a failure. Standard library only."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

FORMATS = ("safetensors", "npz", "torch", "onnx", "compressed-tensors")  # of `export`
WRONG, USAGE = 1, 2  # exit statuses: the file is damaged, or differs; the command cannot be done as it was given


class Answer(NamedTuple):
    """Lines to print, one after the other, and the exit status after them."""

    lines: Iterable[str]
    status: int = 0


class Failure(Exception):
    """Why a subcommand ended: one paragraph for its user, and the exit status."""

    def __init__(self, message: str, status: int = WRONG):
        super().__init__(message)
        self.status = status


def table(rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """Returns the rows as lines with aligned columns.

    Args:
      rows: of the same length each; the first is the heading.
      left: how many columns are aligned to the left. The others are aligned to the right.
    """
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def by(sizes: Iterable[int]) -> str:
    """Returns sizes as a text: "3 x 3 x 1 x 32"."""
    return " x ".join(map(str, sizes)) or "one number"
