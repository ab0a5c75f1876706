"""MNIST, Fashion-MNIST and KMNIST through tensorflow-datasets, without tensorflow: prepared, read and cached.

The prepared directory is the one that stock tensorflow-datasets makes and reads. It is shuffled: the same images come
in another order than from IDX files. Other sets of images are read where they are prepared, as ArrayRecord files.
"""

import contextlib
import hashlib
import io
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from experiments.data.idx import FILES, Split, Tables, read_split
from experiments.run.errors import DataError, UserError, brief
from experiments.run.files import read_arrays, write_arrays

INFO = "dataset_info.json"  # what describes a version
VERSION = re.compile(r"\d+\.\d+\.\d+")  # of a set that is prepared to the end


class Unavailable(DataError):
    """The set is neither on disk nor can be downloaded: the one failure for which `auto` takes mnist-5k."""


def stock_builders() -> dict[str, type]:
    """{name: the class of its builder in tensorflow-datasets}; ImportError where that is not installed."""
    from tensorflow_datasets.image_classification import mnist

    return {"mnist": mnist.MNIST, "fashion_mnist": mnist.FashionMNIST, "kmnist": mnist.KMNIST}


def registered_digests() -> Tables:
    """{set: {official file name: SHA-256 of the official .gz download}}, as tensorflow-datasets registers them."""
    return {
        name: {Path(url).stem: info.checksum for url, info in stock.url_infos.items()}
        for name, stock in stock_builders().items()
    }


def read(name: str, root: Path) -> tuple[tuple[np.ndarray, ...], str]:
    """((train images, train labels, test images, test labels), where they came from) of the set `name`.

    Prepares the set in `root` first if it is not there, from a download or from `root`/downloads/manual. The decoded
    arrays are cached beside the prepared directory.

    Raises:
      Unavailable: the set is not in `root` and cannot be fetched.
      DataError: what is there is damaged.
    """
    try:
        import PIL.Image  # noqa: F401 - these two are needed later; it is better to report now that one is missing
        import requests  # noqa: F401

        stock = stock_builders()[name]
    except ImportError as error:
        raise _unavailable(name, root, f"{error}: pip install 'supermask-jax[experiments]'") from error
    prepared = root / name / str(stock.VERSION)
    info = prepared / INFO  # written last, before the finished directory is given this name
    if not prepared.exists():
        _prepare(name, root, stock.URL, info)
    try:
        described = info.read_bytes()
        if json.loads(described).get("fileFormat") != "array_record":
            raise _unavailable(name, root, f"what is in {prepared} can only be read with tensorflow")
        return _cached(name, prepared, described, lambda: builder(name, root)), _source(name, prepared)
    except Unavailable:
        raise
    except Exception as error:  # the readers raise exceptions of many types on damaged files
        raise DataError(f"cannot read {prepared} ({brief(error)}); remove it and run again") from error


def newest(folder: Path) -> Path | None:
    """The directory of the newest version of a set that is prepared to the end in a directory; None where none is."""
    versions = [path.parent for path in folder.glob(f"*/{INFO}") if VERSION.fullmatch(path.parent.name)]
    return max(versions, key=lambda path: [int(number) for number in path.name.split(".")], default=None)


def read_prepared(name: str, root: Path) -> tuple[tuple[np.ndarray, ...], str] | None:
    """What `read` returns, of any set of images that is prepared in `root`/`name`; None where none is.

    Nothing is downloaded or prepared.

    Raises:
      Unavailable: only tensorflow can read what is there.
      DataError: it is damaged.
    """
    prepared = newest(root / name)
    if prepared is None:
        return None
    again = "prepare it again, with file_format='array_record', or remove it and put the official files in its place"
    try:
        described = (prepared / INFO).read_bytes()
        if json.loads(described).get("fileFormat") != "array_record":
            raise Unavailable(f"what is in {prepared} can only be read with tensorflow; {again}")
        import tensorflow_datasets as tfds

        arrays = _cached(name, prepared, described, lambda: tfds.builder_from_directory(prepared))
    except Unavailable:
        raise
    except Exception as error:  # a package that is missing, and whatever damaged files make the readers raise
        raise DataError(f"cannot read {prepared} ({brief(error)}); {again}") from error
    return arrays, _source(name, prepared)


def require_official(
    splits: tuple[np.ndarray, ...], source: str, title: str, sizes: tuple[int, int], classes: int
) -> None:
    """Raises DataError unless a prepared set has the official images: so many of 32 x 32 in colour, of these classes.

    Args:
      splits, source: what `read_prepared` returned.
      title: of the set, for the message.
      sizes: how many training and test images there are.
      classes: how many classes.
    """
    for images, labels, size in zip(splits[::2], splits[1::2], sizes, strict=True):
        wanted = (size, 32, 32, 3)
        if images.shape != wanted or labels.min() < 0 or labels.max() >= classes:
            raise DataError(
                f"{source} is not {title}: it holds images {list(images.shape)} with labels {labels.min()} to "
                f"{labels.max()}, and needed are {list(wanted)} with 0 to {classes - 1}; prepare it again"
            )


def _source(name: str, prepared: Path) -> str:
    return f"tensorflow-datasets {name} {prepared.name} in {prepared}"


def _cached(name: str, prepared: Path, described: bytes, open_set: Callable) -> tuple[np.ndarray, ...]:
    """The four arrays of a prepared set, from the cache beside it or else decoded; `open_set` makes its builder."""
    cache = prepared.parent / f"{name}-{prepared.name}.npz"
    made_from = np.array(hashlib.sha256(described).hexdigest())
    arrays = read_cache(cache, made_from)
    if arrays is None:
        prepared_set = open_set()
        arrays = _decode(prepared_set, "train") + _decode(prepared_set, "test")
        write_cache(cache, made_from, arrays)
    return arrays


def builder(title: str, root: Path):
    """The stock builder of that name, but for unpacking, reading and encoding, which it does without tensorflow.

    It makes the directory that the stock builder would make.
    """
    from PIL import Image

    class Builder(stock_builders()[title], skip_registration=True):
        name = title

        def _split_generators(self, manager):
            urls = [self.URL + file + ".gz" for file in FILES]
            paths = manager.download({"train": urls[:2], "test": urls[2:]})
            return {split: self._generate_examples(*pair) for split, pair in paths.items()}

        def _generate_examples(self, images_path, labels_path):
            (images, labels), _ = read_split(images_path, labels_path)
            for index, label in enumerate(labels):
                png = io.BytesIO()
                Image.fromarray(images[index, ..., 0]).save(png, "png")
                yield index, {"image": png.getvalue(), "label": int(label)}

    return Builder(data_dir=root, file_format="array_record")


def _prepare(name: str, root: Path, url: str, info: Path) -> None:
    """Makes the prepared directory from a download, or from the files in downloads/manual."""
    import requests
    import tensorflow_datasets as tfds

    manual = root / "downloads" / "manual"
    by_hand = all((manual / f"{file}.gz").is_file() for file in FILES)
    watched = sys.stderr.isatty()
    tfds.display_progress_bar(watched)
    try:
        if not by_hand:  # without a network, tensorflow-datasets would go on trying for minutes
            requests.head(f"{url}{FILES[0]}.gz", timeout=(3, 10), allow_redirects=True).raise_for_status()
        with contextlib.redirect_stdout(sys.stdout if watched else io.StringIO()):
            config = tfds.download.DownloadConfig(try_download_gcs=False)
            builder(name, root).download_and_prepare(download_config=config)
    except Exception as error:  # of requests, the checksums, the disk or our reader; tfds wraps some of them
        if info.is_file():
            return  # another process was faster
        if not by_hand:
            raise _unavailable(name, root, f"downloading {url} failed ({brief(error)})") from error
        raise DataError(
            f"cannot prepare {name} from {manual} ({brief(error)}). The files there must be the official "
            f".gz downloads from {url}; any other copies of the four files belong in {root / name}"
        ) from error


def _unavailable(name: str, root: Path, why: str) -> Unavailable:
    return Unavailable(
        f"{name} is not in {root} and cannot be fetched: {why}. There are three ways out: put the four IDX "
        f"files ({', '.join(FILES)}, .gz or not) in {root / name}; or put the official .gz downloads in "
        f"{root / 'downloads' / 'manual'}; or say --dataset mnist-5k, which needs no download"
    )


def _decode(prepared, split: str) -> Split:
    import tensorflow_datasets as tfds
    from PIL import Image

    source = prepared.as_data_source(split=split, decoders={"image": tfds.decode.SkipDecoding()})
    examples = source.__getitems__(range(len(source)))  # all at once: one by one takes several times as long
    images = np.stack([np.asarray(Image.open(io.BytesIO(example["image"]))) for example in examples])
    images = images if images.ndim == 4 else images[..., None]  # grey ones have no axis of channels
    return images, np.array([example["label"] for example in examples], np.int32)


def read_cache(path: Path, made_from: np.ndarray) -> tuple[np.ndarray, ...] | None:
    """The four arrays, or None if the cache is missing, damaged or made from something else."""
    with contextlib.suppress(UserError, KeyError):
        cache = read_arrays(path)
        if cache["fingerprint"] == made_from:
            return tuple(cache[file] for file in FILES)
    return None


def write_cache(path: Path, made_from: np.ndarray, arrays: tuple[np.ndarray, ...]) -> None:
    """Writes the four arrays, and what they were made from, whole or not at all."""
    with contextlib.suppress(OSError):  # a full or read-only disk costs time at each start, not the run
        write_arrays(path, {"fingerprint": made_from, **dict(zip(FILES, arrays, strict=True))})
