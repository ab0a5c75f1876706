"""The checkpoints of a run: each is whole or not there, whatever kills the process that writes it."""

import contextlib
import hashlib
import logging
import os
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from experiments import processes
from experiments.errors import UserError
from experiments.files import read_json, write_json

KEPT = 2
CHECKSUMS = "checksums.json"  # inside each checkpoint
SAVED = "saved"  # beside the checkpoints, once there has been one
UNFINISHED = ".tmp"  # in the names of checkpoints that are being written or removed


class Checkpoints:
    """The last checkpoints of a run, by step, each whole or not there: its directory gets its name when all is in it.

    Each holds the checksums of its files, because the reader does not notice bytes that changed inside an array. Where
    several processes train together, all must call, and the first one does what is done once.
    """

    def __init__(self, path: Path):
        self._path = path.absolute()
        if processes.is_first():
            path.mkdir(parents=True, exist_ok=True)
            for left in path.glob(f"*{UNFINISHED}*"):  # by a process that was killed
                shutil.rmtree(left)
        processes.meet()

    def save(self, step: int, tree: Any) -> None:
        """Saves a pytree of arrays; returns when it is on disk. (A background save would read donated buffers.)

        Raises:
          UserError: it cannot be written.
        """
        folder, unfinished = self._path / str(step), self._path / f"{step}{UNFINISHED}"
        try:
            with _unlogged():
                ocp.save(unfinished, tree)
            if processes.is_first():
                write_json(unfinished / CHECKSUMS, _checksums(unfinished))
                unfinished.rename(folder)
                (self._path / SAVED).touch()
                for old in self._steps()[KEPT:]:
                    self._remove(old)
        except (OSError, ValueError, RuntimeError) as error:  # a full disk makes orbax raise any of these
            raise UserError(
                f"cannot save the checkpoint at step {step} in {self._path} ({_reason(error)}). Those before it are "
                "whole: make room or mend the directory, and give the same command again."
            ) from error
        processes.meet()

    def restore(self, like: Any) -> tuple[int, Any] | None:
        """(step, tree) of the latest whole checkpoint, laid out like `like`; None when there never was one.

        Raises:
          UserError: there are checkpoints, and none of them can be read; or there were, and they are gone.
        """
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
        steps, damaged = self._steps(), {}
        for step in steps:
            try:
                processes.first_only(lambda folder=self._path / str(step): _check(folder))
                tree = ocp.load(self._path / str(step), abstract)
            except Exception as error:  # whatever a damaged file makes the reader raise
                damaged[step] = f"cannot read the checkpoint at step {step} ({str(error)[:200]})"
                continue
            for later, what in damaged.items() if processes.is_first() else ():
                warnings.warn(f"{what}: it is removed, and the run goes on from step {step}", stacklevel=2)
                self._remove(later)  # the run will save at that step again
            return step, tree
        for what in damaged.values():
            warnings.warn(what, stacklevel=2)
        if steps:
            raise UserError(
                f"no checkpoint in {self._path} can be read (steps {', '.join(map(str, steps))}). Put whole ones back, "
                "or begin a new run in another --workdir."
            )
        if (self._path / SAVED).exists():
            raise UserError(gone(self._path))
        return None

    def _steps(self) -> list[int]:
        """The steps of the checkpoints, latest first."""
        return sorted((int(folder.name) for folder in self._path.iterdir() if folder.name.isdigit()), reverse=True)

    def _remove(self, step: int) -> None:
        """Removes a checkpoint; if it is interrupted, what is left does not pass for one."""
        left = (self._path / str(step)).rename(self._path / f"{step}{UNFINISHED}")
        shutil.rmtree(left)


def _reason(error: Exception) -> str:
    """What the system says, where that is all there is to know of a failed write."""
    number = getattr(error, "errno", None) or re.search(r"os_error_code='(\d+)'", str(error))
    if number is None:
        return str(error)[:200]
    return os.strerror(number if isinstance(number, int) else int(number[1]))


def gone(path: Path) -> str:
    return (
        f"this run has saved checkpoints in {path}, and there are none now. Put them back, or begin a new run in "
        "another --workdir."
    )


@contextlib.contextmanager
def _unlogged() -> Iterator[None]:
    """Orbax also logs what it raises, with the tracebacks of all its threads. After a failure it stays silent: those
    threads outlive it, and print that nobody waits for them any more."""
    logger, hook = logging.getLogger("absl"), sys.unraisablehook
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    sys.unraisablehook = partial(_show_all_but_orphans, hook)
    yield
    logger.setLevel(level)
    sys.unraisablehook = hook


def _show_all_but_orphans(hook: Callable, unraisable) -> None:
    if str(unraisable.exc_value) != "Event loop is closed":
        hook(unraisable)


def _checksums(folder: Path) -> dict[str, str]:
    """{path: SHA-256} of all files of a checkpoint."""
    digests = {}
    for file in sorted(folder.rglob("*")):
        if file.is_file() and file.name != CHECKSUMS:
            with open(file, "rb") as stream:
                digests[file.relative_to(folder).as_posix()] = hashlib.file_digest(stream, "sha256").hexdigest()
    return digests


def _check(folder: Path) -> None:
    """Raises UserError if a file of the checkpoint is not as it was written."""
    if not (folder / CHECKSUMS).exists():
        if not (folder.parent / SAVED).exists():
            return  # of a run that began before there were any
        raise UserError(f"{CHECKSUMS} is missing")
    now = _checksums(folder)
    for name, digest in read_json(folder / CHECKSUMS).items():
        if now.get(name) != digest:
            raise UserError(f"{name} is {'damaged' if name in now else 'missing'}")
