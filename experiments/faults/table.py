"""Every fault, and how many of the runs that it was done to survived."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

from experiments.faults import damage, disks, inputs, power, soak, stops, surroundings
from experiments.faults.child_run import MNIST, Fault, make_fault


def all_faults(kills: int, soak_seconds: float) -> list[Callable[[Path], Fault | None]]:
    """The functions that do harm, in the order of the table.

    Args:
      kills: how many kills in all, over two networks in one and in two processes. Five times as many directories are
        damaged, and as many flags are tried.
      soak_seconds: how long a run is watched that saves again and again. A sixth of it is how long one of two processes
        is frozen, beside a shorter time.
    """
    a_job = -(-kills // len(stops.JOBS))
    return [
        *(partial(stops.kills, job=job, tries=a_job) for job in stops.JOBS),
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
        partial(damage.damaged_directories, tries=5 * kills),
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

    Args:
      kills: see there.
      soak_seconds: see there.
      status: shows which fault it is at, as a context manager.

    Returns:
      "rows": none. "faults": of each fault its name, "tries", "survived", and what was seen of those that did not.
    """
    return {"rows": [], "faults": list(_done(kills, soak_seconds, status))}


def _done(kills: int, soak_seconds: float, status) -> Iterator[dict]:
    faults = all_faults(kills, soak_seconds)
    for number, fault in enumerate(faults, start=1):
        with (
            status(f"{number} of {len(faults)}: {getattr(fault, 'func', fault).__name__.replace('_', ' ')}"),
            tempfile.TemporaryDirectory() as scratch,
        ):
            try:
                seen = fault(Path(scratch))
            except Exception as error:  # of hours of harm, one that could not be done should lose none of the others
                name = getattr(fault, "func", fault).__name__.replace("_", " ")
                seen = make_fault(f"{name}: could not be done", [{"survived": False, "error": repr(error)}])
        if seen is not None:  # a fault that cannot be done here
            lost = [str(details)[-2000:] for details in seen.details if not details["survived"]]
            yield {"fault": seen.fault, "tries": seen.tries, "survived": seen.survived, "lost": lost}
