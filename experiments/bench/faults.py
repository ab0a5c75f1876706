"""Harm done to real training runs, and how many of them survive it: they are killed, starved of disk, damaged.

A function for each fault makes its runs below the directory that it is given and returns a `Fault`. A run survives if
it prints what it should, resumes from a step above 0, and ends with results that are bit-identical to those of an
undisturbed run.
"""

import os
import random
import re
import signal
import time
from functools import partial
from pathlib import Path

import numpy as np

from experiments.bench.child_run import (
    EPOCHS,
    EVERY,
    NEVER,
    ChildRun,
    Fault,
    checkpoint,
    differences,
    finished,
    make_fault,
    results,
    resumed_to_the_end,
    saved,
    saving,
    undisturbed,
)
from experiments.bench.disk_faults import cut_checkpoint, full_disk, noisy_checkpoint

KILLED_EPOCHS = 60
SOAK_WARM_UP = 5  # seconds that measure how many steps take a second


def kills(scratch: Path, tries: int = 20, seed: int = 0) -> Fault:
    """kill -9 at random moments, again and again in one run; every third during a save, every third outside.

    Args:
      scratch: a directory for the runs.
      tries: how many kills.
      seed: of the moments.

    Returns:
      A fault. Each of its details has "resumed" (the step that the killed process had resumed from), "during_save",
      "saved" (the steps of the checkpoints) and "next" (the step that the next process resumed from). After the last
      kill the run ends, its results are compared, and the last details have what "differs".
    """
    expected, workdir, moments = undisturbed(scratch, KILLED_EPOCHS), scratch / "killed", random.Random(seed)
    flags = ("--epochs", str(KILLED_EPOCHS), "--checkpoint-every", str(EVERY))
    details = []
    for number in range(tries):
        with ChildRun(scratch, workdir, *flags) as run:
            run.wait_for_training()
            start = max(saved(workdir), default=0)
            wanted, delay = start + EVERY * moments.randrange(1, 3), moments.uniform(0, 0.1)
            run.wait_for(lambda wanted=wanted: max(saved(workdir), default=0) >= wanted)
            time.sleep(delay)
            if number % 3:
                run.wait_for(lambda number=number: saving(workdir) == (number % 3 == 1))
            run.kill()
        details.append({"resumed": run.resumed(), "during_save": saving(workdir), "saved": saved(workdir)})
    last = resumed_to_the_end(scratch, workdir, expected, "--checkpoint-every", str(NEVER))
    for seen, after in zip(details, [*details[1:], last], strict=True):
        seen["next"] = after["resumed"]
        seen["survived"] = seen["next"] == seen["saved"][-1] > 0 and not last["differs"]
    details[-1]["differs"] = last["differs"]
    return make_fault("kill -9 at a random moment", details)


def other_devices(scratch: Path) -> Fault:
    """One run trains on 8 devices, then on 1, on 8 with its scores sharded, and on 1 to its end.

    Sums over another number of devices round differently, so the accuracies must agree only within 5 points.
    """
    expected, workdir, details = undisturbed(scratch, KILLED_EPOCHS), scratch / "devices", []
    flags = ("--epochs", str(KILLED_EPOCHS), "--checkpoint-every")
    layouts = [("--devices", "8"), ("--devices", "1"), ("--devices", "8", "--shard-scores"), ("--devices", "1")]
    stopped_at = 0
    for layout in layouts:
        last = len(details) == len(layouts) - 1
        with ChildRun(scratch, workdir, *flags, str(NEVER if last else EVERY), *layout) as run:
            if not last:
                run.wait_for(lambda above=stopped_at: max(saved(workdir), default=0) > above)
            status = run.ended() if last else run.kill(signal.SIGTERM)
        resumed = run.resumed() or 0
        seen = {"layout": " ".join(layout), "status": status, "resumed": resumed, "saved": saved(workdir)}
        seen["survived"] = resumed == stopped_at and status == (0 if last else 3)
        details.append({**seen, "output": run.output()})
        stopped_at = max(saved(workdir), default=0)
    if details[-1]["status"] == 0:
        got = results(workdir)
        details[-1]["accuracies"] = [r["summary"]["test_accuracy"] for r in (got, expected)]
        details[-1]["differs"] = differences(got, expected)
        close = abs(np.subtract(*details[-1]["accuracies"])) < 0.05
        details[-1]["survived"] &= bool(close) and len(got["records"]) == KILLED_EPOCHS + 1
    return make_fault("other devices at resume", details[1:])


def stop_signals(scratch: Path, numbers: tuple[int, ...] = (signal.SIGTERM, signal.SIGINT)) -> Fault:
    """SIGTERM and Ctrl-C: the run saves at its step, ends with status 3 and prints the command that resumes it."""
    expected, details = undisturbed(scratch), []
    for number in numbers:
        workdir = scratch / f"stopped-{number}"
        with ChildRun(scratch, workdir, "--epochs", str(EPOCHS), "--checkpoint-every", str(NEVER)) as run:
            run.wait_for(lambda run=run: "epoch 1/" in run.output())
            status = run.kill(number)
        match = re.search(r"saved at step (\d+) of .* Resume with: python -m experiments.mnist", run.output())
        after = resumed_to_the_end(scratch, workdir, expected)
        seen = {"status": status, "saved": int(match[1]) if match else None, **after}
        seen["survived"] = status == 3 and after["resumed"] == seen["saved"] and not after["differs"]
        details.append(seen)
    return make_fault("SIGTERM, Ctrl-C", details)


def second_process(scratch: Path) -> Fault:
    """A second process in a work directory is refused while the first one is alive, and the first is not disturbed."""
    expected, workdir = undisturbed(scratch), scratch / "two"
    with ChildRun(scratch, workdir, "--epochs", str(EPOCHS)) as first:
        first.wait_for(lambda: (workdir / "config.json").exists())
        first.process.send_signal(signal.SIGSTOP)  # or it might end before the second one comes
        with ChildRun(scratch, workdir, "--epochs", str(EPOCHS)) as second:
            status, output = second.ended(), second.output()
        first.process.send_signal(signal.SIGCONT)
        first.ended()
    seen = {"status": status, "output": output, "differs": differences(results(workdir), expected)}
    seen["survived"] = status == 1 and "another process is working in" in output and not seen["differs"]
    return make_fault("second process in the work directory", [seen])


def not_finite(scratch: Path) -> Fault:
    """Training that diverges stops and names the step and the layer. The checkpoints are from before that step."""
    workdir = scratch / "diverged"
    flags = ("--weight-decay", "40", "--learning-rate", "0.2")  # scores that swing ever wider
    run = finished(scratch, workdir, "--epochs", str(EPOCHS), "--checkpoint-every", "10", *flags)
    match = re.search(r"(the loss|[\w/]+) is not finite \(NaN or infinity\) at step (\d+)", run.output())
    seen = {"status": run.ended(), "output": run.output(), "saved": saved(workdir)}
    seen |= {"what": match[1], "step": int(match[2])} if match else {}
    seen["survived"] = seen["status"] == 1 and match is not None and "Traceback" not in seen["output"]
    if seen["survived"] and seen["saved"]:
        arrays = checkpoint(workdir, seen["saved"][-1])
        floats = [array for array in arrays.values() if array.dtype == np.float32]
        seen["finite"] = bool(floats) and all(bool(np.isfinite(array).all()) for array in floats)
        seen["survived"] = 0 < seen["saved"][-1] <= seen["step"] and seen["finite"]
    return make_fault("loss or scores that are not finite", [seen])


def soak(scratch: Path, seconds: float = 15) -> Fault:
    """A run saves about once a second: memory and files must not grow.

    Args:
      scratch: a directory for the run.
      seconds: how long it is watched, from its first checkpoint on.

    Returns:
      A fault whose details have, of each second, "rss" in bytes and the number of open "files"; how many checkpoints
      were "written"; and what is "left" in the work directory.
    """
    workdir, flags = scratch / "soak", ("--epochs", str(10**6), "--checkpoint-every")
    with ChildRun(scratch, workdir, *flags, "100") as run:
        run.wait_for(lambda: saved(workdir))
        time.sleep(SOAK_WARM_UP)
        every = max(saved(workdir)[-1] // SOAK_WARM_UP, 1)
        run.kill(signal.SIGTERM)
    rss, files, steps = [], [], set()
    with ChildRun(scratch, workdir, *flags, str(every)) as run:
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
    return make_fault(f"{seconds:g} s with {len(steps)} checkpoints: {memory}", [seen])


def table(scratch: Path, soak_seconds: float = 15) -> list[Fault]:
    """Every fault, in directories below `scratch`, which must be empty; `soak` takes so many seconds."""
    faults = (kills, full_disk, cut_checkpoint, noisy_checkpoint, other_devices, stop_signals, second_process)
    return [fault(scratch) for fault in (*faults, not_finite, partial(soak, seconds=soak_seconds))]
