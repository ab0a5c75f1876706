"""A run to do harm to: the real command in its own process, what it says and saves, and what it leaves in the end."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np

from experiments.run.workdir import CHANGE_NO_RESULT

ROOT = Path(__file__).parents[2]
SMALL = ("--model", "mlp", "--width", "16", "--dataset", "mnist-5k")
EPOCHS = 4
EVERY = 25  # steps between checkpoints: saving and training take about as long
NEVER = 10**6  # steps between checkpoints of a run that takes fewer: it saves at its end
TIMES = {"train_seconds", "images_per_second", "compile_seconds"}
PATIENCE = 240  # seconds


class Failed(Exception):
    """A run that did not come to where it should be harmed."""


class Run:
    """`python -m experiments.mnist` in a process; its output goes to a file beside its work directory.

    `prefix`: a command to run it under. Compiled programs are kept in `scratch` for the next one: that is most of the
    time of a start. On the CPU, whatever there is: a first process would keep an accelerator's memory to itself.
    """

    def __init__(self, scratch: Path, workdir: Path, *flags: str, prefix: tuple[str, ...] = ()):
        self.workdir, self.log = workdir, scratch / f"{workdir.name}.log"
        environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(scratch / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        command = [*prefix, sys.executable, "-m", "experiments.mnist", *SMALL, *flags, "--workdir", str(workdir)]
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.kill()

    def said(self) -> str:
        """All it has written, without the breaks of lines."""
        return " ".join(self.log.read_text(errors="replace").split())

    def resumed(self) -> int | None:
        """The step it says that it resumed from."""
        found = re.search(r"resumed from step (\d+)", self.said())
        return int(found[1]) if found else None

    def wait_for(self, condition: Callable[[], object]) -> None:
        """Raises Failed if the process ends before the condition is true."""
        end = time.monotonic() + PATIENCE
        while not condition():
            if self.process.poll() is not None or time.monotonic() > end:
                raise Failed(f"ended too early, with status {self.process.poll()}: {self.said()[-1000:]}")
            time.sleep(0.002)

    def goes(self) -> "Run":
        """Waits until it has resumed, or begun."""
        self.wait_for(lambda: "resumed from" in self.said() or "epoch 0/" in self.said())
        return self

    def ended(self) -> int:
        """Waits for its end; its exit status."""
        return self.process.wait(timeout=PATIENCE)

    def kill(self, number: int = signal.SIGKILL) -> int:
        """Sends a signal and waits for the end; the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.ended()


def saved(workdir: Path) -> list[int]:
    """The steps of the checkpoints, lowest first."""
    with contextlib.suppress(FileNotFoundError):
        return sorted(int(name) for name in os.listdir(workdir / "checkpoints") if name.isdigit())
    return []


def saving(workdir: Path) -> bool:
    """Whether a save is under way, or was when the process died."""
    with contextlib.suppress(FileNotFoundError):
        return any("tmp" in name for name in os.listdir(workdir / "checkpoints"))
    return False


def checkpoint(workdir: Path, step: int) -> dict[str, np.ndarray]:
    """{path: array} of a checkpoint, without the time that training took."""
    from jax import dtypes, numpy, random, tree_util
    from orbax.checkpoint import v1 as ocp

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no layout is given: the file's own is what is wanted
        tree = ocp.load(workdir / "checkpoints" / str(step))
    leaves, _ = tree_util.tree_flatten_with_path({name: part for name, part in tree.items() if name != "seconds"})
    return {
        tree_util.keystr(path): np.asarray(
            random.key_data(leaf) if numpy.issubdtype(leaf.dtype, dtypes.prng_key) else leaf
        )
        for path, leaf in leaves
    }


def results(workdir: Path) -> dict:
    """All that a finished run leaves but times and what has no part in the result. Pictures: bytes; arrays: NumPy."""

    def lasting(value: dict) -> dict:
        return {k: v for k, v in value.items() if k not in TIMES and k not in CHANGE_NO_RESULT}

    summary = json.loads((workdir / "summary.json").read_text())
    return {
        "config": lasting(json.loads((workdir / "config.json").read_text())),
        "records": [lasting(json.loads(line)) for line in (workdir / "metrics.jsonl").read_text().splitlines()],
        "summary": {**lasting(summary), "config": lasting(summary["config"])},
        "step": saved(workdir)[-1],
        "arrays": checkpoint(workdir, saved(workdir)[-1]),
        "pictures": {file.name: file.read_bytes() for file in sorted(workdir.glob("*.png"))},
    }


def differences(got: dict, expected: dict) -> list[str]:
    """What differs between the `results` of two runs: names, of the arrays those whose bits differ. `curves.png` shows
    speed, and is left out."""
    names = [name for name in ("config", "records", "summary", "step") if got[name] != expected[name]]
    for kind in ("arrays", "pictures"):
        for name in sorted({*got[kind], *expected[kind]} - {"curves.png"}):
            one, other = got[kind].get(name), expected[kind].get(name)
            if not _same_bits(one, other):
                names.append(name)
    return names


def _same_bits(one, other) -> bool:
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        return (one.shape, one.dtype, one.tobytes()) == (other.shape, other.dtype, other.tobytes())
    return type(one) is type(other) and one == other


def finished(scratch: Path, workdir: Path, *flags: str) -> Run:
    """A run, ended."""
    with Run(scratch, workdir, *flags) as run:
        run.ended()
    return run


def whole(scratch: Path, epochs: int = EPOCHS) -> dict:
    """The results of a run that nothing happens to; made once in `scratch`."""
    workdir = scratch / f"whole-{epochs}"
    if not (workdir / "summary.json").exists():
        run = finished(scratch, workdir, "--epochs", str(epochs), "--checkpoint-every", str(NEVER))
        if run.ended():
            raise Failed(run.said()[-1000:])
    return results(workdir)


def begun(scratch: Path) -> Path:
    """The directory of a run that was killed when it had two checkpoints; made once in `scratch`."""
    workdir = scratch / "begun"
    if not workdir.exists():
        with Run(scratch, workdir, "--epochs", str(EPOCHS), "--checkpoint-every", str(EVERY)) as run:
            run.wait_for(lambda: len(saved(workdir)) >= 2)
    return workdir
