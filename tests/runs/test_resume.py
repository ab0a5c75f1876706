"""A finished run is not begun again, and a stopped one is resumed bit-identical; kills are in test_faults.py.

Methods whose masks change between steps are stopped between two changes, and at one, in this process.
"""

import functools
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp
from signals import stopped_once_training

from experiments.config.run import named
from experiments.config.settings import changed
from experiments.data.load import load
from experiments.mnist import Config, defaults
from experiments.run.checkpoints import Checkpoints
from experiments.run.interrupt import Interrupted
from experiments.training import fit as fitting

pytestmark = pytest.mark.usefixtures("quick_processes")
ROOT = Path(__file__).parents[2]
TIMES = ("train_seconds", "images_per_second")


def command(workdir, *flags):
    run = [sys.executable, "-m", "experiments.mnist", "--model", "lenet-300-100", "--dataset", "mnist-5k"]
    return [*run, "--epochs", "8", "--density", "0.3", "--workdir", str(workdir), *flags]


def run(workdir, *flags):
    return subprocess.run(command(workdir, *flags), cwd=ROOT, capture_output=True, text=True, timeout=300)


def whole_checkpoints(workdir):
    return [int(p.name) for p in (workdir / "checkpoints").glob("*") if p.name.isdigit()]


def results(workdir):
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    records = [{k: v for k, v in record.items() if k not in TIMES} for record in records]
    state = ocp.load(workdir / "checkpoints" / str(max(whole_checkpoints(workdir))))
    return records, state


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole") / "run"
    done = run(workdir)
    assert done.returncode == 0, done.stderr
    return workdir


def _leaves(tree):
    return [
        jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x for x in jax.tree.leaves(tree)
    ]


@pytest.mark.slow
def test_finished_run_prints_its_summary_again_without_training(uninterrupted):
    before = (uninterrupted / "summary.json").read_bytes()
    again = run(uninterrupted)
    assert again.returncode == 0
    assert "test accuracy" in again.stdout and "epoch " not in again.stdout
    assert (uninterrupted / "summary.json").read_bytes() == before


@pytest.mark.slow
def test_changed_setting_is_refused_by_name_and_harmless_ones_are_not(uninterrupted):
    refused = run(uninterrupted, "--learning-rate", "0.2", "--seed", "1")
    assert refused.returncode == 1
    message = " ".join(refused.stderr.split())
    assert "learning_rate (was 0.1, now 0.2)" in message and "seed (was 0, now 1)" in message
    assert "Traceback" not in refused.stderr
    assert run(uninterrupted, "--checkpoint-every", "7", "--data-dir", "/nowhere").returncode == 0


@functools.cache
def digits():
    return load("mnist-5k")


def fit(workdir, method):
    """Two epochs of 63 steps; masks change at the steps 15, 30, 45, 60, 75 and, of gradual, 90."""
    settings = {"model": "mlp", "width": 16, "depth": 1, "epochs": 2, "density": 0.3}
    every = {"update_every": 15, "checkpoint_every": 20, "workdir": str(workdir)}
    config = changed(Config(), **defaults("best", method) | settings | every)
    return fitting.fit(named(config, "mnist-5k"), digits(), "mnist", single=False)


def assert_bit_identical(workdir, got, other, expected):
    times = {*TIMES, "compile_seconds", "config"}
    assert {k: v for k, v in got.items() if k not in times} == {k: v for k, v in expected.items() if k not in times}
    (records, state), (expected_records, expected_state) = results(workdir), results(other)
    assert records == expected_records
    assert all(sum(record["flips"].values()) > 0 for record in records[1:])  # masks changed, in both epochs
    for name in ("state", "masks", "totals"):
        got, want = _leaves(state[name]), _leaves(expected_state[name])
        assert len(got) == len(want) > 0
        for a, b in zip(got, want, strict=True):
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


quiet = pytest.mark.filterwarnings("ignore:(?!cannot read)")  # orbax warns that no layout is given


@quiet
@pytest.mark.slow
@pytest.mark.parametrize("method", ["edge-popup", "rigl"])
def test_stopped_by_a_signal_wherever_it_is_and_resumed_it_ends_bit_identical(method, tmp_path):
    """The signal comes during the first pause of each process: at a change of masks, between two."""
    expected, steps = fit(tmp_path / "whole", method), []

    with stopped_once_training():
        for _ in range(2 if method == "rigl" else 4):
            with pytest.raises(Interrupted, match="stopped by a signal; saved at step") as caught:
                fit(tmp_path / "broken", method)
            steps.append(int(str(caught.value).split("at step ")[1].split(" ")[0]))
    assert steps == ([15, 20] if method == "rigl" else [20, 40, 60, 63])
    assert_bit_identical(tmp_path / "broken", fit(tmp_path / "broken", method), tmp_path / "whole", expected)


@pytest.mark.slow
@quiet
@pytest.mark.parametrize("method", ["rigl", "gradual", "set"])
def test_killed_between_two_changes_of_the_masks_and_at_one_it_ends_bit_identical(method, tmp_path, monkeypatch):
    expected = fit(tmp_path / "whole", method)
    save, stops, saved = Checkpoints.save, [20, 60], []

    def stopping(self, step, tree):
        save(self, step, tree)
        saved.append(step)
        if step in stops:
            stops.remove(step)
            raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoints, "save", stopping)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            fit(tmp_path / "broken", method)
    got = fit(tmp_path / "broken", method)
    assert saved == [20, 40, 60, 80, 100, 120, 126]  # no part was trained twice
    assert_bit_identical(tmp_path / "broken", got, tmp_path / "whole", expected)
