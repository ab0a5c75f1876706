"""Accuracy against bits: every file is measured on disk and evaluated, and the front is that of all points."""

import json
import re

import numpy as np
import PIL.Image
import pytest

import supermask_jax as sm
from experiments import bits
from experiments.config.flags import parser
from experiments.config.registry import METHODS
from experiments.config.settings import changed, flat
from experiments.data.source import arrays_dataset
from experiments.plots import bits as plots
from experiments.run.errors import UserError
from experiments.sweeps import bits as sweep
from experiments.sweeps import cells
from supermask_jax import artifact

pytestmark = pytest.mark.usefixtures("coarse_pictures")

NETWORK = {"model": "mlp", "width": 30, "depth": 1, "epochs": 1}
CHOSEN = {
    "methods": ("edge-popup", "gradual", "dense"),
    "distributions": ("erk",),
    "densities": (0.3,),
    "widths": (15,),
}


def images(classes=3, shape=(12, 11, 1)):
    """84 training and 36 test images; each class is bright at other pixels."""
    labels = np.arange(120, dtype=np.int32) % classes
    pixels = np.random.default_rng(0).integers(0, 90, (120, *shape)).astype(np.uint8)
    rows = pixels.reshape(120, -1)
    rows[labels[:, None] == np.arange(rows.shape[1]) % classes] += 60
    return arrays_dataset("mnist-5k", (pixels[:84], labels[:84], pixels[84:], labels[84:]), "made by hand", classes)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """(work directory, what main returned) of a sweep that leaves every kind of file."""
    path = tmp_path_factory.mktemp("bits") / "sweep"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cells, "open_data", lambda data: images())
        config = changed(bits.Config(), **CHOSEN, **NETWORK, workdir=str(path))
        return path, bits.main(config)


def rows_of(summary, **wanted):
    return [row for row in summary["rows"] if all(row[name] == value for name, value in wanted.items())]


@pytest.mark.slow
def test_every_network_has_a_row_for_each_format_of_its_file(measured):
    _, summary = measured
    lines = [(row["line"], row["network"], row["asked"]) for row in summary["rows"]]
    assert lines == [
        ("edge-popup, erk", "mlp", 0.3),
        *((f"gradual, {dtype}", "mlp", 0.3) for dtype in bits.DTYPES),
        *((f"dense, {dtype}", "mlp", 1.0) for dtype in bits.DTYPES),
        *((f"dense mlp, {dtype}", "mlp, width 15", 1.0) for dtype in bits.DTYPES),
    ]
    assert len(summary["points"]) == len(lines) and {row["seed"] for row in summary["rows"]} == {0}


@pytest.mark.slow
def test_a_row_has_the_size_and_the_accuracy_of_a_file_on_disk(measured):
    path, summary = measured
    sizes = sorted(file.stat().st_size for file in path.parent.rglob("*.safetensors"))
    assert sorted(row["file_bytes"] for row in summary["rows"]) == sizes
    for row in summary["rows"]:
        assert row["trained_accuracy"] == pytest.approx(
            row["test_accuracy"], abs=0.3 if row["stored"] == "int4" else 0.1
        )
        if row["stored"] not in ("int8", "int4"):  # nothing was rounded
            assert row["test_accuracy"] == row["trained_accuracy"]


@pytest.mark.slow
def test_a_narrower_format_makes_every_trained_file_smaller_and_a_supermask_is_smaller_still(measured):
    _, summary = measured
    for row in rows_of(summary, stored="float32"):
        same = {"family": row["family"], "asked": row["asked"]}
        (narrow,), (narrowest,) = (rows_of(summary, stored=dtype, **same) for dtype in ("int8", "int4"))
        assert narrowest["file_bytes"] < narrow["file_bytes"] < row["file_bytes"]
    (supermask,) = rows_of(summary, family="edge-popup, erk")
    assert supermask["file_bytes"] < min(row["file_bytes"] for row in rows_of(summary, family="gradual"))


@pytest.mark.slow
def test_a_converted_network_differs_from_the_trained_one_by_rounding_alone(measured):
    path, _ = measured
    converted = list((path / "networks").iterdir())
    assert len(converted) == 6
    for file in converted:
        cell, _, dtype = file.stem.rpartition("-")
        own = path.parent / "cells" / cell / artifact.FILE
        (before, masks, _, told), (after, _, _, about) = sm.load_subnetwork(own), sm.load_subnetwork(file)
        assert {name for name in told if name not in about} == {"test_accuracy", "test_loss"}
        for layer, leaves in before.items():
            kernel, rounded = np.asarray(leaves["kernel"]), np.asarray(after[layer]["kernel"])
            step = np.abs(kernel).max(axis=0) / {"int8": 127, "int4": 7}[dtype]
            assert np.abs(kernel - rounded).max() > 0 and (np.abs(kernel - rounded) <= 0.51 * step).all()
            assert masks[layer]["kernel"] is None or ((rounded != 0) <= (np.asarray(masks[layer]["kernel"]) == 1)).all()


@pytest.mark.slow
def test_the_files_of_the_sweep_are_its_summary_its_picture_and_the_converted_networks(measured):
    path, summary = measured
    assert {file.name for file in path.iterdir()} == {"summary.json", "bits.png", "networks"}
    assert json.loads((path / "summary.json").read_text()) == json.loads(json.dumps(summary))
    with PIL.Image.open(path / "bits.png") as picture:
        assert np.asarray(picture.convert("L")).std() > 5


@pytest.mark.slow
def test_a_second_sweep_trains_nothing_and_a_file_that_is_gone_is_left_out(measured, monkeypatch, capsys):
    path, summary = measured
    monkeypatch.setattr(cells, "open_data", lambda data: images())
    monkeypatch.setattr("experiments.training.fit._Job.run", None)
    config = changed(bits.Config(), **CHOSEN, **NETWORK, workdir=str(path.with_name("again")))
    (folder,) = (path.parent / "cells").glob("edge-popup-*")
    (folder / artifact.FILE).rename(folder / "elsewhere")
    try:
        again = bits.main(config)
    finally:
        (folder / "elsewhere").rename(folder / artifact.FILE)
    assert again["rows"] == [row for row in summary["rows"] if row["family"] != "edge-popup, erk"]
    assert "left out: edge-popup, erk, mlp, seed 0, seed and masks: " in capsys.readouterr().err


def point(line, size, accuracy, **more):
    row = {"line": line, "family": line, "stored": "int8", "network": "mlp", "asked": 0.3, "density": 0.3, "seed": 0}
    return row | {"file_bytes": size, "test_accuracy": accuracy} | more


def test_seeds_are_one_point_with_their_mean_and_range():
    rows = [point("a", 100, 0.5), point("a", 300, 0.9, seed=1), point("b", 100, 0.5)]
    mean, other = plots.points(rows)
    assert (mean["file_bytes"], mean["lowest"], mean["highest"], mean["seeds"]) == (200, 0.5, 0.9, 2)
    assert mean["test_accuracy"] == pytest.approx(0.7) and (other["line"], other["seeds"]) == ("b", 1)


def test_the_front_is_where_no_file_is_smaller_and_as_accurate():
    rows = [
        point("a", 100, 0.5),
        point("b", 200, 0.5),
        point("c", 200, 0.8),
        point("d", 300, 0.7),
        point("e", 400, 0.9),
    ]
    assert [at["line"] for at in plots.points(rows) if at["front"]] == ["a", "c", "e"]


def test_the_smallest_file_that_reaches_an_accuracy_is_shown(capsys):
    rows = [point("a", 1234, 0.96), point("a", 800, 0.92), point("b", 5000, 0.985)]
    for number, row in enumerate(rows):
        row["asked"] = 0.1 * number
    sweep.show(plots.points(rows), "mnist-5k")
    _, table = re.split("bytes of the smallest file", capsys.readouterr().out)
    a, b = (re.findall(r"[\d,]+", line) for line in table.splitlines() if re.search("│ [ab] ", line))
    assert a == ["800", "1,234"] and b == ["5,000"] * 5  # of 90, 95, 97, 98, 98.5 %


def test_every_method_of_the_command_line_has_cells():
    shared = {**flat(bits.Config().model), "epochs": 1}
    grid = sweep.grid(tuple(METHODS), (0.3, 0.7), ("uniform", "erk"), 2, shared)
    small = sweep.grid(("edge-popup",), (0.05,), ("uniform", "erk"), 1, shared)
    small += sweep.grid(("edge-popup",), (0.7,), ("erk",), 1, shared)
    (conv,) = sweep.grid(("edge-popup",), (0.05,), ("erk",), 1, {**shared, "model": "conv2"})
    assert {cell.config.masks.method for cell in grid} == set(METHODS)
    of_edge_popup = [cell for cell in grid if cell.config.masks.method == "edge-popup"]
    inits = [(cell.config.masks.distribution, cell.config.init) for cell in of_edge_popup]
    assert len(inits) == 2 * 2 * 2 and all(init.scale_weights != init.scale_layers for _, init in inits)
    assert all(init.scale_layers == (distribution == "erk") for distribution, init in inits)
    rates = {(cell.config.masks.distribution, cell.labels["asked"]): cell.config.optim.learning_rate for cell in small}
    assert rates == {("uniform", 0.05): 0.01, ("erk", 0.05): 0.05, ("erk", 0.7): 0.1}
    assert conv.config.init.scale_layers and conv.config.optim.learning_rate == 0.01
    assert len([cell for cell in grid if cell.labels["family"] == "dense"]) == 2


def test_small_networks_do_not_take_the_options_of_the_large_one():
    shared = {**flat(changed(bits.Config(), biases=True, bfloat16=True).model), "epochs": 1}
    (cell,) = sweep.small(("cnn",), (4,), 1, shared)
    assert (cell.config.model.model, cell.config.model.width, cell.config.model.biases) == ("cnn", 4, False)
    assert cell.config.model.bfloat16  # which is no option of a network
    assert (cell.labels["family"], cell.labels["network"]) == ("dense cnn", "cnn, width 4")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--densities", "0.5", "1"], "--densities must be fractions kept, in (0, 1); got (0.5, 1.0)."),
        (["--methods"], "--methods must be one or more methods; got ()."),
        (["--distributions"], "--distributions must be one or more"),
        (["--dtypes"], "--dtypes must be one or more number formats"),
        (["--widths", "0"], "--widths must be in [1, 65,536] each; got (0,)."),
        (["--seeds", "0"], "--seeds must be in [1, 1,000]; got 0."),
        (["--epochs", "0"], "--epochs must be in [1, 1,000,000]; got 0."),
        (["--width", "8"], "nothing reads --width here"),
    ],
)
def test_bad_input_is_one_clear_paragraph(flags, says):
    with pytest.raises(UserError) as refused:
        parser(bits.Config)("x", flags)
    assert says in str(refused.value) and "\n" not in str(refused.value)
