"""CIFAR-10 and CIFAR-100 from the files of their binary versions: a record is the label in one byte (of CIFAR-100, the
coarse label and the fine one), then 32 x 32 bytes each of red, green and blue, by rows.

They are never downloaded. The Python versions are not read: they are pickles, and reading a pickle can run any code.
"""

import gzip
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments.data.source import Dataset, arrays_dataset
from experiments.run.errors import DataError, brief
from experiments.run.files import read_bytes

RECORDS = 10_000  # in the smallest file of each set
PIXELS = 3 * 32 * 32
FILES = (*(f"data_batch_{n}.bin" for n in range(1, 6)), "test_batch.bin")
FOLDER, ARCHIVE = "cifar-10-batches-bin", "cifar-10-binary.tar.gz"


class Official(NamedTuple):
    """What the binary version of a set is made of; the last file is of the test images."""

    name: str
    title: str
    classes: int
    labels: int  # bytes of a record before its pixels, of which the last is the label
    folder: str
    archive: str
    files: tuple[str, ...]
    sizes: tuple[int, ...]  # of each file, in RECORDS


CIFAR_10 = Official("cifar10", "CIFAR-10", 10, 1, FOLDER, ARCHIVE, FILES, (1,) * 6)
CIFAR_100 = Official(
    "cifar100", "CIFAR-100", 100, 2, "cifar-100-binary", "cifar-100-binary.tar.gz", ("train.bin", "test.bin"), (5, 1)
)


def cifar10(root: Path) -> Dataset:
    """CIFAR-10: 50,000 training and 10,000 test photographs of 32 x 32, ten classes (Krizhevsky 2009).

    Its files are looked for in `root`/cifar10, `root`/cifar-10-batches-bin, `root`/cifar10/cifar-10-batches-bin and
    `root`, in this order, and the archive in the same directories. Raises DataError if they are missing or damaged.
    """
    return arrays_dataset("cifar10", *read(root, CIFAR_10))


def cifar100(root: Path) -> Dataset:
    """CIFAR-100: 50,000 training and 10,000 test photographs of 32 x 32, a hundred fine classes (Krizhevsky 2009).

    Its files are looked for in `root`/cifar100, `root`/cifar-100-binary, `root`/cifar100/cifar-100-binary and `root`,
    in this order, and the archive in the same directories. Raises DataError if they are missing or damaged.
    """
    return arrays_dataset("cifar100", *read(root, CIFAR_100), classes=100)


def read(root: Path, of: Official = CIFAR_10) -> tuple[tuple[np.ndarray, ...], str]:
    """((train images, train labels, test images, test labels), where they came from); see `cifar10`.

    Images are uint8 [n, 32, 32, 3] (red, green, blue), labels int32 [n] from 0.
    """
    own, archives = root / of.name, []
    for folder in (own, root / of.folder, own / of.folder, root):
        missing = [file for file in of.files if not (folder / file).is_file()]
        if not missing:
            contents = ((folder / file, read_bytes(folder / file)) for file in of.files)
            return _joined(contents, f"binary files in {folder}", of)
        if len(missing) < len(of.files):
            raise DataError(f"{folder} has files of {of.title} but lacks {', '.join(missing)}: put them there too")
        archives.append(folder / of.archive)
    if archive := next((archive for archive in archives if archive.is_file()), None):
        return _joined(_unpacked(archive, of), str(archive), of)
    raise DataError(
        f"{of.name} is not in {root}, and is not downloaded: put {', '.join(of.files)}, or {of.archive} "
        f"that holds them, in {own}. They are the binary version of https://www.cs.toronto.edu/~kriz/cifar.html; its "
        f"Python version is pickles, which can run any code and are not read"
    )


def _joined(
    contents: Iterable[tuple[Path | str, bytes]], source: str, of: Official
) -> tuple[tuple[np.ndarray, ...], str]:
    """What `read` returns, of (path, bytes) in the order of the set's files."""
    files = [
        read_file(path, content, size * RECORDS, of) for (path, content), size in zip(contents, of.sizes, strict=True)
    ]
    images, labels = zip(*files, strict=True)
    splits = (np.concatenate(images[:-1]), np.concatenate(labels[:-1]), images[-1], labels[-1])
    # Each split has as many images of each class, and no single training file needs to. Since no MD5 of these files is
    # known for certain, this is what shows a wrong label, a file that is there twice, or files that changed places.
    for names, of_split in ((of.files[:-1], splits[1]), (of.files[-1:], splits[3])):
        if np.ptp(counts := np.bincount(of_split, minlength=of.classes)):
            shown = counts.tolist() if of.classes == 10 else f"{counts.min()} to {counts.max()}"
            raise DataError(
                f"{', '.join(names)} ({source}) hold {shown} images of the classes 0 to {of.classes - 1}, where the "
                f"official files hold as many of each: some are damaged, are there twice or changed places; fetch them "
                f"again"
            )
    return splits, source


def read_file(path: Path | str, content: bytes, records: int, of: Official = CIFAR_10) -> tuple[np.ndarray, np.ndarray]:
    """(uint8 images [records, 32, 32, 3], int32 labels [records]) from the `content` of the file `path`."""
    size, each, again = len(content), of.labels + PIXELS, "fetch or copy this file again"
    if size % each:
        raise DataError(f"{path} is no file of {of.title}: {size} bytes, not a multiple of a record's {each}; {again}")
    if size != records * each:  # a file that was cut between two records looks whole
        fault = "truncated" if size < records * each else "too long"
        raise DataError(f"{path} is {fault}: it holds {size // each} images, the official file {records}; {again}")
    table = np.frombuffer(content, np.uint8).reshape(records, each)
    labels = table[:, of.labels - 1]
    if labels.max() >= of.classes:
        raise DataError(f"{path} holds the label {labels.max()}; labels must be 0 to {of.classes - 1}; {again}")
    images = table[:, of.labels :].reshape(records, 3, 32, 32).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images), labels.astype(np.int32)


def _unpacked(path: Path, of: Official) -> list[tuple[Path, bytes]]:
    """[(path, bytes)] of the files in the official archive, for `_joined`. Nothing is written to disk."""
    members = {f"{of.folder}/{file}": path / of.folder / file for file in of.files}
    try:
        with gzip.open(path) as stream, tarfile.open(fileobj=stream, mode="r:") as archive:
            unpacked = {member.name: archive.extractfile(member).read() for member in archive if member.name in members}
            while stream.read(2**20):  # gzip compares its checksum at the end, where tar does not go
                pass
    except Exception as error:  # tarfile raises exceptions of many types on damaged files
        raise DataError(f"cannot read {path} ({brief(error)}); fetch or copy this file again") from error
    if missing := [member for member in members if member not in unpacked]:
        raise DataError(f"{path} lacks {', '.join(missing)}; fetch {of.archive}, the binary version, again")
    return [(member, unpacked[name]) for name, member in members.items()]
