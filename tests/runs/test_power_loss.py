"""A loss of power, at every moment of a run: what had reached the disk is a run that resumes with the right bits.

What the run does to its files is recorded. After each thing that it does, a disk is made that holds what was synced and
nothing else, and another that holds all that was done; real file systems keep something in between.
"""

import os
import tempfile
import warnings
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.run.names import Settings
from experiments.run.workdir import LOCK, Workdir

SETTINGS = Settings({"dataset": "mnist", "seed": 3})
TREE = {"a": jnp.arange(40.0).reshape(8, 5)}
MEMORY = Path("/dev/shm")  # whose files keep numbers of their own: none is used again
EPOCHS = 4


class Disk:
    """What of a directory is on the disk: of files the content, and of folders the names, that they had when synced."""

    def __init__(self, root):
        self.root, self.files, self.folders = root, {}, {os.stat(root).st_ino: {}}

    def sync(self, handle):
        path, number = os.readlink(f"/proc/self/fd/{handle}"), os.fstat(handle).st_ino
        if not path.startswith(str(self.root)):
            return
        if os.path.isdir(path):
            self.folders[number] = {entry.name: (entry.inode(), entry.is_dir()) for entry in os.scandir(path)}
        else:
            self.files[number] = Path(path).read_bytes()

    def write(self, target, number=None):
        """Makes a directory as it would be found after the power is back."""
        target.mkdir()
        for name, (inside, is_folder) in self.folders.get(number or os.stat(self.root).st_ino, {}).items():
            if is_folder:
                self.write(target / name, inside) if inside in self.folders else (target / name).mkdir()
            else:
                (target / name).write_bytes(self.files.get(inside, b""))


def begun(path):
    workdir = Workdir(path, SETTINGS, "images")
    checkpoints = workdir.checkpoints()
    step, tree = checkpoints.restore(TREE) or (0, TREE)
    workdir.cut_records(step if step else -1, epochs=step // 10 + 1 if step else 0)
    return workdir, checkpoints, step, tree


def train(path, saved):
    """Four epochs of a run whose array grows by a step at a time; `saved` gets the steps whose saving has ended."""
    workdir, checkpoints, step, tree = begun(path)
    if not step:
        workdir.append({"epoch": 0, "step": 0})
    for epoch in range(step // 10 + 1, EPOCHS + 1):
        workdir.append({"epoch": epoch, "step": 10 * epoch})
        tree = {"a": tree["a"] + 10}
        checkpoints.save(10 * epoch, tree)
        saved.append(10 * epoch)
    return workdir.records(), tree


def check(disk, saved):
    """A disk after a loss of power, and what was saved before it: nothing is lost, and the run ends in its bits."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a checkpoint that did not reach the disk
        _, _, step, tree = begun(disk)
        np.testing.assert_array_equal(tree["a"], TREE["a"] + step)
        assert step >= max(saved, default=0), (step, saved)
        records, tree = train(disk, [])
    np.testing.assert_array_equal(tree["a"], TREE["a"] + 10 * EPOCHS)
    assert [record["epoch"] for record in records] == list(range(EPOCHS + 1))


@pytest.mark.slow
@pytest.mark.skipif(not (MEMORY.is_dir() and os.path.isdir("/proc/self/fd")), reason="this is no Linux")
def test_power_that_is_lost_at_any_moment_loses_nothing_that_was_saved(monkeypatch):
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        (Path(folder) / "run").mkdir()
        disk, saved, moments = Disk(Path(folder) / "run"), [], []
        real = {name: getattr(os, name) for name in ("fsync", "rename", "replace", "unlink", "rmdir", "mkdir")}

        def recorded(name):
            def call(*args, **kwargs):
                if name == "fsync":
                    disk.sync(args[0])
                result = real[name](*args, **kwargs)
                with monkeypatch.context() as unrecorded:
                    for each, function in real.items():
                        unrecorded.setattr(os, each, function)
                    synced = Path(folder) / f"synced{len(moments)}"
                    disk.write(synced)
                    done = Path(folder) / f"done{len(moments)}"
                    copy(disk.root, done)
                    moments.append((synced, done, list(saved)))
                return result

            return call

        with monkeypatch.context() as patch:
            for name in real:
                patch.setattr(os, name, recorded(name))
            train(disk.root, saved)
        assert saved == [10, 20, 30, 40] and len(moments) > 50
        for synced, done, before in moments:
            for left in (synced, done):
                check(left, before)


def copy(source, target):
    """The files as they are at this moment; some may go while they are read."""
    target.mkdir()
    for entry in os.scandir(source):
        if entry.name == LOCK:
            continue
        if entry.is_dir(follow_symlinks=False):
            copy(entry.path, target / entry.name)
        else:
            try:
                (target / entry.name).write_bytes(Path(entry.path).read_bytes())
            except FileNotFoundError:
                continue
