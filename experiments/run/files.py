"""Atomic writes, and reads that check what they read."""

import contextlib
import errno
import io
import json
import os
import tempfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from experiments.run.errors import DataError, UserError

NO_SYNC = (errno.EINVAL, errno.EBADF, errno.ENOTSUP, errno.ENOSYS)  # of file systems that sync no directory


def read_json(file: Path, schema: Any = dict[str, Any], way_out: str = "") -> dict:
    """The object in a JSON file.

    Args:
      file: it.
      schema: what it must hold, as `schemas` has it.
      way_out: what the user can do where it does not: the end of the error's sentence.

    Raises:
      UserError: the file is no file, or damaged, or holds something else.
    """
    try:
        return parsed(read_text(file), schema)
    except ValueError as error:  # bad JSON, bytes that are no text, other values
        raise UserError(f"{file} is damaged ({error})" + (f"; {way_out}" if way_out else "")) from error


def read_text(file: Path) -> str:
    """The text of a regular file: a pipe would be waited for.

    Raises:
      ValueError: it is no regular file, or no text.
    """
    if not os.path.lexists(file):
        raise ValueError(f"there is no {file.name}")
    if not file.is_file():
        raise ValueError(f"{file.name} is no regular file")
    return file.read_text()


def parsed(text: str, schema: Any) -> Any:
    """The value in a JSON text.

    Raises:
      ValueError: it is no JSON, or does not hold what the schema says.
    """
    try:
        value = json.loads(text)
        msgspec.convert(value, schema)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error
    return value


def require_writable(folder: Path) -> None:
    """Makes the folder, if it is not there; OSError unless files can be made in it."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


def write_json(file: Path, value: dict) -> None:
    write_text(file, json.dumps(value, indent=2) + "\n")


def write_text(file: Path, text: str) -> None:
    write_bytes(file, text.encode())


@contextlib.contextmanager
def naming(file: Path) -> Iterator[None]:
    """Gives an OSError the name of the file that was to be written, if it has none or that of a temporary file."""
    try:
        yield
    except OSError as error:
        if error.filename is None or Path(str(error.filename)).name.startswith(f".{file.name}."):
            error.filename = str(file)
        raise


def sync(path: Path) -> None:
    """Brings a file, or the names in a directory, to the disk: nothing else is sure to outlive a loss of power."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except PermissionError:
        if path.is_dir():
            return  # one that may be entered, not listed; and Windows opens none
        raise
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in NO_SYNC or not path.is_dir():
            raise
    finally:
        os.close(handle)


def sync_all(folder: Path) -> None:
    """Brings a directory to the disk with all that is in it, its own name left out."""
    for inside, _, files in os.walk(folder, topdown=False):
        for name in files:
            sync(Path(inside, name))
        sync(Path(inside))


def write_bytes(file: Path, content: bytes) -> None:
    """Writes a file atomically and to the disk: an interruption leaves the old one."""
    new = file.with_name(f".{file.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        with naming(file), open(new, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(new, file)
        sync(file.parent)
    finally:
        new.unlink(missing_ok=True)


def write_arrays(file: Path, arrays: Mapping[str, Any]) -> None:
    """Writes {name: array} as an .npz file, atomically."""
    stream = io.BytesIO()
    np.savez(stream, **{name: np.asarray(array) for name, array in arrays.items()})
    write_bytes(file, stream.getvalue())


def read_arrays(file: Path) -> dict[str, np.ndarray]:
    """The arrays that `write_arrays` wrote; UserError if the file is missing or damaged."""
    try:
        stored = file.read_bytes()
        with np.load(io.BytesIO(stored)) as archive:
            # Checksums first: NumPy reads as far as an array's header says, and so misses that of a shortened one.
            # A zip file ends with the number of its files, which its reader ignores.
            if archive.zip.testzip() or len(archive.files) != int.from_bytes(stored[-12:-10], "little"):
                raise ValueError("its checksums do not match")
            return dict(archive)
    except Exception as error:  # whatever a damaged file makes the readers raise
        raise UserError(
            f"{file} is damaged ({error}); move it and the .json file beside it away, and both are made again."
        ) from error


def read_bytes(path: Path) -> bytes:
    """The bytes of a file of images; DataError if it cannot be read."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path} ({error}); fix this, or fetch or copy the file again") from error
