"""Every fault, and how many of the runs that it was done to survived."""

import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

from experiments.faults import damage, disks, inputs, power, soak, stops, surroundings
from experiments.faults.child_run import MNIST, Fault, make_fault

Harmful = Callable[[Path], Fault | None]
WAITING = (stops.frozen, soak.soak)  # most of their time


def all_faults(kills: int, soak_seconds: float) -> list[Harmful]:
    """The functions that do harm, in the order of the table.

    Args:
      kills: how many kills in all, over two networks in one and in two processes; as many flags are tried, and a
        hundred times as many directories damaged.
      soak_seconds: how long a run is watched that saves again and again. A sixth of it is how long one of two processes
        is frozen, beside a shorter time.
    """
    jobs = stops.jobs()
    return [
        *(partial(stops.kills, job=job, tries=-(-kills // len(jobs))) for job in jobs),
        stops.stop_signals,
        stops.interrupted_phases,
        stops.second_process,
        partial(stops.frozen, seconds=(20, max(soak_seconds / 6, 20))),
        stops.jumping_clock,
        stops.other_devices,
        stops.not_finite,
        disks.full_disk,
        partial(disks.full_disk, job=MNIST.of_two),
        disks.cut_checkpoint,
        disks.noisy_checkpoint,
        partial(damage.damaged_directories, tries=100 * kills),
        *([power.power_loss] if power.can_be_recorded() else []),
        surroundings.closed_streams,
        surroundings.unusable,
        surroundings.other_users,
        surroundings.terminals,
        partial(inputs.hostile_flags, tries=kills),
        inputs.swollen_archives,
        partial(soak.soak, seconds=soak_seconds),
    ]


def measure(kills: int, soak_seconds: float, status: Callable[[str], AbstractContextManager]) -> dict:
    """Does all harm to real runs; arguments as in `all_faults`.

    The soak and the frozen processes, which mostly wait, go on beside the rest.

    Args:
      kills: see there.
      soak_seconds: see there.
      status: shows which fault it is at, as a context manager.

    Returns:
      "rows": none. "faults": of each fault its name, "tries", "survived", and what was seen of those that did not.
    """
    faults = all_faults(kills, soak_seconds)
    waiting = [fault for fault in faults if _function(fault) in WAITING]
    with ThreadPoolExecutor() as beside:
        seen = {fault: beside.submit(_done, fault) for fault in waiting}
        done = {}
        for number, fault in enumerate((fault for fault in faults if fault not in waiting), start=1):
            with status(f"{number} of {len(faults)}: {_name(fault)}"):
                done[fault] = _done(fault)
        with status(f"waiting for: {' and '.join(map(_name, waiting))}"):
            done |= {fault: seen[fault].result() for fault in waiting}
    return {"rows": [], "faults": [done[fault] for fault in faults if done[fault]]}


def _function(fault: Harmful) -> Callable:
    return getattr(fault, "func", fault)


def _name(fault: Harmful) -> str:
    return _function(fault).__name__.replace("_", " ")


def _done(fault: Harmful) -> dict | None:
    """What was seen of the fault; None of one that cannot be done here."""
    with tempfile.TemporaryDirectory() as scratch:
        try:
            seen = fault(Path(scratch))
        except Exception as error:  # of hours of harm, one that could not be done should lose none of the others
            seen = make_fault(f"{_name(fault)}: could not be done", [{"survived": False, "error": repr(error)}])
    if seen is None:
        return None
    lost = [str(details)[-2000:] for details in seen.details if not details["survived"]]
    return {"fault": seen.fault, "tries": seen.tries, "survived": seen.survived, "lost": lost}
