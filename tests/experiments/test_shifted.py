"""Other photographs in the classes of the training set, and in none: found, matched by class, counted once each."""

import dataclasses
import shutil
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

from experiments import imagenet as command
from experiments import mnist
from experiments.config.flags import parser
from experiments.config.run import named
from experiments.config.settings import changed, flat, neutral
from experiments.data.load import load, load_like, load_ood, load_shifted
from experiments.data.shifted import V2
from experiments.data.source import Dataset, Shifted
from experiments.run import schemas
from experiments.run.errors import DataError, UserError
from experiments.run.files import read_json
from experiments.run.names import Settings
from experiments.training.evaluation import Evaluator
from experiments.training.fit import run
from supermask_jax.methods import dense

ROOT = Path(__file__).parents[2]
WNIDS = tuple(f"n{number:08}" for number in range(12))


def photographs(folder, counts):
    """{class folder: how many photographs} of noise, of several sizes."""
    for seed, (name, count) in enumerate(counts.items()):
        (folder / name).mkdir(parents=True)
        rng = np.random.default_rng([seed, count])
        for n in range(count):
            pixels = rng.integers(0, 256, (20 + n % 3, 24, 3), np.uint8)
            PIL.Image.fromarray(pixels).save(folder / name / f"{n}.jpg", quality=95)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Twelve classes to train on, and all three sets."""
    base = tmp_path_factory.mktemp("shifted")
    photographs(base / "imagenet" / "train", dict.fromkeys(WNIDS, 2))
    photographs(base / "imagenet" / "val", dict.fromkeys(WNIDS, 1))
    photographs(base / V2, {str(number): 1 + number % 2 for number in range(12)})
    photographs(base / "imagenet-a", {WNIDS[5]: 3, WNIDS[2]: 300, WNIDS[9]: 4})
    photographs(base / "imagenet-o", {"n77777777": 2, "n88888888": 3})
    return base


def trained_on(names=WNIDS, size=12):
    """A set of which only names and sizes matter."""
    none = load_nothing(size)
    return dataclasses.replace(none, classes=len(names), class_names=tuple(names))


def load_nothing(size):
    return Dataset("made up", None, None, 0, (size, size, 3), (0.5,) * 3, (0.25,) * 3, "00000000", "made up")


# Which photographs, in which classes.


def test_numbered_folders_are_places_among_the_sorted_names(root):
    [got] = load_shifted(["imagenet-v2"], root, trained_on())
    assert (got.dataset.name, len(got.dataset.test), got.classes.dtype) == ("imagenet-v2", 18, np.int32)
    for index in range(18):  # 0, 1, 10, 11, 2, ...: in the order of their names
        number = int(got.dataset.test.stored.photograph(index).name.split("/")[-2])
        assert got.classes[got.dataset.test.labels[index]] == number
    names = (*WNIDS[6:], *WNIDS[:6])  # a training set that numbers its classes in another order
    [moved] = load_shifted(["imagenet-v2"], root, trained_on(names))
    np.testing.assert_array_equal(moved.classes, (got.classes + 6) % 12)


def test_a_folder_among_numbered_ones_that_has_no_number_is_the_one_that_is_named(root, tmp_path):
    folder = tmp_path / V2
    shutil.copytree(root / V2, folder)
    shutil.copytree(folder / "0", folder / "notes")
    with pytest.raises(DataError, match="has the class folder notes, which is no class of"):
        load_shifted(["imagenet-v2"], tmp_path, trained_on())


def test_named_folders_are_classes_of_that_name_and_the_others_are_left_out(root):
    [got] = load_shifted(["imagenet-a"] * 2, root, trained_on())
    assert got.classes.tolist() == [2, 5, 9] and got.dataset.classes == 3
    assert np.bincount(got.dataset.test.labels).tolist() == [300, 3, 4]
    assert got.dataset.class_names == (WNIDS[2], WNIDS[5], WNIDS[9])


@pytest.mark.parametrize("size", [8, 12])
def test_all_photographs_are_read_at_the_size_of_the_training_images(root, size):
    dataset = trained_on(size=size)
    [a] = load_shifted(["imagenet-a"], root, dataset)
    both = load_ood(["imagenet", "imagenet-o"], root, dataset)
    for each in (a.dataset, *both):
        assert each.test.read(np.arange(2))["image"].shape == (2, size, size, 3), each.name
    assert [len(each.test) for each in both] == [12, 5] and both[1].name == "imagenet-o"
    assert load_like("imagenet", root, dataset).image_shape == (size, size, 3)


def test_the_data_set_itself_is_not_out_of_distribution_at_any_size(root):
    with pytest.raises(UserError, match="has the images that the network is trained on"):
        load_ood(["imagenet"], root, load("imagenet", root, image_size=10))


def test_the_names_of_the_classes_are_those_of_the_folders(root):
    assert load("imagenet", root, image_size=8).class_names == WNIDS
    assert load("mnist-5k", root).class_names == ()


# What is measured.


class Linear:
    def logits(self, params, state, images):
        return images.reshape(len(images), -1) @ params["w"]


def test_each_photograph_counts_once_and_only_the_logits_of_the_sets_classes_do(root):
    dataset = load("imagenet", root, image_size=8)
    [a] = load_shifted(["imagenet-a"], root, dataset)
    w = np.random.default_rng(0).normal(0, 0.05, (8 * 8 * 3, 12)).astype(np.float32)
    evaluator = Evaluator(dense({"w": jnp.asarray(w)}), Linear(), dataset)
    got = evaluator.shifted_figures({"w": jnp.asarray(w)}, None, a)
    batch = a.dataset.test.read(np.arange(307))
    pixels = (batch["image"] / 255 - np.array(dataset.mean)) / np.array(dataset.std)
    logits = (pixels.reshape(307, -1) @ w)[:, [2, 5, 9]]
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    right = logits.argmax(axis=1) == batch["label"]
    assert 0.1 < right.mean() < 0.9 and (got["images"], got["classes"]) == (307, 3)
    assert got["test_accuracy"] == pytest.approx(right.mean(), abs=1e-6)
    assert got["test_loss"] == pytest.approx(-np.log(p[np.arange(307), batch["label"]]).mean(), rel=1e-4)
    whole = evaluator.shifted_figures({"w": jnp.asarray(w)}, None, Shifted(dataset, np.arange(12, dtype=np.int32)))
    assert (whole["images"], whole["classes"]) == (12, 12)


SMALL = ("--model=cnn", "--width=4", "--depth=1", "--image-size=8", "--batch-size=8", "--epochs=1", "--warmup-epochs=0")


@pytest.mark.slow
def test_a_run_records_what_it_measures_on_them_and_so_does_its_file_on_any_number_of_devices(root, tmp_path, capsys):
    asked = ["--shifted", "imagenet-v2", "imagenet-a"]
    flags = [*SMALL, f"--data-dir={root}", f"--workdir={tmp_path}", "--devices=2"]
    flags += [*asked, "--assess", "--ood", "imagenet-o"]
    program = [sys.executable, "-m", "experiments.imagenet", *flags]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "on imagenet-v2" in done.stdout and "(307 images, 3 classes)" in done.stdout
    summary = read_json(tmp_path / "summary.json", schemas.RunSummary)
    recorded = summary["shifted"]
    assert list(recorded) == ["imagenet-v2", "imagenet-a"] and set(summary["ood_auroc"]) == {"noise", "imagenet-o"}
    assert (recorded["imagenet-v2"]["images"], recorded["imagenet-v2"]["classes"]) == (18, 12)
    file = str(tmp_path / "subnetwork.safetensors")
    config = parser(command.Config, command.defaults)("prog", [f"--data-dir={root}", "--evaluate", file, *asked])
    got = run(config, "imagenet")["shifted"]
    for name, figures in recorded.items():
        assert got[name] == pytest.approx(figures, rel=1e-5), name
    assert "on imagenet-a: accuracy" in capsys.readouterr().out


# Names of runs.


def test_a_run_without_them_keeps_its_name_and_one_with_them_has_another():
    config = named(mnist.Config(), "mnist")
    without, using = (
        Settings(flat(each), neutral(mnist.Config)) for each in (config, changed(config, shifted=("imagenet-a",)))
    )
    assert "shifted" not in without._named({}) and without.digest() != using.digest()


# Bad input.


def parsed(*flags):
    return parser(command.Config, command.defaults)("prog", list(flags))


def test_they_are_neither_trained_on_nor_taken_for_each_other():
    with pytest.raises(UserError, match="no dataset 'imagenet-a': did you mean 'imagenet'"):
        parsed("--dataset", "imagenet-a")
    for flags in (["--assess", "--ood", "imagenet-a"], ["--shifted", "imagenet-o"], ["--shifted", "imagenet"]):
        with pytest.raises(SystemExit):
            parsed(*flags)


@pytest.mark.parametrize(
    ("name", "names", "says"),
    (
        ("imagenet-a", WNIDS[:6], r"imagenet-a has the class folder n00000009, which is no class of made up \(6 cla"),
        ("imagenet-a", WNIDS[:4], "has the class folder n00000005 and 1 more, which is no class"),
        ("imagenet-v2", WNIDS[:11], "has the class folder 11, which is no class of made up"),
        (
            "imagenet-v2",
            (*WNIDS, "n9"),
            f"{V2} lacks the class folder 12: the 13 classes .* 0 to 12. Unpack",
        ),
        ("imagenet-a", (), "--shifted imagenet-a needs a network that is trained on photographs in the same classes"),
    ),
)
def test_classes_that_do_not_fit_are_named(root, name, names, says):
    with pytest.raises(UserError, match=says) as caught:
        load_shifted([name], root, trained_on(names))
    assert "\n" not in str(caught.value)


def test_what_is_missing_is_an_error_with_what_to_do(tmp_path):
    with pytest.raises(DataError, match=r"imagenet-a is not in .*put imagenet-a.tar there, which github.*tar -xf"):
        load_shifted(["imagenet-a"], tmp_path, trained_on())
    (tmp_path / "imagenetv2-matched-frequency.tar.gz").touch()
    with pytest.raises(DataError, match=r"frequency.tar.gz is not unpacked: cd .* && tar -xf imagenetv2"):
        load_shifted(["imagenet-v2"], tmp_path, trained_on())
    photographs(tmp_path / "imagenet-v2", {"0": 1, "1": 0})
    with pytest.raises(DataError, match=r"the class folder .*1 is empty"):
        load_shifted(["imagenet-v2"], tmp_path, trained_on())
