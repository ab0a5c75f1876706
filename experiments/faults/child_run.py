"""Real training runs in child processes, to do harm to: their output, their checkpoints, their results at the end."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jax import ShapeDtypeStruct, devices, dtypes, random, sharding, tree_util
from orbax.checkpoint import v1 as ocp

from experiments.run.names import CHANGE_NO_RESULT

ROOT = Path(__file__).parents[2]
NEVER = 10**6  # steps between checkpoints of a run that takes fewer: it saves at its end
TIMES = {"train_seconds", "images_per_second", "compile_seconds", "date"}
PATIENCE = 240  # seconds


class Job(NamedTuple):
    """A small run of a command."""

    name: str
    command: str
    flags: tuple[str, ...]
    epochs: int  # of a run that is harmed once
    long: int  # epochs of a run that is harmed again and again
    every: int  # steps between checkpoints: saving and training take about as long
    processes: int = 1

    @property
    def of_two(self) -> "Job":
        """The same on two devices, each in a process of its own."""
        return self._replace(name=f"{self.name}-of-two", flags=(*self.flags, "--devices", "2"), processes=2)


MNIST = Job("mnist", "experiments.mnist", ("--model", "mlp", "--width", "16", "--dataset", "mnist-5k"), 4, 60, 25)
SMALL_VGG = ("--train-images", "400", "--model", "vgg-11", "--widen", "0.0625", "--batch-size", "50")  # has BatchNorm
CIFAR = Job("cifar", "experiments.cifar", ("--dataset", "colour-digits", *SMALL_VGG), 3, 30, 6)
CIFAR_10 = CIFAR._replace(name="cifar10", flags=("--dataset", "cifar10", *SMALL_VGG))  # for those who have it


class Failed(Exception):
    """A run that did not reach the point where it should be harmed."""


ON_CPU = {"JAX_PLATFORMS": "cpu"}  # of the environment: one process would take an accelerator's memory from the next


class ChildRun:
    """A command of the experiments in processes of its own. As a context manager it kills them at its end.

    The run computes on the CPU. Compiled programs, most of a start's time, are kept in `scratch` for the next run.

    Args:
      scratch: a directory for the output, which is named like the work directory.
      workdir: of the run.
      flags: more flags.
      job: what is run.
      prefix: a command to run it under.
      variables: more environment variables.
      more: of `subprocess.Popen`.
    """

    def __init__(
        self,
        scratch: Path,
        workdir: Path,
        *flags: str,
        job: Job = MNIST,
        prefix: tuple[str, ...] = (),
        variables: Mapping[str, str] | None = None,
        **more,
    ):
        self.workdir = workdir
        self._logs = [scratch / f"{workdir.name}.{number}.log" for number in range(job.processes)]
        environment = {
            **os.environ,
            **ON_CPU,
            "JAX_COMPILATION_CACHE_DIR": str(scratch / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            **(variables or {}),
        }
        command = [*prefix, sys.executable, "-m", job.command, *job.flags, *flags, "--workdir", str(workdir)]
        if job.processes > 1:
            command += ["--coordinator", f"127.0.0.1:{_free_port()}", "--num-processes", str(job.processes)]
        self.processes = []
        for number, log in enumerate(self._logs):
            own = ["--process-id", str(number)] if job.processes > 1 else []
            with open(log, "w") as stream:
                process = subprocess.Popen(
                    [*command, *own], cwd=ROOT, env=environment, stdout=stream, stderr=stream, **more
                )
            self.processes.append(process)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.kill()

    def output(self) -> str:
        """All that its processes have printed, with a space for every line break."""
        return " ".join(word for log in self._logs for word in log.read_text(errors="replace").split())

    def resumed(self) -> int | None:
        """The step that it printed it resumed from."""
        match = re.search(r"resumed from step (\d+)", self.output())
        return int(match[1]) if match else None

    def wait_for(self, condition: Callable[[], object], patience: float = PATIENCE) -> None:
        """Waits until the condition is true. Raises Failed if a process ends first."""
        end = time.monotonic() + patience
        while not condition():
            ended = [status for process in self.processes if (status := process.poll()) is not None]
            if ended or time.monotonic() > end:
                raise Failed(f"ended too early, with status {ended}: {self.output()[-1000:]}")
            time.sleep(0.002)

    def wait_for_training(self) -> None:
        """Waits until it has resumed, or begun. Raises Failed if a process ends first."""
        self.wait_for(lambda: "resumed from" in self.output() or "epoch 0/" in self.output())

    def ended(self, patience: float = PATIENCE) -> int:
        """Waits until all processes end; returns the exit status of the first."""
        end = time.monotonic() + patience
        for process in self.processes:
            process.wait(timeout=max(end - time.monotonic(), 0.1))
        return self.processes[0].returncode

    def statuses(self) -> list[int | None]:
        """The exit status of each process; None of one that is alive."""
        return [process.poll() for process in self.processes]

    def kill(self, number: int = signal.SIGKILL, only: int | None = None) -> int:
        """Sends a signal to all processes, or to one, and waits until all end; returns the first one's exit status."""
        for at, process in enumerate(self.processes):
            if process.poll() is None and only in (None, at):
                process.send_signal(number)
        return self.ended()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def finished(scratch: Path, workdir: Path, *flags: str, **more) -> ChildRun:
    """A run whose processes have ended; arguments as in `ChildRun`."""
    with ChildRun(scratch, workdir, *flags, **more) as run:
        run.ended()
    return run


def undisturbed(scratch: Path, epochs: int | None = None, job: Job = MNIST) -> dict:
    """The results of a run that no harm is done to, of so many epochs. It is made once in `scratch`."""
    epochs = epochs or job.epochs
    workdir = scratch / f"undisturbed-{job.name}-{epochs}"
    if not (workdir / "summary.json").exists():
        run = finished(scratch, workdir, "--epochs", str(epochs), "--checkpoint-every", str(NEVER), job=job)
        if run.ended():
            raise Failed(run.output()[-1000:])
    return results(workdir)


def begun(scratch: Path) -> Path:
    """The directory of a run on MNIST that was killed when it had two checkpoints. It is made once in `scratch`."""
    workdir = scratch / "begun"
    if not workdir.exists():
        with ChildRun(scratch, workdir, "--epochs", str(MNIST.epochs), "--checkpoint-every", str(MNIST.every)) as run:
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
    return Fault(name, len(details), sum(bool(seen["survived"]) for seen in details), details)


def resumed_to_the_end(scratch: Path, workdir: Path, expected: dict, *flags: str, job: Job = MNIST, **more) -> dict:
    """Gives the same command again, without any harm: where it resumed, how it ended, and what differs."""
    run = finished(scratch, workdir, "--epochs", str(expected["summary"]["epochs"]), *flags, job=job, **more)
    seen = {"resumed": run.resumed(), "status": run.ended(), "output": run.output()}
    return seen | {"differs": differences(results(workdir), expected) if seen["status"] == 0 else ["unfinished"]}


def is_an_error(output: str) -> bool:
    """Whether a run printed one of our errors, and no traceback."""
    return "error: " in output and "Traceback" not in output


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
    here, path = sharding.SingleDeviceSharding(devices("cpu")[0]), workdir / "checkpoints" / str(step)
    layout = tree_util.tree_map(
        lambda leaf: ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), ocp.metadata(path).metadata
    )
    tree = ocp.load(path, layout)
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
