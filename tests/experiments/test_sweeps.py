"""Sweeps of many small runs: every cell leaves its row, is trained once, and bad settings are refused at once."""

import collections
import contextlib
import inspect
import json
import resource
import shutil
import subprocess
import sys
import typing
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

from experiments import bits, compare, pruning_only, random_pruning
from experiments.config import sized
from experiments.config.flags import parser
from experiments.config.registry import METHODS
from experiments.config.run import Run, named
from experiments.config.settings import changed, fields, flat, neutral
from experiments.config.sized import Size
from experiments.data.source import arrays_dataset
from experiments.plots import lines, sweeps
from experiments.run.errors import UserError
from experiments.run.names import Settings, default_path
from experiments.run.workdir import Workdir
from experiments.sweeps import cells, comparison, random_masks, sizes
from experiments.sweeps import construction as target
from experiments.sweeps.learned import Learned
from supermask_jax import models

pytestmark = pytest.mark.usefixtures("coarse_pictures")

ROOT = Path(__file__).parents[2]
COMMANDS = {"compare": compare, "random_pruning": random_pruning, "pruning_only": pruning_only, "bits": bits}
FIGURES = {"test_accuracy", "test_loss", "density", "parameters", "flops", "epochs", "steps", "train_seconds"}
ASSESSED = {"ece", "brier", "fgsm_accuracy", "ood_auroc", "gradient_flow"}
TIMES = {"train_seconds"}


def small(folder, **changes):
    settings = {"methods": ("dense", "bernoulli", "random"), "densities": (0.3,), "seeds": 1, "epochs": 1}
    network = {"model": "mlp", "width": 16, "depth": 1, "dataset": "mnist-5k"}
    return changed(compare.Config(), **settings | network | {"workdir": str(folder / "compare")} | changes)


def written(folder):
    return json.loads((folder / "summary.json").read_text())


def without_times(rows):
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


def assert_is_a_picture(file):
    with PIL.Image.open(file) as picture:
        pixels = np.asarray(picture.convert("L"))
    assert min(pixels.shape) > 80 and pixels.std() > 5


def trained(patch, interrupt_at=None):
    """The names of the directories that are trained in from now on; training in the one at that place is stopped."""
    names, fit = [], cells.fit

    def interrupted(*_):
        raise KeyboardInterrupt

    def noted(config, *rest, **options):
        path = Path(config.output.workdir)
        if not (path / "summary.json").exists():
            if len(names) == interrupt_at:
                patch.setattr(Workdir, "append", interrupted)
            names.append(path.name)
        return fit(config, *rest, **options)

    patch.setattr(cells, "fit", noted)
    return names


def tiny(shape=(8, 8, 1), classes=3):
    """90 training and 30 test images; each class is bright at other pixels."""
    labels = np.arange(120, dtype=np.int32) % classes
    images = np.random.default_rng(0).integers(0, 60, (120, *shape)).astype(np.uint8)
    pixels = images.reshape(120, -1)
    pixels[labels[:, None] == np.arange(pixels.shape[1]) % classes] += 150
    return arrays_dataset("tiny", (images[:90], labels[:90], images[90:], labels[90:]), "made by hand", classes)


@pytest.fixture
def not_trained(monkeypatch):
    """The settings of the cells that are requested from now on; their figures are made up."""
    configs = []

    def made_up(config, dataset, experiment, ood=None, single=True):
        configs.append(config)
        rng = np.random.default_rng(len(configs))
        figures = {name: float(value) for name, value in zip(sorted(FIGURES), rng.uniform(0.5, 0.9, 8), strict=True)}
        assessed = {"ece": 0.01, "brier": 0.1, "fgsm_accuracy": 0.4, "ood_auroc": {"noise": 0.8}}
        return figures | assessed | {"density": config.masks.density, "gradient_flow": [1.0, float(rng.uniform())]}

    monkeypatch.setattr(cells, "fit", made_up)
    return configs


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """(directory, what main returned) of a comparison of three cells."""
    folder = tmp_path_factory.mktemp("compared")
    return folder, compare.main(small(folder))


# Comparing methods.


def test_every_cell_leaves_a_row_of_its_labels_its_seed_and_its_figures(compared):
    _, summary = compared
    rows = summary["rows"]
    assert [(row["method"], row["asked"], row["seed"]) for row in rows] == [
        ("dense", 1.0, 0),
        ("bernoulli", 1.0, 0),
        ("random", 0.3, 0),
    ]
    for row in rows:
        assert row["emptied"] == []
        sampled = {"test_sampled_accuracy"} if row["method"] == "bernoulli" else set()
        assert set(row) == {"method", "asked", "seed"} | {"emptied"} | FIGURES | ASSESSED | sampled
        assert 0.12 < row["test_accuracy"] < 1 and (row["epochs"], row["steps"]) == (1, 63)
        assert 0 <= row["ece"] <= 1 and 0 <= row["brier"] <= 2 and set(row["ood_auroc"]) == {"noise"}
        assert 0 <= row["fgsm_accuracy"] < row["test_accuracy"] and 0 <= row["ood_auroc"]["noise"] <= 1
        assert len(row["gradient_flow"]) == 2  # before training and after its one epoch
        assert row["flops"] == 2 * row["parameters"]
    flows = {row["method"]: row["gradient_flow"] for row in rows}
    assert flows["bernoulli"][0] == 0 and min(*flows["dense"], *flows["random"], flows["bernoulli"][1]) > 0
    dense, bernoulli, random = rows
    kept = [round(0.3 * size) for size in (784 * 16, 16 * 10)]  # by erk no fewer weights, but others
    assert (dense["density"], dense["parameters"]) == (1.0, 784 * 16 + 16 * 10)
    assert 0 <= random["parameters"] - sum(kept) <= 2 and random["density"] == pytest.approx(0.3, abs=1e-3)
    assert 0 < bernoulli["density"] < 1


@pytest.mark.slow
def test_the_summary_on_disk_is_what_main_returns_and_the_picture_is_real(compared):
    folder, summary = compared
    assert written(folder / "compare") == json.loads(json.dumps(summary))
    assert (summary["dataset"], summary["config"]["densities"]) == ("mnist-5k", (0.3,))
    assert {"data_source", "versions"} <= set(summary)
    assert {file.name for file in (folder / "compare").iterdir()} == {"summary.json", "compare.png"}
    assert_is_a_picture(folder / "compare" / "compare.png")
    for cell in (folder / "cells").iterdir():  # of which checkpoints are not needed, once it is finished
        own = {".lock", "config.json", "metrics.jsonl", "summary.json", "subnetwork.safetensors"}
        assert {file.name for file in cell.iterdir()} == own


@pytest.mark.slow
def test_a_second_run_trains_nothing_and_a_wider_one_only_the_new_cells(compared, tmp_path, monkeypatch):
    folder, summary = compared
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    names = trained(monkeypatch)
    again = compare.main(small(tmp_path))
    renamed = compare.main(small(tmp_path, workdir=str(tmp_path / "another")))  # sweeps share their cells
    assert again["rows"] == renamed["rows"] == summary["rows"] and not names
    wider = compare.main(small(tmp_path, densities=(0.3, 0.7)))
    assert len(names) == 1 and names[0].startswith("random-mnist-5k-d0.7-s0-")
    dense, bernoulli, new, random = wider["rows"]
    assert [dense, bernoulli, random] == summary["rows"] and (new["method"], new["asked"]) == ("random", 0.7)
    assert new["density"] == pytest.approx(0.7, abs=1e-3)


def test_an_interrupted_comparison_resumes_with_the_missing_cells_and_has_the_same_rows(
    compared, tmp_path, monkeypatch
):
    _, whole = compared
    settings = small(tmp_path, methods=("dense", "random"))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        names = trained(patch, interrupt_at=1)
        compare.main(settings)
    assert [name.split("-")[0] for name in names] == ["dense", "random"] and not list((tmp_path / "compare").iterdir())
    names = trained(monkeypatch)
    rows = compare.main(settings)["rows"]
    assert [name.split("-")[0] for name in names] == ["random"]
    assert without_times(rows) == [row for row in without_times(whole["rows"]) if row["method"] != "bernoulli"]


class Requested(Exception):
    pass


def grid_of(patch, command, settings):
    """The cells that a command requests; none is trained."""

    def requested(grid, *_):
        raise Requested(grid)

    patch.setattr(cells, "run", requested)
    with pytest.raises(Requested) as caught:
        command.main(settings)
    return list(caught.value.args[0])


def test_methods_that_take_no_density_have_one_cell_for_each_seed(tmp_path, monkeypatch):
    settings = small(tmp_path, methods=compare.ALL, densities=(0.2, 0.7, 0.2), seeds=2)
    grid = grid_of(monkeypatch, compare, settings)
    requested = [(c.labels["method"], c.labels["asked"], c.config.seed) for c in grid]
    for method in compare.ALL:
        densities = [1.0] if method in ("dense", "bernoulli", "threshold") else [0.7, 0.2]
        assert [r for r in requested if r[0] == method] == [(method, d, s) for d in densities for s in (0, 1)]
    assert len(requested) == len(set(requested))


def test_every_registered_method_is_compared_and_the_baseline_comes_first():
    assert set(compare.ALL) == set(METHODS) and compare.ALL[0] == "dense"


# Directories of cells.

# The names of cells that were trained before settings had sections: these are not trained again.
NAMES = [  # (command, place in its grid, data set, name)
    ("compare", 0, "mnist", "dense-mnist-s0-1c69cd04"),
    ("compare", 3, "mnist", "edge-popup-mnist-d0.5-s0-bd202b4d"),
    ("compare", 18, "mnist", "bernoulli-mnist-s0-d0b56a59"),
    ("compare", 21, "mnist", "random-mnist-d0.5-s0-8b1e88c6"),
    ("compare", -1, "mnist", "edge-popup-mnist-d0.02-s2-f9074725"),
    ("random_pruning", 3, "mnist-5k", "random-mnist-5k-d0.2-s0-b37612cc"),
    ("random_pruning", 30, "mnist-5k", "grasp-mnist-5k-d0.2-s0-dc038396"),
    ("random_pruning", -1, "mnist-5k", "random-mnist-5k-d0.05-s2-169d5a7c"),
    ("pruning_only", 0, "mnist-5k", "edge-popup-mnist-5k-d0.3-s0-3f158be1"),
    ("pruning_only", 18, "mnist-5k", "edge-popup-mnist-5k-d0.3-s0-c77a136b"),
    ("pruning_only", -1, "mnist-5k", "edge-popup-mnist-5k-d0.3-s2-8df99e25"),
]


@pytest.mark.parametrize(("command", "place", "dataset", "name"), NAMES)
def test_the_directory_of_a_cell_has_the_name_that_it_always_had(command, place, dataset, name, tmp_path, monkeypatch):
    more = {"parts": pruning_only.PARTS[1:], "density": 0.3} if command == "pruning_only" else {}
    config = changed(COMMANDS[command].Config(), dataset="mnist-5k", workdir=str(tmp_path / "sweep"), **more)
    cell = grid_of(monkeypatch, COMMANDS[command], config)[place]
    assert cells.directory(named(cell.config, dataset)) == name


def test_cells_that_differ_in_any_setting_lie_in_different_directories():
    base = changed(cells.cell({}, "random").config, dataset="mnist-5k")
    elsewhere = {
        "data_dir",
        "workdir",
        "checkpoint_every",
        "preset",
        "evaluate",
        "dry_run",
    }  # where it lies does not change a cell ...
    elsewhere |= {"devices", "parallel", "shard_scores", "restart"}  # ... nor what it is trained on, or whether again
    elsewhere |= {"coordinator", "num_processes", "process_id", "workers", "compilation_cache"}
    others = {bool: lambda v: not v, int: lambda v: v + 1, float: lambda v: v / 2 + 0.01}
    others |= {tuple: lambda v: (*v, 0.5), type(None): lambda v: "a file"}

    def directory(**settings):
        return default_path(Settings(flat(changed(base, **settings)), neutral(Run)), "cells").name

    names = {directory()}
    for field in fields(Run):
        value = flat(base)[field.name]
        choices = [] if type(value) is tuple else getattr(field.type, "__args__", ())
        choices = [v for v in choices if v != value and not isinstance(v, type)]
        if field.name in elsewhere:
            other = {"preset": "tutorial", "parallel": "pmap"}.get(field.name, 8)
            assert directory(**{field.name: other}) in names
        else:
            names.add(directory(**{field.name: choices[0] if choices else others[type(value)](value)}))
    assert len(names) == 1 + len([*fields(Run)]) - len(elsewhere)


def test_a_cell_has_the_best_recipe_for_its_data_set():
    assert cells.cell({}, "random", dataset="mnist").config.optim.optimizer == "adam"
    cifar = cells.cell({}, "random", dataset="cifar10", model="resnet-20").config
    assert (cifar.optim.optimizer, cifar.augment.flip, cifar.model.affine) == ("sgd", True, True)


def test_options_of_the_model_that_a_sweep_does_not_set_are_the_recipes():
    """On CIFAR weights learn with affine BatchNorm, where a network has any; and conv2 has none to be told of."""
    for module in (bits, compare):
        for model, flags, affine in (("resnet-20", {}, True), ("conv2", {}, True), ("conv2", {"widen": 0.5}, True)):
            config = changed(module.Config(), model=model, dataset="cifar10", **flags)
            shared = {**cells.of_model(config.model), **flat(config.data), "epochs": 1}
            (cell,) = comparison.grid(("dense",), (0.5,), 1, shared)
            found = cell.config.model
            assert (found.model, found.affine, found.widen) == (model, affine, flags.get("widen", 1.0))


def test_resnets_are_made_from_their_channels_and_layers():
    configs = [cell.config for cell in random_masks.by_size([Size("resnet", 24, 32)], ("erk",), (0.2,), 1, {})]
    assert [(c.model.model, c.model.widen, c.masks.method) for c in configs] == [
        ("resnet-32", 1.5, "dense"),
        ("resnet-32", 1.5, "random"),
    ]


def test_the_preset_of_resnets_trains_as_published():
    config = parsed("random_pruning", "--preset", "paper")
    assert (config.model, config.data.dataset, config.epochs, max(config.depths)) == ("resnet", "cifar10", 160, 110)
    shared = {**random_masks.PUBLISHED, "dataset": "cifar10", "learning_rate": config.learning_rate}
    for cell in random_masks.by_distribution(Size("resnet", 16, 20), ("erk",), ("rigl",), (0.1,), 1, shared):
        optim = cell.config.optim
        assert (optim.schedule, optim.drop_at, optim.weight_decay) == ("steps", (0.5, 0.75), 5e-4)
        assert (optim.batch_size, optim.learning_rate, optim.momentum) == (128, 0.1, 0.9)


def test_an_option_that_nothing_reads_is_refused_in_a_cell_too():
    for settings in ({"width": 7}, {"drop_fraction": 0.1}, {"stream": True}):
        with pytest.raises(UserError, match="nothing reads --"):
            cells.cell({}, "random", model="lenet-300-100", **settings)


def test_a_setting_out_of_range_is_refused_in_a_cell_too():
    with pytest.raises(UserError, match="--density must be"):
        cells.cell({}, "random", density=1.5)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_cell_has_the_settings_of_the_data(command, tmp_path, monkeypatch):
    chosen = {"dataset": "mnist-5k", "train_images": 900, "validation": 100, "data_dir": str(tmp_path)}
    more = {"parts": ("width", "depth", "narrow", "data"), "seeds": 1} if command == "pruning_only" else {"seeds": 1}
    config = changed(COMMANDS[command].Config(), **chosen, **more, workdir=str(tmp_path / "sweep"))
    grid = grid_of(monkeypatch, COMMANDS[command], config)
    assert len(grid) > 10
    for cell in grid:
        assert {name: flat(cell.config)[name] for name in chosen} == chosen


def test_rows_are_grouped_in_their_order_and_those_without_a_value_left_out():
    rows = [{"n": "b", "x": 2, "y": 0.5}, {"n": "a", "x": 1, "y": 0.1}, {"n": "b", "x": 1, "y": None}, {"n": "c"}]
    groups = lines.grouped([*rows, {"n": "b", "x": 2, "y": 0.25}], "n", "x", "y")
    assert groups == {"b": {2: [0.5, 0.25]}, "a": {1: [0.1]}} and list(groups) == ["b", "a"]


# Random pruning.


@pytest.mark.slow
def test_random_pruning_from_end_to_end(tmp_path, monkeypatch, capsys):
    choice = {"densities": (0.3,), "distributions": ("erk", "erk+", "snip"), "methods": ("set", "synflow"), "seeds": 1}
    network = {"model": "cnn", "width": 2, "depth": 2, "widths": (2,), "depths": (2,)}
    training = {"epochs": 1, "batch_size": 15, "dataset": "mnist-5k"}  # 267 steps: set changes its masks once
    path, names = tmp_path / "random_pruning", trained(monkeypatch)
    summary = random_pruning.main(changed(random_pruning.Config(), **choice, **network, **training, workdir=str(path)))
    labels = ("part", "name", "asked", "width", "depth", "seed")
    assert [tuple(row[label] for label in labels) for row in summary["rows"]] == [
        ("distribution", "dense", 1.0, 2, 2, 0),
        ("distribution", "random, erk", 0.3, 2, 2, 0),
        ("distribution", "random, snip", 0.3, 2, 2, 0),
        ("distribution", "set", 0.3, 2, 2, 0),
        ("distribution", "synflow", 0.3, 2, 2, 0),
        ("size", "dense", 1.0, 2, 2, 0),
        ("size", "random, erk, 30% kept", 0.3, 2, 2, 0),
    ]
    assert len(set(names)) == 6  # one of them was left out: a cell of both sweeps is trained once
    for row in summary["rows"]:
        size = 9 * 2 + 9 * 2 * 2 + 2 * 2 * 2 * 10
        assert set(row) >= FIGURES | ASSESSED and row["steps"] == 267 and 0 < row["test_accuracy"] < 1
        assert 0 <= row["parameters"] - row["asked"] * size <= 3  # each layer rounds up
    (left_out,) = (line for line in capsys.readouterr().out.splitlines() if "left out" in line)
    assert "random, erk+" in left_out and "the density must be at least 0.597" in left_out  # for its last layer
    (rewired,) = (tmp_path / "cells").glob("set-*/metrics.jsonl")
    assert sum(json.loads(rewired.read_text().splitlines()[-1])["flips"].values()) > 0
    assert written(path) == json.loads(json.dumps(summary))
    assert {file.name for file in path.iterdir()} == {"summary.json", "distributions.png", "sizes.png"}
    for picture in path.glob("*.png"):
        assert_is_a_picture(picture)


def test_random_pruning_draws_its_rows(tmp_path, not_trained):
    chosen = {"densities": (0.3, 0.7), "distributions": ("erk", "uniform"), "methods": ("set",), "seeds": 2}
    sizes = {"widths": (2, 3), "depths": (1, 2), "dataset": "mnist-5k", "workdir": str(tmp_path / "sweep")}
    summary = random_pruning.main(changed(random_pruning.Config(), **chosen, **sizes))
    assert [row["part"] for row in summary["rows"]] == ["distribution"] * 2 * (1 + 3 * 2) + ["size"] * 2 * 4 * 3
    assert len({config.seed for config in not_trained}) == 2
    assert all(config.evaluation.assess and config.optim.learning_rate == 0.01 for config in not_trained)
    assert written(tmp_path / "sweep") == json.loads(json.dumps(summary))
    assert {file.name for file in (tmp_path / "sweep").iterdir()} == {
        "summary.json",
        "distributions.png",
        "sizes.png",
    }
    for picture in (tmp_path / "sweep").glob("*.png"):
        assert_is_a_picture(picture)


def test_every_size_is_trained_dense_and_at_each_density():
    sizes = [Size("cnn", width, depth) for depth in (2, 1) for width in (8, 4)]
    grid = random_masks.by_size(sizes, ("erk",), (0.2, 0.7), 2, {})
    trained = [(cell.config.model.depth, cell.config.model.width) for cell in grid]
    assert trained == [size for size in ((1, 4), (1, 8), (2, 4), (2, 8)) for _ in range(6)]
    for i, cell in enumerate(grid):
        masks = cell.config.masks
        method, density = (("dense", 1.0), ("random", 0.7), ("random", 0.2))[i // 2 % 3]
        assert (masks.method, masks.density, cell.config.seed) == (method, density, i % 2)
        assert (cell.labels["width"], cell.labels["asked"]) == (cell.config.model.width, density)
        assert method == "dense" or masks.distribution == "erk"


def test_without_sizes_there_is_no_picture_of_sizes(tmp_path, monkeypatch):
    config = changed(random_pruning.Config(), widths=(), seeds=1, dataset="mnist-5k", workdir=str(tmp_path / "sweep"))
    assert {cell.labels["part"] for cell in grid_of(monkeypatch, random_pruning, config)} == {"distribution"}
    assert sweeps.sizes({"config": flat(config), "rows": []}) is None


def test_without_the_assessment_only_accuracy_is_drawn():
    row = {"part": "distribution", "width": 4, "depth": 2, "seed": 0, "flops": 9}
    rows = [
        row | {"name": name, "method": name, "asked": density, "density": density, "test_accuracy": 0.9}
        for name, density in (("dense", 1.0), ("random, erk", 0.3), ("set", 0.3), ("random, erk", 0.7), ("set", 0.7))
    ]
    summary = {"config": flat(random_pruning.Config()), "dataset": "mnist-5k", "rows": rows}
    for figure in (sweeps.distributions(summary), sweeps.comparison(summary)):
        assert ["accuracy" in ax.get_ylabel() for ax in figure.axes] == [True, True]


def test_methods_that_learn_their_density_have_markers_of_their_own_and_sampled_ones_accuracy_alone():
    row = {"seed": 0, "flops": 9, "test_accuracy": 0.9, "ece": 0.1, "fgsm_accuracy": 0.5}
    rows = [
        row | {"method": "dense", "asked": 1.0, "density": 1.0},
        row | {"method": "bernoulli", "asked": 1.0, "density": 0.4, "test_sampled_accuracy": 0.8},
        row | {"method": "threshold", "asked": 1.0, "density": 0.6},
        *(row | {"method": "set", "asked": d, "density": d} for d in (0.2, 0.5)),
    ]
    figure = sweeps.comparison({"config": flat(compare.Config()), "dataset": "mnist-5k", "rows": rows})
    drawn = [{line.get_label(): line.get_marker() for line in ax.lines} for ax in figure.axes]
    bernoulli, threshold = "bernoulli, drawn masks, density learned", "threshold, density learned"
    assert drawn[0][bernoulli] != drawn[0][threshold] != "None"
    for panel in drawn[2:]:  # calibration and robustness
        assert bernoulli not in panel and panel[threshold] == drawn[0][threshold]


# Pruning only.


def parameters(family, width, depth, image_shape, classes):
    hidden = (width,) * depth
    model = models.MLP(classes, use_bias=False, hidden=hidden) if family == "mlp" else models.ConvNet(classes, hidden)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *image_shape)))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def learned(examples, seeds=1, families=("mlp", "cnn"), parts=("width", "depth", "narrow", "data"), **settings):
    return Learned(examples, (28, 28, 1), 10, 3, seeds, {"batch_size": 128, **settings}).grid(families, parts)


@pytest.mark.parametrize(("image_shape", "classes"), [((28, 28, 1), 10), ((16, 16, 3), 100)], ids=["mnist", "colour"])
@pytest.mark.parametrize("family", ["mlp", "cnn"])
def test_networks_of_every_depth_are_the_widest_with_so_many_parameters(family, image_shape, classes):
    most = sizes.FAMILIES[family].parameters
    for depth in sizes.FAMILIES[family].depths:
        width = sizes.width_for(family, depth, image_shape, classes)
        counts = [parameters(family, w, depth, image_shape, classes) for w in (width, width + 1)]
        assert 0.8 * most < counts[0] <= most < counts[1]


def test_images_that_are_too_large_for_so_many_parameters_are_refused():
    with pytest.raises(UserError, match="224 x 224 x 3 are too large for an mlp of 100,000 parameters"):
        sizes.width_for("mlp", 2, (224, 224, 3), 10)


@pytest.mark.parametrize("examples", [4_000, 60_000])
def test_fewer_images_are_passed_over_more_often_so_that_the_steps_are_as_many(examples):
    grid = learned(examples, seeds=2, parts=("data",))
    counts = [count for count in sizes.TRAIN_IMAGES if count <= examples]
    for family in ("mlp", "cnn"):
        chosen = [cell for cell in grid if cell.config.model.model == family]
        assert [cell.labels["train_images"] for cell in chosen] == [n for n in counts for _ in range(2)]
        assert [cell.config.seed for cell in chosen] == [0, 1] * len(counts)
        steps = [cell.config.epochs * -(-n // 128) for cell, n in zip(chosen, sorted(counts * 2), strict=True)]
        assert max(steps) < 1.03 * min(steps) and steps[-1] == 3 * -(-examples // 128)
        assert chosen[-1].config.data.train_images == 0 and chosen[0].config.data.train_images == 1_000


def test_with_train_images_no_cell_trains_on_more():
    grid = learned(5_000, parts=("width", "data"), train_images=5_000)
    assert {cell.config.data.train_images for cell in grid} == {1_000, 4_000, 5_000}
    for cell in grid:
        assert cell.config.data.train_images == cell.labels["train_images"]
        assert cell.config.epochs == round(3 * 5_000 / cell.labels["train_images"])


def test_every_learned_part_has_its_cells():
    grid = learned(60_000, density=0.7)
    of_part = {part: [c for c in grid if c.labels["part"] == part] for part in sweeps.PARTS}
    families = sizes.FAMILIES.values()
    widths, depths = sum(len(family.widths) for family in families), sum(len(family.depths) for family in families)
    expected = {"width": 2 * widths, "depth": depths, "narrow": depths, "data": 2 * len(sizes.TRAIN_IMAGES)}
    assert {part: len(of_it) for part, of_it in of_part.items()} == expected
    assert {c.config.masks.unit for c in of_part["width"]} == {"weight", "neuron"}
    for cell in grid:
        assert (cell.config.model.width, cell.config.model.depth) == (cell.labels["width"], cell.labels["depth"])
        assert cell.config.masks.method == "edge-popup" and cell.config.masks.density == 0.7


def test_pruning_only_draws_its_rows(tmp_path, not_trained, monkeypatch):
    row = {"form": "product", "seed": 0, "weight_error": 0.1, "output_error": 0.2, "test_accuracy": 0.7}
    built = {
        "target": {"accuracy": 0.9, "units": [784, 32, 10]},
        "rows": [row | {"width": 1}, row | {"width": 4}, row | {"form": "subset-sum", "width": 4}],
    }
    monkeypatch.setattr(target, "construct", lambda widths, seeds, dataset: built)
    settings = {"dataset": "mnist-5k", "seeds": 2, "validation": 400, "workdir": str(tmp_path / "sweep")}
    summary = pruning_only.main(changed(pruning_only.Config(), **settings))
    assert summary["construction"] == built and len(summary["rows"]) == len(not_trained)
    images = {row["train_images"] for row in summary["rows"]}
    assert images == {1_000, 3_600}  # of 4000, those that are not held out
    assert {file.name for file in (tmp_path / "sweep").iterdir()} == {
        "summary.json",
        "construction.png",
        "learned.png",
    }
    for picture in (tmp_path / "sweep").glob("*.png"):
        assert_is_a_picture(picture)


@pytest.mark.slow
def test_the_construction_comes_nearer_with_more_candidates_on_images_of_any_shape(monkeypatch):
    monkeypatch.setattr(target, "EPOCHS", 40)
    built = target.construct((1, 6), 1, tiny(shape=(5, 4, 3)))
    assert built["target"]["units"] == [60, 32, 3] and built["target"]["accuracy"] > 0.5
    rows = {(row["form"], row["width"]): row for row in built["rows"]}
    assert set(rows) == {("product", 1), ("product", 6), ("subset-sum", 1), ("subset-sum", 6)}
    for (_, width), row in rows.items():
        assert 0 < row["weight_error"] < row["largest_weight_error"] and row["output_error"] > 0
        assert row["weights"] == width * (60 * 60 + 60 * 32 + 32 * 32 + 32 * 3)
    best = rows["subset-sum", 6]
    for other in (rows["product", 6], rows["subset-sum", 1]):
        assert best["weight_error"] < other["weight_error"] and best["output_error"] < other["output_error"]
    assert rows["product", 1]["weight_error"] == rows["subset-sum", 1]["weight_error"]


def test_the_families_are_the_networks_that_have_a_width_and_a_depth():
    assert set(sizes.FAMILIES) == set(sized.NAMES) - {sized.RESNET}


@pytest.mark.slow
def test_pruning_only_from_end_to_end(tmp_path, monkeypatch):
    monkeypatch.setattr(target, "EPOCHS", 5)
    monkeypatch.setitem(sizes.FAMILIES, "mlp", sizes.FAMILIES["mlp"]._replace(widths=(8,)))
    chosen = {"parts": ("construction", "width"), "families": ("mlp",), "construction_widths": (6, 1), "seeds": 1}
    training = {"epochs": 1, "density": 0.7, "dataset": "mnist-5k", "workdir": str(tmp_path / "pruning_only")}
    summary = pruning_only.main(changed(pruning_only.Config(), **chosen, **training))

    built = summary["construction"]
    assert 0.85 < built["target"]["accuracy"] < 1 and built["target"]["deviation"] > 0
    assert built["target"]["units"] == [784, 32, 10]
    rows = {(row["form"], row["width"]): row for row in built["rows"]}
    assert set(rows) == {("product", 1), ("product", 6), ("subset-sum", 1), ("subset-sum", 6)}
    for (_, width), row in rows.items():
        assert row["seed"] == 0 and 0 <= row["test_accuracy"] <= 1 and row["output_error"] > 0
        assert 0 < row["weight_error"] < row["largest_weight_error"]
        firsts, seconds = 784 * 784 + 32 * 32, 784 * 32 + 32 * 10
        assert row["weights"] == width * (firsts + seconds) and row["kept"] <= width * (784 + 32 + seconds)
    best = rows["subset-sum", 6]
    for other in (rows["product", 6], rows["subset-sum", 1]):
        assert best["weight_error"] < other["weight_error"] and best["output_error"] < other["output_error"]
    assert best["test_accuracy"] > rows["subset-sum", 1]["test_accuracy"]
    assert rows["product", 1]["weight_error"] == rows["subset-sum", 1]["weight_error"]  # the same choice of one or none

    assert [(row["part"], row["name"], row["width"]) for row in summary["rows"]] == [
        ("width", "mlp, weights", 8),
        ("width", "mlp, neurons", 8),
    ]
    weights, neurons = summary["rows"]
    assert [row["steps"] for row in summary["rows"]] == [32, 32]
    assert weights["parameters"] == sum(-(-7 * size // 10) for size in (784 * 8, 8 * 8, 8 * 10))
    assert neurons["parameters"] == 784 * 6 + 8 * 6 + 8 * 10  # 6 of 8 units are kept whole, and all classes
    path = tmp_path / "pruning_only"
    assert written(path) == json.loads(json.dumps(summary))
    assert {file.name for file in path.iterdir()} == {"summary.json", "construction.png", "learned.png"}
    for picture in path.glob("*.png"):
        assert_is_a_picture(picture)


# The command lines.


def parsed(command, *flags):
    module = COMMANDS[command]
    return parser(module.Config, getattr(module, "defaults", lambda: {}))("x", list(flags))


@pytest.mark.parametrize(
    ("command", "flags", "says"),
    [
        ("compare", ["--densities", "0.5", "0"], "--densities must be fractions kept, in (0, 1); got (0.5, 0.0)."),
        ("compare", ["--densities", "1"], "got (1.0,)"),
        ("compare", ["--densities", "nan"], "got (nan,)"),
        ("compare", ["--densities"], "--densities must be"),
        ("compare", ["--methods"], "--methods must be one or more"),
        ("compare", ["--seeds", "0"], "--seeds must be in [1, 1,000]; got 0."),
        ("compare", ["--model", "mlp", "--width", "0"], "--width must be"),
        ("compare", ["--model", "mlp", "--depth", "0"], "--depth must be"),
        ("compare", ["--epochs", "-1"], "--epochs must be"),
        ("compare", ["--dataset", "mnist5k"], "did you mean 'mnist-5k'?"),
        ("compare", ["--width", "8"], "nothing reads --width here: it goes with --model cnn, --model mlp."),
        ("compare", ["--no-assess", "--ood", "kmnist"], "--ood names the images that --assess measures on"),
        ("compare", ["--validation", "-1"], "--validation must be"),
        ("random_pruning", ["--densities", "1", "0.1"], "--densities must be fractions kept, in (0, 1)"),
        ("random_pruning", ["--densities", "0"], "got (0.0,)"),
        ("random_pruning", ["--seeds", "0"], "--seeds must be in [1, 1,000]"),
        ("random_pruning", ["--widths", "4", "0"], "--widths must be in [1, 65,536] each; got (4, 0)."),
        ("random_pruning", ["--depths", "0"], "--depths must be"),
        ("random_pruning", ["--batch-size", "0"], "--batch-size must be"),
        ("random_pruning", ["--learning-rate", "inf"], "--learning-rate must be above 0, at most 3e+38; got inf."),
        ("random_pruning", ["--preset", "cifar", "--depths", "20", "21"], "a resnet has a --depth of 20, 32, 44"),
        ("random_pruning", ["--stream"], "nothing reads --stream here: it goes with --dataset folder."),
        (
            "random_pruning",
            ["--model", "convnet"],
            "did you mean 'cnn'? There are: mlp, cnn, resnet.",
        ),
        ("pruning_only", ["--density", "0"], "--density must be the fraction kept, in (0, 1); got 0.0."),
        ("pruning_only", ["--density", "1"], "got 1.0"),
        ("pruning_only", ["--construction-widths", "1", "33"], "--construction-widths must be each in [1, 32]"),
        ("pruning_only", ["--construction-widths", "0"], "got (0,)"),
        ("pruning_only", ["--seeds", "0"], "--seeds must be"),
        ("pruning_only", ["--parts"], "--parts must be one or more"),
        ("pruning_only", ["--families"], "--families must be one or more"),
    ],
)
def test_bad_input_is_one_clear_paragraph(command, flags, says):
    with pytest.raises(UserError) as refused:
        parsed(command, *flags)
    assert says in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("command", "flag", "valid"),
    [
        ("compare", "--methods", compare.ALL),
        ("random_pruning", "--methods", ("magnitude", "snip", "grasp", "synflow", "gradual", "set", "rigl")),
        ("random_pruning", "--distributions", ("uniform", "uniform+", "er", "erk", "erk+", "snip", "grasp", "synflow")),
        ("pruning_only", "--parts", ("construction", "width", "depth", "narrow", "data")),
        ("pruning_only", "--families", ("mlp", "cnn")),
    ],
)
def test_an_unknown_name_in_a_list_gets_an_answer_with_those_there_are(command, flag, valid, capsys):
    with pytest.raises(SystemExit) as stopped:
        parsed(command, flag, valid[0], "magic")
    says = capsys.readouterr().err
    assert stopped.value.code == 2 and flag in says and "magic" in says and "Traceback" not in says
    assert all(name in says for name in valid)


def test_flags_that_were_renamed_are_understood():
    for command in ("compare", "random_pruning"):
        assert parsed(command, "--strangers", "kmnist") == parsed(command, "--ood", "kmnist")
    assert parsed("compare", "--no-judge") == parsed("compare", "--no-assess") != parsed("compare")


@pytest.mark.parametrize("command", COMMANDS)
def test_field_names_are_unique_and_defaults_can_be_run(command):
    names = [field.name for field in fields(COMMANDS[command].Config)]
    assert len(names) == len(set(names))
    assert parsed(command) == COMMANDS[command].Config()


@pytest.mark.parametrize("command", COMMANDS)
def test_no_number_is_without_a_bound_but_for_numbers_of_images_which_the_data_bound(command):
    numbers = [f.name for f in fields(COMMANDS[command].Config) if {int, float} & {f.type, *typing.get_args(f.type)}]
    taken = collections.defaultdict(set)
    for name in numbers:
        for value in ("1000000000000", "1e300", "inf", "nan"):
            with contextlib.suppress(UserError, SystemExit):
                parsed(command, f"--{name.replace('_', '-')}", value)
                taken[value].add(name)
    assert len(numbers) > 2 and set(taken) <= {"1000000000000"}
    images, rates = {"train_images", "validation"}, {"learning_rate", "weight_decay", "temperature"}
    assert taken["1000000000000"] <= images | rates


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_every_field_imports_nothing_heavy_and_answers_at_once(command):
    code = f"""
import runpy, sys
sys.argv = ["experiments.{command}", "--help"]
try:
    runpy.run_module("experiments.{command}", run_name="__main__")
except SystemExit as stopped:
    print("heavy:", sorted({{"jax", "numpy", "matplotlib", "flax"}} & set(sys.modules)), stopped.code)
"""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert (done.returncode, done.stderr) == (0, "")
    assert "heavy: [] 0" in done.stdout
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1  # seconds of the processor
    for field in fields(COMMANDS[command].Config):
        assert f"--{field.name.replace('_', '-')} " in done.stdout.replace(",", " ")
    first_line = inspect.getdoc(COMMANDS[command].Config).splitlines()[0]
    assert first_line.split(":")[0] in done.stdout


@pytest.mark.slow
def test_a_cell_that_diverges_is_left_out_and_the_sweep_continues(tmp_path, capsys):
    network = {"model": "mlp", "width": 8, "epochs": 1}
    grid = [cells.cell({"rate": rate}, "dense", learning_rate=rate, **network) for rate in (1e30, 1e-3)]
    rows, left_out = cells.run(grid, tiny(), tmp_path)
    assert [row["rate"] for row in rows] == [1e-3]
    assert [(row["rate"], row["seed"]) for row in left_out] == [(1e30, 0)] and "not finite" in left_out[0]["reason"]
    assert "left out: " in capsys.readouterr().out
