"""What several devices cost a train step: collectives and bytes of the compiled step, passes, steps per second.

`python -m experiments.benchmark --scaling` measures and prints; `tables` puts the figures into docs/scaling.md.
The devices are fake: parts of one CPU, in a process that is started with so many. The compiler's partitioner decides
what they exchange, as on real devices; their speed shows only overhead.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable

import numpy as np

from experiments.bench.rows import row
from experiments.bench.scaling_step import LAYOUTS, SPEED_NET, passes, speed, traffic

DEVICES = (1, 2, 4, 8)
SPEED_BATCH = 64  # images in all, however many devices
TRAFFIC_DEVICES, TRAFFIC_BATCH = 8, 256
TRAFFIC_NETS = ("mnist-convnet", "mlp", "resnet-50")
PASSES_NETS = (*TRAFFIC_NETS, "wide-resnet-50")
# Barely optimized: compiling is what takes the time where nothing is run. The collectives are the same.
QUICK = "--xla_backend_optimization_level=0"
CHILD_SECONDS = 1800


def in_child(devices: int, task: Callable, calls: Iterable[tuple], flags: str = "") -> list:
    """[task(*arguments) for arguments in calls], computed in a new process with so many fake devices.

    Args:
      devices: how many.
      task: a function at the top of a room.
      calls: its arguments, which travel as JSON.
      flags: more XLA flags for the process.

    Raises:
      RuntimeError: the process failed, or took longer than `CHILD_SECONDS`; the end of what it printed is in the
        message.
    """
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {flags}",
        "PJRT_NPROC": "32",  # with a thread per core, many devices on few cores can wait for each other forever
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    code = f"import json, sys; from {task.__module__} import {task.__name__} as task"
    code += "; print(json.dumps([task(*arguments) for arguments in json.loads(sys.argv[1])]))"
    command = [sys.executable, "-c", code, json.dumps(list(calls))]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=CHILD_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"{task.__name__} on {devices} fake devices took over {CHILD_SECONDS} seconds") from error
    if done.returncode:
        raise RuntimeError(f"{task.__name__} on {devices} fake devices failed: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(
    rounds: int,
    nets: tuple[str, ...] = TRAFFIC_NETS,
    passes_nets: tuple[str, ...] = PASSES_NETS,
    devices: tuple[int, ...] = DEVICES,
    batch: int = TRAFFIC_BATCH,
) -> dict:
    """{"traffic": of each network and layout, "passes": {network: {kind: n}}, "speed": of each number of devices}."""
    cases = [(net, *case) for net in nets for case in (*((of, batch) for of in LAYOUTS), ("gathered", batch, False))]
    return {
        "traffic": in_child(TRAFFIC_DEVICES, traffic, cases, QUICK),
        "passes": dict(zip(passes_nets, in_child(1, passes, [(net,) for net in passes_nets]), strict=True)),
        "speed": in_child(max(devices), speed, [(devices, SPEED_BATCH, rounds)])[0],
    }


def rows(measured: dict) -> list[dict]:
    """The rows of the benchmark's table, from what `measure` returns."""
    lines = []
    for n, seconds in measured["speed"].items():
        group = f"{SPEED_NET}, batch {SPEED_BATCH} in all, {n} fake device{'s' * (n != '1')}"
        for layout in (*LAYOUTS, "pmap"):
            lines.append(row(group, layout, "steps/s", 1 / np.array(seconds[layout])))
        for layout in LAYOUTS[:2]:
            share = np.array(seconds[f"selection, {layout}"]) / np.array(seconds[layout])
            lines.append(row(group, f"selection's share, {layout}", "%", 100 * share))
    for one in measured["traffic"]:
        group = f"bytes per step, {one['network']}, {one['devices']} devices"
        name = one["layout"] + ("" if one["as_on_accelerators"] else ", counting as CPUs do")
        bytes_, most = totals(one), max(measured["passes"][one["network"]].values())
        lines += [
            row(group, name, "MB", bytes_["others"] / 1e6),
            row(group, "... selection, a pass", "bytes", bytes_["a pass"]),
            row(group, f"... selection, {most} passes", "kB", (bytes_["once"] + most * bytes_["a pass"]) / 1e3),
        ]
    for net, of in measured["passes"].items():
        lines += [row(f"passes of selection, {net}", kind, "passes", n) for kind, n in of.items()]
    return lines


def totals(one: dict) -> dict[str, int]:
    """Bytes of the results of a step's collectives, per device: "others", and of selection "once" and "a pass".

    "once" is for two searches: a second one follows among equal scores at the cut. "a pass" costs the same in both.
    """
    sums = {part: sum(kinds.values()) for part, kinds in one["parts"].items()}
    return {
        "others": sum(size for part, size in sums.items() if "selection" not in part),
        "once": 2 * sums.get("selection, a search", 0),
        "a pass": sums.get("selection, a pass", 0),
    }
