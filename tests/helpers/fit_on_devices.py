"""What test_placement.py runs in processes of their own: small runs of the main job on one, eight, and two times four
devices.

    python fit_on_devices.py DIR             every run of RUNS, its files in DIR/<name>
    python fit_on_devices.py DIR PORT ID     those of BY_TWO, as one of two processes
"""

import sys
from pathlib import Path

from experiments.config.run import named
from experiments.config.settings import changed
from experiments.data.load import load
from experiments.mnist import Config, defaults
from experiments.run import processes
from experiments.training.fit import fit

# The images are not shifted: under pmap, each device would draw its own shifts.
SMALL = {"model": "mlp", "width": 16, "epochs": 2, "batch_size": 400, "density": 0.3, "shift": 0, "checkpoint_every": 7}
PLACEMENTS = {
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


def main(folder: Path, port: str | None = None, process_id: str | None = None) -> None:
    place = {"coordinator": f"127.0.0.1:{port}", "num_processes": 2, "process_id": int(process_id)} if port else {}
    processes.join(8, place.get("coordinator"), place.get("num_processes"), place.get("process_id"))
    dataset = load("mnist-5k")
    for method, placements in (BY_TWO if port else RUNS).items():
        for name in placements:
            settings = {**defaults("best", method), **SMALL, **PLACEMENTS[name], "assess": method == "rigl", **place}
            # Alternate flips are the same everywhere. Bernoulli's small network has images with equal logits then.
            settings["flip_alternately"] = method != "bernoulli"
            config = changed(Config(), **settings, workdir=str(folder / f"{method}-{name}"))
            fit(named(config, dataset.name), dataset, "mnist", single=False)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
