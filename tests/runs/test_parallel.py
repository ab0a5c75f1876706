"""One train step on one device, on a mesh, under pmap and in two processes: the same losses and the same masks."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import on_devices
import pytest

from supermask_jax import parallel

pytestmark = pytest.mark.usefixtures("quick_processes")
CASES = [name for name in vars(on_devices) if name.startswith("case_")]


def start(devices, *arguments):
    """A Python process of on_devices.py with that many CPU devices: this one has its devices already."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {os.environ['XLA_FLAGS']}",
        "JAX_ENABLE_COMPILATION_CACHE": "false",  # compilations are counted
        "PJRT_NPROC": "32",  # with a thread per core, eight devices on few cores can wait for each other forever
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    return subprocess.Popen(
        [sys.executable, str(Path(on_devices.__file__)), *map(str, arguments)],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def results_of(processes):
    """What each printed last, from JSON; all have ended when this returns."""
    try:
        outputs = [process.communicate(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, errors) in zip(processes, outputs, strict=True):
        if "Multiprocess computations aren't implemented on the CPU" in errors:
            pytest.skip("this jaxlib has no collectives between CPU processes")
        assert process.returncode == 0, errors[-3000:]
    return [json.loads(printed.splitlines()[-1]) for printed, _ in outputs]


@pytest.fixture(scope="module")
def eight():
    return results_of([start(8, "eight")])[0]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_on_eight_devices(eight, case):
    assert eight[case] is None, eight[case]


@pytest.mark.slow
def test_two_processes_with_a_share_of_the_batch_each_give_the_losses_and_masks_of_one_device(eight):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    both = results_of([start(4, "process", port, process_id) for process_id in range(2)])
    for results in both:
        assert results == {"mesh": eight["toy"], "pmap": eight["toy"]}


def test_a_weighted_mean_over_parts_is_that_of_the_whole_only_with_the_axis_name():
    values = jnp.array([[1.0, 2.0], [3.0, 7.0]])
    weights = jnp.array([[1.0, 1.0], [1.0, 0.0]])

    def over(axis_name):
        def part(v, w):
            gradient = jax.grad(parallel.weighted_mean)(v, w, axis_name)
            return jax.lax.pmean(parallel.weighted_mean(v, w, axis_name), "parts"), gradient / 2

        return jax.vmap(part, axis_name="parts")(values, weights)

    assert parallel.weighted_mean(values, weights) == 2
    mean, gradient = over("parts")
    assert mean.tolist() == [2, 2]
    np.testing.assert_allclose(gradient, weights / 3)
    assert over(None)[0].tolist() == [2.25, 2.25]


def test_initialize_passes_on_all_or_nothing(monkeypatch):
    called = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *arguments: called.append(arguments))
    parallel.initialize()
    parallel.initialize("host:1234", 2, 0)
    assert called == [(None, None, None), ("host:1234", 2, 0)]
    for some in (("host:1234", None, None), (None, 2, 0), ("host:1234", 2, None)):
        with pytest.raises(ValueError, match="or none of them"):
            parallel.initialize(*some)
    for process_id in (-1, 2):
        with pytest.raises(ValueError, match=rf"\[0, processes\): got {process_id} of 2"):
            parallel.initialize("host:1234", 2, process_id)
