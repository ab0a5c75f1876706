"""A loss of power, at every moment of a run: what had reached the disk is a run that resumes with the right bits.

What a run does to its files is recorded. After each thing that it does, a disk is made that holds what was synced and
nothing else, and another that holds all that was done; real file systems keep something in between.
"""

import contextlib
import os
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import jax.numpy as jnp
import numpy as np

from experiments.faults.child_run import Fault, make_fault
from experiments.run.names import Settings
from experiments.run.workdir import LOCK, Workdir

SETTINGS = Settings({"dataset": "mnist", "seed": 3})
TREE = {"a": jnp.arange(40.0).reshape(8, 5)}
MEMORY = Path("/dev/shm")  # whose files keep numbers of their own: none is used again
OPEN = Path("/proc/self/fd")
EPOCHS = 4
CALLS = ("fsync", "rename", "replace", "unlink", "rmdir", "mkdir")


def can_be_recorded() -> bool:
    """Whether this system has what the recording needs."""
    return MEMORY.is_dir() and OPEN.is_dir()


class Disk:
    """What of a directory is on the disk: of files the content, and of folders the names, that they had when synced."""

    def __init__(self, root: Path):
        self._root, self._files, self._folders = root, {}, {os.stat(root).st_ino: {}}

    def sync(self, handle: int) -> None:
        path, number = os.readlink(OPEN / str(handle)), os.fstat(handle).st_ino
        if not path.startswith(str(self._root)):
            return
        if os.path.isdir(path):
            self._folders[number] = {entry.name: (entry.inode(), entry.is_dir()) for entry in os.scandir(path)}
        else:
            self._files[number] = Path(path).read_bytes()

    def write(self, target: Path, number: int | None = None) -> None:
        """Makes a directory as it would be found after the power is back."""
        target.mkdir()
        for name, (inside, is_folder) in self._folders.get(number or os.stat(self._root).st_ino, {}).items():
            if is_folder:
                self.write(target / name, inside) if inside in self._folders else (target / name).mkdir()
            else:
                (target / name).write_bytes(self._files.get(inside, b""))


def power_loss(scratch: Path | None = None) -> Fault:
    """A run of four epochs without any training; after each of its calls that change a disk, the power is lost.

    Args:
      scratch: is not used: the run is in memory.

    Returns:
      A fault with two tries for each moment; its details have what is "wrong", if anything is.
    """
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        root, saved, moments = Path(folder) / "run", [], []
        root.mkdir()
        with _recorded(root, saved, moments):
            _train(root, saved)
        details = [
            {"moment": number, "kept": kept, "wrong": wrong, "survived": wrong is None}
            for number, (disks, before) in enumerate(moments)
            for kept, disk in disks.items()
            for wrong in [_wrong_after(disk, before)]
        ]
    return make_fault("power lost after any write, sync or rename", details)


@contextlib.contextmanager
def _recorded(root: Path, saved: list[int], moments: list[tuple[dict[str, Path], list[int]]]) -> Iterator[None]:
    """While it lasts, each call that changes the disk adds ({what is kept: disk}, steps saved before) to `moments`."""
    disk, real = Disk(root), {name: getattr(os, name) for name in CALLS}

    def recording(name):
        def call(*args, **kwargs):
            if name == "fsync":
                disk.sync(args[0])
            result = real[name](*args, **kwargs)
            with mock.patch.multiple(os, **real):
                disks = {kept: root.with_name(f"{kept}{len(moments)}") for kept in ("synced", "done")}
                disk.write(disks["synced"])
                _copy(root, disks["done"])
                moments.append((disks, list(saved)))
            return result

        return call

    with mock.patch.multiple(os, **{name: recording(name) for name in CALLS}):
        yield


def _copy(source: Path, target: Path) -> None:
    """The files as they are at this moment; some may go while they are read."""
    target.mkdir()
    for entry in os.scandir(source):
        if entry.name == LOCK:
            continue
        if entry.is_dir(follow_symlinks=False):
            _copy(Path(entry.path), target / entry.name)
        else:
            with contextlib.suppress(FileNotFoundError):
                (target / entry.name).write_bytes(Path(entry.path).read_bytes())


def _begun(path: Path):
    workdir = Workdir(path, SETTINGS, "images")
    checkpoints = workdir.checkpoints()
    step, tree = checkpoints.restore(TREE) or (0, TREE)
    workdir.cut_records(step if step else -1, epochs=step // 10 + 1 if step else 0)
    return workdir, checkpoints, step, tree


def _train(path: Path, saved: list[int]):
    """Four epochs of a run whose array grows by a step at a time; `saved` gets the steps whose saving has ended."""
    workdir, checkpoints, step, tree = _begun(path)
    if not step:
        workdir.append({"epoch": 0, "step": 0})
    for epoch in range(step // 10 + 1, EPOCHS + 1):
        workdir.append({"epoch": epoch, "step": 10 * epoch})
        tree = {"a": tree["a"] + 10}
        checkpoints.save(10 * epoch, tree)
        saved.append(10 * epoch)
    return workdir.records(), tree


def _wrong_after(disk: Path, saved: list[int]) -> str | None:
    """What is wrong with a disk after a loss of power: something saved is lost, or the run ends in other bits."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a checkpoint that did not reach the disk
        try:
            _, _, step, tree = _begun(disk)
            if step < max(saved, default=0) or not np.array_equal(tree["a"], TREE["a"] + step):
                return f"resumes from step {step}, and {saved} were saved"
            records, tree = _train(disk, [])
        except Exception as error:  # whatever a user would see
            return f"{type(error).__name__}: {error}"
    whole = np.array_equal(tree["a"], TREE["a"] + 10 * EPOCHS)
    told = [record["epoch"] for record in records] == list(range(EPOCHS + 1))
    return None if whole and told else "other bits, or other records"
