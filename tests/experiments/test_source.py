"""Data sets in memory: examples by index, statistics of each channel, a fingerprint of the images and their order."""

import dataclasses
import subprocess
import sys
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest

from experiments.data import source
from experiments.data.source import Arrays, arrays_dataset
from experiments.run.errors import DataError


def noise(n, channels, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, 5, 4, channels), np.uint8)


def dataset_of(images, **options):
    labels = np.arange(len(images)) % 10
    return arrays_dataset("noise", (images, labels, images[:3], labels[:3]), "made up", **options)


def test_examples_are_read_by_index_in_any_order_and_twice():
    images, labels = noise(7, 1), np.array([3, 1, 4, 1, 5, 9, 2])
    read = Arrays(images, labels)
    assert len(read) == 7 and read.labels.dtype == np.int32
    batch = read.read(np.array([6, 0, 0, 3]))
    assert batch.keys() == {"image", "label"} and batch["label"].dtype == np.int32
    np.testing.assert_array_equal(batch["image"], np.stack([images[6], images[0], images[0], images[3]]), strict=True)
    assert batch["label"].tolist() == [2, 3, 3, 1]


def test_a_part_holds_its_own_examples_in_the_order_asked_for():
    images, labels = noise(7, 3), np.array([3, 1, 4, 1, 5, 9, 2])
    part = Arrays(images, labels).take(np.array([5, 2, 4])).take(np.array([2, 0]))
    np.testing.assert_array_equal(part.images, images[[4, 5]])
    assert part.labels.tolist() == [5, 9] and len(part) == 2
    assert len(part.take(np.array([], int))) == 0


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (np.zeros((3, 2, 2), np.uint8), np.zeros(3), r"uint8 \[3, 2, 2\]"),
        (np.zeros((3, 2, 2, 1), np.float32), np.zeros(3), "float32"),
        (np.zeros((3, 2, 2, 1), np.uint8), np.zeros(4), "4 labels"),
    ],
)
def test_arrays_of_another_form_are_refused(images, labels, message):
    with pytest.raises(ValueError, match=message):
        Arrays(images, labels)


def test_one_channel_has_the_statistics_to_the_last_bit_that_it_always_had(monkeypatch):
    monkeypatch.setattr(source, "CHUNK", 7)  # three chunks, one of them incomplete
    images = noise(19, 1)
    counts = sum(np.bincount(image.ravel(), minlength=256) for image in images)
    levels = np.arange(256) / 255
    mean = np.average(levels, weights=counts)
    std = np.sqrt(np.average((levels - mean) ** 2, weights=counts))
    got = dataset_of(images)
    assert (got.mean, got.std) == ((float(mean),), (float(std),))
    assert got.mean == pytest.approx([(images / 255).mean()], rel=1e-12)
    assert got.std == pytest.approx([(images / 255).std()], rel=1e-12)


@pytest.mark.parametrize("channels", [2, 3])
def test_each_channel_has_its_own_statistics(channels):
    images = noise(19, channels) // np.arange(1, channels + 1, dtype=np.uint8)
    got = dataset_of(images)
    assert all(type(value) is float for value in got.mean + got.std)
    np.testing.assert_allclose(got.mean, (images / 255).mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(got.std, (images / 255).std((0, 1, 2)), rtol=1e-12)
    assert got.image_shape == (5, 4, channels)


def test_published_statistics_replace_those_of_the_pixels():
    got = dataset_of(np.zeros((4, 2, 2, 1), np.uint8), mean=(0.25,), std=(0.5,), classes=7)
    assert (got.mean, got.std, got.classes) == ((0.25,), (0.5,), 7)


@pytest.mark.parametrize(("channel", "name"), [(0, "red"), (1, "green"), (2, "blue")])
def test_a_constant_channel_is_an_error_that_names_it(channel, name):
    images = noise(9, 3)
    images[..., channel] = 200
    with pytest.raises(DataError, match=rf"all training pixels of the {name} channel are equal \(made up\)"):
        dataset_of(images)
    with pytest.raises(DataError, match=r"all training pixels are equal \(made up\)"):
        dataset_of(images[..., channel, None])


def test_the_fingerprint_is_the_crc_of_the_training_images_in_their_order():
    images = noise(9, 1)
    got = dataset_of(images).fingerprint
    assert got == f"{zlib.crc32(images.tobytes()):08x}"
    assert got != dataset_of(images[::-1]).fingerprint
    assert dataset_of(images[::-1]).fingerprint == dataset_of(images[::-1].copy()).fingerprint
    assert source.fingerprint(np.frombuffer(b"\0\0\0\0", np.uint8)) == "2144df1c"  # of four zero bytes
    assert source.fingerprint(np.frombuffer(b"\xc2", np.uint8)) == f"{zlib.crc32(bytes([0xC2])):08x}"


def test_the_fingerprint_copies_nothing():
    images = np.zeros((1000, 40, 40, 3), np.uint8)
    tracemalloc.start()
    try:
        source.fingerprint(images)
        assert tracemalloc.get_traced_memory()[1] < images.nbytes / 100
    finally:
        tracemalloc.stop()


def test_statistics_take_no_more_memory_than_some_chunks():
    images = np.random.default_rng(0).integers(0, 256, (30_000, 10, 10, 3), np.uint8)
    tracemalloc.start()
    try:
        source.pixel_statistics(images, "made up")
        assert tracemalloc.get_traced_memory()[1] < images.nbytes / 3
    finally:
        tracemalloc.stop()


def test_a_data_set_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        dataset_of(noise(3, 1)).name = "other"


def test_no_room_of_data_imports_jax_or_a_reader_of_images():
    rooms = sorted(file.stem for file in Path(source.__file__).parent.glob("*.py") if file.stem != "__init__")
    heavy = ("jax", "flax", "PIL", "requests", "tensorflow_datasets", "mlxtend", "grain")
    code = f"import sys\nfrom experiments.data import {', '.join(rooms)}\n"
    code += f"print([name for name in {heavy} if name in sys.modules])"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=60)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")
