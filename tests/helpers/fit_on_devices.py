"""What test_layout.py runs in processes of their own: small runs of the main job on one, eight, and two times four
devices.

    python fit_on_devices.py DIR             every run of RUNS, its files in DIR/<name>
    python fit_on_devices.py DIR PORT ID     those of BY_TWO, as one of two processes
"""

import sys
from pathlib import Path

from experiments.data import load as data
from experiments.mnist import Config, defaults, settled
from experiments.run import processes
from experiments.training import fit as runner

# The images are not shifted: under pmap, each device would draw its own shifts.
SMALL = {"model": "mlp", "width": 16, "epochs": 2, "batch_size": 400, "density": 0.3, "shift": 0, "checkpoint_every": 7}
ROADS = {
    "one": {},
    "jit": {"devices": 8},
    "sharded": {"devices": 8, "shard_scores": True},
    "pmap": {"devices": 8, "parallel": "pmap"},
}
RUNS = {
    "edge-popup": ("one", "jit", "sharded", "pmap"),
    "bernoulli": ("one", "sharded"),
    "rigl": ("one", "sharded"),
}
BY_TWO = {"edge-popup": ("sharded", "pmap"), "bernoulli": ("sharded",), "rigl": ("sharded",)}


def main(folder, port=None, process_id=None):
    place = {"coordinator": f"127.0.0.1:{port}", "num_processes": 2, "process_id": int(process_id)} if port else {}
    processes.join(Config(devices=8, **place))
    for method, roads in (BY_TWO if port else RUNS).items():
        for road in roads:
            settings = {**defaults("best", method), **SMALL, **ROADS[road], "judge": method == "rigl", **place}
            config = settled(Config(**settings, workdir=str(folder / f"{method}-{road}")), "mnist-5k")
            runner.fit(config, data.load("mnist-5k"), "mnist", alone=False)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
