"""The main job on one device, on eight, and in two processes of four: the same curves, the same flips, the same files.

Where devices are simulated, this happens in processes of their own: this one has its devices already.
"""

import json
import os
import random
import shlex
import signal
import socket
import subprocess
import sys
from pathlib import Path

import fit_on_devices
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import supermask_jax as sm
from experiments.config.settings import changed
from experiments.data.load import load
from experiments.mnist import Config
from experiments.run import processes
from experiments.run.errors import UserError
from experiments.run.placement import Placement
from experiments.training.fit import fit

pytestmark = pytest.mark.usefixtures("quick_processes")
ROOT = Path(__file__).parents[2]
SCRIPT = [sys.executable, str(Path(fit_on_devices.__file__))]
COUNTED_LIKE = 1e-5  # relative: sums in another order


def start(*arguments, **environment):
    path = os.pathsep.join(filter(None, [str(ROOT), *sys.path]))
    return subprocess.Popen(
        [*map(str, arguments)], cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": path} | environment,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def ended(running, seconds=240):
    """[(exit status, standard output, standard error)] of each, when all have ended."""
    try:
        told = [process.communicate(timeout=seconds) for process in running]
    finally:
        for process in running:
            process.kill()
    if any("Multiprocess computations aren't implemented on the CPU" in errors for _, errors in told):
        pytest.skip("this jaxlib has no collectives between CPU processes")
    return [(process.returncode, *texts) for process, texts in zip(running, told, strict=True)]


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def curves(folder):
    """What a run found, epoch by epoch and at the end, but for the times: {name: number}."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((folder / "summary.json").read_text())
    told = {}
    for record in [*records, summary]:
        place = f"epoch {record['epoch']}" if "epoch" in record else "end"
        for name, value in record.items():
            if isinstance(value, dict) and name in ("flips", "layers"):
                told |= {f"{place} {name} {layer}": counts for layer, counts in value.items()}
            elif isinstance(value, float) and "seconds" not in name and "per_second" not in name:
                told[f"{place} {name}"] = value
    return told


def assert_same_curves(folder, other):
    got, wanted = curves(folder), curves(other)
    assert got.keys() == wanted.keys() and len(wanted) > 20
    assert any("flips" in name and flips > 0 for name, flips in wanted.items())
    for name, value in wanted.items():
        if isinstance(value, float):
            assert got[name] == pytest.approx(value, rel=COUNTED_LIKE), name
        else:
            assert got[name] == value, name


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    [(status, _, errors)] = ended([start(*SCRIPT, folder)])
    assert status == 0, errors[-3000:]
    return folder


@pytest.fixture(scope="module")
def by_two(tmp_path_factory):
    folder, port = tmp_path_factory.mktemp("by_two"), free_port()
    for status, _, errors in ended([start(*SCRIPT, folder, port, i) for i in range(2)]):
        assert status == 0, errors[-3000:]
    return folder


ON_EIGHT = [(method, name) for method, names in fit_on_devices.RUNS.items() for name in names if name != "one"]
IN_TWO = [(method, name) for method, names in fit_on_devices.BY_TWO.items() for name in names]


@pytest.mark.slow
@pytest.mark.parametrize(("method", "placement"), ON_EIGHT)
def test_eight_devices_find_what_one_finds(runs, method, placement):
    assert_same_curves(runs / f"{method}-{placement}", runs / f"{method}-one")
    summary = json.loads((runs / f"{method}-{placement}" / "summary.json").read_text())
    assert (summary["devices"], summary["processes"]) == (8, 1)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "placement"), IN_TWO)
def test_two_processes_find_what_one_device_finds_and_the_first_writes_it(runs, by_two, method, placement):
    assert_same_curves(by_two / f"{method}-{placement}", runs / f"{method}-one")
    summary = json.loads((by_two / f"{method}-{placement}" / "summary.json").read_text())
    assert (summary["devices"], summary["processes"]) == (8, 2)
    files = {path.name for path in (by_two / f"{method}-{placement}").iterdir()}
    assert files == {path.name for path in (runs / f"{method}-one").iterdir()}


# The commands.


def commands(workdir, *more):
    """The command of each of two processes."""
    run = [sys.executable, "-m", "experiments.mnist", "--model", "mlp", "--width", "16", "--dataset", "mnist-5k"]
    run += ["--workdir", workdir, "--coordinator", f"127.0.0.1:{free_port()}", "--num-processes", "2", *more]
    return [[*run, "--process-id", i] for i in range(2)]


def until(process, text):
    assert any(text in line for line in iter(process.stdout.readline, "")), process.stderr.read()


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_at_one_step_and_one_process_goes_on_from_it(tmp_path):
    running = [start(*command) for command in commands(tmp_path / "run", "--epochs", "400")]
    until(running[0], "epoch   1/")
    running[1].send_signal(signal.SIGTERM)
    told = ended(running, 120)
    assert [status for status, _, _ in told] == [3, 3], told
    step = told[0][2].split("saved at step ")[1].split(" ")[0]
    assert step == told[1][2].split("saved at step ")[1].split(" ")[0] and int(step) >= 63
    assert not any("epoch" in out for _, out, _ in told[1:])  # the first one speaks for all
    goes_on = shlex.split(told[0][2].strip().splitlines()[-1])
    assert goes_on[-2:] == ["--process-id", "0"]
    alone = [part for part in goes_on if part not in ("--process-id", "0")]
    at = alone.index("--coordinator")
    alone = start(sys.executable, *alone[1:at], *alone[at + 4 :])
    until(alone, f"resumed from step {step} of {400 * 63}")
    alone.send_signal(signal.SIGTERM)
    assert ended([alone])[0][0] == 3


@pytest.mark.slow
def test_when_a_process_is_killed_the_other_ends_and_says_so(tmp_path):
    running = [start(*command) for command in commands(tmp_path / "run", "--epochs", "400")]
    until(running[0], "epoch   1/")
    running[1].kill()
    (status, _, errors), _ = ended(running, 90)  # an orderly end would wait for the other one for minutes
    assert status == 1 and "another process has ended" in " ".join(errors.split())


@pytest.mark.slow
def test_what_fails_in_the_first_process_fails_in_all_and_so_do_different_flags(tmp_path):
    (tmp_path / "file").touch()
    told = ended([start(*command) for command in commands(tmp_path / "file" / "run")], 90)
    assert [status for status, _, _ in told] == [1, 1]
    assert "cannot write to the work directory" in told[0][2] and "another process could not begin" in told[1][2]
    one, two = commands(tmp_path / "run")
    told = ended([start(*one), start(*two, "--seed", "1")], 90)
    assert [status for status, _, _ in told] == [1, 1]
    assert all("flags, but for --process-id" in errors and "Traceback" not in errors for _, _, errors in told)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_processes_that_have_other_images_or_see_another_directory_are_told_so(tmp_path):
    dataset = load("mnist-5k")
    for name, order in (("one", slice(None)), ("other", slice(None, None, -1))):
        files = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
        parts = (dataset.train.images, dataset.train.labels, dataset.test.images, dataset.test.labels)
        (tmp_path / name).mkdir()
        for file, part in zip(files, parts, strict=True):
            part = part[order].astype(np.uint8).reshape(len(part), *[28, 28][: 2 * (part.ndim > 1)])
            head = np.array([0x800 + part.ndim, *part.shape], ">u4").tobytes()
            (tmp_path / name / f"{file}-ubyte").write_bytes(head + part.tobytes())
    first, second = commands(tmp_path / "run", "--dataset", "idx", "--epochs", "1")
    told = ended([start(*first, "--data-dir", tmp_path / "one"), start(*second, "--data-dir", tmp_path / "other")], 90)
    assert [status for status, _, _ in told] == [1, 1]
    assert all("the images and their order must be the same" in " ".join(errors.split()) for _, _, errors in told)

    stale = ended([start(*first[: first.index("--coordinator")], "--epochs", "1", "--dataset", "mnist-5k")])
    assert stale[0][0] == 0
    first, second = commands(tmp_path / "fresh", "--epochs", "1")
    second[second.index("--workdir") + 1] = tmp_path / "run"
    told = ended([start(*first), start(*second)], 90)
    assert [status for status, _, _ in told] == [1, 1]
    assert all(
        "must be on a file system that all share, and the same in all" in " ".join(errors.split())
        for _, _, errors in told
    )


@pytest.mark.slow
def test_under_slurm_the_environment_says_who_takes_part(tmp_path):
    run = [sys.executable, "-m", "experiments.mnist", "--model", "mlp", "--width", "16", "--dataset", "mnist-5k"]
    run += ["--epochs", "1", "--coordinator", "auto", "--workdir", tmp_path / "run"]
    job = {"SLURM_JOB_ID": str(random.randrange(10**6)), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
    told = ended([start(*run, **job, SLURM_PROCID=str(i), SLURM_LOCALID=str(i)) for i in range(2)], 120)
    assert [status for status, _, _ in told] == [0, 0], told
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["devices"], summary["processes"]) == (2, 2)
    outside = ended([start(*run)])[0]
    assert outside[0] == 1 and "cannot join the other processes" in outside[2] and "Traceback" not in outside[2]


# One device, in this process.


def test_on_one_device_nothing_is_split_and_the_tree_comes_back():
    placement = Placement()
    tree = {"a": np.arange(6.0, dtype=np.float32).reshape(2, 3), "key": jax.random.key(3), "none": None}
    placed = placement.replicate(tree)
    assert placed["none"] is None and isinstance(placed["a"], jax.Array)
    np.testing.assert_array_equal(placed["a"], tree["a"])
    assert jax.random.key_data(placed["key"]).tolist() == jax.random.key_data(tree["key"]).tolist()
    np.testing.assert_array_equal(placement.split(tree["a"], axis=1), tree["a"])
    assert placement.whole(placed) is placed
    subnet = sm.Subnet({"w": jnp.ones((4, 2))}, {"w": jnp.ones((4, 2))})
    state = sm.TrainState(jnp.int32(0), subnet, None, (), jax.random.key(0))
    assert jax.tree.map(lambda leaf: leaf.sharding, placement.place(state)) == placement.shardings(state)


def test_more_devices_than_there_are_and_batches_that_do_not_divide_are_refused(tmp_path):
    config = changed(Config(), devices=64, workdir=str(tmp_path / "run"), dataset="mnist-5k")
    with pytest.raises(UserError, match=r"--devices 64: asked for 64 devices; there are \d"):
        fit(config, load("mnist-5k"), "mnist")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"devices": -1}, "--devices must be 1 or more"),
        ({"devices": 8, "batch_size": 100}, "--batch-size 100 does not divide over --devices 8"),
        ({"devices": 8, "parallel": "pmap", "shard_scores": True}, "--shard-scores is for --parallel jit"),
        ({"num_processes": 2}, "go with --coordinator"),
        ({"coordinator": "auto", "process_id": 2}, "go with --coordinator ADDRESS:PORT"),
        ({"coordinator": "host"}, "must be auto or ADDRESS:PORT; got host"),
        ({"coordinator": "host:1"}, "needs --num-processes and --process-id"),
        ({"coordinator": "host:1", "num_processes": 2, "process_id": 2}, r"in \[0, --num-processes\): got 2 of 2"),
        ({"coordinator": "host:1", "num_processes": 3, "process_id": 0, "devices": 8}, "does not divide over --num-pr"),
    ],
)
def test_flags_of_several_devices_are_checked_before_anything_starts(settings, says):
    with pytest.raises(UserError, match=says):
        changed(Config(), **settings).check()


def test_alone_a_process_is_the_first_and_asks_nobody():
    assert processes.is_first() and processes.any_of(True) and not processes.any_of(False)
    assert processes.of_first(0.1) == 0.1 and processes.of_first(np.arange(3)).tolist() == [0, 1, 2]
    assert processes.tree_of_first("anything") == "anything"
    processes.require_alike(7, "nothing to compare with: 7")
    assert processes.in_turn(lambda: "result") == "result"
    with pytest.raises(OSError, match="mine"):
        processes.in_turn(lambda: (_ for _ in ()).throw(OSError("mine")))
