"""CIFAR-10's binary files, on tiny ones: every image is where it belongs, and what is not whole is refused."""

import gzip
import io
import tarfile
from pathlib import Path

import numpy as np
import pytest

from experiments.data import cifar
from experiments.data import load as data
from experiments.data.cifar import ARCHIVE, FILES, FOLDER
from experiments.run.errors import DataError

RECORD = 3073
RECORDS = 10  # in each of our files, one of each class


@pytest.fixture(autouse=True)
def _small_files(monkeypatch):
    monkeypatch.setattr(cifar, "RECORDS", RECORDS)


def contents(seed=0):
    """{file: bytes} of a set of noise, with one image of each class in every file."""
    rng = np.random.default_rng(seed)
    files = {}
    for file in FILES:
        records = rng.integers(0, 256, (RECORDS, RECORD), np.uint8)
        records[:, 0] = rng.permutation(10)
        files[file] = records.tobytes()
    return files


def write(folder, files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)


def archived(files, folder=FOLDER):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, content in {"readme.html": b"<html>", **files}.items():
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return gzip.compress(stream.getvalue(), mtime=0)  # or the time would be in the names of tests


def assert_holds(got, files):
    """The data set's pixels and labels, one by one, are the bytes where the format has them."""
    train, test = b"".join(files[file] for file in FILES[:-1]), files[FILES[-1]]
    for images, labels, content in (
        (got.train.images, got.train.labels, train),
        (got.test.images, got.test.labels, test),
    ):
        assert images.dtype == np.uint8 and labels.dtype == np.int32
        assert images.shape == (len(content) // RECORD, 32, 32, 3) and labels.shape == (len(images),)
        for n, image in enumerate(images):
            record = content[n * RECORD : (n + 1) * RECORD]
            assert labels[n] == record[0]
            for channel in range(3):
                plane = record[1 + 1024 * channel : 1 + 1024 * (channel + 1)]
                assert image[:, :, channel].tobytes() == plane


def test_each_plane_is_a_channel_and_each_row_a_row():
    record = bytearray(RECORDS * RECORD)
    record[0] = 7
    record[1 + 1 * 32 + 2] = 200  # red, row 1, column 2
    record[1 + 1024 + 5 * 32 + 31] = 100  # green, row 5, the last column
    record[1 + 2048 + 31 * 32] = 50  # blue, the last row, column 0
    record[RECORD] = 3
    record[RECORD + 1] = 9  # the second image's first pixel, red
    images, labels = cifar.read_file("file", bytes(record), RECORDS)
    assert images.shape == (RECORDS, 32, 32, 3) and images.flags.c_contiguous
    assert labels.tolist() == [7, 3, *[0] * (RECORDS - 2)]
    where = [index.tolist() for index in np.nonzero(images)]
    assert list(zip(*where, images[images > 0].tolist(), strict=True)) == [
        (0, 1, 2, 0, 200), (0, 5, 31, 1, 100), (0, 31, 0, 2, 50), (1, 0, 0, 0, 9),
    ]  # fmt: skip


@pytest.mark.parametrize("folder", ["cifar10", FOLDER, f"cifar10/{FOLDER}", ""])
def test_the_files_are_read_in_every_folder_and_in_their_order(tmp_path, folder):
    write(tmp_path / folder, contents())
    got = data.load("cifar10", tmp_path)
    assert_holds(got, contents())
    assert (got.name, got.classes, got.image_shape, got.warning) == ("cifar10", 10, (32, 32, 3), None)
    assert str(tmp_path / folder) in got.source and "\n" not in got.source


@pytest.mark.parametrize("folder", ["cifar10", FOLDER, f"cifar10/{FOLDER}", ""])
def test_the_archive_is_read_where_the_files_are_not_and_unpacks_nothing(tmp_path, folder):
    write(tmp_path / folder, {ARCHIVE: archived(contents())})
    got = data.load("cifar10", tmp_path)
    assert_holds(got, contents())
    assert str(tmp_path / folder / ARCHIVE) in got.source
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [tmp_path / folder / ARCHIVE]
    write(tmp_path, contents(seed=1))
    assert_holds(data.load("cifar10", tmp_path), contents(seed=1))


def test_the_folder_of_the_set_comes_before_the_directory_itself(tmp_path):
    for seed, folder in enumerate(["cifar10", FOLDER, f"cifar10/{FOLDER}", ""]):
        write(tmp_path / folder, contents(seed))
    assert_holds(data.load("cifar10", tmp_path), contents(0))


def test_statistics_are_those_of_each_channel_of_the_training_pixels(tmp_path):
    files = contents()
    darker = bytearray(files[FILES[0]])
    for at in range(0, len(darker), RECORD):
        darker[at + 1 : at + 1025] = bytes(1024)  # the red plane
    write(tmp_path, files | {FILES[0]: bytes(darker)})
    got = data.load("cifar10", tmp_path)
    scaled = got.train.images / 255
    assert got.mean == pytest.approx(scaled.mean((0, 1, 2)), rel=1e-12)
    assert got.std == pytest.approx(scaled.std((0, 1, 2)), rel=1e-12)
    assert got.mean[0] < 0.45 < got.mean[1]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c: c[:-1], r"30729 bytes, not a multiple of a record's 3073"),
        (lambda c: b"<html>" + c, "not a multiple"),
        (lambda c: b"", "truncated: it holds 0 images, the official file 10"),
        (lambda c: c[:-RECORD], "truncated: it holds 9 images, the official file 10"),
        (lambda c: c + c[:RECORD], "too long: it holds 11 images, the official file 10"),
        (lambda c: b"\x0a" + c[1:], "label 10; labels must be 0 to 9"),
    ],
)
@pytest.mark.parametrize("file", [FILES[0], FILES[2], FILES[-1]])
@pytest.mark.parametrize("packed", [False, True])
def test_a_damaged_file_is_named(tmp_path, packed, file, damage, message):
    files = contents()
    files[file] = damage(files[file])
    write(tmp_path / "cifar10", {ARCHIVE: archived(files)} if packed else files)
    with pytest.raises(DataError, match=message) as caught:
        data.load("cifar10", tmp_path)
    path = tmp_path / "cifar10" / (Path(ARCHIVE) / FOLDER if packed else "") / file
    assert str(path) in str(caught.value) and "again" in str(caught.value)


def test_a_file_has_ten_thousand_records_if_nobody_says_otherwise(tmp_path, monkeypatch):
    monkeypatch.undo()
    write(tmp_path, contents())
    with pytest.raises(DataError, match=rf"{FILES[0]} is truncated: it holds 10 images, the official file 10000"):
        data.load("cifar10", tmp_path)


def _another_label(content):
    return bytes([(content[0] + 1) % 10]) + content[1:]


def _unbalanced(files):
    """Of two training files, one has two images of class 0 and the other none, as the official ones may be."""
    first, second = (bytearray(files[file]) for file in FILES[:2])
    labels = first[::RECORD], second[::RECORD]
    first[labels[0].index(1) * RECORD], second[labels[1].index(0) * RECORD] = 0, 1
    return files | {FILES[0]: bytes(first), FILES[1]: bytes(second)}


def test_classes_need_not_be_balanced_within_a_training_file(tmp_path):
    write(tmp_path, _unbalanced(contents()))
    assert_holds(data.load("cifar10", tmp_path), _unbalanced(contents()))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda f: f | {FILES[-1]: f[FILES[0]], FILES[0]: f[FILES[-1]]}, FILES[0]),  # changed places
        (lambda f: f | {FILES[1]: f[FILES[0]]}, FILES[0]),  # one of them twice
        (lambda f: f | {FILES[-1]: f[FILES[0]]}, FILES[-1]),  # a training file as the test file
        (lambda f: f | {FILES[3]: _another_label(f[FILES[3]])}, FILES[3]),
        (lambda f: f | {FILES[-1]: _another_label(f[FILES[-1]])}, FILES[-1]),
    ],
)
def test_a_split_whose_classes_are_not_balanced_is_refused(tmp_path, change, named):
    write(tmp_path, change(_unbalanced(contents())))
    with pytest.raises(DataError, match="as many of each") as caught:
        data.load("cifar10", tmp_path)
    assert named in str(caught.value)


def test_missing_files_are_named(tmp_path):
    files = contents()
    for file in (FILES[1], FILES[-1]):
        del files[file]
    write(tmp_path / "cifar10", files)
    with pytest.raises(DataError, match=rf"{tmp_path / 'cifar10'} .* lacks {FILES[1]}, {FILES[-1]}:"):
        data.load("cifar10", tmp_path)


def test_where_there_are_no_files_it_says_which_belong_where(tmp_path):
    for root in (tmp_path, tmp_path / "not there"):
        with pytest.raises(DataError) as caught:
            data.load("cifar10", root)
        for part in (*FILES, ARCHIVE, root / "cifar10", "binary version", "pickles"):
            assert str(part) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_pickles_are_not_read(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    write(folder, {Path(file).stem: b"cos\nabort\n(tR." for file in FILES})  # unpickled, it would end this process
    for root in (tmp_path, folder):
        with pytest.raises(DataError, match="is not in"):
            data.load("cifar10", root)


def test_a_file_that_cannot_be_read_is_a_data_error(tmp_path, monkeypatch):
    write(tmp_path, contents())

    def refuse(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(DataError, match=rf"{FILES[0]} .*Permission denied"):
        data.load("cifar10", tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot read"),
        (b"<html>", "cannot read .*gzip"),
        (gzip.compress(b"<html>", mtime=0), "cannot read"),
        (archived(contents())[:-100], "cannot read"),
        (archived(contents())[:-8] + bytes(8), "cannot read .*CRC"),
        (archived(contents(), folder="elsewhere"), f"lacks {FOLDER}/{FILES[0]}, "),
        (archived({file: content for file, content in contents().items() if file != FILES[2]}), f"lacks .*{FILES[2]}"),
    ],
)
def test_a_damaged_archive_is_named(tmp_path, content, message):
    write(tmp_path, {ARCHIVE: content})
    with pytest.raises(DataError, match=message) as caught:
        data.load("cifar10", tmp_path)
    assert str(tmp_path / ARCHIVE) in str(caught.value)


def test_an_archive_in_which_a_link_stands_for_a_file_reads_nothing_outside_it(tmp_path):
    outside = tmp_path / "outside"
    outside.write_bytes(contents()[FILES[0]])
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        link = tarfile.TarInfo(f"{FOLDER}/{FILES[0]}")
        link.type, link.linkname = tarfile.SYMTYPE, str(outside)
        archive.addfile(link)
    write(tmp_path / "data", {ARCHIVE: gzip.compress(stream.getvalue())})
    with pytest.raises(DataError, match="cannot read"):
        data.load("cifar10", tmp_path / "data")


def fine_and_coarse(seed=0):
    """{file: bytes} of a CIFAR-100 of noise: the coarse label, the fine one, and the pixels; each class as often."""
    rng = np.random.default_rng(seed)
    files = {}
    for file, size in zip(cifar.CIFAR_100.files, (5, 1), strict=True):
        records = rng.integers(0, 256, (size * 100, 3074), np.uint8)
        records[:, 0], records[:, 1] = rng.integers(0, 20, len(records)), rng.permutation(np.arange(len(records)) % 100)
        files[file] = records.tobytes()
    return files


@pytest.mark.parametrize("folder", ["cifar100", "cifar-100-binary", "cifar100/cifar-100-binary", ""])
@pytest.mark.parametrize("packed", [False, True])
def test_cifar_100_has_its_fine_labels(tmp_path, monkeypatch, folder, packed):
    monkeypatch.setattr(cifar, "RECORDS", 100)
    files = fine_and_coarse()
    archive = {cifar.CIFAR_100.archive: archived(files, "cifar-100-binary")}
    write(tmp_path / folder, archive if packed else files)
    got = data.load("cifar100", tmp_path)
    assert (got.name, got.classes, len(got.train), len(got.test)) == ("cifar100", 100, 500, 100)
    for split, content in ((got.train, files["train.bin"]), (got.test, files["test.bin"])):
        records = np.frombuffer(content, np.uint8).reshape(-1, 3074)
        np.testing.assert_array_equal(split.labels, records[:, 1])
        np.testing.assert_array_equal(split.images.transpose(0, 3, 1, 2).reshape(len(records), -1), records[:, 2:])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c: c[:-1], "no file of CIFAR-100: .* not a multiple of a record's 3074"),
        (lambda c: c[:1] + bytes([100]) + c[2:], "label 100; labels must be 0 to 99"),
        (
            lambda c: c[:1] + bytes([(c[1] + 1) % 100]) + c[2:],
            "hold 0 to 2 images of the classes 0 to 99|as many of each",
        ),
    ],
)
def test_a_damaged_file_of_cifar_100_is_refused(tmp_path, monkeypatch, damage, message):
    monkeypatch.setattr(cifar, "RECORDS", 100)
    files = fine_and_coarse()
    write(tmp_path, files | {"test.bin": damage(files["test.bin"])})
    with pytest.raises(DataError, match=message):
        data.load("cifar100", tmp_path)
