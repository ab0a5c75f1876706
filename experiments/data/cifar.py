"""CIFAR-10 and CIFAR-100 from their official files, or from what tensorflow-datasets prepared. Nothing is downloaded.

In the binary version a record is the label in one byte (of CIFAR-100, the coarse label and the fine one), then 32 x 32
bytes each of red, green and blue, by rows. In the Python version a file is a pickle of a dictionary: its "data" have
such pixels in each row, and a list has the labels. Both versions have the same images in the same order.
"""

import gzip
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from experiments.data import tfds
from experiments.data.pickles import read_pickle
from experiments.data.source import Dataset, arrays_dataset
from experiments.run.errors import DataError, brief
from experiments.run.files import read_bytes

AGAIN = "fetch or copy this file again"
RECORDS = 10_000  # in the smallest file of each set
PIXELS = 3 * 32 * 32
LARGEST = 2**28  # bytes of an official archive, unpacked: 190 million at most
FILES = (*(f"data_batch_{n}.bin" for n in range(1, 6)), "test_batch.bin")
FOLDER, ARCHIVE = "cifar-10-batches-bin", "cifar-10-binary.tar.gz"


class Official(NamedTuple):
    """What one version of a set is made of; the last file is of the test images."""

    name: str
    title: str
    classes: int
    labels: int  # bytes of a record before its pixels, of which the last is the label
    folder: str
    archive: str
    files: tuple[str, ...]
    sizes: tuple[int, ...]  # of each file, in RECORDS
    key: bytes | None = None  # of the labels in the Python version; None in the binary one

    @property
    def version(self) -> str:
        return "Python version" if self.key else "binary version"


CIFAR_10 = Official("cifar10", "CIFAR-10", 10, 1, FOLDER, ARCHIVE, FILES, (1,) * 6)
CIFAR_100 = Official(
    "cifar100", "CIFAR-100", 100, 2, "cifar-100-binary", "cifar-100-binary.tar.gz", ("train.bin", "test.bin"), (5, 1)
)
PYTHON = {
    "cifar10": CIFAR_10._replace(
        folder="cifar-10-batches-py",
        archive="cifar-10-python.tar.gz",
        files=tuple(file.removesuffix(".bin") for file in FILES),
        key=b"labels",
    ),
    "cifar100": CIFAR_100._replace(
        folder="cifar-100-python", archive="cifar-100-python.tar.gz", files=("train", "test"), key=b"fine_labels"
    ),
}

Splits = tuple[np.ndarray, ...]  # train images, train labels, test images, test labels


def cifar10(root: Path) -> Dataset:
    """CIFAR-10: 50,000 training and 10,000 test photographs of 32 x 32, ten classes (Krizhevsky 2009).

    The files of its binary version are looked for in `root`/cifar10, `root`/cifar-10-batches-bin,
    `root`/cifar10/cifar-10-batches-bin and `root`, in this order, and the archive in the same directories; then those
    of its Python version, where the folder is cifar-10-batches-py; then what tensorflow-datasets prepared, in
    `root`/cifar10. Raises DataError if they are missing or damaged.
    """
    return arrays_dataset("cifar10", *read(root, CIFAR_10))


def cifar100(root: Path) -> Dataset:
    """CIFAR-100: 50,000 training and 10,000 test photographs of 32 x 32, a hundred fine classes (Krizhevsky 2009).

    Its files are looked for as those of `cifar10`: in `root`/cifar100, and in folders that are named cifar-100-binary
    and cifar-100-python. Raises DataError if they are missing or damaged.
    """
    return arrays_dataset("cifar100", *read(root, CIFAR_100), classes=100)


def read(root: Path, of: Official = CIFAR_10) -> tuple[Splits, str]:
    """((train images, train labels, test images, test labels), where they came from); see `cifar10`.

    Images are uint8 [n, 32, 32, 3] (red, green, blue), labels int32 [n] from 0.
    """
    python = PYTHON[of.name]
    for version in (of, python):
        if found := _found(root, version):
            return found
    if prepared := tfds.read_prepared(of.name, root):
        splits, source = prepared
        sizes = RECORDS * sum(of.sizes[:-1]), RECORDS * of.sizes[-1]
        tfds.require_official(splits, source, of.title, sizes, of.classes)
        _require_balance(splits, source, of, ["the training images", "the test images"])
        return splits, source
    raise DataError(
        f"{of.name} is not in {root}, and is never downloaded. There are three ways out: put {of.archive} or "
        f"{python.archive} of https://www.cs.toronto.edu/~kriz/cifar.html, or the files in it (of the binary version "
        f"{', '.join(of.files)}; of the Python version {', '.join(python.files)}), in {root / of.name}; or name the "
        f"directory that has them with --data-dir or in $SUPERMASK_DATA_DIR; or, to try the command, say --dataset "
        f"colour-digits: these are MNIST's digits in colour, not {of.title}, and need no download"
    )


def _found(root: Path, of: Official) -> tuple[Splits, str] | None:
    """What `read` returns, from files of this version or from their archive; None where there is neither."""
    own, archives = root / of.name, []
    for folder in (own, root / of.folder, own / of.folder, root):
        missing = [file for file in of.files if not (folder / file).is_file()]
        if not missing:
            contents = ((folder / file, read_bytes(folder / file)) for file in of.files)
            return _joined(contents, f"{of.version.removesuffix(' version')} files in {folder}", of)
        # A file that is named train or test may be of anything, in a directory that is not named like the set.
        if len(missing) < len(of.files) and (folder != root or "train" not in of.files):
            raise DataError(f"{folder} has files of {of.title} but lacks {', '.join(missing)}: put them there too")
        archives.append(folder / of.archive)
    archive = next((archive for archive in archives if archive.is_file()), None)
    return _joined(_unpacked(archive, of), str(archive), of) if archive else None


def _joined(contents: Iterable[tuple[Path | str, bytes]], source: str, of: Official) -> tuple[Splits, str]:
    """What `read` returns, of (path, bytes) in the order of the set's files."""
    files = [
        read_file(path, content, size * RECORDS, of) for (path, content), size in zip(contents, of.sizes, strict=True)
    ]
    images, labels = zip(*files, strict=True)
    splits = (np.concatenate(images[:-1]), np.concatenate(labels[:-1]), images[-1], labels[-1])
    _require_balance(splits, source, of, [", ".join(of.files[:-1]), of.files[-1]])
    return splits, source


def _require_balance(splits: Splits, source: str, of: Official, names: list[str]) -> None:
    """Raises DataError, with the split's name, unless each split has as many images of each class.

    No single training file needs to. Since no MD5 of these files is known for certain, this is what shows a wrong
    label, a file that is there twice, or files that changed places.
    """
    for name, labels in zip(names, splits[1::2], strict=True):
        if np.ptp(counts := np.bincount(labels, minlength=of.classes)):
            shown = counts.tolist() if of.classes == 10 else f"{counts.min()} to {counts.max()}"
            raise DataError(
                f"{name} ({source}) hold {shown} images of the classes 0 to {of.classes - 1}, where the official files "
                f"hold as many of each: some are damaged, are there twice or changed places; fetch them again"
            )


def read_file(path: Path | str, content: bytes, records: int, of: Official = CIFAR_10) -> tuple[np.ndarray, np.ndarray]:
    """(uint8 images [records, 32, 32, 3], int32 labels [records]) from the `content` of the file `path`."""
    planes, labels = (_of_pickle if of.key else _of_records)(path, content, of)
    if len(labels) != records:  # a file that was cut between two records looks whole
        fault = "truncated" if len(labels) < records else "too long"
        raise DataError(f"{path} is {fault}: it holds {len(labels)} images, the official file {records}; {AGAIN}")
    if wrong := [label for label in (labels.min(), labels.max()) if not 0 <= label < of.classes]:
        raise DataError(f"{path} holds the label {wrong[0]}; labels must be 0 to {of.classes - 1}; {AGAIN}")
    images = planes.reshape(records, 3, 32, 32).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images), labels.astype(np.int32)


def _of_records(path: Path | str, content: bytes, of: Official) -> tuple[np.ndarray, np.ndarray]:
    """(uint8 [n, PIXELS], labels [n]) of a file of the binary version."""
    size, each = len(content), of.labels + PIXELS
    if size % each:
        raise DataError(f"{path} is no file of {of.title}: {size} bytes, not a multiple of a record's {each}; {AGAIN}")
    table = np.frombuffer(content, np.uint8).reshape(-1, each)
    return table[:, of.labels :], table[:, of.labels - 1]


def _of_pickle(path: Path | str, content: bytes, of: Official) -> tuple[np.ndarray, np.ndarray]:
    """(uint8 [n, PIXELS], labels [n]) of a file of the Python version."""
    batch, key = read_pickle(path, content), str(of.key, "ascii")
    planes, labels = batch.get(b"data"), batch.get(of.key)
    if not isinstance(planes, np.ndarray) or planes.ndim != 2 or planes.shape[1] != PIXELS:
        raise DataError(f"{path} is no file of {of.title}: its data are not bytes [n, {PIXELS}]; {AGAIN}")
    if not isinstance(labels, list) or any(type(label) is not int for label in labels):
        raise DataError(f"{path} is no file of {of.title}: its {key} are not a list of whole numbers; {AGAIN}")
    if len(labels) != len(planes):
        raise DataError(f"{path} has {len(labels)} {key} and {len(planes)} images; {AGAIN}")
    training = len(of.files) - 1
    titles = [*(f"training batch {n} of {training}".encode() for n in range(1, training + 1)), b"testing batch 1 of 1"]
    own, said = titles[of.files.index(Path(path).name)], batch.get(b"batch_label")
    if said in titles and said != own:
        raise DataError(
            f"{path} says that it is the {said.decode()}, not the {own.decode()}: put each file in its place"
        )
    return planes, np.array(labels, object)


class _AtMost:
    """A stream that ends with an error if more is read from it than it may hold."""

    def __init__(self, stream: BinaryIO, left: int):
        self._stream, self._left = stream, left

    def read(self, size: int) -> bytes:
        part = self._stream.read(size)
        self._left -= len(part)
        if self._left < 0:
            raise ValueError("it unpacks to more than the official archive holds")
        return part


def _unpacked(path: Path, of: Official) -> list[tuple[Path, bytes]]:
    """[(path, bytes)] of the files in the official archive, for `_joined`. Nothing is written to disk."""
    members = {f"{of.folder}/{file}": path / of.folder / file for file in of.files}
    try:
        with gzip.open(path) as packed:
            stream = _AtMost(packed, LARGEST)
            with tarfile.open(fileobj=stream, mode="r|") as archive:
                found = (member for member in archive if member.name in members)
                unpacked = {member.name: archive.extractfile(member).read() for member in found}
            while stream.read(2**20):  # gzip compares its checksum at the end, where tar does not go
                pass
    except Exception as error:  # tarfile raises exceptions of many types on damaged files
        raise DataError(f"cannot read {path} ({brief(error)}); {AGAIN}") from error
    if missing := [member for member in members if member not in unpacked]:
        raise DataError(f"{path} lacks {', '.join(missing)}; fetch {of.archive}, the {of.version}, again")
    return [(member, unpacked[name]) for name, member in members.items()]
