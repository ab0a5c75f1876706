"""SVHN, house numbers cropped to one digit, from its official MATLAB files, or from what tensorflow-datasets prepared.

Nothing is downloaded.
"""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from experiments.data import tfds
from experiments.data.source import Dataset, arrays_dataset
from experiments.run.errors import DataError, brief
from experiments.run.files import read_bytes

FILES = ("train_32x32.mat", "test_32x32.mat")
SIZES = (73_257, 26_032)  # images in each
AGAIN = "fetch or copy this file again"


def svhn(root: Path) -> Dataset:
    """SVHN: 73,257 training and 26,032 test photographs of digits, 32 x 32, in colour (Netzer et al. 2011).

    Its files are looked for in `root`/svhn and `root`; then what tensorflow-datasets prepared, in `root`/svhn_cropped.
    The classes are not balanced. Raises DataError if the files are missing or damaged.
    """
    for folder in (root / "svhn", root):
        missing = [file for file in FILES if not (folder / file).is_file()]
        if not missing:
            splits = (_read_file(folder / file, size) for file, size in zip(FILES, SIZES, strict=True))
            return _dataset([array for split in splits for array in split], f"MATLAB files in {folder}")
        if len(missing) < len(FILES):
            raise DataError(f"{folder} has files of SVHN but lacks {', '.join(missing)}: put it there too")
    if prepared := tfds.read_prepared("svhn_cropped", root):  # the label of the digit 0 is 0 there
        tfds.require_official(*prepared, "SVHN", SIZES, 10)
        return _dataset(*prepared)
    raise DataError(
        f"svhn is not in {root}, and is never downloaded. There are three ways out: put {' and '.join(FILES)} of "
        f"http://ufldl.stanford.edu/housenumbers in {root / 'svhn'}; or name the directory that has them with "
        f"--data-dir or in $SUPERMASK_DATA_DIR; or, to try the command, say --dataset colour-digits: these are MNIST's "
        f"digits in colour, not SVHN, and need no download"
    )


def _dataset(arrays: Sequence[np.ndarray], source: str) -> Dataset:
    return arrays_dataset("svhn", arrays, source)


def _read_file(path: Path, records: int) -> tuple[np.ndarray, np.ndarray]:
    """(uint8 images [records, 32, 32, 3], int32 labels [records] from 0) of a MATLAB file.

    It has them as X [32, 32, 3, records] and y [records, 1], where 10 is the digit 0.
    """
    content = read_bytes(path)
    try:
        import scipy.io

        stored = scipy.io.loadmat(io.BytesIO(content), variable_names=("X", "y"))
        images, labels = stored["X"], stored["y"]
    except Exception as error:  # SciPy raises exceptions of many types on damaged files
        raise DataError(f"cannot read {path} ({brief(error)}); {AGAIN}") from error
    count = images.shape[-1] if _is(images, "u1", 4) else -1
    if count < 0 or images.shape[:-1] != (32, 32, 3):
        raise DataError(f"{path} is no file of SVHN: its X is not bytes [32, 32, 3, n]; {AGAIN}")
    if count != records:
        fault = "truncated" if count < records else "too long"
        raise DataError(f"{path} is {fault}: it holds {count} images, the official file {records}; {AGAIN}")
    if not (_is(labels, "u1", 2) and labels.shape == (count, 1) and labels.min() >= 1 and labels.max() <= 10):
        raise DataError(f"{path} is no file of SVHN: its y is not bytes [{count}, 1] from 1 to 10; {AGAIN}")
    return np.ascontiguousarray(images.transpose(3, 0, 1, 2)), labels[:, 0].astype(np.int32) % 10


def _is(value: object, dtype: str, axes: int) -> bool:
    return isinstance(value, np.ndarray) and value.dtype == dtype and value.ndim == axes
