"""A disk with little room, for runs to fill."""

import contextlib
import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from experiments.faults.child_run import ROOT, ChildRun

ROOM = 8 * 2**20  # bytes
KINDS = ("mount", "namespace", "limit")


class Disk(NamedTuple):
    """A directory with little room. `small_disk` makes it."""

    path: Path  # as a run sees it
    seen: Path  # as this process sees it
    prefix: tuple[str, ...] = ()  # the command that a run needs to see it
    limits: bool = False  # whether it is no disk but a limit on the size of every file

    def fill(self, run: ChildRun, free: int) -> None:
        """Leaves the run, which may have started, about so many bytes."""
        if self.limits:
            free = max(free, 2**14)  # the run's output counts too
            for process in run.processes:
                resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (free, free))
            return
        with open(self.seen / "filler", "wb", buffering=0) as filler, contextlib.suppress(OSError):
            while True:
                filler.write(bytes(4096))
        with open(self.seen / "filler", "r+b") as filler:
            filler.truncate(max((self.seen / "filler").stat().st_size - free, 0))

    def clear(self) -> None:
        """Makes room again."""
        (self.seen / "filler").unlink(missing_ok=True)


@contextlib.contextmanager
def small_disk(path: Path, kinds: tuple[str, ...] = KINDS) -> Iterator[Disk]:
    """Makes the directory `path` with room for `ROOM` bytes, by the first of these ways that the system allows.

    Args:
      path: the directory, which must not exist.
      kinds: "mount": a file system in memory. "namespace": the same in a namespace of its own, which needs no rights.
        "limit": a limit on the size of every file, which always works and is never left out.
    """
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={ROOM}", "tmpfs", str(path)]
    if "mount" in kinds and shutil.which("mount") and subprocess.run(mount, capture_output=True).returncode == 0:
        try:
            yield Disk(path, path)
        finally:
            subprocess.run(["umount", "-l", str(path)], check=True)
        return
    if "namespace" in kinds and shutil.which("unshare") and shutil.which("nsenter"):
        script = ["unshare", "-rm", "sh", "-c", '"$@" && echo mounted && exec sleep 3600', "sh", *mount]
        with subprocess.Popen(script, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as keeper:
            try:
                if keeper.stdout.readline() == b"mounted\n":
                    enter = ("nsenter", f"--target={keeper.pid}", "--user", "--preserve-credentials", "--mount")
                    enter = (*enter, f"--wd={ROOT}", "--")
                    yield Disk(path, Path(f"/proc/{keeper.pid}/root{path.resolve()}"), enter)
                    return
            finally:
                keeper.kill()
    yield Disk(path, path, limits=True)
