"""Harm done to running jobs, and what survives it: the real command, killed, starved, damaged.

A function for each fault: it makes its runs (`subject`) below the directory it is given and returns a `Fault`. A try is
survived when the run says what it should, goes on from a step above 0, and ends with the bits of a run that nothing
happened to.
"""

import contextlib
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments.bench.subject import (
    EPOCHS,
    EVERY,
    NEVER,
    ROOT,
    Run,
    begun,
    checkpoint,
    differences,
    finished,
    results,
    saved,
    saving,
    whole,
)

KILLED_EPOCHS = 60
ROOM = 8 * 2**20  # bytes of the disk that fills
SOAK_WARM_UP = 5  # seconds, from which the steps between checkpoints are found


class Fault(NamedTuple):
    """`survived` of `tries`; `details` says of each try what was seen."""

    fault: str
    tries: int
    survived: int
    details: list[dict]


def _goes_on(scratch: Path, workdir: Path, expected: dict, *flags: str) -> dict:
    """What is seen when the same command is given again and nothing more happens."""
    run = finished(scratch, workdir, "--epochs", str(expected["summary"]["epochs"]), *flags)
    seen = {"resumed": run.resumed(), "status": run.ended(), "said": run.said()}
    return seen | {"differs": differences(results(workdir), expected) if seen["status"] == 0 else ["unfinished"]}


def _fault(name: str, details: list[dict]) -> Fault:
    return Fault(name, len(details), sum(seen["survived"] for seen in details), details)


def kills(scratch: Path, tries: int = 20, seed: int = 0) -> Fault:
    """kill -9 at moments drawn from a seed, of one run, over and over; every third during a save, every third outside.

    Each of `details`: `resumed` (the step that the killed process had gone on from), `during_save`, and `next` (the
    step that the one after it went on from). The last one ends, and its results are compared.
    """
    expected, workdir, moments = whole(scratch, KILLED_EPOCHS), scratch / "killed", random.Random(seed)
    flags = ("--epochs", str(KILLED_EPOCHS), "--checkpoint-every", str(EVERY))
    details = []
    for number in range(tries):
        with Run(scratch, workdir, *flags) as run:
            run.goes()
            start = max(saved(workdir), default=0)
            wanted, delay = start + EVERY * moments.randrange(1, 3), moments.uniform(0, 0.1)
            run.wait_for(lambda wanted=wanted: max(saved(workdir), default=0) >= wanted)
            time.sleep(delay)
            if number % 3:
                run.wait_for(lambda number=number: saving(workdir) == (number % 3 == 1))
            run.kill()
        details.append({"resumed": run.resumed(), "during_save": saving(workdir), "saved": saved(workdir)})
    last = _goes_on(scratch, workdir, expected, "--checkpoint-every", str(NEVER))
    for seen, after in zip(details, [*details[1:], last], strict=True):
        seen["next"] = after["resumed"]
        seen["survived"] = seen["next"] == seen["saved"][-1] > 0 and not last["differs"]
    return _fault("kill -9 at a random moment", details)


@contextlib.contextmanager
def small_disk(path: Path, kinds: tuple[str, ...] = ("mount", "namespace", "limit")) -> Iterator["Disk"]:
    """A directory with room for `ROOM` bytes, made in the first of these ways that this system allows: a file system in
    memory; the same in a namespace of its own, which needs no rights; or a limit on the size of every file."""
    path.mkdir()
    mount, size = ["mount", "-t", "tmpfs", "-o", f"size={ROOM}", "tmpfs", str(path)], {"capture_output": True}
    if "mount" in kinds and shutil.which("mount") and subprocess.run(mount, **size).returncode == 0:
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
                    enter = (*enter, f"--wd={ROOT}")
                    yield Disk(path, Path(f"/proc/{keeper.pid}/root{path.resolve()}"), (*enter, "--"))
                    return
            finally:
                keeper.kill()
    yield Disk(path, path, limits=True)


class Disk(NamedTuple):
    """Where there is little room: the directory as a run sees it and as this process does, the command to run under,
    and whether it is no disk but a limit on the size of every file."""

    path: Path
    seen: Path
    prefix: tuple[str, ...] = ()
    limits: bool = False

    def fill(self, run: Run, free: int) -> None:
        """Leaves the run about so many bytes; it may have started."""
        if self.limits:
            free = max(free, 2**14)  # of its output, too
            resource.prlimit(run.process.pid, resource.RLIMIT_FSIZE, (free, free))
            return
        with open(self.seen / "filler", "wb", buffering=0) as filler, contextlib.suppress(OSError):
            while True:
                filler.write(bytes(4096))
        with open(self.seen / "filler", "r+b") as filler:
            filler.truncate(max((self.seen / "filler").stat().st_size - free, 0))

    def clear(self) -> None:
        (self.seen / "filler").unlink(missing_ok=True)


def full_disk(scratch: Path, kinds: tuple[str, ...] = ("mount", "namespace", "limit")) -> Fault:
    """No room for a checkpoint, for part of one, for a line of metrics, for the pictures; then there is room again."""
    expected = whole(scratch)
    in_save = Run.resumed  # once it goes on from a checkpoint, what it writes next is another one
    places = [
        ("checkpoint", 0, lambda run: saved(seen)),
        ("checkpoint", 2**15, in_save),
        ("metrics.jsonl", 0, None),  # which it cuts before it goes on
    ]
    details = []
    with small_disk(scratch / "disk", kinds) as disk:
        workdir, seen = disk.path / "run", disk.seen / "run"
        flags = ("--epochs", str(EPOCHS), "--checkpoint-every", str(EVERY))

        def starved(place: str, free: int, until: Callable[[Run], object] | None) -> dict:
            if not until:  # or it would make room by removing a save that was not finished
                for left in (seen / "checkpoints").glob("*tmp*"):
                    shutil.rmtree(left)
            with Run(scratch, workdir, *flags, prefix=disk.prefix) as run:
                if until:
                    run.wait_for(lambda: until(run))
                disk.fill(run, free)
                status, said = run.ended(), run.said()
            disk.clear()
            return {"place": place, "status": status, "said": said, "saved": saved(seen), "resumed": run.resumed()}

        def goes_on() -> dict:
            with Run(scratch, workdir, *flags, prefix=disk.prefix) as run:
                run.ended()
            return {"resumed": run.resumed(), "differs": differences(results(seen), expected)}

        details += [starved(*place) for place in places if not (disk.limits and place[0] == "metrics.jsonl")]
        details.append(goes_on())
        for file in (seen / "summary.json", *seen.glob("*.png")):
            file.unlink()
        details.append(starved("pictures", 2**14, None))
        details.append(goes_on())
    differs = [name for now in details for name in now.get("differs", [])]
    for number, now in enumerate(details):
        now["next"] = next((after["resumed"] for after in details[number + 1 :] if after["resumed"]), None)
        stopped = now.get("status") == 1 and "error: " in now["said"] and "Traceback" not in now["said"]
        now["survived"] = stopped and now["next"] == now["saved"][-1] > 0 and not differs
    details = [now for now in details if "place" in now]
    return _fault("full disk", details)


def cut_checkpoint(scratch: Path, tries: int = 2, seed: int = 0) -> Fault:
    """Files of the last checkpoint cut short; in the end, of all."""
    return _damaged("checkpoint cut short", scratch, "cut", tries, seed, lambda b, at, rng: b[:at])


def noisy_checkpoint(scratch: Path, tries: int = 2, seed: int = 0) -> Fault:
    """16 bytes in files of the last checkpoint overwritten with noise; in the end, of all."""
    return _damaged(
        "checkpoint overwritten with noise",
        scratch,
        "noisy",
        tries,
        seed,
        lambda b, at, rng: b[:at] + rng.randbytes(16) + b[at + 16 :],
    )


def _damaged(name: str, scratch: Path, short: str, tries: int, seed: int, change: Callable) -> Fault:
    expected, rng = whole(scratch), random.Random(seed)
    original = begun(scratch)
    before, last = saved(original)[-2:]
    details = []
    for number in range(tries):
        workdir = shutil.copytree(original, scratch / f"{short}-{number}")
        files = [_damage(workdir / "checkpoints" / str(last), change, rng, largest=number == 0)]
        seen = _goes_on(scratch, workdir, expected, "--checkpoint-every", str(EVERY))
        warned = (
            f"cannot read the checkpoint at step {last}" in seen["said"]
            and f"goes on from step {before}" in seen["said"]
        )
        seen["survived"] = warned and seen["resumed"] == before and not seen["differs"]
        details.append({"files": files, "warned": warned, **seen})
    workdir = shutil.copytree(original, scratch / f"{short}-all")
    files = [_damage(workdir / "checkpoints" / str(step), change, rng) for step in saved(workdir)]
    metrics = (workdir / "metrics.jsonl").read_bytes()
    run = finished(scratch, workdir, "--epochs", str(EPOCHS))
    refused = run.ended() == 1 and "no checkpoint in" in run.said() and "Traceback" not in run.said()
    untouched = (workdir / "metrics.jsonl").read_bytes() == metrics and saved(workdir) == saved(original)
    seen = {"files": files, "all": True, "status": run.ended(), "said": run.said(), "resumed": run.resumed()}
    details.append({**seen, "survived": refused and untouched})
    return _fault(name, details)


def _damage(checkpoint: Path, change: Callable, rng: random.Random, largest: bool = False) -> str:
    """Changes a file at random, or that of the arrays; its name."""
    files = sorted(file for file in checkpoint.rglob("*") if file.is_file() and file.stat().st_size)
    file = max(files, key=lambda file: file.stat().st_size) if largest else rng.choice(files)
    content = file.read_bytes()
    file.write_bytes(change(content, rng.randrange(len(content)), rng))
    return str(file.relative_to(checkpoint))


def other_devices(scratch: Path) -> Fault:
    """One run on 8 devices, then on 1, on 8 with its scores sharded, and on 1 to its end.

    Sums over other numbers of devices round otherwise: the results must agree but for that.
    """
    expected, workdir, details = whole(scratch, KILLED_EPOCHS), scratch / "devices", []
    flags = ("--epochs", str(KILLED_EPOCHS), "--checkpoint-every")
    layouts = [("--devices", "8"), ("--devices", "1"), ("--devices", "8", "--shard-scores"), ("--devices", "1")]
    stopped_at = 0
    for layout in layouts:
        last = len(details) == len(layouts) - 1
        with Run(scratch, workdir, *flags, str(NEVER if last else EVERY), *layout) as run:
            if not last:
                run.wait_for(lambda above=stopped_at: max(saved(workdir), default=0) > above)
            status = run.ended() if last else run.kill(signal.SIGTERM)
        resumed = run.resumed() or 0
        seen = {"layout": " ".join(layout), "status": status, "resumed": resumed, "saved": saved(workdir)}
        seen["survived"] = resumed == stopped_at and status == (0 if last else 3)
        details.append({**seen, "said": run.said()})
        stopped_at = max(saved(workdir), default=0)
    if details[-1]["status"] == 0:
        got = results(workdir)
        details[-1]["accuracies"] = [r["summary"]["test_accuracy"] for r in (got, expected)]
        details[-1]["differs"] = differences(got, expected)
        close = abs(np.subtract(*details[-1]["accuracies"])) < 0.05
        details[-1]["survived"] &= bool(close) and len(got["records"]) == KILLED_EPOCHS + 1
    return _fault("other devices at resume", details[1:])


def asked_to_stop(scratch: Path, numbers: tuple[int, ...] = (signal.SIGTERM, signal.SIGINT)) -> Fault:
    """SIGTERM and Ctrl-C: it saves where it is, ends with status 3 and prints the command that goes on."""
    expected, details = whole(scratch), []
    for number in numbers:
        workdir = scratch / f"stopped-{number}"
        with Run(scratch, workdir, "--epochs", str(EPOCHS), "--checkpoint-every", str(NEVER)) as run:
            run.wait_for(lambda run=run: "epoch 1/" in run.said())
            status = run.kill(number)
        found = re.search(r"saved at step (\d+) of .* Go on with: python -m experiments.mnist", run.said())
        after = _goes_on(scratch, workdir, expected)
        seen = {"status": status, "saved": int(found[1]) if found else None, **after}
        seen["survived"] = status == 3 and after["resumed"] == seen["saved"] and not after["differs"]
        details.append(seen)
    return _fault("SIGTERM, Ctrl-C", details)


def second_process(scratch: Path) -> Fault:
    """A second process in a work directory is refused while the first one is alive, and the first goes on."""
    expected, workdir = whole(scratch), scratch / "two"
    with Run(scratch, workdir, "--epochs", str(EPOCHS)) as first:
        first.wait_for(lambda: (workdir / "config.json").exists())
        first.process.send_signal(signal.SIGSTOP)  # or it might end before the second one comes
        with Run(scratch, workdir, "--epochs", str(EPOCHS)) as second:
            status = second.ended()
            said = second.said()
        first.process.send_signal(signal.SIGCONT)
        first.ended()
    seen = {"status": status, "said": said, "differs": differences(results(workdir), expected)}
    seen["survived"] = status == 1 and "another process is working in" in said and not seen["differs"]
    return _fault("second process in the work directory", [seen])


def not_finite(scratch: Path) -> Fault:
    """Training that diverges: it stops, names the step and the layer, and the checkpoints are from before."""
    workdir, flags = (
        scratch / "diverged",
        ("--weight-decay", "40", "--learning-rate", "0.2"),
    )  # scores that swing ever wider
    run = finished(scratch, workdir, "--epochs", str(EPOCHS), "--checkpoint-every", "10", *flags)
    found = re.search(r"(the loss|[\w/]+) is not finite \(NaN or infinity\) at step (\d+)", run.said())
    seen = {"status": run.ended(), "said": run.said(), "saved": saved(workdir)}
    seen |= {"what": found[1], "step": int(found[2])} if found else {}
    seen["survived"] = seen["status"] == 1 and found is not None and "Traceback" not in seen["said"]
    if seen["survived"] and seen["saved"]:
        arrays = checkpoint(workdir, seen["saved"][-1])
        floats = [array for array in arrays.values() if array.dtype == np.float32]
        seen["finite"] = bool(floats) and all(bool(np.isfinite(array).all()) for array in floats)
        seen["survived"] = 0 < seen["saved"][-1] <= seen["step"] and seen["finite"]
    return _fault("loss or scores that are not finite", [seen])


def soak(scratch: Path, seconds: float = 15) -> Fault:
    """A run with about a checkpoint a second. Its details: `rss` in bytes and `files` open, of each second since the
    first checkpoint; how many checkpoints were `written`; and what is left in the work directory."""
    workdir, flags = scratch / "soak", ("--epochs", str(10**6), "--checkpoint-every")
    with Run(scratch, workdir, *flags, "100") as run:
        run.wait_for(lambda: saved(workdir))
        time.sleep(SOAK_WARM_UP)
        every = max(saved(workdir)[-1] // SOAK_WARM_UP, 1)
        run.kill(signal.SIGTERM)
    rss, files, steps = [], [], set()
    with Run(scratch, workdir, *flags, str(every)) as run:
        start = max(saved(workdir))
        run.wait_for(lambda: max(saved(workdir)) > start)
        end = time.monotonic() + seconds
        while time.monotonic() < end and run.process.poll() is None:
            status = Path(f"/proc/{run.process.pid}/status").read_text()
            rss.append(int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) * 1024)
            files.append(len(os.listdir(f"/proc/{run.process.pid}/fd")))
            steps |= set(saved(workdir)) - {start}
            time.sleep(1)
        status = run.kill(signal.SIGTERM)
    left = [file for file in workdir.rglob("*") if file.is_file()]
    seen = {
        "seconds": seconds,
        "status": status,
        "every": every,
        "written": len(steps),
        "rss": rss,
        "files": files,
        "left": {"files": len(left), "bytes": sum(file.stat().st_size for file in left)},
        "saved": saved(workdir),
    }
    grown = rss[-1] / rss[0] if rss else np.inf
    seen["survived"] = status == 3 and grown < 1.2 and len(saved(workdir)) == 2 and not saving(workdir)
    memory = f"{rss[0] / 1e6:.0f} MB, then {rss[-1] / 1e6:.0f}" if rss else "ended too early"
    return _fault(f"{seconds:g} s with {len(steps)} checkpoints: {memory}", [seen])


def table(scratch: Path, soak_seconds: float = 15) -> list[Fault]:
    """Every fault, in directories below `scratch`, which must be empty."""
    faults = (kills, full_disk, cut_checkpoint, noisy_checkpoint, other_devices, asked_to_stop, second_process)
    return [fault(scratch) for fault in (*faults, not_finite, partial(soak, seconds=soak_seconds))]
