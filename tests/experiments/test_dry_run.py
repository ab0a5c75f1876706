"""--dry-run: the figures of a compiled step are those of the network, nothing is trained and nothing is written."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest

from experiments import cifar, imagenet, mnist
from experiments.bench import dry_run
from experiments.bench.networks import describe
from experiments.config.settings import changed
from experiments.run.errors import DataError, UserError
from experiments.run.placement import Placement
from experiments.training.evaluation import Split
from experiments.training.network import network as make_network
from experiments.training.parts import Parts

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs" / "scaling.md").read_text()
NETWORKS = {"MNIST convnet": "convnet", "Conv2": "conv2", "Conv4": "conv4"}
NETWORKS |= {"ResNet-20": "resnet-20", "ResNet-18": "resnet-18"}
SIZES = (784 * 100, 100 * 100, 100 * 10)  # of the kernels of an MLP of two hidden layers of 100
MLP = {"dataset": "mnist-5k", "model": "mlp", "batch_size": 50, "epochs": 3, "density": 0.5}


def measured(config, data=None):
    data = data or dry_run._images(config)
    return dry_run.measure(Parts(config, data, Split("test", data.test), Placement()))


@pytest.fixture
def mlp():
    return changed(mnist.Config(), **MLP)


def test_the_figures_are_those_of_the_network_and_of_the_training(mlp):
    got = measured(mlp)
    assert (got["parameters"], got["kept"], got["steps"]) == (sum(SIZES), 0.5, 3 * 4000 // 50)
    assert (got["flops"], got["kept_flops"]) == (2 * sum(SIZES), sum(SIZES))
    assert got["step_flops"] == 3 * 2 * sum(SIZES) * 50
    # Weights, scores and momentum in float32; beside them counters and a key.
    assert 0 <= got["memory"]["state"] - 3 * 4 * sum(SIZES) < 100
    assert 0 <= got["memory"]["images"] - 4000 * (784 + 4) < 60_000, "the images, and the order of an epoch"
    assert got["memory"]["peak"] == got["memory"]["state"] + got["memory"]["images"] + got["memory"]["temporary"]
    assert got["memory"]["temporary"] > 4 * sum(SIZES), "the gradients at least"
    assert not got["wire"], "one device has nobody to send to"


def expected(config, network, chip, learns, state=0):
    sizes = {"steps": 480, "memory": {"state": state}, "wire": {}}
    return dry_run._on_chip(config, network, sizes, 1, learns, dry_run.CHIPS[chip])


def test_expected_speeds_follow_the_chip_the_steps_and_the_number_format(mlp):
    chips = measured(mlp)["chips"]
    assert set(chips) == set(dry_run.CHIPS) and all(chip["fits"] for chip in chips.values())
    for chip in chips.values():
        assert chip["days"] == pytest.approx(240 / chip["steps_per_second"] / 86400)
    network = describe("resnet-50")
    wide, narrow = (changed(imagenet.Config(), method="dense", bfloat16=narrow) for narrow in (False, True))
    slow = expected(wide, network, "A100", 0)
    assert slow["days"] == pytest.approx(480 / slow["steps_per_second"] / 86400)
    for faster in (expected(wide, network, "H100", 0), expected(narrow, network, "A100", 0)):
        assert faster["steps_per_second"] > 1.5 * slow["steps_per_second"]


def test_the_expected_steps_of_the_page_are_those_of_the_formulae_and_the_measured_ones():
    """What was measured: docs/speed.md, from experiments/results/h100.json."""
    rows = json.loads((ROOT / "experiments" / "results" / "h100.json").read_text())["rows"]
    plain = {(row["step"], row["method"]): row["ms"] for row in rows if "step" in row and "flags" not in row}
    shown = dict(re.findall(r"^\| ([\w -]+) \| ([\d., |]+) \|$", DOCUMENT, re.MULTILINE))
    for label, name in NETWORKS.items():
        config = changed(cifar.Config(), model=name, batch_size=128)
        shape = (28, 28, 1) if name == "convnet" else (32, 32, 3)
        network = dry_run.describe_module(make_network(config.model, config.init, 10, shape).module, shape)
        learns = 4 * sum(math.prod(shape) for shape in network.scores.values())
        texts = []
        for method in ("dense", "edge-popup"):
            milliseconds = 1e3 / expected(changed(config, method=method), network, "H100", learns)["steps_per_second"]
            assert milliseconds == pytest.approx(plain[name, method], rel=0.45)
            texts.append(f"{milliseconds:.2f}, {plain[name, method]:.2f}")
        assert shown[label] == " | ".join(texts)


def test_the_expected_speed_of_resnet_50_is_near_the_published_one():
    """938 photographs a second by NVIDIA's example on an A100 in TF32, and 2,470 in mixed precision."""
    network = describe("resnet-50")
    for narrow, text, published in ((False, "997", 938), (True, "1,994", 2470)):
        config = changed(imagenet.Config(), method="dense", bfloat16=narrow)
        got = expected(config, network, "A100", 0)["steps_per_second"] * config.optim.batch_size
        assert got == pytest.approx(published, rel=0.2)
        assert f"{got:,.0f}" == text and f" {text} " in DOCUMENT.replace("\n", " ")


def test_what_a_step_holds_must_be_less_than_the_memory(mlp):
    network = dry_run.describe_module(make_network(mlp.model, mlp.init, 10, (28, 28, 1)).module, (28, 28, 1))
    for state, learns, fits in ((79e9, 0, True), (81e9, 0, False), (70e9, 6e9, False)):
        assert expected(mlp, network, "H100", learns, state)["fits"] is fits


def test_masks_that_are_drawn_keep_no_known_part(mlp, capsys):
    got = mnist.main(changed(mlp, method="bernoulli", dry_run=True))
    assert got["kept"] is None and got["kept_flops"] is None and "kept" not in capsys.readouterr().out


def test_the_command_prints_its_figures_and_writes_nothing(mlp, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    got = mnist.main(changed(mlp, dry_run=True, workdir="run"))
    printed = capsys.readouterr().out
    assert "89,400" in printed and "50.0%" in printed and "H100" in printed and "240" in printed
    assert got["steps"] == 240 and not list(tmp_path.iterdir())


def test_imagenet_need_not_be_there_and_other_images_must(tmp_path, capsys):
    data = dry_run._images(changed(imagenet.Config(), data_dir=str(tmp_path), image_size=32))
    assert (len(data.train), len(data.test), data.classes) == (1_281_167, 50_000, 1000)
    assert "there are no photographs in" in capsys.readouterr().out
    batch = data.train.read(np.arange(3))
    assert batch["image"].shape == (3, 32, 32, 3) and batch["image"].dtype == np.uint8 and len(batch["label"]) == 3
    assert len(data.train.take(np.arange(5))) == 5
    with pytest.raises(DataError):
        dry_run._images(changed(imagenet.Config(), dataset="cifar10", data_dir=str(tmp_path)))


@pytest.mark.parametrize("other", [{"evaluate": "file"}, {"parallel": "pmap"}])
def test_what_compiles_no_such_step_is_refused(mlp, other):
    with pytest.raises(UserError, match="--dry-run compiles the train step of --parallel jit"):
        changed(mlp, dry_run=True, **other).check()


@pytest.mark.parametrize(
    ("count", "unit", "text"),
    [(0, "B", "0 B"), (999, "", "999"), (1234, "B", "1.23 kB"), (8.18e9, "", "8.18 G"), (2.5e15, "B", "2,500.00 TB")],
)
def test_numbers_are_short(count, unit, text):
    assert dry_run._scaled(count, unit) == text


@pytest.mark.parametrize(
    ("days", "text"), [(0.001, "a minute at most"), (0.01, "14 minutes"), (0.5, "12.0 hours"), (3.25, "3.2 days")]
)
def test_times_have_the_unit_that_fits(days, text):
    assert dry_run._time(days) == text
