"""MNIST's digits in colour: the shape of CIFAR-10, the digits of MNIST, and colours that tell nothing of the class."""

import gzip
import urllib.request

import numpy as np
import pytest

from experiments.config.registry import DATASETS
from experiments.data import colour_digits, idx, tfds
from experiments.data import load as data
from experiments.run.errors import DataError

INSIDE = slice(2, 30)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("a set that is never downloaded asks for the network")

    import requests

    for place, name in ((requests, "head"), (requests, "get"), (urllib.request, "urlopen"), (tfds, "_prepare")):
        monkeypatch.setattr(place, name, refuse)


def mnist_of(folder, monkeypatch, count=20):
    """{file: array} of a small MNIST in `folder`, which is known by its checksums."""
    rng, arrays = np.random.default_rng(0), {}
    folder.mkdir(parents=True, exist_ok=True)
    for file in idx.FILES:
        shape = (count, 28, 28) if "images" in file else (count,)
        arrays[file] = rng.integers(0, 256 if "images" in file else 10, shape, np.uint8)
        header = bytes([0, 0, 8, len(shape)]) + np.array(shape, ">u4").tobytes()
        (folder / f"{file}.gz").write_bytes(gzip.compress(header + arrays[file].tobytes()))
    digests = idx.read(idx.find(folder))[1]
    monkeypatch.setattr(idx, "KNOWN_MD5", {"mnist": {file: min(of, key=len) for file, of in digests.items()}})
    return arrays


def test_mnist_from_the_directory_of_the_data_is_padded_and_tinted(tmp_path, monkeypatch):
    arrays = mnist_of(tmp_path / "mnist", monkeypatch)
    got = data.load("colour-digits", tmp_path)
    assert (got.name, got.classes, got.image_shape, got.warning) == ("colour-digits", 10, (32, 32, 3), None)
    for source, images, labels in ((got.train, *idx.FILES[:2]), (got.test, *idx.FILES[2:])):
        assert source.images.dtype == np.uint8
        np.testing.assert_array_equal(source.images[:, INSIDE, INSIDE].max(-1), arrays[images])  # the digit itself
        np.testing.assert_array_equal(source.labels, arrays[labels])
        border = source.images.copy()
        border[:, INSIDE, INSIDE] = 0
        assert not border.any()
    assert "not CIFAR" in got.source and str(tmp_path / "mnist") in got.source


def test_without_mnist_it_is_the_5000_digits_with_their_own_name_and_a_warning(tmp_path):
    got = data.load("colour-digits", tmp_path)
    grey = data.load("mnist-5k")
    assert (got.name, len(got.train), len(got.test)) == ("colour-digits-5k", 4000, 1000)
    np.testing.assert_array_equal(got.train.images[:, INSIDE, INSIDE].max(-1), grey.train.images[..., 0])
    np.testing.assert_array_equal(got.test.labels, grey.test.labels)
    for part in ("NOT CIFAR", "colour-digits-5k", "do not", "compare"):
        assert part in got.warning
    asked = data.load("colour-digits-5k", tmp_path)
    assert asked.warning is None and asked.fingerprint == got.fingerprint and got.name in DATASETS


def test_a_colour_is_drawn_from_the_index_alone():
    colours = colour_digits.drawn_colours(5000)
    np.testing.assert_array_equal(colour_digits.drawn_colours(70)[:50], colours[:50])
    assert colours[:3].tolist() == [[221, 255, 55], [255, 55, 173], [255, 227, 55]]  # the same images for ever
    assert (colours.max(1) == 255).all() and (colours.min(1) == colour_digits.DARKEST).all()
    assert abs(colours.mean(0) - 155).max() < 3


def test_colours_tell_nothing_of_the_class_even_where_classes_come_in_turn():
    got = data.load("colour-digits-5k")
    colours = colour_digits.drawn_colours(5000)[:4000].astype(float)
    means = np.array([colours[got.train.labels == label].mean(0) for label in range(10)])
    assert abs(means - colours.mean(0)).max() < 4 * colours.std() / np.sqrt(400)


def test_a_mnist_that_is_damaged_is_an_error_and_is_not_replaced(tmp_path, monkeypatch):
    mnist_of(tmp_path, monkeypatch)
    file = tmp_path / f"{idx.FILES[0]}.gz"
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(DataError, match=idx.FILES[0]):
        data.load("colour-digits", tmp_path)


def test_a_mnist_that_only_tensorflow_can_read_is_done_without(tmp_path):
    folder = tmp_path / "mnist" / "3.0.1"
    folder.mkdir(parents=True)
    (folder / "dataset_info.json").write_text('{"fileFormat": "tfrecord"}')
    got = data.load("colour-digits", tmp_path)
    assert got.name == "colour-digits-5k" and "tensorflow" in got.warning
