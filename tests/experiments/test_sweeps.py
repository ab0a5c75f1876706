"""Sweeps of many small runs: every cell leaves its row, is trained once, and bad settings are refused at once."""

import dataclasses
import inspect
import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

from experiments import compare, pruning_only, random_pruning
from experiments.data import load as data
from experiments.mnist import Config
from experiments.plots import style
from experiments.run import command_line
from experiments.run.errors import UserError
from experiments.run.workdir import default_path
from experiments.sweeps import cells
from experiments.sweeps import construction as target
from experiments.training import fit as runner
from supermask_jax import models

ROOT = Path(__file__).parents[2]
COMMANDS = {"compare": compare, "random_pruning": random_pruning, "pruning_only": pruning_only}
FIGURES = {"test_accuracy", "test_loss", "density", "parameters", "flops", "epochs", "steps", "train_seconds"}
JUDGED = {"ece", "brier", "fgsm_accuracy", "ood_auroc", "gradient_flow"}
TIMES = {"train_seconds"}


@pytest.fixture(autouse=True, scope="module")
def coarse_pictures():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(style, "DOTS_PER_INCH", 30)
        yield


def small(folder, **changes):
    settings = {"methods": ("dense", "bernoulli", "random"), "densities": (0.3,), "seeds": 1, "epochs": 1}
    network = {"model": "mlp", "width": 16, "depth": 1, "dataset": "mnist-5k"}
    return compare.Config(**settings | network | {"workdir": str(folder / "compare")} | changes)


def written(folder):
    return json.loads((folder / "summary.json").read_text())


def without_times(rows):
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


def assert_is_a_picture(file):
    with PIL.Image.open(file) as picture:
        pixels = np.asarray(picture.convert("L"))
    assert min(pixels.shape) > 80 and pixels.std() > 5


def trained(patch):
    """The names of the directories that are trained in from now on; a stand-in for `runner._train` notes them."""
    names, train = [], runner._train

    def noted(config, dataset, held, workdir, *rest):
        names.append(workdir.path.name)
        return train(config, dataset, held, workdir, *rest)

    patch.setattr(runner, "_train", noted)
    return names


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
        sampled = {"test_sampled_accuracy"} if row["method"] == "bernoulli" else set()
        assert set(row) == {"method", "asked", "seed"} | FIGURES | JUDGED | sampled
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


def test_the_summary_on_disk_is_what_main_returns_and_the_picture_is_real(compared):
    folder, summary = compared
    assert written(folder / "compare") == json.loads(json.dumps(summary))
    assert (summary["dataset"], summary["config"]["densities"]) == ("mnist-5k", (0.3,))
    assert {"data_source", "versions"} <= set(summary)
    assert {file.name for file in (folder / "compare").iterdir()} == {"summary.json", "compare.png"}
    assert_is_a_picture(folder / "compare" / "compare.png")
    for cell in (folder / "cells").iterdir():  # of which checkpoints are not needed, once it is finished
        assert {file.name for file in cell.iterdir()} == {".lock", "config.json", "metrics.jsonl", "summary.json"}


def test_a_second_run_trains_nothing_and_a_wider_one_only_the_new_cells(compared, tmp_path, monkeypatch):
    folder, summary = compared
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    with monkeypatch.context() as patch:
        patch.setattr(runner, "_train", None)
        again = compare.main(small(tmp_path))
        renamed = compare.main(small(tmp_path, workdir=str(tmp_path / "another")))  # sweeps share their cells
    assert again["rows"] == renamed["rows"] == summary["rows"]
    names = trained(monkeypatch)
    wider = compare.main(small(tmp_path, densities=(0.3, 0.7)))
    assert len(names) == 1 and names[0].startswith("random-mnist-5k-d0.7-s0-")
    dense, bernoulli, new, random = wider["rows"]
    assert [dense, bernoulli, random] == summary["rows"] and (new["method"], new["asked"]) == ("random", 0.7)
    assert new["density"] == pytest.approx(0.7, abs=1e-3)


def test_an_interrupted_comparison_goes_on_with_the_rest_and_ends_the_same(compared, tmp_path, monkeypatch):
    _, whole = compared
    settings, train, started = small(tmp_path, methods=("dense", "random")), runner._train, []

    def interrupted(config, *rest):
        started.append(config.method)
        if len(started) == 2:
            raise KeyboardInterrupt
        return train(config, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(runner, "_train", interrupted)
        compare.main(settings)
    assert started == ["dense", "random"] and not list((tmp_path / "compare").iterdir())
    names = trained(monkeypatch)
    rows = compare.main(settings)["rows"]
    assert [name.split("-")[0] for name in names] == ["random"]
    assert without_times(rows) == [row for row in without_times(whole["rows"]) if row["method"] != "bernoulli"]


class Asked(Exception):
    pass


def grid_of(patch, settings):
    """The cells that a comparison asks for; none is trained."""

    def asked(grid, *_):
        raise Asked(grid)

    patch.setattr(cells, "run", asked)
    with pytest.raises(Asked) as caught:
        compare.main(settings)
    return caught.value.args[0]


def test_methods_that_take_no_density_get_one_cell_a_seed(tmp_path, monkeypatch):
    settings = small(tmp_path, methods=compare.ALL, densities=(0.2, 0.7, 0.2), seeds=2)
    asked = [(c.labels["method"], c.labels["asked"], c.config.seed) for c in grid_of(monkeypatch, settings)]
    for method in compare.ALL:
        densities = [1.0] if method in ("dense", "bernoulli") else [0.7, 0.2]
        assert [a for a in asked if a[0] == method] == [(method, d, s) for d in densities for s in (0, 1)]
    assert len(asked) == len(set(asked))


def test_cells_that_differ_in_any_setting_lie_in_different_directories():
    base = cells.cell({}, "random", dataset="mnist-5k").config
    elsewhere = {"data_dir", "workdir", "checkpoint_every", "preset"}  # where it lies does not change a cell ...
    elsewhere |= {"devices", "parallel", "shard_scores"}  # ... nor what it is trained on
    elsewhere |= {"coordinator", "num_processes", "process_id"}
    others = {bool: lambda v: not v, int: lambda v: v + 1, float: lambda v: v / 2 + 0.01}
    names = {default_path(base, "cells").name}
    for field in dataclasses.fields(Config):
        value = getattr(base, field.name)
        choices = [v for v in getattr(field.type, "__args__", ()) if v != value and v is not type(None)]
        if field.name in elsewhere:
            other = {"preset": "tutorial", "parallel": "pmap"}.get(field.name, 8)
            assert default_path(dataclasses.replace(base, **{field.name: other}), "cells").name in names
        else:
            other = choices[0] if choices else others[type(value)](value)
            names.add(default_path(dataclasses.replace(base, **{field.name: other}), "cells").name)
    assert len(names) == 1 + len(dataclasses.fields(Config)) - len(elsewhere)


def test_rows_are_grouped_in_their_order_and_those_without_a_value_left_out():
    rows = [{"n": "b", "x": 2, "y": 0.5}, {"n": "a", "x": 1, "y": 0.1}, {"n": "b", "x": 1, "y": None}, {"n": "c"}]
    groups = cells.grouped([*rows, {"n": "b", "x": 2, "y": 0.25}], "n", "x", "y")
    assert groups == {"b": {2: [0.5, 0.25]}, "a": {1: [0.1]}} and list(groups) == ["b", "a"]


# Random pruning.


def test_random_pruning_from_end_to_end(tmp_path, monkeypatch, capsys):
    choice = {"densities": (0.3,), "distributions": ("erk", "erk+", "snip"), "methods": ("set", "synflow"), "seeds": 1}
    network = {"model": "cnn", "width": 2, "depth": 2, "widths": (2,), "depths": (2,)}
    training = {"epochs": 1, "batch_size": 15, "dataset": "mnist-5k"}  # 267 steps: set changes its masks once
    path, names = tmp_path / "random_pruning", trained(monkeypatch)
    summary = random_pruning.main(random_pruning.Config(**choice, **network, **training, workdir=str(path)))
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
    assert len(set(names)) == 6  # one of them was left out: what both sweeps ask for is trained once
    for row in summary["rows"]:
        size = 9 * 2 + 9 * 2 * 2 + 2 * 2 * 2 * 10
        assert set(row) >= FIGURES | JUDGED and row["steps"] == 267 and 0 < row["test_accuracy"] < 1
        assert 0 <= row["parameters"] - row["asked"] * size <= 3  # each layer rounds up
    (left_out,) = (line for line in capsys.readouterr().out.splitlines() if "left out" in line)
    assert "random, erk+" in left_out and "the density must be at least 0.597" in left_out  # its last layer alone
    (rewired,) = (tmp_path / "cells").glob("set-*/metrics.jsonl")
    assert sum(json.loads(rewired.read_text().splitlines()[-1])["flips"].values()) > 0
    assert written(path) == json.loads(json.dumps(summary))
    assert {file.name for file in path.iterdir()} == {"summary.json", "distributions.png", "sizes.png"}
    for picture in path.glob("*.png"):
        assert_is_a_picture(picture)


def test_every_size_is_trained_dense_and_at_each_density():
    settings = random_pruning.Config(densities=(0.2, 0.7), widths=(8, 4), depths=(2, 1), seeds=2)
    grid = [cell for cell in random_pruning.grid(settings) if cell.labels["part"] == "size"]
    sizes = [(cell.config.depth, cell.config.width) for cell in grid]
    assert sizes == [size for size in ((1, 4), (1, 8), (2, 4), (2, 8)) for _ in range(6)]
    for i, cell in enumerate(grid):
        method, density = (("dense", 1.0), ("random", 0.7), ("random", 0.2))[i // 2 % 3]
        assert (cell.config.method, cell.config.density, cell.config.seed) == (method, density, i % 2)
        assert (cell.labels["width"], cell.labels["asked"]) == (cell.config.width, density)
        assert method == "dense" or cell.config.distribution == "erk"


def test_without_sizes_there_is_no_picture_of_sizes():
    settings = random_pruning.Config(widths=(), seeds=1)
    assert {cell.labels["part"] for cell in random_pruning.grid(settings)} == {"distribution"}
    assert random_pruning.draw_sizes({"config": dataclasses.asdict(settings), "rows": []}) is None


# Pruning only.


def parameters(family, width, depth):
    sizes = (width,) * depth
    model = models.MLP(use_bias=False, hidden=sizes) if family == "mlp" else models.ConvNet(channels=sizes)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 28, 28, 1)))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


@pytest.mark.parametrize("family", ["mlp", "cnn"])
def test_networks_of_every_depth_are_the_widest_with_so_many_parameters(family):
    for depth in pruning_only.DEPTHS[family]:
        width = pruning_only.width_for(family, depth)
        most = pruning_only.PARAMETERS[family]
        assert 0.8 * most < parameters(family, width, depth) <= most < parameters(family, width + 1, depth)


@pytest.mark.parametrize("examples", [4_000, 60_000])
def test_fewer_images_are_passed_over_more_often_so_that_the_steps_are_as_many(examples):
    settings = pruning_only.Config(parts=("data",), seeds=2)
    grid = pruning_only.grid(settings, examples)
    counts = [count for count in pruning_only.TRAIN_IMAGES if count <= examples]
    for family in ("mlp", "cnn"):
        chosen = [cell for cell in grid if cell.config.model == family]
        assert [cell.labels["train_images"] for cell in chosen] == [n for n in counts for _ in range(2)]
        assert [cell.config.seed for cell in chosen] == [0, 1] * len(counts)
        steps = [cell.config.epochs * -(-n // 128) for cell, n in zip(chosen, sorted(counts * 2), strict=True)]
        assert max(steps) < 1.03 * min(steps) and steps[-1] == 3 * -(-examples // 128)
        assert chosen[-1].config.train_images == 0 and chosen[0].config.train_images == 1_000


def test_every_learned_part_has_its_cells():
    grid = pruning_only.grid(pruning_only.Config(seeds=1), 60_000)
    found = {part: [c for c in grid if c.labels["part"] == part] for part in pruning_only.AXES}
    widths, depths = (sum(map(len, sizes.values())) for sizes in (pruning_only.WIDTHS, pruning_only.DEPTHS))
    expected = {"width": 2 * widths, "depth": depths, "narrow": depths, "data": 2 * len(pruning_only.TRAIN_IMAGES)}
    assert {part: len(of_it) for part, of_it in found.items()} == expected
    assert {c.config.unit for c in found["width"]} == {"weight", "neuron"}
    for cell in grid:
        assert (cell.config.width, cell.config.depth) == (cell.labels["width"], cell.labels["depth"])
        assert cell.config.method == "edge-popup" and cell.config.density == 0.5


def test_pruning_only_from_end_to_end(tmp_path, monkeypatch):
    monkeypatch.setattr(target, "EPOCHS", 5)
    monkeypatch.setattr(pruning_only, "WIDTHS", {"mlp": (8,)})
    chosen = {"parts": ("construction", "width"), "families": ("mlp",), "construction_widths": (6, 1), "seeds": 1}
    training = {"epochs": 1, "density": 0.7, "dataset": "mnist-5k", "workdir": str(tmp_path / "pruning_only")}
    summary = pruning_only.main(pruning_only.Config(**chosen, **training))

    built = summary["construction"]
    assert 0.85 < built["target"]["accuracy"] < 1 and built["target"]["deviation"] > 0
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
    return command_line.parse(COMMANDS[command].Config, lambda **_: {}, "x", list(flags))


@pytest.mark.parametrize(
    ("command", "flags", "says"),
    [
        ("compare", ["--densities", "0.5", "0"], "--densities must be fractions kept, in (0, 1); got (0.5, 0.0)."),
        ("compare", ["--densities", "1"], "got (1.0,)"),
        ("compare", ["--densities", "nan"], "got (nan,)"),
        ("compare", ["--densities"], "--densities must be"),
        ("compare", ["--methods"], "--methods must be one or more"),
        ("compare", ["--seeds", "0"], "--seeds must be 1 or more; got 0."),
        ("compare", ["--width", "0"], "--width must be"),
        ("compare", ["--depth", "0"], "--depth must be"),
        ("compare", ["--epochs", "-1"], "--epochs must be"),
        ("compare", ["--dataset", "mnist5k"], "did you mean 'mnist-5k'?"),
        ("random_pruning", ["--densities", "1", "0.1"], "--densities must be fractions kept, in (0, 1)"),
        ("random_pruning", ["--densities", "0"], "got (0.0,)"),
        ("random_pruning", ["--seeds", "0"], "--seeds must be 1 or more"),
        ("random_pruning", ["--widths", "4", "0"], "--widths must be 1 or more each; got (4, 0)."),
        ("random_pruning", ["--depths", "0"], "--depths must be"),
        ("random_pruning", ["--batch-size", "0"], "--batch-size must be"),
        ("random_pruning", ["--model", "convnet"], "no model 'convnet': did you mean 'cnn'? There are: cnn, mlp."),
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


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_every_field_and_imports_nothing_heavy(command):
    code = f"""
import runpy, sys
sys.argv = ["experiments.{command}", "--help"]
try:
    runpy.run_module("experiments.{command}", run_name="__main__")
except SystemExit as stopped:
    print("heavy:", sorted({{"jax", "numpy", "matplotlib", "flax"}} & set(sys.modules)), stopped.code)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert "heavy: [] 0" in done.stdout
    for field in COMMANDS[command].Config.__dataclass_fields__:
        assert f"--{field.replace('_', '-')} " in done.stdout.replace(",", " ")
    first_line = inspect.getdoc(COMMANDS[command].Config).splitlines()[0]
    assert first_line.split(":")[0] in done.stdout


def test_a_cell_that_diverges_is_left_out_and_the_sweep_goes_on(tmp_path, capsys):
    small = {"model": "mlp", "width": 8, "epochs": 1}
    grid = [cells.cell({"rate": rate}, "dense", learning_rate=rate, **small) for rate in (1e30, 1e-3)]
    rows = cells.run(grid, data.load("mnist-5k"), tmp_path)
    assert [row["rate"] for row in rows] == [1e-3]
    assert "left out: " in capsys.readouterr().out
