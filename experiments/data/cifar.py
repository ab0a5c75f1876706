"""CIFAR-10 from the files of its binary version: a record is the label in one byte, then 32 x 32 bytes each of red,
green and blue, by rows.

It is never downloaded. The Python version is not read: it is pickles, and reading a pickle can run any code.
"""

import gzip
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from experiments.data.source import Dataset, arrays_dataset
from experiments.run.errors import DataError, brief
from experiments.run.files import read_bytes

RECORDS = 10_000  # in each of the six files
FILES = (*(f"data_batch_{n}.bin" for n in range(1, 6)), "test_batch.bin")
FOLDER, ARCHIVE = "cifar-10-batches-bin", "cifar-10-binary.tar.gz"


def cifar10(root: Path) -> Dataset:
    """CIFAR-10: 50,000 training and 10,000 test photographs of 32 x 32, ten classes (Krizhevsky 2009).

    Its files are looked for in `root`/cifar10, `root`/cifar-10-batches-bin, `root`/cifar10/cifar-10-batches-bin and
    `root`, in this order, and the archive in the same directories. Raises DataError if they are missing or damaged.
    """
    return arrays_dataset("cifar10", *read(root))


def read(root: Path) -> tuple[tuple[np.ndarray, ...], str]:
    """((train images, train labels, test images, test labels), where they came from); see `cifar10`.

    Images are uint8 [n, 32, 32, 3] (red, green, blue), labels int32 [n] in 0..9.
    """
    own, archives = root / "cifar10", []
    for folder in (own, root / FOLDER, own / FOLDER, root):
        missing = [file for file in FILES if not (folder / file).is_file()]
        if not missing:
            contents = ((folder / file, read_bytes(folder / file)) for file in FILES)
            return _joined(contents, f"binary files in {folder}")
        if len(missing) < len(FILES):
            raise DataError(f"{folder} has files of CIFAR-10 but lacks {', '.join(missing)}: put them there too")
        archives.append(folder / ARCHIVE)
    if archive := next((archive for archive in archives if archive.is_file()), None):
        return _joined(_unpacked(archive), str(archive))
    raise DataError(
        f"cifar10 is not in {root}, and is not downloaded: put {', '.join(FILES)}, or {ARCHIVE} "
        f"that holds them, in {own}. They are the binary version of https://www.cs.toronto.edu/~kriz/cifar.html; its "
        f"Python version is pickles, which can run any code and are not read"
    )


def _joined(contents: Iterable[tuple[Path | str, bytes]], source: str) -> tuple[tuple[np.ndarray, ...], str]:
    """What `read` returns, of six (path, bytes) in the order of FILES."""
    images, labels = zip(*(read_file(*file, RECORDS) for file in contents), strict=True)
    splits = (np.concatenate(images[:-1]), np.concatenate(labels[:-1]), images[-1], labels[-1])
    # Each split has as many images of each class, and no single training file needs to. Since no MD5 of these files is
    # known for certain, this is what shows a wrong label, a file that is there twice, or files that changed places.
    for files, of_split in ((FILES[:-1], splits[1]), (FILES[-1:], splits[3])):
        if np.ptp(counts := np.bincount(of_split, minlength=10)):
            raise DataError(
                f"{', '.join(files)} ({source}) hold {counts.tolist()} images of the classes 0 to 9, where the "
                f"official files hold as many of each: some are damaged, are there twice or changed places; fetch them "
                f"again"
            )
    return splits, source


def read_file(path: Path | str, content: bytes, records: int) -> tuple[np.ndarray, np.ndarray]:
    """(uint8 images [records, 32, 32, 3], int32 labels [records]) from the `content` of the file `path`."""
    size, each, again = len(content), 1 + 3 * 32 * 32, "fetch or copy this file again"
    if size % each:
        raise DataError(f"{path} is no file of CIFAR-10: {size} bytes, not a multiple of a record's {each}; {again}")
    if size != records * each:  # a file that was cut between two records looks whole
        fault = "truncated" if size < records * each else "too long"
        raise DataError(f"{path} is {fault}: it holds {size // each} images, the official file {records}; {again}")
    table = np.frombuffer(content, np.uint8).reshape(records, each)
    if table[:, 0].max() > 9:
        raise DataError(f"{path} holds the label {table[:, 0].max()}; labels must be 0 to 9; {again}")
    images = table[:, 1:].reshape(records, 3, 32, 32).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images), table[:, 0].astype(np.int32)


def _unpacked(path: Path) -> list[tuple[Path, bytes]]:
    """[(path, bytes)] of the six files in the official archive, for `_joined`. Nothing is written to disk."""
    members = {f"{FOLDER}/{file}": path / FOLDER / file for file in FILES}
    try:
        with gzip.open(path) as stream, tarfile.open(fileobj=stream, mode="r:") as archive:
            unpacked = {member.name: archive.extractfile(member).read() for member in archive if member.name in members}
            while stream.read(2**20):  # gzip compares its checksum at the end, where tar does not go
                pass
    except Exception as error:  # tarfile raises exceptions of many types on damaged files
        raise DataError(f"cannot read {path} ({brief(error)}); fetch or copy this file again") from error
    if missing := [member for member in members if member not in unpacked]:
        raise DataError(f"{path} lacks {', '.join(missing)}; fetch {ARCHIVE}, the binary version, again")
    return [(member, unpacked[name]) for name, member in members.items()]
