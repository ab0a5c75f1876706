"""A run that saves again and again for a long time: memory, open files and files on the disk must not grow."""

import os
import re
import signal
import time
from pathlib import Path

from experiments.faults.child_run import ChildRun, Fault, make_fault, saved, saving

WARM_UP = 5  # seconds that measure how many steps take a second
# What tensorstore, which writes the arrays, keeps of each save (0.1.86): `to_json` never frees what it returns. More
# would be ours.
BYTES_A_SAVE = 100_000


def soak(scratch: Path, seconds: float = 15, between: float = 2) -> Fault:
    """A run saves every other second or so: memory and files must not grow, but for `BYTES_A_SAVE`.

    Args:
      scratch: a directory for the run.
      seconds: how long it is watched, from its first checkpoint on.
      between: seconds between checkpoints.

    Returns:
      A fault whose details have, of each second, "rss" in bytes and the number of open "files"; how many checkpoints
      were "written"; and what is "left" in the work directory.
    """
    workdir, flags = scratch / "soak", ("--epochs", str(10**6), "--checkpoint-every")
    with ChildRun(scratch, workdir, *flags, "100") as run:
        run.wait_for(lambda: saved(workdir))
        time.sleep(WARM_UP)
        every = max(int(saved(workdir)[-1] / WARM_UP * between), 1)
        run.kill(signal.SIGTERM)
    rss, files, steps = [], [], set()
    with ChildRun(scratch, workdir, *flags, str(every)) as run:
        start = max(saved(workdir))
        run.wait_for(lambda: max(saved(workdir)) > start)
        end, number = time.monotonic() + seconds, run.processes[0].pid
        while time.monotonic() < end and run.processes[0].poll() is None:
            status = Path(f"/proc/{number}/status").read_text()
            rss.append(int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) * 1024)
            files.append(len(os.listdir(f"/proc/{number}/fd")))
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
    if not rss:
        return make_fault("a run that saves again and again", [{**seen, "survived": False}])
    settled = rss[min(WARM_UP, len(rss) - 1)]  # memory that a process needs once is taken in its first seconds
    grown = rss[-1] - settled
    seen["survived"] = (
        status == 3
        and grown < 30e6 + BYTES_A_SAVE * len(steps)
        and min(files[-5:]) <= min(files[:5]) + 1
        and len(saved(workdir)) == 2
        and not saving(workdir)
    )
    memory = f"memory {settled / 1e6:.0f} MB, then {rss[-1] / 1e6:.0f}; {min(files[:5])} open files, then {files[-1]}"
    return make_fault(f"{seconds:g} s with {len(steps):,} checkpoints ({memory})", [seen])
