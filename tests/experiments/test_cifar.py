"""CIFAR's official files, on tiny ones: every image is where it belongs, and what is not whole is refused."""

import functools
import gzip
import io
import os
import pickle
import pickletools
import tarfile
from pathlib import Path

import cifar_pickles
import numpy as np
import pytest

from experiments.data import cifar, pickles
from experiments.data import load as data
from experiments.data.cifar import ARCHIVE, FILES, FOLDER
from experiments.run.errors import DataError

PYTHON = cifar.PYTHON["cifar10"]
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
        versions = (*FILES, ARCHIVE, "binary version", *PYTHON.files, PYTHON.archive, "Python version")
        for part in (*versions, root / "cifar10", "--data-dir", "$SUPERMASK_DATA_DIR", "--dataset colour-digits"):
            assert str(part) in str(caught.value)
        assert "\n" not in str(caught.value)


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


def test_an_archive_is_unpacked_no_further_than_the_official_one_goes(tmp_path, monkeypatch):
    monkeypatch.setattr(cifar, "LARGEST", 10**6)
    (tmp_path / ARCHIVE).write_bytes(archived(contents() | {"more": bytes(10**6)}))
    with pytest.raises(DataError, match="unpacks to more than the official archive holds"):
        data.load("cifar10", tmp_path)


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


# The Python version.

PROTOCOLS = [functools.partial(pickle.dumps, protocol=protocol) for protocol in range(5)]  # of Python 3


@pytest.mark.parametrize("dumps", [cifar_pickles.python_2, *PROTOCOLS])
def test_the_python_version_has_the_images_of_the_binary_version_in_their_order(tmp_path, dumps):
    write(tmp_path, cifar_pickles.pickled(contents(), dumps=dumps))
    got = data.load("cifar10", tmp_path)
    assert_holds(got, contents())
    assert "Python files" in got.source
    write(tmp_path / "binary", contents())
    assert data.load("cifar10", tmp_path / "binary").fingerprint == got.fingerprint


@pytest.mark.parametrize("folder", ["cifar10", PYTHON.folder, f"cifar10/{PYTHON.folder}", ""])
@pytest.mark.parametrize("packed", [False, True])
def test_the_python_version_is_read_in_every_folder(tmp_path, folder, packed):
    files = cifar_pickles.pickled(contents())
    write(tmp_path / folder, {PYTHON.archive: archived(files, PYTHON.folder)} if packed else files)
    got = data.load("cifar10", tmp_path)
    assert_holds(got, contents())
    assert str(tmp_path / folder) in got.source


@pytest.mark.parametrize("packed", [False, True])
def test_the_binary_version_is_preferred(tmp_path, packed):
    write(tmp_path / "cifar10", cifar_pickles.pickled(contents(0)))
    write(tmp_path, {ARCHIVE: archived(contents(1))} if packed else contents(1))
    assert_holds(data.load("cifar10", tmp_path), contents(1))


@pytest.mark.parametrize("packed", [False, True])
def test_the_python_version_of_cifar_100_has_its_fine_labels(tmp_path, monkeypatch, packed):
    monkeypatch.setattr(cifar, "RECORDS", 100)
    version, files = cifar.PYTHON["cifar100"], cifar_pickles.pickled(fine_and_coarse(), labels=2)
    assert list(files) == list(version.files)
    write(tmp_path, {version.archive: archived(files, version.folder)} if packed else files)
    write(tmp_path / "binary", fine_and_coarse())
    got, expected = (data.load("cifar100", root) for root in (tmp_path, tmp_path / "binary"))
    for one, other in ((got.train, expected.train), (got.test, expected.test)):
        np.testing.assert_array_equal(one.images, other.images, strict=True)
        np.testing.assert_array_equal(one.labels, other.labels, strict=True)


def test_a_file_named_train_that_is_of_something_else_is_no_part_of_cifar_100(tmp_path):
    write(tmp_path, {"train": b"of something else"})
    with pytest.raises(DataError, match="cifar100 is not in"):
        data.load("cifar100", tmp_path)
    write(tmp_path / "cifar100", {"train": b""})
    with pytest.raises(DataError, match="lacks test"):
        data.load("cifar100", tmp_path)


def _globals(tmp_path):
    """{name: a pickle that calls it}: each would make a file, end the process or look around."""
    mark = tmp_path / "executed"

    class Calling:
        def __init__(self, function, *arguments):
            self.reduced = function, arguments

        def __reduce__(self):
            return self.reduced

    made = {
        f"{function.__name__}, protocol {protocol}": pickle.dumps({b"data": Calling(function, *arguments)}, protocol)
        for function, *arguments in (
            (os.system, f"touch {mark}"),
            (eval, f"open({str(mark)!r}, 'w')"),
            (open, str(mark), "w"),
            (getattr, "", "upper"),
            (bytearray, 2**40),
            (np.zeros, 3),
            (np.dtype, "O"),
        )
        for protocol in (0, 2, 4)
    }
    return {
        **made,
        "abort": b"cos\nabort\n(tR.",
        "dotted": b"\x80\x04\x8c\x08builtins\x8c\x0deval.__call__\x93.",
        "instance": b"(S'touch'\nios\nsystem\n.",
        "new": b"\x80\x02c__builtin__\ndict\n)\x81.",
        "persistent": b"Pid\n.",
        "extension": b"\x80\x02\x82\x01.",
        "buffer": b"\x80\x05\x97.",
        "room for 2**60 bytes": b"\x80\x05\x96" + (2**60).to_bytes(8, "little") + b".",
        "another codec": b"c_codecs\nencode\n(Vaa\nVzip\ntR.",
        "a changed function": b"cnumpy.core.multiarray\n_reconstruct\n(dS'__call__'\nI1\nsb.",
        "a changed type": b"c__builtin__\nset\n(dS'x'\nI1\nsb.",
    }


def test_what_a_pickle_asks_for_is_refused_and_not_run(tmp_path):
    good = cifar_pickles.pickled(contents())
    for at, (name, content) in enumerate(_globals(tmp_path).items()):
        file = PYTHON.files[at % 6]
        root = tmp_path / str(at)
        write(root, good | {file: content})
        with pytest.raises(DataError) as caught:
            data.load("cifar10", root)
        assert str(root / file) in str(caught.value) and "\n" not in str(caught.value), name
        if name.startswith(("system", "eval", "abort", "dotted")):
            assert "which is not run" in str(caught.value), name
    assert not (tmp_path / "executed").exists()


def test_the_reader_lacks_every_instruction_that_makes_instances_or_takes_memory():
    lacking = {"PERSID", "BINPERSID", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4"}
    lacking |= {"BYTEARRAY8", "NEXT_BUFFER", "READONLY_BUFFER"}
    known = {opcode.name: ord(opcode.code) for opcode in pickletools.opcodes}
    assert {name for name, code in known.items() if code not in pickles._Reader.dispatch} == lacking


def _batch_with(**changes):
    def change(batch):
        values = {key.encode(): value for key, value in changes.items()}
        return {key: value for key, value in (batch | values).items() if value is not None}

    return change


PIXELS = np.zeros((RECORDS, 3072), np.uint8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_batch_with(data=None), "its data are not bytes"),
        (_batch_with(data=b"\0" * 3072), "its data are not bytes"),
        (_batch_with(data=PIXELS.reshape(RECORDS, 3, 1024)), "its data are not bytes"),
        (_batch_with(data=PIXELS[:, 1:]), "its data are not bytes"),
        (_batch_with(data=PIXELS.astype(np.float32)), "an array of 'f4', not of uint8"),
        (_batch_with(data=PIXELS.astype(object)), "an array of 'O8', not of uint8"),
        (_batch_with(labels=None), "its labels are not a list"),
        (_batch_with(labels=tuple(range(10))), "its labels are not a list"),
        (_batch_with(labels=np.arange(10, dtype=np.uint8)), "its labels are not a list"),
        (_batch_with(labels=[*range(9), 9.0]), "its labels are not a list"),
        (_batch_with(labels=[*range(9), True]), "its labels are not a list"),
        (_batch_with(labels=[*range(9), 10]), "label 10; labels must be 0 to 9"),
        (_batch_with(labels=[*range(9), -1]), "label -1; labels must be 0 to 9"),
        (_batch_with(labels=[*range(9), 2**80]), f"label {2**80}; labels"),
        (_batch_with(labels=list(range(9))), "has 9 labels and 10 images"),
        (_batch_with(labels=list(range(9)), data=PIXELS[1:]), "truncated: it holds 9 images, the official file 10"),
        (_batch_with(labels=[*range(10), 0], data=np.zeros((11, 3072), np.uint8)), "too long: it holds 11 images"),
        (lambda batch: list(batch), "it holds list, not a dictionary"),
        (lambda batch: {key.decode(): value for key, value in batch.items()}, "its data are not bytes"),
    ],
)
def test_a_batch_that_is_not_like_the_official_ones_is_named(tmp_path, change, message):
    batches = cifar_pickles.batches(contents())
    for file in (PYTHON.files[0], PYTHON.files[-1]):
        root = tmp_path / file
        write(root, {name: pickle.dumps(change(b) if name == file else b) for name, b in batches.items()})
        with pytest.raises(DataError, match=message) as caught:
            data.load("cifar10", root)
        assert str(root / file) in str(caught.value)


@pytest.mark.parametrize("damage", [lambda c: c[:-1], lambda c: c[: len(c) // 2], lambda c: b"", lambda c: c + b"."])
def test_a_pickle_that_is_cut_or_goes_on_is_named(tmp_path, damage):
    files = cifar_pickles.pickled(contents())
    write(tmp_path, files | {"data_batch_3": damage(files["data_batch_3"])})
    with pytest.raises(DataError, match=rf"{tmp_path / 'data_batch_3'} is truncated or damaged"):
        data.load("cifar10", tmp_path)


def test_batches_that_changed_places_are_named_with_and_without_their_titles(tmp_path):
    batches = cifar_pickles.batches(_unbalanced(contents()))
    for one, other, balanced in (("data_batch_1", "data_batch_2", True), ("data_batch_1", "test_batch", False)):
        swapped = batches | {one: batches[other], other: batches[one]}
        write(tmp_path / "cifar10", {name: pickle.dumps(batch) for name, batch in swapped.items()})
        with pytest.raises(DataError, match=rf"{one} says that it is the .*, not the training batch 1 of 5"):
            data.load("cifar10", tmp_path)
        for batch in swapped.values():
            batch.pop(b"batch_label", None)
        write(tmp_path / "cifar10", {name: pickle.dumps(batch) for name, batch in swapped.items()})
        if not balanced:  # two training files that changed places change the order alone
            with pytest.raises(DataError, match=rf"{one}.* as many of each"):
                data.load("cifar10", tmp_path)
        batches = cifar_pickles.batches(_unbalanced(contents()))


def test_nothing_that_the_reader_knows_can_be_changed_by_a_pickle(tmp_path):
    """A pickle may set attributes of what it names: a later file would be read by what an earlier one left."""
    for content in _globals(tmp_path).values():
        write(tmp_path / "bad", dict.fromkeys(PYTHON.files, content))
        with pytest.raises(DataError):
            data.load("cifar10", tmp_path / "bad")
    write(tmp_path / "good", cifar_pickles.pickled(contents()))
    assert_holds(data.load("cifar10", tmp_path / "good"), contents())
