"""--dry-run: the figures of a compiled step are those of the network, nothing is trained and nothing is written."""

from pathlib import Path

import numpy as np
import pytest

from experiments import imagenet, mnist
from experiments.bench import dry_run
from experiments.bench.networks import describe
from experiments.config.registry import METHODS
from experiments.config.settings import changed
from experiments.data.blank import blank_imagenet
from experiments.run.errors import DataError, UserError
from experiments.run.placement import Placement
from experiments.training.evaluation import Split
from experiments.training.methods import Setup
from experiments.training.parts import Parts

DOCUMENT = (Path(__file__).parents[2] / "docs" / "scaling.md").read_text()
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


def test_expected_speeds_follow_the_chip_the_steps_and_the_number_format(mlp):
    chips = measured(mlp)["chips"]
    assert set(chips) == set(dry_run.CHIPS) and all(chip["fits"] for chip in chips.values())
    for chip in chips.values():
        assert chip["days"] == pytest.approx(240 / chip["steps_per_second"] / 86400)
    assert chips["H100"]["steps_per_second"] > chips["A100"]["steps_per_second"]
    narrow = measured(changed(mlp, bfloat16=True))["chips"]
    assert narrow["H100"]["steps_per_second"] > chips["H100"]["steps_per_second"]


def test_the_measured_step_is_the_one_that_the_guesses_are_made_from():
    """CIFAR's ResNet-18 in batches of 128 takes 4.32 ms dense and 7.39 ms by edge-popup, as docs/speed.md has it."""
    data = blank_imagenet(32, 10)
    for method, seconds in (("dense", 4.321e-3), ("edge-popup", 7.394e-3)):
        config = changed(imagenet.Config(), model="resnet-18", method=method, batch_size=128, image_size=32)
        parts = Parts(config, data, Split("test", data.test), Placement())
        network = dry_run.describe_module(parts.network.module, (32, 32, 3))
        sizes = {"parameters": 11_164_352, "steps": 1, "memory": {"state": 0}, "wire": {}}
        got = dry_run._on_chip(parts, network, sizes, dry_run.CHIPS["H100"])
        assert 1 / got["steps_per_second"] == pytest.approx(seconds, rel=0.01)


def test_the_expected_speed_of_resnet_50_is_near_the_published_one():
    """938 photographs a second by NVIDIA's example on an A100 in TF32, and 2,470 in mixed precision."""
    network, data = describe("resnet-50"), blank_imagenet()
    for narrow, text, published in ((False, "997", 938), (True, "1,994", 2470)):
        config = changed(imagenet.Config(), method="dense", bfloat16=narrow)
        parts = Parts(config, data, Split("test", data.test), Placement())
        vars(parts)["method"] = METHODS["dense"].resolve()(Setup(config.masks, None, {}, None, None, None))
        sizes = {"parameters": 0, "steps": 1, "memory": {"state": 0}, "wire": {}}
        got = dry_run._on_chip(parts, network, sizes, dry_run.CHIPS["A100"])["steps_per_second"]
        assert got * config.optim.batch_size == pytest.approx(published, rel=0.2)
        assert f"{got * config.optim.batch_size:,.0f}" == text and f" {text} " in DOCUMENT.replace("\n", " ")


def test_a_state_that_is_larger_than_the_memory_does_not_fit(mlp):
    data = dry_run._images(mlp)
    parts = Parts(mlp, data, Split("test", data.test), Placement())
    network = dry_run.describe_module(parts.network.module, (28, 28, 1))
    for state, fits in ((79e9, True), (81e9, False)):
        sizes = {"parameters": 1, "steps": 1, "memory": {"state": state}, "wire": {}}
        assert dry_run._on_chip(parts, network, sizes, dry_run.CHIPS["H100"])["fits"] is fits


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


@pytest.mark.parametrize(("days", "text"), [(0.001, "1 minutes"), (0.5, "12.0 hours"), (3.25, "3.2 days")])
def test_times_have_the_unit_that_fits(days, text):
    assert dry_run._time(days) == text
