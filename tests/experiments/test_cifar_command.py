"""`python -m experiments.cifar` with the real ResNet-20, on a few images in class folders."""

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp
from PIL import Image

import supermask_jax as sm
from experiments import cifar
from experiments.config.flags import parser
from experiments.run.checkpoints import Checkpoints
from experiments.run.errors import DataError
from experiments.sweeps import cells
from supermask_jax.models import zoo

pytestmark = pytest.mark.usefixtures("quick_processes")
ROOT = Path(__file__).parents[2]
TIMES = {"train_seconds", "images_per_second", "compile_seconds"}
CLASSES, TRAIN, TEST, BATCH = 4, 40, 12, 8
STEPS = 4  # of an epoch, on 36 of the images: the last four are left out
quiet = pytest.mark.filterwarnings("ignore:(?!cannot read)")  # orbax warns that no layout is given


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    root, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for split, examples in (("train", TRAIN), ("test", TEST)):
        for n in range(examples):
            label = n % CLASSES
            pixels = rng.integers(0, 150, (32, 32, 3)) + 30 * label
            file = root / split / f"class {label}" / f"{n:02}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.astype(np.uint8)).save(file)
    return root


def flags(pictures, workdir, *more):
    return [
        *("--dataset", "folder", "--data-dir", str(pictures), "--workdir", str(workdir), "--batch-size", str(BATCH)),
        *("--train-images", "36", "--epochs", "2", *more),
    ]


def main(pictures, workdir, *more):
    return cifar.main(parser(cifar.Config, cifar.defaults)(cifar.PROG, flags(pictures, workdir, *more)))


def saved(workdir):
    return sorted(int(file.name) for file in (workdir / "checkpoints").iterdir() if file.name.isdigit())


def results(workdir):
    """(the records, the state of training, the summary), without the times."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    lines = [{name: value for name, value in line.items() if name not in TIMES} for line in lines]
    state = ocp.load(workdir / "checkpoints" / str(max(saved(workdir))))["state"]
    summary = json.loads((workdir / "summary.json").read_text())
    different = TIMES | {"config"}
    return lines, state, {name: value for name, value in summary.items() if name not in different}


def assert_same_results(workdir, other):
    (lines, state, summary), (expected_lines, expected_state, expected) = results(workdir), results(other)
    assert lines == expected_lines and summary == expected
    assert jax.tree.leaves(state["model_state"])
    states = ({**part, "key": jax.random.key_data(part["key"])} for part in (state, expected_state))
    jax.tree.map(np.testing.assert_array_equal, *states)


def assert_random_by_erk(workdir, summary, layers):
    """A network of so many layers that was trained for one epoch under random masks of density 0.2."""
    assert (summary["model"], summary["steps"]) == ("resnet-20", STEPS) and summary["dataset"].startswith("folder")
    kept, size = (sum(layer[name] for layer in summary["layers"].values()) for name in ("kept", "size"))
    assert 0 <= kept - 0.2 * size <= len(summary["layers"]) == layers
    assert len({round(layer["density"], 2) for layer in summary["layers"].values()}) > 1
    _, state, _ = results(workdir)
    scales = [leaf for path, leaf in sm.trees.by_path(state["subnet"]["weights"]).items() if path.endswith("scale")]
    assert len(scales) == layers - 1 and not any(np.all(np.asarray(leaf) == 1) for leaf in scales)  # they learn
    means = [leaf for path, leaf in sm.trees.by_path(state["model_state"]).items() if path.endswith("mean")]
    assert len(means) == layers - 1 and all(np.any(np.asarray(leaf)) for leaf in means)


RANDOM = ["--method", "random", "--distribution", "erk", "--density", "0.2", "--epochs", "1"]


class Small(nn.Module):
    """In place of ResNet-20, which takes long to compile: a BatchNorm and two dense layers."""

    classes: int
    affine: bool

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.avg_pool(x, (8, 8), (8, 8)).reshape(len(x), -1)
        x = nn.relu(nn.Dense(40, use_bias=False, name="conv")(x))
        norm = nn.BatchNorm(not train, use_scale=self.affine, use_bias=self.affine, name="norm")
        return nn.Dense(self.classes, use_bias=False, name="dense")(norm(x))


def small(classes, *, affine, depth, widen):
    return zoo.Architecture(Small(classes, affine), "conv/kernel", "dense/kernel")


@quiet
def test_the_command_trains_a_network_with_batch_statistics(pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(zoo, "cifar_resnet", small)
    monkeypatch.setattr("experiments.plots.one_run.draw_run", lambda *_: None)
    assert_random_by_erk(tmp_path, main(pictures, tmp_path, *RANDOM), layers=2)


@pytest.mark.slow
@quiet
def test_without_its_files_the_command_says_what_to_do_and_what_it_says_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(zoo, "cifar_resnet", small)
    monkeypatch.setattr("experiments.plots.one_run.draw_run", lambda *_: None)
    place = ["--data-dir", str(tmp_path / "data"), "--workdir", str(tmp_path / "run"), "--train-images", "300"]
    parsed = parser(cifar.Config, cifar.defaults)
    with pytest.raises(DataError, match=r"cifar10 is not in .* --dataset colour-digits"):
        cifar.main(parsed(cifar.PROG, place))
    summary = cifar.main(parsed(cifar.PROG, [*place, "--dataset", "colour-digits", "--epochs", "1"]))
    assert summary["dataset"] == "colour-digits-5k" and "not CIFAR" in summary["data_source"]
    assert not (tmp_path / "data").exists()


@pytest.mark.slow
@quiet
def test_resnet_20_keeps_its_density_its_scales_learn_and_its_pictures_are_drawn(pictures, tmp_path):
    assert_random_by_erk(tmp_path, main(pictures, tmp_path, *RANDOM), layers=20)
    assert {"curves.png", "layers.png", "kernels.png"} <= {file.name for file in tmp_path.iterdir()}


METHODS = {
    "random": ["--distribution", "erk", "--density", "0.2"],
    "edge-popup": ["--density", "0.3"],
    "snip": ["--density", "0.1", "--assess"],
    "grasp": ["--density", "0.3"],
    "synflow": ["--density", "0.3", "--rounds", "3"],
    "rigl": ["--density", "0.2", "--flip-alternately"],
    "dense": ["--assess"],
}


@pytest.mark.slow
@quiet
@pytest.mark.parametrize("method", METHODS)
def test_stopped_and_resumed_it_ends_bit_identical(pictures, tmp_path, monkeypatch, method):
    more = ["--method", method, *METHODS[method], "--checkpoint-every", "3"]
    if method != "edge-popup":  # once with the real network
        monkeypatch.setattr(zoo, "cifar_resnet", small)
        monkeypatch.setattr("experiments.plots.one_run.draw_run", lambda *_: None)
    expected = main(pictures, tmp_path / "whole", *more)
    save, stops = Checkpoints.save, [3, 6]

    def stopping(self, step, tree):
        save(self, step, tree)
        if step in stops:
            stops.remove(step)
            raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoints, "save", stopping)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            main(pictures, tmp_path / "broken", *more)
    got = main(pictures, tmp_path / "broken", *more)
    assert got["steps"] == expected["steps"] == 2 * STEPS and not stops
    assert_same_results(tmp_path / "broken", tmp_path / "whole")
    if "--density" in more:
        density = float(more[more.index("--density") + 1])
        assert abs(got["density"] - density) < 0.002
    assert ("gradient_flow" in got) == ("--assess" in more)


@pytest.mark.slow
@quiet
def test_a_signal_stops_it_and_what_it_prints_resumes_it_bit_identical(pictures, tmp_path):
    more = ["--method", "rigl", "--density", "0.2", "--epochs", "12", "--checkpoint-every", "1000000"]
    more += ["--model", "vgg-11", "--widen", "0.1"]  # it has batch statistics, and compiles sooner than a ResNet
    command = [sys.executable, "-m", "experiments.cifar"]
    whole = subprocess.run(
        [*command, *flags(pictures, tmp_path / "whole", *more)], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert whole.returncode == 0, whole.stderr
    process = subprocess.Popen(
        [*command, *flags(pictures, tmp_path / "broken", *more)],
        cwd=ROOT, env=os.environ | {"PYTHONUNBUFFERED": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert any(line.startswith("epoch   2/") for line in iter(process.stdout.readline, "")), process.stderr.read()
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 3, said
    step = int(said.split("stopped by a signal; saved at step ")[1].split(" ")[0])
    assert 2 * STEPS <= step < 12 * STEPS and saved(tmp_path / "broken") == [step]
    program, *rest = shlex.split(said.strip().splitlines()[-1])
    assert (str(ROOT / program), rest[:2]) == (sys.executable, ["-m", "experiments.cifar"])
    again = subprocess.run([sys.executable, *rest], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0 and f"resumed from step {step} of {12 * STEPS}" in again.stdout, again.stderr
    assert_same_results(tmp_path / "broken", tmp_path / "whole")


@pytest.mark.slow
@quiet
def test_streamed_from_disk_it_ends_as_it_does_in_memory(pictures, tmp_path):
    more = ["--method", "dense", "--epochs", "2", "--flip-alternately"]
    for name, stream in (("memory", []), ("streamed", ["--stream"])):
        main(pictures, tmp_path / name, *more, *stream)
    (lines, state, summary), (expected_lines, expected_state, expected) = (
        results(tmp_path / name) for name in ("streamed", "memory")
    )
    others = {"dataset": "", "file_bytes": 0}  # the file tells which data it is of, and streamed they have another mark
    assert lines == expected_lines and summary | others == expected | others
    states = ({**part, "key": jax.random.key_data(part["key"])} for part in (state, expected_state))
    jax.tree.map(np.testing.assert_array_equal, *states)


@pytest.mark.parametrize(
    ("method", "model", "rate"),
    (("dense", "resnet-20", 0.1), ("dense", "conv2", 0.01), ("gradual", "conv6", 0.01), ("edge-popup", "conv2", 0.1)),
)
def test_weights_of_networks_without_batchnorm_learn_at_a_lower_rate_on_cifar(method, model, rate):
    """At the rate of ResNets, Conv2 falls to 10 %."""
    assert cells.cell({}, method, dataset="cifar10", model=model).config.optim.learning_rate == rate
    parsed = parser(cifar.Config, cifar.defaults)("x", ["--method", method, "--model", model])
    assert parsed.optim.learning_rate == rate
