"""Harm done to the files of training runs: disks that are full, checkpoints that are damaged. See `stops`."""

import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from experiments.faults.child_run import (
    MNIST,
    ChildRun,
    Fault,
    Job,
    begun,
    differences,
    finished,
    is_an_error,
    make_fault,
    results,
    resumed_to_the_end,
    saved,
    undisturbed,
)
from experiments.faults.small_disk import KINDS, Disk, small_disk


def full_disk(scratch: Path, kinds: tuple[str, ...] = KINDS, job: Job = MNIST) -> Fault:
    """No room for a checkpoint, for part of one, for a line of metrics, for the pictures; then there is room again.

    Args:
      scratch: a directory for the runs.
      kinds: the ways to make a small disk, as in `small_disk`.
      job: what is run.
    """
    expected = undisturbed(scratch, job=job)
    with small_disk(scratch / f"disk-{job.name}", kinds) as disk:
        details = _starved_again_and_again(scratch, disk, expected, job)
    differs = [name for now in details for name in now.get("differs", [])]
    for number, now in enumerate(details):
        now["next"] = next((after["resumed"] for after in details[number + 1 :] if after["resumed"]), None)
        stopped = now.get("status") == 1 and is_an_error(now["output"])
        now["survived"] = stopped and now["next"] == now["saved"][-1] > 0 and not differs
    name = "a full disk" + (", two processes" if job.processes > 1 else "")
    return make_fault(name, [now for now in details if "place" in now])


def _starved_again_and_again(scratch: Path, disk: Disk, expected: dict, job: Job) -> list[dict]:
    """Details of one run that comes upon the full disk at one place after the other."""
    workdir, seen = disk.path / "run", disk.seen / "run"
    flags = ("--epochs", str(job.epochs), "--checkpoint-every", str(job.every))

    def starved(place: str, free: int, until: Callable[[ChildRun], object] | None) -> dict:
        if not until:  # or the run would make room by removing a save that was not finished
            for left in (seen / "checkpoints").glob("*tmp*"):
                shutil.rmtree(left)
        with ChildRun(scratch, workdir, *flags, job=job, prefix=disk.prefix) as run:
            if until:
                run.wait_for(lambda: until(run))
            disk.fill(run, free)
            status, output = run.ended(), run.output()
        disk.clear()
        return {"place": place, "status": status, "output": output, "saved": saved(seen), "resumed": run.resumed()}

    def resumed() -> dict:
        with ChildRun(scratch, workdir, *flags, job=job, prefix=disk.prefix) as run:
            run.ended()
        return {"resumed": run.resumed(), "differs": differences(results(seen), expected)}

    details = [starved("checkpoint", 0, lambda run: saved(seen))]
    details.append(starved("checkpoint", 2**15, ChildRun.resumed))  # after it resumed, it writes the next checkpoint
    if not disk.limits:
        details.append(starved("metrics.jsonl", 0, None))  # a run cuts this file before it resumes
    details.append(resumed())
    for file in (seen / "summary.json", *seen.glob("*.png")):
        file.unlink()
    return [*details, starved("pictures", 2**14, None), resumed()]


def cut_checkpoint(scratch: Path, tries: int = 2, seed: int = 0) -> Fault:
    """Files of the last checkpoint are cut short; in the last try, files of all checkpoints.

    Args:
      scratch: a directory for the runs.
      tries: how many runs lose their last checkpoint.
      seed: of the files and the places in them.
    """
    return _damaged("a checkpoint that is cut short", scratch, "cut", tries, seed, lambda b, at, rng: b[:at])


def noisy_checkpoint(scratch: Path, tries: int = 2, seed: int = 0) -> Fault:
    """16 bytes of the last checkpoint are overwritten with noise; in the last try, of all checkpoints.

    Arguments as in `cut_checkpoint`.
    """

    def change(content: bytes, at: int, rng: random.Random) -> bytes:
        return content[:at] + rng.randbytes(16) + content[at + 16 :]

    return _damaged("a checkpoint with 16 bytes of noise", scratch, "noisy", tries, seed, change)


def _damaged(name: str, scratch: Path, short: str, tries: int, seed: int, change: Callable) -> Fault:
    expected, rng = undisturbed(scratch), random.Random(seed)
    original = begun(scratch)
    before, last = saved(original)[-2:]
    details = []
    for number in range(tries):
        workdir = shutil.copytree(original, scratch / f"{short}-{number}")
        files = [_damage(workdir / "checkpoints" / str(last), change, rng, largest=number == 0)]
        seen = resumed_to_the_end(scratch, workdir, expected, "--checkpoint-every", str(MNIST.every))
        warned = (
            f"cannot read the checkpoint at step {last}" in seen["output"]
            and re.search(rf"resumes from step {before}\b", seen["output"]) is not None
        )
        seen["survived"] = warned and seen["resumed"] == before and not seen["differs"]
        details.append({"files": files, "warned": warned, **seen})
    workdir = shutil.copytree(original, scratch / f"{short}-all")
    files = [_damage(workdir / "checkpoints" / str(step), change, rng) for step in saved(workdir)]
    metrics = (workdir / "metrics.jsonl").read_bytes()
    run = finished(scratch, workdir, "--epochs", str(MNIST.epochs))
    refused = run.ended() == 1 and "no checkpoint in" in run.output() and is_an_error(run.output())
    untouched = (workdir / "metrics.jsonl").read_bytes() == metrics and saved(workdir) == saved(original)
    seen = {"files": files, "all": True, "status": run.ended(), "output": run.output(), "resumed": run.resumed()}
    details.append({**seen, "survived": refused and untouched})
    return make_fault(name, details)


def _damage(checkpoint: Path, change: Callable, rng: random.Random, largest: bool = False) -> str:
    """Changes a random file of a checkpoint, or the largest, which has the arrays. Returns its path."""
    files = sorted(file for file in checkpoint.rglob("*") if file.is_file() and file.stat().st_size)
    file = max(files, key=lambda file: file.stat().st_size) if largest else rng.choice(files)
    content = file.read_bytes()
    file.write_bytes(change(content, rng.randrange(len(content)), rng))
    return str(file.relative_to(checkpoint))
