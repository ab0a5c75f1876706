"""Files that an export writes, whole or not at all, and packages that only some commands need."""

import contextlib
import importlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from supermask_jax.commands.answers import USAGE, Failure
from supermask_jax.container import sync_names

PACKAGES = {"torch": "torch", "onnx": "onnx", "PIL": "pillow"}  # as they are imported, and as pip has them


def module(name: str, what: str) -> ModuleType:
    """Returns a package of `PACKAGES`, imported now.

    Args:
      name: as it is imported.
      what: the part of the command that needs it, for the error.

    Raises:
      Failure: it is not installed.
    """
    assert name in PACKAGES
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Failure(f"{what} needs {PACKAGES[name]}: pip install {PACKAGES[name]} ({error})", USAGE) from error


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives the path of a new file, which takes the place of `path` at the end, unless an error ends the block.

    The file and its name are then on the disk.

    Raises:
      OSError: the file cannot be written.
    """
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        new = Path(folder) / f"new{path.suffix}"
        yield new
        with open(new, "rb+") as stream:
            os.fsync(stream.fileno())
        os.replace(new, path)
        sync_names(path.parent)
