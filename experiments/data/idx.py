"""IDX files, the format of MNIST: four files a set, and which set they belong to.

An IDX file is two zero bytes, the type of its values (8: unsigned bytes), the number of axes, the size of each axis in
four bytes, big-endian, and the values. It may be compressed by gzip.
"""

import contextlib
import gzip
import hashlib
import io
import math
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from experiments.run.errors import DataError
from experiments.run.files import read_bytes

# Of the uncompressed files, since anyone may have compressed them again. Only MNIST's are known for certain.
KNOWN_MD5 = {
    "mnist": {
        "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
        "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
        "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
        "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
    }
}
CHUNK = 2**18  # bytes that are unpacked at a time
FILES = tuple(KNOWN_MD5["mnist"])  # each set's four files: training images and labels, test images and labels

Split = tuple[np.ndarray, np.ndarray]  # images uint8 [n, 28, 28, 1], labels int32 [n] in 0..9
Tables = Mapping[str, Mapping[str, str]]  # {set: {official file name: digest}}


def find(folder: Path) -> dict[str, Path]:
    """{official name: path} of the four files in `folder`, or {} if none is there.

    A file may be named with -idx or .idx, and with or without .gz. Raises DataError if only some are there.
    """
    paths = {}
    for file in FILES:
        names = [base + end for base in (file, file.replace("-idx", ".idx")) for end in (".gz", "")]
        if path := next((folder / name for name in names if (folder / name).is_file()), None):
            paths[file] = path
    if paths and (missing := [file for file in FILES if file not in paths]):
        raise DataError(f"{folder} has IDX files but lacks {', '.join(missing)}: put them there too")
    return paths


def read(files: Mapping[str, Path]) -> tuple[tuple[np.ndarray, ...], dict[str, set[str]]]:
    """((train images, train labels, test images, test labels), {official name: digests}) of the files of `find`.

    Raises DataError, with the file's path, if a file is damaged or does not fit the others.
    """
    train, train_digests = read_split(files[FILES[0]], files[FILES[1]])
    test, test_digests = read_split(files[FILES[2]], files[FILES[3]])
    return train + test, dict(zip(FILES, train_digests + test_digests, strict=True))


def identify(digests: Mapping[str, set[str]], registered: Callable[[], Tables]) -> dict[str, set[str]]:
    """{official name: the names of the sets that the file belongs to}.

    Args:
      digests: {official name: {MD5 of the content, SHA-256 of the file as it is stored}}, as `read` returns them.
      registered: makes tables of the SHA-256 of official downloads, or raises ImportError. It is called only for files
        that `KNOWN_MD5` lacks. A file that was unpacked or compressed again is not in these tables.
    """

    def owners(tables: Tables) -> dict[str, set[str]]:
        return {file: {name for name, of in tables.items() if of.get(file) in digests[file]} for file in FILES}

    known = owners(KNOWN_MD5)
    if not all(known.values()):
        with contextlib.suppress(ImportError):
            known = {file: names or known[file] for file, names in owners(registered()).items()}
    return known


def read_split(images_path: Path, labels_path: Path) -> tuple[Split, list[set[str]]]:
    """((images, labels), [digests of the one file, digests of the other]); see `Split` and `read_idx`."""
    images, images_digests = read_idx(images_path, axes=3)
    labels, labels_digests = read_idx(labels_path, axes=1)
    if not len(images) or images.shape[1:] != (28, 28):
        raise DataError(f"{images_path} holds images {list(images.shape)}; needed are [n, 28, 28] with n > 0")
    if len(labels) != len(images):
        raise DataError(f"{labels_path} has {len(labels)} labels, {images_path} has {len(images)} images")
    if labels.max() > 9:
        raise DataError(f"{labels_path} holds the label {labels.max()}; labels must be 0 to 9")
    return (images[..., None], labels.astype(np.int32)), [images_digests, labels_digests]


def read_idx(path: Path, axes: int) -> tuple[np.ndarray, set[str]]:
    """(the uint8 array in an IDX file, {MD5 of its content, SHA-256 of the file as it is stored}).

    Raises DataError, with the path, unless the file is whole and its array has so many axes.
    """
    again, stored = "fetch or copy this file again", read_bytes(path)
    magic, start = bytes([0, 0, 8, axes]), 4 + 4 * axes
    packed = stored.startswith(b"\x1f\x8b")
    stream: Any = gzip.GzipFile(fileobj=io.BytesIO(stored)) if packed else io.BytesIO(stored)
    try:
        head = stream.read(start)
        if not head.startswith(magic) or len(head) < start:
            begin = head.hex(" ") or "nothing"
            raise DataError(f"{path} is no IDX file of {axes} axes of bytes: it starts with {begin}; {again}")
        shape = np.frombuffer(head, ">u4", axes, offset=4).tolist()
        promised = math.prod(shape)
        content = head + _at_most(stream, promised + 1)  # one more tells a file that is too long
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} is a corrupted or truncated gzip file ({error}); {again}") from error
    size = len(content) - start
    if size > promised:
        raise DataError(f"{path} is too long: more bytes of data follow the {promised} that {shape} needs; {again}")
    if size < promised:
        raise DataError(f"{path} is truncated: {size} bytes of data where {shape} needs {promised}; {again}")
    digests = {hashlib.md5(content, usedforsecurity=False).hexdigest(), hashlib.sha256(stored).hexdigest()}
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape), digests


def _at_most(stream: Any, wanted: int) -> bytes:
    """The next bytes of a stream: as many as are wanted, or all that are left; no memory is taken in advance."""
    parts = []
    while wanted > 0 and (part := stream.read(min(wanted, CHUNK))):
        parts.append(part)
        wanted -= len(part)
    return b"".join(parts)
