"""SVHN's MATLAB files, on tiny ones: every image and label is where it belongs, and what is not whole is refused."""

import io

import numpy as np
import pytest
import scipy.io

from experiments.data import load as data
from experiments.data import svhn
from experiments.data.svhn import FILES
from experiments.run.errors import DataError

SIZES = (30, 20)


@pytest.fixture(autouse=True)
def _small_files(monkeypatch):
    monkeypatch.setattr(svhn, "SIZES", SIZES)


def mat(compressed=True, **variables):
    stream = io.BytesIO()
    scipy.io.savemat(stream, variables, do_compression=compressed)
    return stream.getvalue()


def split(count, seed=0):
    """X [32, 32, 3, count] and y [count, 1] of noise, the digits 1 to 9 and then 0, which is 10, by turns."""
    rng = np.random.default_rng(seed)
    return {
        "X": rng.integers(0, 256, (32, 32, 3, count), np.uint8),
        "y": (np.arange(count, dtype=np.uint8) % 10 + 1)[:, None],
    }


def contents(seed=0):
    return {file: split(size, seed + size) for file, size in zip(FILES, SIZES, strict=True)}


def write(folder, files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(mat(**content) if isinstance(content, dict) else content)


@pytest.mark.parametrize("folder", ["svhn", ""])
def test_every_image_and_label_is_where_it_belongs_and_10_is_the_digit_0(tmp_path, folder):
    write(tmp_path / folder, contents())
    got = data.load("svhn", tmp_path)
    for source, stored in zip((got.train, got.test), contents().values(), strict=True):
        assert source.images.dtype == np.uint8 and source.labels.dtype == np.int32 and source.images.flags.c_contiguous
        assert source.images.shape == (len(source), 32, 32, 3)
        for n in range(len(source)):
            np.testing.assert_array_equal(source.images[n], stored["X"][..., n])
            assert source.labels[n] == (0 if stored["y"][n, 0] == 10 else stored["y"][n, 0])
    assert (got.name, got.classes, got.image_shape, got.warning) == ("svhn", 10, (32, 32, 3), None)
    assert str(tmp_path / folder) in got.source and set(got.train.labels) == set(range(10))


def test_the_folder_of_the_set_comes_first(tmp_path):
    write(tmp_path, contents(seed=1))
    write(tmp_path / "svhn", contents())
    np.testing.assert_array_equal(data.load("svhn", tmp_path).train.images[0], contents()[FILES[0]]["X"][..., 0])


def test_the_official_numbers_of_images_are_asked_for_if_nobody_says_otherwise(tmp_path, monkeypatch):
    monkeypatch.undo()
    write(tmp_path, contents())
    with pytest.raises(DataError, match=rf"{FILES[0]} is truncated: it holds 30 images, the official file 73257"):
        data.load("svhn", tmp_path)


def _with(**changes):
    return lambda stored: mat(**{name: value for name, value in (stored | changes).items() if value is not None})


def _objects(stored):
    cells = np.empty((32, 32, 3, 20), object)
    cells.fill(np.uint8(1))
    return mat(**stored | {"X": cells})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda stored: mat(**stored)[:-100], "cannot read"),
        (lambda stored: mat(**stored)[:300], "cannot read|no file of SVHN"),
        (lambda stored: b"", "cannot read"),
        (lambda stored: b"<html>" * 100, "cannot read"),
        (lambda stored: b"\x89HDF\r\n\x1a\n" + bytes(600), "cannot read"),
        (_with(X=None), "cannot read .*X"),
        (_with(y=None), "cannot read .*y"),
        (_with(X=split(19)["X"]), "truncated: it holds 19 images, the official file 20"),
        (_with(X=split(21)["X"]), "too long: it holds 21 images, the official file 20"),
        (_with(X=split(20)["X"].astype(np.float64)), "its X is not bytes"),
        (_with(X=split(20)["X"].transpose(3, 0, 1, 2)), "its X is not bytes"),
        (_with(X="text"), "its X is not bytes"),
        (_objects, "its X is not bytes"),
        (_with(y=split(19)["y"]), "its y is not bytes"),
        (_with(y=split(20)["y"].T), "its y is not bytes"),
        (_with(y=split(20)["y"] - 1), "its y is not bytes"),
        (_with(y=split(20)["y"] + 1), "its y is not bytes"),
        (_with(y=split(20)["y"].astype(np.float64)), "its y is not bytes"),
        (_with(y=split(20)["y"].astype(object)), "its y is not bytes"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, damage, message):
    write(tmp_path, contents() | {FILES[1]: damage(contents()[FILES[1]])})
    with pytest.raises(DataError, match=message) as caught:
        data.load("svhn", tmp_path)
    assert str(tmp_path / FILES[1]) in str(caught.value) and "again" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_changed_places_are_named(tmp_path):
    write(tmp_path, dict(zip(FILES, reversed(contents().values()), strict=True)))
    with pytest.raises(DataError, match=rf"{FILES[0]} is truncated: it holds 20 images"):
        data.load("svhn", tmp_path)


def test_a_missing_file_is_named(tmp_path):
    write(tmp_path / "svhn", {FILES[0]: contents()[FILES[0]]})
    with pytest.raises(DataError, match=f"lacks {FILES[1]}"):
        data.load("svhn", tmp_path)


def test_where_there_are_no_files_it_says_which_belong_where(tmp_path):
    with pytest.raises(DataError) as caught:
        data.load("svhn", tmp_path)
    for part in (*FILES, tmp_path / "svhn", "--data-dir", "$SUPERMASK_DATA_DIR", "--dataset colour-digits"):
        assert str(part) in str(caught.value)
    assert "\n" not in str(caught.value)
