"""The file that a run leaves of its network: all of it comes back, and is evaluated to the recorded figures."""

import dataclasses
import json

import flax.linen as nn
import jax
import numpy as np
import pytest

import supermask_jax as sm
from experiments.config.registry import INITIALIZERS, METHODS, MODELS, Entry
from experiments.config.run import named
from experiments.config.settings import changed
from experiments.data.source import arrays_dataset
from experiments.mnist import Config, defaults
from experiments.run.errors import UserError
from experiments.training import fit as fitting
from experiments.training import stored
from supermask_jax import artifact
from supermask_jax.models import zoo
from supermask_jax.trees import by_path

CLASSES, SHAPE = 4, (6, 5, 3)


def images(seed=0, examples=40, tests=12):
    labels = np.arange(examples + tests) % CLASSES
    pixels = np.random.default_rng(seed).integers(0, 150, (len(labels), *SHAPE)) + 30 * labels[:, None, None, None]
    parts = pixels[:examples].astype(np.uint8), labels[:examples], pixels[examples:].astype(np.uint8), labels[examples:]
    return arrays_dataset("mnist-5k", parts, "here", CLASSES)


def fit(workdir, method, **settings):
    small = {"model": "mlp", "width": 6, "depth": 1, "batch_size": 8, "density": 0.3, "epochs": 2, "shift": 1}
    config = changed(Config(), **{**defaults("best", method), **small, "workdir": str(workdir), **settings})
    return fitting.fit(named(config, "mnist-5k"), images(), "mnist", single=False)


@pytest.fixture
def opened(monkeypatch):
    """What opens the images, and what it was asked for."""
    asked = []

    def open_data(data):
        asked.append(data)
        return images(seed=1 if data.dataset == "kmnist" else 0)

    monkeypatch.setattr(stored, "open_data", open_data)
    return asked


def evaluate(file, **settings):
    return stored.evaluate(changed(Config(), evaluate=str(file), **settings))


QUICK = ("dense",)
EACH = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in METHODS]


@pytest.mark.parametrize("method", EACH)
def test_the_file_of_every_method_is_evaluated_to_the_figures_of_its_run(method, tmp_path, opened, capsys):
    summary = fit(tmp_path, method)
    file = tmp_path / artifact.FILE
    assert summary["file_bytes"] == file.stat().st_size
    weights, masks, state, settings = sm.load_run(tmp_path)
    assert settings == json.loads((tmp_path / "config.json").read_text()) and settings["method"] == method
    counts = {path: np.count_nonzero(mask) for path, mask in by_path(masks).items()}
    if method != "dense":
        assert counts == {path: layer["kept"] for path, layer in summary["layers"].items()}
    assert summary["dense_bytes"] == 4 * sum(leaf.size for leaf in jax.tree.leaves(weights)) and state is None
    got = evaluate(file)
    assert (got["test_accuracy"], got["test_loss"]) == (summary["test_accuracy"], summary["test_loss"])
    assert got["recorded_accuracy"] == summary["test_accuracy"] and opened[0].dataset == "mnist-5k"
    assert "the same accuracy" in capsys.readouterr().out


@pytest.mark.parametrize(
    "init", [name if name == "kaiming-normal" else pytest.param(name, marks=pytest.mark.slow) for name in INITIALIZERS]
)
def test_frozen_weights_are_a_seed_whatever_they_are_drawn_from(init, tmp_path, opened):
    summary = fit(tmp_path, "edge-popup", init=init, seed=7, epochs=1, scale_weights=True)
    header = artifact.container.read(tmp_path / artifact.FILE)[0]
    assert header["origin"]["seed"] == 7 and all("draw" in entry for entry in header["leaves"].values())
    assert evaluate(tmp_path / artifact.FILE)["test_loss"] == summary["test_loss"]


def test_each_layer_is_scaled_by_its_own_density(tmp_path, opened):
    options = {"density": 0.3, "distribution": "erk", "epochs": 1}
    for name in ("plain", "scaled"):
        summary = fit(tmp_path / name, "edge-popup", scale_layers=name == "scaled", **options)
    (plain, *_), (scaled, *_) = (sm.load_subnetwork(tmp_path / name / artifact.FILE) for name in ("plain", "scaled"))
    wanted = sm.densities.erk({path: leaf.shape for path, leaf in by_path(plain).items()}, 0.3)
    assert len(set(wanted.values())) == 2
    for path, leaf in by_path(scaled).items():
        np.testing.assert_allclose(leaf, np.asarray(by_path(plain)[path]) * wanted[path] ** -0.5, rtol=1e-6)
    assert evaluate(tmp_path / "scaled" / artifact.FILE)["test_loss"] == summary["test_loss"]


@pytest.mark.slow
def test_rescaled_masks_come_back(tmp_path, opened):
    summary = fit(tmp_path, "bernoulli", rescale=True)
    assert evaluate(tmp_path / artifact.FILE)["test_loss"] == summary["test_loss"]


class Normalised(nn.Module):
    classes: int

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.BatchNorm(not train, name="norm")(x)
        return nn.Dense(self.classes, use_bias=False, name="dense")(x.reshape(len(x), -1))


def normalised(classes):
    return zoo.Architecture(Normalised(classes), "dense/kernel", "dense/kernel")


@pytest.mark.slow
def test_batch_statistics_come_back(tmp_path, opened, monkeypatch):
    monkeypatch.setitem(MODELS, "normalised", Entry(f"{__name__}:normalised"))
    summary = fit(tmp_path, "edge-popup", model="normalised")
    assert evaluate(tmp_path / artifact.FILE)["test_loss"] == summary["test_loss"]
    _, _, state, _ = sm.load_run(tmp_path)
    assert np.abs(by_path(state)["batch_stats/norm/mean"]).min() > 0


def test_another_data_set_that_is_named_is_evaluated_on_and_told(tmp_path, opened, capsys):
    fit(tmp_path, "edge-popup", epochs=1)
    evaluate(tmp_path / artifact.FILE, dataset="kmnist")
    assert opened[0].dataset == "kmnist" and "on other images of mnist-5k" in capsys.readouterr().out


def test_a_run_that_is_not_finished_has_no_network(tmp_path):
    with pytest.raises(FileNotFoundError, match="the run is not finished, or there is none"):
        sm.load_run(tmp_path)


def test_what_cannot_be_read_is_told_as_the_file_that_was_named(tmp_path, opened):
    for file in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(UserError, match=rf"cannot read {file} \(.*--evaluate takes a file of a network"):
            evaluate(file)


@pytest.mark.parametrize(
    ("about", "says"),
    [
        ({}, "does not say which data set it is of"),
        ({"dataset": "mnist-5k"}, "is no network of these experiments"),
        ({"dataset": "mnist-5k", "model": "os:system"}, "is no network of these experiments"),
    ],
)
def test_a_file_that_is_of_no_experiment_is_refused(about, says, tmp_path, opened):
    weights = {"Dense_0": {"kernel": np.ones((3, 2), np.float32)}}
    sm.save_subnetwork(tmp_path / "x", sm.methods.dense(weights), artifact.Stored(), about=about)
    with pytest.raises(UserError, match=says):
        evaluate(tmp_path / "x")


def test_images_of_another_shape_are_refused(tmp_path, opened, monkeypatch):
    fit(tmp_path, "edge-popup", epochs=1)
    smaller = dataclasses.replace(images(), classes=3)
    monkeypatch.setattr(stored, "open_data", lambda data: smaller)
    with pytest.raises(UserError, match="in 4 classes, and mnist-5k has 6 x 5 x 3 in 3"):
        evaluate(tmp_path / artifact.FILE)
