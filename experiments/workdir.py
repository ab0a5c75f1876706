"""The directory of a run. Files are replaced whole or, like the metrics, only added to; a run can be resumed."""

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import warnings
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from experiments.errors import InUse, UserError

try:
    import fcntl
except ImportError:  # not a Unix
    fcntl = None

A_RUNS_FILES = ("config.json", "metrics.jsonl", "summary.json", "checkpoints")
SUMMARY_KEYS = {"method", "dataset", "test_accuracy", "test_loss", "density", "epochs", "steps", "layers", "seed"}

CHANGE_NO_RESULT = {"data_dir", "workdir", "checkpoint_every", "preset"}  # a preset is only a name for its settings
# But for the order of sums and, under pmap, the draws of each device: a run may go on with other ones.
CHANGE_NO_RESULT |= {"devices", "parallel", "shard_scores", "coordinator", "num_processes", "process_id"}
KEPT_CHECKPOINTS = 2


def default_path(config, name: str) -> Path:
    """runs/<name>/<method>-<dataset>-d<density>-s<seed>-<digest of all settings that bear on the result>."""
    density = f"-d{config.density:g}" if config.density < 1 else ""  # a method that takes none has 1
    return Path("runs") / name / f"{config.method}-{config.dataset}{density}-s{config.seed}-{digest(config)}"


def digest(config) -> str:
    """Eight characters that stand for all settings that bear on the result."""
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k not in CHANGE_NO_RESULT}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


class Workdir:
    """A run's files under `path`. A new directory takes the settings; an old one must hold the same.

    `summary_keys`: what a whole summary.json holds. `writes`: whether this process does; if not, another one does, and
    has made the directory.
    """

    def __init__(
        self, path: Path, config, data_digest: str, summary_keys: set[str] = SUMMARY_KEYS, writes: bool = True
    ):
        self.path, self._summary_keys, self._writes = Path(path), summary_keys, writes
        if not writes:
            if not (self.path / "config.json").is_file():
                raise UserError(
                    f"the first process wrote {self.path / 'config.json'}, and this one cannot see it. "
                    "Name a --workdir on a file system that all processes share."
                )
            return
        record = {**dataclasses.asdict(config), "workdir": str(path), "data": data_digest}
        record = json.loads(json.dumps(record))  # as it will be read again: a tuple becomes a list
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = _lock(self.path)
            found = [name for name in A_RUNS_FILES if (self.path / name).exists()]
            if "config.json" in found and len(found) > 1:  # alone, it is of a run that did not begin
                self._refuse_other_settings(record)
            elif found and found != ["config.json"]:
                raise UserError(
                    f"{self.path} holds {', '.join(found)} but not config.json, the settings of that run. "
                    "Put it back, or name another --workdir."
                )
            else:
                write_json(self.path / "config.json", record)
        except OSError as error:
            raise UserError(
                f"cannot write to the work directory {self.path} ({error}); name another with --workdir"
            ) from error

    def _refuse_other_settings(self, record: dict) -> None:
        old = self.config()
        if old.get("data") != record["data"] and old.get("dataset") == record["dataset"]:
            raise UserError(
                f"{self.path} holds a run on {old['dataset']} images that are not those found now, or in another "
                "order. Name the directory it used with --data-dir, or begin a new run in another --workdir."
            )
        differing = [
            f"{field} (was {old.get(field)!r}, now {record.get(field)!r})"
            for field in sorted({*old, *record} - {*CHANGE_NO_RESULT})
            if old.get(field) != record.get(field)
        ]
        if differing:
            raise UserError(
                f"{self.path} holds a run with other settings: {'; '.join(differing)}. Give that run's settings to "
                "go on with it, or another --workdir to begin a new one."
            )

    def summary(self) -> dict | None:
        """The summary of a finished run, or None."""
        file = self.path / "summary.json"
        if not file.exists():
            return None
        summary = read_json(file)
        if missing := self._summary_keys - set(summary):
            raise UserError(f"{file} is damaged (no {', '.join(sorted(missing))}); move it away to have it made again.")
        return summary

    def finish(self, summary: dict, draw: Callable[[], None]) -> None:
        """Draws the pictures and writes summary.json, the mark of a finished run.

        A picture that fails does not cost the result; a run that is interrupted while it draws does so again.
        """
        if not self._writes:
            return
        try:
            draw()
        except Exception:
            write_json(self.path / "summary.json", summary)
            raise
        write_json(self.path / "summary.json", summary)

    def config(self) -> dict:
        """The settings that the run began with."""
        return read_json(self.path / "config.json")

    def records(self) -> list[dict]:
        """The lines of metrics.jsonl."""
        file = self.path / "metrics.jsonl"
        records = []
        for line in file.read_text().splitlines() if file.exists() else []:
            with contextlib.suppress(json.JSONDecodeError):  # a killed run may have half written its last line
                records.append(json.loads(line))
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
                f"{step} has behind it. Put the file back, or begin a new run in another --workdir."
            )
        if not self._writes:
            return
        write_text(self.path / "metrics.jsonl", "".join(json.dumps(record) + "\n" for record in kept))

    def append(self, record: dict) -> dict:
        """Adds one line to metrics.jsonl, on disk when this returns; returns the record."""
        if self._writes:
            with open(self.path / "metrics.jsonl", "a") as file:
                file.write(json.dumps(record) + "\n")
                file.flush()
                os.fsync(file.fileno())
        return record

    def checkpoints(self) -> "Checkpoints":
        return Checkpoints(self.path / "checkpoints")


class _Lock:
    """The lock of an open directory. It ends with this object, or with the process, however that ends."""

    _directory = None

    def __init__(self, path: Path):
        self._directory = os.open(path, os.O_RDONLY)
        try:
            fcntl.flock(self._directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InUse(
                f"another process is working in {path}. Wait until it ends, or name another --workdir."
            ) from error

    def __del__(self):
        if self._directory is not None:
            os.close(self._directory)


_locks = weakref.WeakValueDictionary()  # one for each directory, however often this process opens it


def _lock(path: Path) -> _Lock | None:
    """Keeps other processes out of the directory as long as the object lives. None where there are no such locks."""
    if fcntl is None:
        return None
    path = path.resolve()
    if (lock := _locks.get(path)) is None:
        lock = _locks[path] = _Lock(path)
    return lock


class Checkpoints:
    """The last checkpoints of a run, by step. A save that is killed leaves the ones before it whole."""

    def __init__(self, path: Path):
        self._path, training = path, ocp.training
        self._orbax = training.Checkpointer(
            path.absolute(),
            save_decision_policy=training.save_decision_policies.FixedIntervalPolicy(1),  # we decide when
            preservation_policy=training.preservation_policies.LatestN(KEPT_CHECKPOINTS),
            cleanup_tmp_directories=True,
        )

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._orbax.close()

    def save(self, step: int, tree: Any) -> None:
        """Saves a pytree of arrays; returns when it is on disk. (A background save would read donated buffers.)"""
        self._orbax.save(step, tree)

    def restore(self, like: Any) -> tuple[int, Any] | None:
        """(step, tree) of the latest whole checkpoint, laid out like `like`; None when there is none at all.

        Raises:
          UserError: there are checkpoints, and none of them can be read.
        """
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
        steps = sorted((checkpoint.step for checkpoint in self._orbax.checkpoints), reverse=True)
        for step in steps:
            try:
                return step, self._orbax.load(step, abstract)
            except Exception as error:  # whatever a damaged file makes the reader raise
                warnings.warn(f"cannot read the checkpoint at step {step}: {str(error)[:200]}", stacklevel=2)
        if steps:
            raise UserError(
                f"no checkpoint in {self._path} can be read (steps {', '.join(map(str, steps))}). Put whole ones back, "
                "or begin a new run in another --workdir."
            )
        return None


def read_json(file: Path) -> dict:
    """The object in a JSON file; UserError if it is damaged."""
    try:
        value = json.loads(file.read_text())
        if not isinstance(value, dict):
            raise ValueError("no JSON object")
    except ValueError as error:  # bad JSON, or bytes that are no text
        raise UserError(f"{file} is damaged ({error}); move it away, or name another --workdir.") from error
    return value


def write_json(file: Path, value: dict) -> None:
    write_text(file, json.dumps(value, indent=2) + "\n")


def write_text(file: Path, text: str) -> None:
    _write(file, text.encode())


def _write(file: Path, content: bytes) -> None:
    """Writes a whole file or, if anything interrupts it, leaves the old one."""
    new = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with open(new, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(new, file)
    finally:
        new.unlink(missing_ok=True)


def write_arrays(file: Path, arrays: Mapping[str, Any]) -> None:
    """Writes {name: array} as an .npz, whole or not at all."""
    stream = io.BytesIO()
    np.savez(stream, **{name: np.asarray(array) for name, array in arrays.items()})
    _write(file, stream.getvalue())


def read_arrays(file: Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz; UserError if it is missing or damaged."""
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
            f"{file} is damaged ({error}); move it and the .json beside it away to have both made again."
        ) from error
