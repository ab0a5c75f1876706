"""CIFAR-10, CIFAR-100 and SVHN as tensorflow-datasets prepares them: read without tensorflow, nothing is downloaded."""

import contextlib
import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from experiments.data import cifar, svhn, tfds
from experiments.data import load as data
from experiments.run.errors import DataError

VERSION = "3.0.2"
SETS = {"cifar10": ("cifar10", 10), "cifar100": ("cifar100", 100), "svhn": ("svhn_cropped", 10)}  # name, classes


def prepare(root, title, splits, classes):
    """Prepares {split: (images, labels)} with ArrayRecord files and the features that the stock builders have."""
    import tensorflow_datasets

    class Builder(tensorflow_datasets.core.GeneratorBasedBuilder, skip_registration=True):
        name, VERSION = title, tensorflow_datasets.core.Version("3.0.2")

        def _info(self):
            of = tensorflow_datasets.features
            shape = splits["train"][0].shape[1:]
            image, label = of.Image(shape=shape), of.ClassLabel(num_classes=classes)
            features = of.FeaturesDict({"id": of.Text(), "image": image, "label": label})
            return tensorflow_datasets.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, manager):
            return {split: self._generate_examples(*arrays) for split, arrays in splits.items()}

        def _generate_examples(self, images, labels):
            for index, (image, label) in enumerate(zip(images, labels, strict=True)):
                png = io.BytesIO()
                Image.fromarray(image.squeeze()).save(png, "png")
                yield index, {"id": str(index), "image": png.getvalue(), "label": int(label)}

    tensorflow_datasets.display_progress_bar(False)
    config = tensorflow_datasets.download.DownloadConfig(try_download_gcs=False)
    with contextlib.redirect_stdout(io.StringIO()):
        Builder(data_dir=root, file_format="array_record").download_and_prepare(download_config=config)


def noise(count, classes, seed):
    return np.random.default_rng(seed).integers(0, 256, (count, 32, 32, 3), np.uint8), np.arange(count) % classes


@pytest.fixture(params=list(SETS))
def prepared(request, tmp_path, monkeypatch):
    """(the name of a small set, what was prepared of it, the directory of the data)."""
    title, classes = SETS[request.param]
    monkeypatch.setattr(cifar, "RECORDS", classes)
    counts = (5 * classes, classes)
    monkeypatch.setattr(svhn, "SIZES", counts)
    splits = {split: noise(n, classes, n) for split, n in zip(("train", "test"), counts, strict=True)}
    prepare(tmp_path, title, splits, classes)
    return request.param, splits, tmp_path


def in_any_order(images, labels):
    return sorted((image.tobytes(), int(label)) for image, label in zip(images, labels, strict=True))


def directory_of(name, root):
    return root / SETS[name][0] / VERSION


def test_what_was_prepared_is_read_without_tensorflow_and_the_same_from_its_cache(prepared):
    name, splits, root = prepared
    got = data.load(name, root)
    for split, source in (("train", got.train), ("test", got.test)):
        assert source.images.dtype == np.uint8 and source.labels.dtype == np.int32
        assert in_any_order(source.images, source.labels) == in_any_order(*splits[split])
    assert (got.name, got.classes, got.image_shape) == (name, SETS[name][1], (32, 32, 3))
    assert str(directory_of(name, root)) in got.source and "tensorflow" not in sys.modules
    assert [path.name for path in directory_of(name, root).parent.glob("*.npz")] == [f"{SETS[name][0]}-{VERSION}.npz"]
    again = data.load(name, root)
    np.testing.assert_array_equal(again.train.images, got.train.images)
    np.testing.assert_array_equal(again.test.labels, got.test.labels)


def test_files_that_are_there_are_preferred(prepared):
    name, _, root = prepared
    files = {"cifar10": cifar.CIFAR_10.files, "cifar100": cifar.CIFAR_100.files, "svhn": svhn.FILES}[name]
    (root / files[0]).write_bytes(b"")
    with pytest.raises(DataError, match="lacks"):
        data.load(name, root)


def test_what_is_damaged_or_of_another_size_is_an_error(prepared, monkeypatch):
    name, _, root = prepared
    monkeypatch.setattr(cifar, "RECORDS", 1000)
    monkeypatch.setattr(svhn, "SIZES", (1000, 1000))
    with pytest.raises(DataError, match=r"is not (CIFAR|SVHN).*prepare it again"):
        data.load(name, root)
    for cache in directory_of(name, root).parent.glob("*.npz"):
        cache.unlink()
    for record in directory_of(name, root).glob("*record*"):
        record.write_bytes(record.read_bytes()[:-200])
    with pytest.raises(DataError, match=rf"cannot read {directory_of(name, root)}") as caught:
        data.load(name, root)
    assert "\n" not in str(caught.value)


def test_classes_of_cifar_must_be_balanced(tmp_path, monkeypatch):
    monkeypatch.setattr(cifar, "RECORDS", 10)
    images, labels = noise(50, 10, 0)
    prepare(tmp_path, "cifar10", {"train": (images, np.where(labels == 3, 4, labels)), "test": noise(10, 10, 1)}, 10)
    with pytest.raises(DataError, match=r"the training images .* as many of each"):
        data.load("cifar10", tmp_path)


def test_what_only_tensorflow_can_read_is_an_error_that_says_so(tmp_path):
    folder = tmp_path / "cifar10" / VERSION
    folder.mkdir(parents=True)
    (folder / "dataset_info.json").write_text(json.dumps({"fileFormat": "tfrecord"}))
    with pytest.raises(DataError, match=rf"{folder} can only be read with tensorflow.*array_record"):
        data.load("cifar10", tmp_path)
    (folder / "dataset_info.json").write_text("no JSON")
    with pytest.raises(DataError, match=f"cannot read {folder}"):
        data.load("cifar10", tmp_path)


def test_the_newest_version_is_read_and_none_that_is_not_finished(tmp_path):
    for name in ("3.0.2", "10.0.0", "incomplete.ABC_11.0.0", "11.0.0.incompleteABC"):
        (tmp_path / name).mkdir()
        (tmp_path / name / tfds.INFO).write_text("{}")
    assert tfds.newest(tmp_path).name == "10.0.0" and tfds.newest(tmp_path / "none") is None


def test_colour_digits_are_of_a_prepared_mnist(tmp_path):
    splits = {
        split: (noise(n, 10, n)[0][:, :28, :28, :1], np.arange(n) % 10) for split, n in (("train", 30), ("test", 20))
    }
    prepare(tmp_path, "mnist", splits, 10)
    got = data.load("colour-digits", tmp_path)
    assert got.name == "colour-digits" and got.warning is None
    digits = got.train.images[:, 2:30, 2:30].max(-1, keepdims=True)
    assert in_any_order(digits, got.train.labels) == in_any_order(*splits["train"])


def test_nothing_is_prepared_where_nothing_is(tmp_path):
    assert tfds.read_prepared("cifar10", tmp_path) is None and not list(Path(tmp_path).iterdir())
