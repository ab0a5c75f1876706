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
import numpy as np
from orbax.checkpoint import v1 as ocp

from experiments.run import processes, schemas
from experiments.run.errors import UserError, ways_out
from experiments.run.files import read_json, sync, sync_all, write_json

KEPT = 2
CHECKSUMS = "checksums.json"  # inside each checkpoint
SAVED = "saved"  # among the checkpoints, once there has been one
MOST = 16  # that are looked at, the latest
DAMAGED = ".damaged"  # after the names of those that were found so
SAVE_SECONDS = 30 * 24 * 3600  # orbax takes the time of day, and a clock that is set meanwhile should end no run
UNFINISHED = ".tmp"  # in the names of checkpoints that are being written or removed


class Checkpoints:
    """The last checkpoints of a run, by step, each whole or not there: its directory gets its name when all is in it.

    Each holds the checksums of its files, because the reader does not notice bytes that changed inside an array. Where
    several processes train together, all must call, and the first one does what is done once.

    A mark in the directory, and one beside it, which stays if it is emptied, say that there has been one.

    Args:
      path: the directory.

    Raises:
      UserError: the directory cannot be made.
    """

    def __init__(self, path: Path):
        self._path = path.absolute()
        self._marks = _mark(self._path), self._path / SAVED
        if processes.is_first():
            try:
                path.mkdir(parents=True, exist_ok=True)
                sync(path.parent)
                for left in path.glob(f"*{UNFINISHED}*"):  # by a process that was killed
                    if left.name.split(".")[0].isdigit() and left.is_dir() and not left.is_symlink():
                        shutil.rmtree(left)
            except OSError as error:
                raise UserError(
                    f"{path} cannot hold checkpoints ({error.strerror}). " + ways_out("Move it away")
                ) from error
        processes.meet()

    @property
    def _was_saved(self) -> bool:
        return any(map(os.path.lexists, self._marks))

    def save(self, step: int, tree: Any) -> None:
        """Saves a pytree of arrays; returns when it is on disk. (A background save would read donated buffers.)

        Raises:
          UserError: it cannot be written.
        """
        folder, unfinished = self._path / str(step), self._path / f"{step}{UNFINISHED}"
        try:
            with _unlogged(), ocp.Context(async_options=ocp.options.AsyncOptions(timeout_secs=SAVE_SECONDS)):
                ocp.save(unfinished, tree)
            if processes.is_first():
                write_json(unfinished / CHECKSUMS, _checksums(unfinished))
                # The order matters where power is lost: the name comes when all of it is on the disk; the marks, that
                # one was saved, and the end of older ones come when the name is.
                sync_all(unfinished)
                unfinished.rename(folder)
                sync(self._path)
                if not all(mark.exists() for mark in self._marks):
                    for mark in self._marks:
                        mark.touch()
                    sync(self._path.parent)
                for old in self._steps()[KEPT:]:
                    self._remove(old)
        except (OSError, ValueError, RuntimeError) as error:  # a full disk makes orbax raise any of these
            if processes.is_shared_failure(error):
                raise
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
        seen = np.array([*self._steps(), *[-1] * MOST])[:MOST]
        steps, damaged = [int(step) for step in processes.of_first(seen) if step >= 0], {}
        for step in steps:
            fault = _fault(self._path / str(step), self._was_saved) if processes.is_first() else None
            if not processes.any_of(fault is not None):
                for later, what in damaged.items() if processes.is_first() else ():
                    warnings.warn(f"{what}: it is renamed, and the run resumes from step {step}", stacklevel=2)
                    self._put_aside(later)
                return step, self._load(step, like)
            damaged[step] = f"cannot read the checkpoint at step {step} ({fault})"
        for what in damaged.values() if processes.is_first() else ():
            warnings.warn(what, stacklevel=2)
        if steps:
            raise UserError(
                f"no checkpoint in {self._path} can be read (steps {', '.join(map(str, steps))}). "
                + ways_out("Put whole ones back")
            )
        if processes.any_of(self._was_saved):
            raise UserError(gone(self._path))
        return None

    def _load(self, step: int, like: Any) -> Any:
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
        tree, failed = None, None
        try:
            with _unlogged():
                tree = ocp.load(self._path / str(step), abstract)
        except Exception as error:  # whatever the reader raises
            failed = error
        if processes.any_of(failed is not None):  # or the others would continue, and wait for this process forever
            raise UserError(
                f"the checkpoint at step {step} in {self._path} could not be read ({str(failed)[:200]}), although its "
                "files are as they were written. Give the same command again; if that does not help, move it away, and "
                "the one before is used."
            ) from failed
        return tree

    def _steps(self) -> list[int]:
        """The steps of the checkpoints, latest first."""
        names = (entry.name for entry in self._path.iterdir())
        return sorted((int(name) for name in names if re.fullmatch("0|[1-9][0-9]{0,17}", name)), reverse=True)

    def _put_aside(self, step: int) -> None:
        """Renames a damaged checkpoint: the run will save at that step again."""
        aside = self._path / f"{step}{DAMAGED}"
        if aside.is_symlink() or aside.is_file():  # of an earlier time
            aside.unlink()
        shutil.rmtree(aside, ignore_errors=True)
        (self._path / str(step)).rename(aside)

    def _remove(self, step: int) -> None:
        """Removes a checkpoint; if it is interrupted, what is left does not pass for one."""
        left = (self._path / str(step)).rename(self._path / f"{step}{UNFINISHED}")
        shutil.rmtree(left)


def discard(path: Path) -> None:
    """Removes the directory of checkpoints of a run that needs none any more, and its mark."""
    shutil.rmtree(path, ignore_errors=True)
    _mark(path).unlink(missing_ok=True)


def _mark(path: Path) -> Path:
    """The file beside a directory of checkpoints that says that there has been one."""
    return path.with_name(f".saved-{path.name}")


def _reason(error: Exception) -> str:
    """What the system says, where that is all there is to know of a failed write."""
    number = getattr(error, "errno", None) or re.search(r"os_error_code='(\d+)'", str(error))
    if number is None:
        return str(error)[:200]
    return os.strerror(number if isinstance(number, int) else int(number[1]))


def gone(path: Path) -> str:
    return f"this run has saved checkpoints in {path}, and there are none now. {ways_out('Put them back')}"


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


def _fault(folder: Path, with_checksums: bool) -> str | None:
    """What is wrong with a checkpoint: a file that is not as it was written. None if it is whole.

    with_checksums: False of a run that began before there were checksums.
    """
    if not folder.is_dir():
        return "it is no folder"
    if not os.path.lexists(folder / CHECKSUMS):
        return f"{CHECKSUMS} is missing" if with_checksums else None
    try:
        now, written = _checksums(folder), read_json(folder / CHECKSUMS, schemas.Checksums)
    except (OSError, UserError) as error:
        return str(error)
    for name in sorted({*now, *written}):
        if name not in written and not Path(name).name.startswith("."):  # such a one is a file system's or a desktop's
            return f"{name} is not among its checksums"
        if name in written and now.get(name) != written[name]:
            return f"{name} is {'damaged' if name in now else 'missing'}"
    return None
