"""Photographs that tensorflow-datasets prepared: the crops of files, from records, in any process and any order."""

import contextlib
import dataclasses
import io
import json
import pickle
import shutil
import sys
from functools import partial

import jax
import numpy as np
import PIL.Image
import pytest

from experiments import imagenet as command
from experiments.config.flags import parser
from experiments.data import records
from experiments.data.batches import class_sample, hold_out
from experiments.data.load import load
from experiments.data.photographs import cropped
from experiments.data.stream import batches_ahead
from experiments.run.errors import DataError
from experiments.training.fit import run
from experiments.training.images import Others, require_same_images
from experiments.training.stepper import Epochs, _read

WNIDS = ("n01440764", "n02119789", "n03000684")
VERSION = "5.1.0"
COUNTS = {"train": 18, "validation": 6}
SHARDS = 2


def jpeg(seed):
    """The bytes of a smooth photograph of 60 x 90 or 300 x 500."""
    width, height = ((60, 90), (300, 500))[seed % 2]
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    phases = np.random.default_rng(seed).uniform(0, 6, 3)
    pixels = np.stack([127.5 + 120 * np.sin(3 * x + 2 * y + phase) for phase in phases], axis=-1)
    stream = io.BytesIO()
    PIL.Image.fromarray(pixels.round().astype(np.uint8)).save(stream, "JPEG", quality=95)
    return stream.getvalue()


def prepare(root, splits, names=WNIDS):
    """Prepares {split: [(bytes of an image, label)]} with the features of imagenet2012."""
    import tensorflow_datasets as tfds

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name, VERSION = "imagenet2012", tfds.core.Version("5.1.0")

        def _info(self):
            image, label = tfds.features.Image(encoding_format="jpeg"), tfds.features.ClassLabel(names=list(names))
            features = tfds.features.FeaturesDict({"image": image, "label": label, "file_name": tfds.features.Text()})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, manager):
            return {split: self._generate_examples(examples) for split, examples in splits.items()}

        def _generate_examples(self, examples):
            for index, (image, label) in enumerate(examples):
                yield index, {"image": image, "label": label, "file_name": f"{index}.JPEG"}

    tfds.display_progress_bar(False)
    config = tfds.download.DownloadConfig(try_download_gcs=False, num_shards=SHARDS)
    with contextlib.redirect_stdout(io.StringIO()):
        Builder(data_dir=root, file_format="array_record").download_and_prepare(download_config=config)


def examples(split):
    return [(jpeg(seed + len(split)), seed % 3) for seed in range(COUNTS[split])]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    base = tmp_path_factory.mktemp("prepared")
    prepare(base, {split: examples(split) for split in COUNTS})
    return base


@pytest.fixture
def copied(root, tmp_path):
    """(the directory of the data, that of the version), to be damaged."""
    shutil.copytree(root / "imagenet2012", tmp_path / "imagenet2012", ignore=shutil.ignore_patterns("*.npz"))
    return tmp_path, tmp_path / "imagenet2012" / VERSION


@pytest.fixture
def no_labels(monkeypatch):
    """Fails whoever asks for all labels."""

    def refuse(self):
        raise AssertionError("all labels are read")

    monkeypatch.setattr(records.Shards, "labels", property(refuse))


def test_records_give_the_crops_and_labels_that_their_bytes_give_as_files(root, no_labels):
    dataset = load("imagenet", root, image_size=24)
    assert (dataset.name, dataset.classes) == (f"photographs-{dataset.fingerprint}", 3)
    assert dataset.class_names == WNIDS and dataset.image_shape == (24, 24, 3)
    assert VERSION in dataset.source and "tensorflow" not in sys.modules
    for split, source in (("train", dataset.train), ("validation", dataset.test)):
        assert len(source) == COUNTS[split]
        for draws in (None, np.arange(len(source), dtype=np.uint32)):
            batch = source.read(np.arange(len(source)), draws)
            assert batch["image"].dtype == np.uint8 and batch["label"].dtype == np.int32
            expected, crop = {}, 1.0 if split == "validation" else 0.08
            for image, label in examples(split):
                for draw in (None,) if draws is None else map(int, draws):
                    with PIL.Image.open(io.BytesIO(image)) as opened:
                        expected[draw, cropped(opened, 24, draw, crop).tobytes()] = label
            for place, (image, label) in enumerate(zip(batch["image"], batch["label"], strict=True)):
                assert expected[None if draws is None else place, image.tobytes()] == label


def test_labels_are_read_once_and_from_their_file_after_that(root, copied, capsys, monkeypatch):
    base, version = copied
    train = load("imagenet", base, image_size=8).train
    read = train.read(np.arange(18))["label"]
    np.testing.assert_array_equal(train.labels, read)
    assert train.labels.dtype == np.int32 and "18 labels" in capsys.readouterr().out
    np.testing.assert_array_equal(train.take(np.array([3, 1])).labels, read[[3, 1]])
    monkeypatch.setattr(records.Shards, "record", lambda self, index: pytest.fail("a record is read again"))
    np.testing.assert_array_equal(load("imagenet", base, image_size=8).train.labels, read)
    monkeypatch.undo()
    (cache,) = version.parent.glob("*.npz")
    for damaged in (b"", cache.read_bytes()[:-30]):
        cache.write_bytes(damaged)
        np.testing.assert_array_equal(load("imagenet", base, image_size=8).train.labels, read)
    info = version / records.INFO
    info.write_text(info.read_text() + "\n")  # of another preparation
    capsys.readouterr()
    np.testing.assert_array_equal(load("imagenet", base, image_size=8).train.labels, read)
    assert "18 labels" in capsys.readouterr().out


def test_validation_images_and_samples_of_classes_are_those_of_the_labels(root):
    dataset = load("imagenet", root, image_size=8)
    rest, held_out = hold_out(dataset, 6)
    assert sorted(held_out.read(np.arange(6))["label"].tolist()) == [0, 0, 1, 1, 2, 2] and len(rest.train) == 12
    assert class_sample(rest.train, 3, jax.random.key(0), 2)["label"].tolist() == [0, 0, 1, 1, 2, 2]


def test_a_source_that_is_sent_to_a_process_takes_neither_files_nor_labels_with_it(root):
    train = load("imagenet", root, image_size=8).train
    assert train.labels.shape == (18,)
    sent = pickle.loads(pickle.dumps(train))
    assert sent.stored.shards._opened is None and "labels" not in vars(sent.stored.shards)
    order, draws = np.array([5, 0, 17]), np.array([1, 2, 3], np.uint32)
    jax.tree.map(np.testing.assert_array_equal, sent.read(order, draws), train.read(order, draws))


@pytest.mark.slow
def test_workers_give_the_batches_that_one_thread_gives_from_any_step_on(root):
    train, order = load("imagenet", root, image_size=16).train, Epochs(18, 4, drawn=True).order(jax.random.key(0), 0)
    one = list(batches_ahead(partial(_read, train, order), 0, 5, workers=0, ahead=2))
    for start in (0, 2):
        several = list(batches_ahead(partial(_read, train, order), start, 5, workers=2, ahead=2))
        jax.tree.map(np.testing.assert_array_equal, several, one[start:])


def test_several_processes_compare_their_images_without_all_labels(root, no_labels, monkeypatch):
    compared = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr("experiments.run.processes.require_alike", lambda value, what: compared.append(value))
    dataset = load("imagenet", root, image_size=8)
    fewer = dataclasses.replace(dataset, test=dataset.test.take(np.arange(5)))
    for each in (dataset, load("imagenet", root, image_size=8), fewer):
        require_same_images(each, Others((each,)))
    assert compared[0] == compared[1] != compared[2]


@pytest.mark.slow
def test_a_plain_run_reads_no_labels_but_those_of_its_batches(root, tmp_path, no_labels):
    dataset = load("imagenet", root, image_size=8)
    flags = ["--model=cnn", "--width=4", "--depth=1", "--image-size=8", "--batch-size=6", "--epochs=1"]
    flags += ["--warmup-epochs=0", f"--data-dir={root}", f"--workdir={tmp_path / 'run'}"]
    summary = run(parser(command.Config, command.defaults)("prog", flags), "imagenet")
    assert summary["dataset"] == dataset.name and summary["steps"] == 3 and 0 <= summary["test_accuracy"] <= 1


def test_the_fingerprint_changes_with_version_classes_and_lengths_only(root, copied, tmp_path):
    base, version = copied
    first = load("imagenet", base).fingerprint
    assert first == load("imagenet", root).fingerprint
    version.rename(version.with_name("5.0.0"))
    fingerprints = {first, load("imagenet", base).fingerprint}
    names = version.with_name("5.0.0") / "label.labels.txt"
    names.write_text(names.read_text().replace(WNIDS[0], "n00000001"))
    fingerprints.add(load("imagenet", base).fingerprint)
    prepare(tmp_path / "more", {split: [*examples(split), (jpeg(0), 0)] for split in COUNTS})
    fingerprints.add(load("imagenet", tmp_path / "more").fingerprint)
    assert len(fingerprints) == 4


def test_the_newest_version_is_read_and_one_that_is_not_finished_is_not(copied):
    base, version = copied
    for other in ("5.0.9", "5.1.0.incompleteABC"):
        shutil.copytree(version, version.with_name(other))
    assert version.name in load("imagenet", base).source
    for other in ("5.9.0", "5.10.0"):
        shutil.copytree(version, version.with_name(other))
    assert "5.10.0" in load("imagenet", base).source


def test_folders_are_preferred(copied):
    base, _ = copied
    (base / "train").mkdir()
    with pytest.raises(DataError, match=r"no photographs in .*val"):
        load("imagenet", base)


def test_more_files_are_opened_than_the_process_was_allowed(root):
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
        records.allow_files(100)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == 356
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# Bad input.


def told(version, **changes):
    info = json.loads((version / records.INFO).read_text())
    (version / records.INFO).write_text(json.dumps(info | changes))


def test_a_set_that_needs_tensorflow_is_refused_with_the_command_that_converts_it_and_read_after_that(copied):
    base, version = copied
    told(version, fileFormat="tfrecord")
    with pytest.raises(DataError, match=rf"only be read with tensorflow.* tfds convert_format .*{version} .*array_rec"):
        load("imagenet", base)
    told(version, alternativeFileFormats=["array_record"])  # as that command leaves it
    assert len(load("imagenet", base, image_size=8).test.read(np.arange(6))["label"]) == 6


@pytest.mark.parametrize(
    "damage, says",
    (
        (lambda version: (version / records.INFO).write_text("no JSON"), "cannot read what describes"),
        (lambda version: (version / records.INFO).write_text("[]"), "cannot read what describes"),
        (lambda version: told(version, splits=[]), "has no split train: prepare the set again"),
        (lambda version: told(version, splits=[{"name": "train"}]), "no split validation|cannot read what desc"),
        (lambda version: (version / "features.json").unlink(), "cannot read what describes"),
        (lambda version: (version / "label.labels.txt").unlink(), "cannot read what describes"),
        (lambda version: next(version.glob("*train*00001-of*")).unlink(), r"lacks imagenet2012-train.*copy the files"),
        (lambda version: [f.unlink() for f in version.glob("*validation*")], "lacks imagenet2012-val.* and 1 more"),
    ),
)
def test_what_is_missing_or_damaged_is_one_paragraph(copied, damage, says):
    base, version = copied
    damage(version)
    with pytest.raises(DataError, match=says) as caught:
        load("imagenet", base)
    assert "\n" not in str(caught.value)


def test_a_shard_that_is_cut_short_is_an_error_with_its_record(copied):
    base, version = copied
    shard = next(version.glob("*train*00000-of*"))
    shard.write_bytes(shard.read_bytes()[:-200])
    train = load("imagenet", base, image_size=8).train
    with pytest.raises(DataError, match=r"cannot read record 0 of train in .*--skip-corrupt") as caught:
        train.read(np.array([0]))
    assert "\n" not in str(caught.value)


def test_a_corrupt_image_is_named_and_by_flag_another_takes_its_place(tmp_path):
    prepare(tmp_path, {split: [(image[:200], label) for image, label in examples(split)] for split in COUNTS})
    train = load("imagenet", tmp_path, image_size=8, skip_corrupt=True).train
    one = np.array([2]), np.array([1], np.uint32)
    with (
        pytest.warns(UserWarning, match=r"another takes its place"),
        pytest.raises(DataError, match="no photograph in"),
    ):
        train.read(*one)
    mixed = [(jpeg(0) if n == 5 else image[:200], label) for n, (image, label) in enumerate(examples("train"))]
    prepare(tmp_path / "mixed", {"train": mixed, "validation": mixed})
    with pytest.raises(DataError, match=r"cannot read the image in record \d+ of train in .*prepare the set again"):
        load("imagenet", tmp_path / "mixed", image_size=8).train.read(np.arange(3), np.arange(3, dtype=np.uint32))
    train = load("imagenet", tmp_path / "mixed", image_size=8, skip_corrupt=True).train
    with pytest.warns(UserWarning, match=r"in record \d+ of train"):
        assert train.read(*one)["label"].tolist() == [mixed[5][1]]
    with pytest.raises(DataError):  # an evaluation counts each once
        train.read(np.arange(3))
