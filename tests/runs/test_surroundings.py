"""What surrounds a run: variables, limits and memory that it cannot work with are one paragraph, before it trains."""

import os
import platform
import resource
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.run import surroundings
from experiments.run.command_line import run
from experiments.run.errors import UserError
from experiments.run.interrupt import Interrupted
from experiments.run.placement import Placement
from experiments.training.stepper import memory_of

SMALL = ["--dataset", "mnist-5k", "--train-images", "100", "--epochs", "1", "--model", "mlp", "--width", "8"]


def mnist(tmp_path, **variables):
    command = [sys.executable, "-m", "experiments.mnist", *SMALL, "--workdir", str(tmp_path / "run")]
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, timeout=120)
    assert "Traceback" not in done.stderr
    return done.returncode, " ".join(done.stderr.split())


@pytest.mark.slow
@pytest.mark.parametrize(
    "variables, says",
    (
        ({"JAX_PLATFORMS": "nonsense"}, "JAX_PLATFORMS=nonsense asks for devices that JAX does not find here"),
        ({"JAX_PLATFORMS": "cuda"}, "JAX_PLATFORMS=cuda asks for devices that JAX does not find here"),
        ({"JAX_DISABLE_JIT": "1"}, "JAX_DISABLE_JIT is set, and the commands compile their steps: unset it"),
    ),
)
def test_a_variable_that_no_run_can_work_with_is_named(tmp_path, variables, says):
    if variables.get("JAX_PLATFORMS") == "cuda" and any(device.platform == "gpu" for device in jax.devices()):
        pytest.skip("there is a GPU")
    status, err = mnist(tmp_path, **variables)
    assert status == 1 and err.startswith("error: " + says), err


def test_a_flag_of_xla_that_sets_the_number_of_devices_is_named(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=3")
    there = jax.device_count()
    with pytest.raises(
        UserError, match=f"there are {there}, .* XLA_FLAGS has --xla_force_host_platform_device_count=3"
    ):
        Placement(there + 1)


def test_few_open_files_are_raised_where_that_is_allowed_and_an_error_where_it_is_not(monkeypatch):
    set_to = []
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: set_to.append(limits))
    monkeypatch.setattr(resource, "getrlimit", lambda _: (40, 5000))
    surroundings.require_usable()
    monkeypatch.setattr(resource, "getrlimit", lambda _: (2048, resource.RLIM_INFINITY))
    surroundings.require_usable()
    assert set_to == [(1024, 5000)]
    monkeypatch.setattr(resource, "getrlimit", lambda _: (24, 24))
    with pytest.raises(UserError, match=r"only 24 files .* raise the limit \(ulimit -n\)"):
        surroundings.require_usable()


@pytest.mark.parametrize("version", surroundings.GROUP_VERSIONS)
def test_what_a_container_or_a_job_may_still_take_bounds_the_free_memory(version, tmp_path, monkeypatch):
    names = {"MEMORY": "meminfo", "GROUP": "cgroup", "GROUPS": "groups"}
    for constant, name in names.items():
        monkeypatch.setattr(surroundings, constant, tmp_path / name)
    (tmp_path / "meminfo").write_text("MemAvailable: 1000 kB\nSwapFree: 500 kB\n")
    (tmp_path / "cgroup").write_text(f"3:pids:/\n7:{version.kind}:/jobs/one\n")
    assert surroundings.free_memory(swap=True) == 1500 * 1024  # no such groups are mounted
    jobs = tmp_path / "groups" / version.folder / "jobs"
    (jobs / "one").mkdir(parents=True)
    for group, limit, used in ((jobs, 900_000, 500_000), (jobs / "one", 600_000, 450_000)):
        (group / version.limit).write_text(f"{limit}\n")
        (group / version.used).write_text(f"{used}\n")
        cached = f"{version.cached}inactive_file 20000\n{version.cached}active_file 3000\n"
        (group / "memory.stat").write_text(f"anon 7\n{cached}")
    assert surroundings.free_memory(swap=True) == 600_000 - 450_000 + 23_000
    (jobs / "one" / version.limit).write_text("max\n")
    assert surroundings.free_memory(swap=False) == 900_000 - 500_000 + 23_000


FAULTS = """
import resource
import jax
from experiments.run import command_line
if {keeps}:
    command_line._keep_freed_memory()
step = jax.jit(lambda x: jax.numpy.cos(x @ x.T) @ x, donate_argnums=0)  # the square has 64 MB
x = jax.numpy.ones((4096, 64))
for _ in range(20):  # the heap grows for a while
    x = jax.block_until_ready(step(x))
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    x = jax.block_until_ready(step(x))
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is glibc that is asked to keep freed memory")
def test_a_command_keeps_the_memory_of_a_step_for_the_next():
    """XLA allocates in its own threads, whose heaps give large blocks back: a page fault for each 4 kB of a step."""

    def faults(keeps):
        variables = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
        variables["JAX_PLATFORMS"] = "cpu"
        code = FAULTS.format(keeps=keeps)
        done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return int(done.stdout)

    assert 3 * faults(keeps=True) < faults(keeps=False)


@pytest.mark.parametrize("error", (MemoryError("Unable to allocate 3 GiB"), RuntimeError("RESOURCE_EXHAUSTED: x\ny")))
def test_memory_that_does_not_suffice_is_one_paragraph_and_other_failures_keep_their_traceback(capsys, error):
    def fail(raised):
        raise raised

    with pytest.raises(SystemExit) as ended:
        run(fail, lambda *_: error, "python -m experiments.mnist", [])
    err = " ".join(capsys.readouterr().err.split())
    assert ended.value.code == 1 and err.startswith("error: the memory does not suffice (") and " y" not in err
    with pytest.raises(RuntimeError, match="something else"):
        run(fail, lambda *_: RuntimeError("something else"), "python -m experiments.mnist", [])


def test_the_command_that_resumes_does_not_restart(capsys):
    def stopped(_):
        raise Interrupted("stopped by a signal.")

    with pytest.raises(SystemExit) as ended:
        run(stopped, lambda *_: None, "python -m experiments.mnist", ["--restart", "--seed", "3"])
    err = capsys.readouterr().err
    assert ended.value.code == 3 and err.endswith("-m experiments.mnist --seed 3\n")


def test_a_step_that_needs_more_memory_than_is_free_is_refused_before_it_runs(tmp_path, monkeypatch):
    device = jax.devices("cpu")[0]
    compiled = jax.jit(lambda x: jnp.sort(x)[::-1].cumsum()).lower(np.ones(10_000, np.float32)).compile()
    needed = memory_of(compiled)
    assert 40_000 <= needed < 1_000_000
    monkeypatch.setattr(surroundings, "MEMORY", tmp_path / "meminfo")
    surroundings.require_memory(10**15, device)  # nothing tells
    for free, refused in ((10**6, False), (20, True)):
        (tmp_path / "meminfo").write_text(f"MemTotal: 9 kB\nMemAvailable:   {free} kB\nSwapFree: 3 kB\n")
        assert [surroundings.free_memory(swap) for swap in (False, True)] == [1024 * free, 1024 * (free + 3)]
        if refused:
            with pytest.raises(UserError, match=r"a training step needs 0\.0 GB .* a smaller --batch-size"):
                surroundings.require_memory(needed, device)
        else:
            surroundings.require_memory(needed, device)
