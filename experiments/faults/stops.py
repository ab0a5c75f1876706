"""Runs that are stopped: killed, sent a signal, frozen, or brought to values that are not finite.

A function for each fault makes its runs below the directory that it is given and returns a `Fault`. A run survives if
it prints what it should, resumes from a step above 0, and ends with results that are bit-identical to those of an
undisturbed run.
"""

import random
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from experiments.data import cifar, load
from experiments.faults.child_run import (
    CIFAR,
    CIFAR_10,
    MNIST,
    NEVER,
    ChildRun,
    Fault,
    Job,
    checkpoint,
    differences,
    finished,
    is_an_error,
    make_fault,
    results,
    resumed_to_the_end,
    saved,
    saving,
    undisturbed,
)
from experiments.run.errors import UserError


def jobs() -> tuple[Job, ...]:
    """What is killed: MNIST and CIFAR-10, in one and in two processes; images of its shape where it is not found."""
    try:
        cifar.read(load.directory())
    except UserError:
        return (MNIST, CIFAR, MNIST.of_two, CIFAR.of_two)
    return (MNIST, CIFAR_10, MNIST.of_two, CIFAR_10.of_two)


def kills(scratch: Path, tries: int = 20, seed: int = 0, job: Job = MNIST) -> Fault:
    """kill -9 at random moments, again and again in one run; every third during a save, every third outside.

    Of a run of two processes, one is killed, or the other, or both.

    Args:
      scratch: a directory for the runs.
      tries: how many kills.
      seed: of the moments.
      job: what is run.

    Returns:
      A fault. Each of its details has "resumed" (the step that the killed process had resumed from), "during_save",
      "saved" (the steps of the checkpoints) and "next" (the step that the next process resumed from). After the last
      kill the run ends, its results are compared, and the last details have what "differs".
    """
    expected = undisturbed(scratch, job.long, job)
    workdir, moments = scratch / f"killed-{job.name}", random.Random(seed)
    flags = ("--epochs", str(job.long), "--checkpoint-every", str(job.every))
    details = []
    for number in range(tries):
        with ChildRun(scratch, workdir, *flags, job=job) as run:
            run.wait_for_training()
            start = max(saved(workdir), default=0)
            left = (expected["step"] - start) // job.every - 3  # a run that has ended cannot be killed
            wanted, delay = start + job.every * min(moments.randrange(1, 3), max(left, 0)), moments.uniform(0, 0.1)
            run.wait_for(lambda wanted=wanted: max(saved(workdir), default=0) >= wanted)
            time.sleep(delay)
            if number % 3:
                run.wait_for(lambda number=number: saving(workdir) == (number % 3 == 1))
            run.kill(only=moments.choice((0, 1, None)) if job.processes > 1 else None)
        seen = {"resumed": run.resumed(), "during_save": saving(workdir), "saved": saved(workdir)}
        details.append(seen | {"statuses": run.statuses()})
    last = resumed_to_the_end(scratch, workdir, expected, "--checkpoint-every", str(NEVER), job=job)
    for seen, after in zip(details, [*details[1:], last], strict=True):
        seen["next"] = after["resumed"]
        seen["survived"] = seen["next"] == seen["saved"][-1] > 0 and not last["differs"]
    details[-1]["differs"] = last["differs"]
    return make_fault(f"kill -9 at a random moment, {_named(job)}", details)


def _named(job: Job) -> str:
    networks = {MNIST.name: "MNIST", CIFAR.name: "CIFAR's shape and BatchNorm", CIFAR_10.name: "CIFAR-10 and BatchNorm"}
    return networks[job.name.partition("-")[0]] + (", two processes" if job.processes > 1 else "")


def stop_signals(
    scratch: Path, numbers: tuple[int, ...] = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP), job: Job = MNIST
) -> Fault:
    """The run saves at its step, ends with status 3 and prints the command that resumes it."""
    expected, details = undisturbed(scratch, job=job), []
    for number in numbers:
        workdir = scratch / f"stopped-{job.name}-{number}"
        flags = ("--epochs", str(job.epochs), "--checkpoint-every", str(NEVER))
        with ChildRun(scratch, workdir, *flags, job=job) as run:
            run.wait_for(lambda run=run: "epoch 1/" in run.output())
            status = run.kill(number)
        match = re.search(rf"saved at step (\d+) of .* Resume with: \S+ -m {job.command}", run.output())
        after = resumed_to_the_end(scratch, workdir, expected, job=job)
        seen = {"signal": number, "status": status, "saved": int(match[1]) if match else None, **after}
        seen["survived"] = status == 3 and after["resumed"] == seen["saved"] and not after["differs"]
        details.append(seen)
    return make_fault("SIGTERM, Ctrl-C, a closed terminal (SIGHUP)", details)


def _compiling(run: ChildRun) -> bool:
    return (run.workdir / "config.json").exists()


def _first_step(run: ChildRun) -> bool:
    return "a step takes" in run.output()


def _saving(run: ChildRun) -> bool:
    return saving(run.workdir)


def _drawing(run: ChildRun) -> bool:
    return any(run.workdir.glob("*.png"))


PHASES: dict[str, Callable[[ChildRun], bool]] = {
    "compiling": _compiling,
    "the first step": _first_step,
    "saving": _saving,
    "drawing": _drawing,
}


def interrupted_phases(scratch: Path, job: Job = MNIST, phases: tuple[str, ...] = tuple(PHASES)) -> Fault:
    """Ctrl-C while the run compiles, at its first step, while it saves and while it draws.

    It ends with status 3 after saving, with 130 where there is nothing to save, or with 0 where it was about to end;
    the same command then ends with the bits of an undisturbed run.

    Args:
      scratch: a directory for the runs.
      job: what is run.
      phases: which of `PHASES`.
    """
    expected, details = undisturbed(scratch, job=job), []
    flags = ("--epochs", str(job.epochs), "--checkpoint-every", str(job.every))
    for phase in phases:
        workdir, reached = scratch / f"phase-{phase.replace(' ', '-')}", PHASES[phase]
        cold = {"JAX_ENABLE_COMPILATION_CACHE": "false"} if phase == "compiling" else {}
        with ChildRun(scratch, workdir, *flags, job=job, variables=cold) as run:
            run.wait_for(lambda run=run, reached=reached: reached(run))
            unfinished = not (workdir / "summary.json").exists()
            status = run.kill(signal.SIGINT)
        said = run.output()  # now: the next run of the directory prints to the same file
        after = resumed_to_the_end(scratch, workdir, expected, "--checkpoint-every", str(job.every), job=job)
        seen = {"phase": phase, "status": status, "said": said[-500:], "differs": after["differs"]}
        in_order = status in (3, 130) and ("Resume with" if status == 3 else "same command") in said
        seen["survived"] = unfinished and (in_order or status == 0) and "Traceback" not in said and not after["differs"]
        details.append(seen)
    return make_fault("Ctrl-C while compiling, at the first step, saving, drawing", details)


def frozen(scratch: Path, seconds: tuple[float, ...] = (20,), job: Job = MNIST.of_two) -> Fault:
    """One of two processes is frozen (SIGSTOP) for a while, and goes on: so does the run, or both end and it resumes.

    Args:
      scratch: a directory for the runs.
      seconds: how long; each of the two processes is frozen so long.
      job: what is run.
    """
    expected, details = undisturbed(scratch, job.long, job), []
    flags = ("--epochs", str(job.long), "--checkpoint-every", str(job.every))
    for number, length in enumerate(seconds):
        for which in range(job.processes):
            workdir = scratch / f"frozen-{number}-{which}"
            with ChildRun(scratch, workdir, *flags, job=job) as run:
                run.wait_for(lambda workdir=workdir: saved(workdir))
                run.processes[which].send_signal(signal.SIGSTOP)
                time.sleep(length)
                ended_meanwhile = [status is not None for status in run.statuses()]
                run.processes[which].send_signal(signal.SIGCONT)
                status = run.ended()
            seen = {"seconds": length, "process": which, "ended_meanwhile": ended_meanwhile, "status": status}
            seen |= {"statuses": run.statuses(), "said": run.output()}
            # Where it took too long, the runtime ends the processes, some with a stack trace of its own.
            in_order = set(run.statuses()) == {0} or (0 not in run.statuses() and "Traceback" not in run.output())
            after = resumed_to_the_end(scratch, workdir, expected, job=job)
            details.append({**seen, "differs": after["differs"], "survived": in_order and not after["differs"]})
    return make_fault(f"one of two processes frozen for {' and '.join(f'{s:g}' for s in seconds)} s", details)


CLOCK = """
import time
real, began = time.time, time.monotonic()
def jumping():
    return real() + (0, 86400, -86400)[int(time.monotonic() - began) % 3]
time.time = jumping
"""


def jumping_clock(scratch: Path, job: Job = MNIST) -> Fault:
    """The clock that Python tells jumps by a day, forward or back, every second. It is not the system's that jumps."""
    expected, workdir, room = undisturbed(scratch, job.long, job), scratch / "jumping", scratch / "clock"
    room.mkdir()
    (room / "sitecustomize.py").write_text(CLOCK)
    flags = ("--epochs", str(job.long), "--checkpoint-every", str(job.every))
    run = finished(scratch, workdir, *flags, job=job, variables={"PYTHONPATH": str(room)})
    status = run.ended()
    differs = ["unfinished"] if status else differences(results(workdir), expected)
    seen = {"status": status, "said": run.output()[-1500:], "differs": differs}
    return make_fault("a clock that jumps by a day every second", [{**seen, "survived": not differs}])


def other_devices(scratch: Path) -> Fault:
    """One run trains on 8 devices, then on 1, on 8 with its scores sharded, and on 1 to its end.

    Sums over another number of devices round differently, so the accuracies must agree only within 5 points.
    """
    expected, workdir, details = undisturbed(scratch, MNIST.long), scratch / "devices", []
    flags = ("--epochs", str(MNIST.long), "--checkpoint-every")
    layouts = [("--devices", "8"), ("--devices", "1"), ("--devices", "8", "--shard-scores"), ("--devices", "1")]
    stopped_at = 0
    for layout in layouts:
        last = len(details) == len(layouts) - 1
        with ChildRun(scratch, workdir, *flags, str(NEVER if last else MNIST.every), *layout) as run:
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
        details[-1]["survived"] &= bool(close) and len(got["records"]) == MNIST.long + 1
    details[1]["survived"] &= details[0]["survived"]  # which resumed from nothing, and is no try of its own
    return make_fault("other devices at resume: 8, 1, 8 sharded, 1", details[1:])


def second_process(scratch: Path) -> Fault:
    """A second process in a work directory is refused while the first one is alive, and the first is not disturbed."""
    expected, workdir = undisturbed(scratch), scratch / "two"
    with ChildRun(scratch, workdir, "--epochs", str(MNIST.epochs)) as first:
        first.wait_for(lambda: (workdir / "config.json").exists())
        first.processes[0].send_signal(signal.SIGSTOP)  # or it might end before the second one comes
        with ChildRun(scratch, workdir, "--epochs", str(MNIST.epochs)) as second:
            status, output = second.ended(), second.output()
        first.processes[0].send_signal(signal.SIGCONT)
        first.ended()
    seen = {"status": status, "output": output, "differs": differences(results(workdir), expected)}
    seen["survived"] = status == 1 and "another process is working in" in output and not seen["differs"]
    return make_fault("a second run in the work directory", [seen])


def not_finite(scratch: Path) -> Fault:
    """Training that diverges stops and names the step and the layer. The checkpoints are from before that step."""
    workdir = scratch / "diverged"
    flags = ("--weight-decay", "40", "--learning-rate", "0.2")  # scores that swing ever wider
    run = finished(scratch, workdir, "--epochs", str(MNIST.epochs), "--checkpoint-every", "10", *flags)
    match = re.search(r"(the loss|[\w/]+) is not finite \(NaN or infinity\) at step (\d+)", run.output())
    seen = {"status": run.ended(), "output": run.output(), "saved": saved(workdir)}
    seen |= {"what": match[1], "step": int(match[2])} if match else {}
    seen["survived"] = seen["status"] == 1 and match is not None and is_an_error(seen["output"])
    seen["survived"] &= bool(seen["saved"])
    if seen["survived"]:
        arrays = checkpoint(workdir, seen["saved"][-1])
        floats = [array for array in arrays.values() if array.dtype == np.float32]
        seen["finite"] = bool(floats) and all(bool(np.isfinite(array).all()) for array in floats)
        seen["survived"] = 0 < seen["saved"][-1] <= seen["step"] and seen["finite"]
    return make_fault("loss or scores that are not finite", [seen])
