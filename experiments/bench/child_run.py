"""A real training run in a child process, to do harm to: its output, its checkpoints, and its results at the end."""

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
from typing import NamedTuple

import numpy as np
from jax import dtypes, random, tree_util
from orbax.checkpoint import v1 as ocp

from experiments.run.names import CHANGE_NO_RESULT

ROOT = Path(__file__).parents[2]
SMALL = ("--model", "mlp", "--width", "16", "--dataset", "mnist-5k")
EPOCHS = 4
EVERY = 25  # steps between checkpoints: saving and training take about as long
NEVER = 10**6  # steps between checkpoints of a run that takes fewer: it saves at its end
TIMES = {"train_seconds", "images_per_second", "compile_seconds"}
PATIENCE = 240  # seconds


class Failed(Exception):
    """A run that did not reach the point where it should be harmed."""


class ChildRun:
    """`python -m experiments.mnist` in a process. As a context manager it kills the process at its end.

    The run computes on the CPU, because one process would take an accelerator's memory from the next. Compiled programs
    are kept in `scratch` for the next run: compiling is most of a start's time.

    Args:
      scratch: a directory for the output, which is named like the work directory.
      workdir: of the run.
      flags: more flags.
      prefix: a command to run it under.
    """

    def __init__(self, scratch: Path, workdir: Path, *flags: str, prefix: tuple[str, ...] = ()):
        self.workdir, self._log = workdir, scratch / f"{workdir.name}.log"
        environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(scratch / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        command = [*prefix, sys.executable, "-m", "experiments.mnist", *SMALL, *flags, "--workdir", str(workdir)]
        with open(self._log, "w") as log:
            self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.kill()

    def output(self) -> str:
        """All that it has printed, with a space for every line break."""
        return " ".join(self._log.read_text(errors="replace").split())

    def resumed(self) -> int | None:
        """The step that it printed it resumed from."""
        match = re.search(r"resumed from step (\d+)", self.output())
        return int(match[1]) if match else None

    def wait_for(self, condition: Callable[[], object]) -> None:
        """Waits until the condition is true. Raises Failed if the process ends first."""
        end = time.monotonic() + PATIENCE
        while not condition():
            if self.process.poll() is not None or time.monotonic() > end:
                raise Failed(f"ended too early, with status {self.process.poll()}: {self.output()[-1000:]}")
            time.sleep(0.002)

    def wait_for_training(self) -> None:
        """Waits until it has resumed, or begun. Raises Failed if the process ends first."""
        self.wait_for(lambda: "resumed from" in self.output() or "epoch 0/" in self.output())

    def ended(self) -> int:
        """Waits until the process ends; returns its exit status."""
        return self.process.wait(timeout=PATIENCE)

    def kill(self, number: int = signal.SIGKILL) -> int:
        """Sends a signal and waits until the process ends; returns its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.ended()


def finished(scratch: Path, workdir: Path, *flags: str) -> ChildRun:
    """A run whose process has ended; arguments as in `ChildRun`."""
    with ChildRun(scratch, workdir, *flags) as run:
        run.ended()
    return run


def undisturbed(scratch: Path, epochs: int = EPOCHS) -> dict:
    """The results of a run that no harm is done to. It is made once in `scratch`."""
    workdir = scratch / f"undisturbed-{epochs}"
    if not (workdir / "summary.json").exists():
        run = finished(scratch, workdir, "--epochs", str(epochs), "--checkpoint-every", str(NEVER))
        if run.ended():
            raise Failed(run.output()[-1000:])
    return results(workdir)


def begun(scratch: Path) -> Path:
    """The directory of a run that was killed when it had two checkpoints. It is made once in `scratch`."""
    workdir = scratch / "begun"
    if not workdir.exists():
        with ChildRun(scratch, workdir, "--epochs", str(EPOCHS), "--checkpoint-every", str(EVERY)) as run:
            run.wait_for(lambda: len(saved(workdir)) >= 2)
    return workdir


class Fault(NamedTuple):
    """How many of the harmed runs survived."""

    fault: str
    tries: int
    survived: int
    details: list[dict]  # of each try


def make_fault(name: str, details: list[dict]) -> Fault:
    """The fault of that name; each of its details says whether the run "survived"."""
    return Fault(name, len(details), sum(seen["survived"] for seen in details), details)


def resumed_to_the_end(scratch: Path, workdir: Path, expected: dict, *flags: str) -> dict:
    """Gives the same command again, without any harm: where it resumed, how it ended, and what differs."""
    run = finished(scratch, workdir, "--epochs", str(expected["summary"]["epochs"]), *flags)
    seen = {"resumed": run.resumed(), "status": run.ended(), "output": run.output()}
    return seen | {"differs": differences(results(workdir), expected) if seen["status"] == 0 else ["unfinished"]}


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
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no layout is given: the file's own is what is wanted
        tree = ocp.load(workdir / "checkpoints" / str(step))
    leaves, _ = tree_util.tree_flatten_with_path({name: part for name, part in tree.items() if name != "seconds"})
    return {
        tree_util.keystr(path): np.asarray(
            random.key_data(leaf) if dtypes.issubdtype(leaf.dtype, dtypes.prng_key) else leaf
        )
        for path, leaf in leaves
    }


def results(workdir: Path) -> dict:
    """All that a finished run leaves, without times and without settings that change no result.

    Pictures are bytes, and arrays are NumPy's.
    """

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
    """The names of what differs between the `results` of two runs; of arrays and pictures, those whose bits differ."""
    names = [name for name in ("config", "records", "summary", "step") if got[name] != expected[name]]
    for kind in ("arrays", "pictures"):
        for name in sorted({*got[kind], *expected[kind]}):
            one, other = got[kind].get(name), expected[kind].get(name)
            if not _same_bits(one, other):
                names.append(name)
    return names


def _same_bits(one, other) -> bool:
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        return (one.shape, one.dtype, one.tobytes()) == (other.shape, other.dtype, other.tobytes())
    return type(one) is type(other) and one == other
