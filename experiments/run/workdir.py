"""The directory of a run. Files are replaced whole or, like the metrics, only added to; a run can be resumed."""

import errno
import itertools
import json
import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments.run import schemas
from experiments.run.checkpoints import Checkpoints, gone
from experiments.run.errors import InUse, UserError, ways_out
from experiments.run.files import naming, parsed, read_json, read_text, sync, write_json, write_text
from experiments.run.names import Settings, plain

try:
    import fcntl
except ImportError:  # not a Unix
    fcntl = None

A_RUNS_FILES = ("config.json", "metrics.jsonl", "summary.json", "checkpoints", "tasks", "subnetwork.safetensors")
A_RUNS_FILES += (".saved-checkpoints",)  # the mark of `Checkpoints`
A_RUNS_OWN = [name for name in A_RUNS_FILES if name != "tasks"]  # which no other directory is likely to hold

LOCK = ".lock"
REPLACED = "replaced"  # the folders that --restart moves the files of earlier runs to: replaced-1, replaced-2, ...
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Workdir:
    """A run's files under `path`. A new directory takes the settings; an old one must hold the same.

    Args:
      path: the directory.
      settings: of the run.
      fingerprint: of the images and their order.
      summary: the schema of its summary.json.
      restart: whether to begin anew: what an earlier run left is moved to a folder in it.
      writes: whether this process writes; if not, another one does, and has made the directory.
    """

    def __init__(
        self,
        path: Path,
        settings: Settings,
        fingerprint: str,
        summary: Any = schemas.RunSummary,
        restart: bool = False,
        writes: bool = True,
    ):
        self.path, self._summary, self._writes = Path(path), summary, writes
        if not writes:
            if not (self.path / "config.json").is_file():
                raise UserError(
                    f"the first process wrote {self.path / 'config.json'}, and this one cannot see it. "
                    "Name a --workdir on a file system that all processes share."
                )
            return
        record = {**plain(dict(settings.values)), "workdir": str(path), "data": fingerprint}
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            sync(self.path.resolve().parent)
            self._lock = _lock(self.path)
            for left in [left for name in (*A_RUNS_FILES, "*.png") for left in self.path.glob(f".{name}.*")]:
                left.unlink()  # half written by a process that was killed
            if restart:
                self._put_aside()
            found = [name for name in A_RUNS_FILES if os.path.lexists(self.path / name)]
            if "config.json" in found and len(found) > 1:  # alone, it is of a run that did not begin
                self._refuse_other_settings(settings, record)
            elif found and found != ["config.json"]:
                raise UserError(
                    f"{self.path} holds {', '.join(found)} but not config.json, the settings of that run. "
                    + ways_out("Put it back")
                )
            else:
                write_json(self.path / "config.json", record)
        except OSError as error:
            raise UserError(
                f"cannot write to the work directory {self.path} ({error}); name another with --workdir"
            ) from error

    def _put_aside(self) -> None:
        """Moves all that an earlier run left into a folder of its own; a directory that is no run's stays as it is."""
        if not any(os.path.lexists(self.path / name) for name in A_RUNS_OWN):
            return
        left = [file for file in self.path.iterdir() if file.name != LOCK and not file.name.startswith(f"{REPLACED}-")]
        number = next(n for n in itertools.count(1) if not os.path.lexists(self.path / f"{REPLACED}-{n}"))
        aside = self.path / f"{REPLACED}-{number}"
        aside.mkdir()
        for file in sorted(left, key=lambda file: file.name == "config.json"):  # the settings last
            file.rename(aside / file.name)

    def _refuse_other_settings(self, settings: Settings, record: dict) -> None:
        old = self.config()
        if old.get("data") != record["data"] and old.get("dataset") == record["dataset"]:
            raise UserError(
                f"{self.path} holds a run on {old['dataset']} images that differ from these, or come in another "
                "order. Name the directory it used with --data-dir, or begin a new run in another --workdir."
            )
        differing = settings.differing(old)
        if differing:
            raise UserError(
                f"{self.path} holds a run with other settings: {'; '.join(differing)}. Give that run's settings to "
                "resume it, or another --workdir to begin a new one."
            )

    def summary(self) -> dict | None:
        """The summary of a finished run, or None."""
        file = self.path / "summary.json"
        if not os.path.lexists(file):
            return None
        return read_json(file, self._summary, "move it away, and it is made again from the checkpoints.")

    def finish(self, summary: dict, draw: Callable[[], None]) -> None:
        """Draws the pictures and writes summary.json, the mark of a finished run.

        A picture that fails does not cost the result; a run that is interrupted, or finds the disk full, while it draws
        does so again.
        """
        if not self._writes:
            return
        try:
            with naming(self.path):
                draw()
        except Exception as error:
            if getattr(error, "errno", None) in NO_ROOM:
                raise
            write_json(self.path / "summary.json", summary)
            raise
        write_json(self.path / "summary.json", summary)

    def mark(self) -> int:
        """An int32 that is the same for all who see this very directory."""
        written = (self.path / "config.json").stat()
        return (written.st_mtime_ns ^ written.st_size) % 2**31

    def config(self) -> dict:
        """The settings that the run began with."""
        return read_json(self.path / "config.json", schemas.Settings, ways_out("put a whole copy back"))

    def records(self) -> list[dict]:
        """The lines of metrics.jsonl, but for a last one that a killed run half wrote.

        Raises:
          UserError: a line is no record.
        """
        file = self.path / "metrics.jsonl"
        if not os.path.lexists(file):
            return []
        where, records = "", []
        try:
            lines = read_text(file).split("\n")
            for number, line in enumerate(lines[:-1], 1):  # the last is what follows the last end of a line
                where = f"line {number}: "
                records.append(parsed(line, schemas.Record))
        except ValueError as error:
            raise UserError(f"{file} is damaged ({where}{error}); {ways_out('put a whole copy back')}") from error
        return records

    def cut_records(self, step: int, epochs: int) -> None:
        """Drops the lines of metrics.jsonl that come after `step`: a resumed run writes them again.

        Raises:
          UserError: what is left is not one line for each of the first `epochs` epochs, counted from 0.
        """
        kept = [record for record in self.records() if record["step"] <= step]
        if [record["epoch"] for record in kept] != list(range(epochs)):
            raise UserError(
                f"{self.path / 'metrics.jsonl'} does not hold the epochs 0 to {epochs - 1} that the checkpoint at step "
                f"{step} has behind it. " + ways_out("Put the file back")
            )
        if not self._writes:
            return
        write_text(self.path / "metrics.jsonl", "".join(json.dumps(record) + "\n" for record in kept))

    def append(self, record: dict) -> dict:
        """Adds one line to metrics.jsonl, on disk when this returns; returns the record."""
        if self._writes:
            file = self.path / "metrics.jsonl"
            new = not file.exists()
            with naming(file), open(file, "a") as stream:
                stream.write(json.dumps(record) + "\n")
                stream.flush()
                os.fsync(stream.fileno())
            if new:
                sync(self.path)
        return record

    def checkpoints(self) -> Checkpoints:
        """Of this run.

        Raises:
          UserError: they were there, and are gone.
        """
        if os.path.lexists(self.path / "metrics.jsonl") and not os.path.lexists(self.path / "checkpoints"):
            raise UserError(gone(self.path / "checkpoints"))
        return Checkpoints(self.path / "checkpoints")


class _Lock:
    """The lock of a directory. It ends with this object, or with the process, however that ends.

    A file that is open for writing: an exclusive flock over NFS needs that. Some file systems lock nothing at all.
    """

    _file = None

    def __init__(self, path: Path):
        self._file = os.open(path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InUse(
                f"another process is working in {path}. Wait until it ends, or name another --workdir."
            ) from error
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise

    def __del__(self):
        if self._file is not None:
            os.close(self._file)


_locks = weakref.WeakValueDictionary()  # one for each directory, however often this process opens it


def _lock(path: Path) -> _Lock | None:
    """Keeps other processes out of the directory for the life of the object. None where there are no such locks."""
    if fcntl is None:
        return None
    path = path.resolve()
    if (lock := _locks.get(path)) is None:
        lock = _locks[path] = _Lock(path)
    return lock
