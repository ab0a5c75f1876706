"""Images in class folders, of any set: read into memory, or decoded from disk whenever a batch needs them."""

import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from experiments.data.pictures import in_threads, opened, rgb, visible
from experiments.data.source import Dataset, arrays_dataset, pixel_statistics
from experiments.run.errors import DataError
from experiments.run.surroundings import free_memory

if TYPE_CHECKING:
    from PIL.Image import Image

# An image's suffix decides whether a file belongs in a class folder, its content how it is decoded.
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp")
TEST_FOLDERS = ("test", "val", "validation")  # the first of these that is there
EVERY = 5  # without a split, one image in so many of each class is held out for the test set
STATISTICS = 2000  # training images that give the mean and deviation of a streamed set
Paths = dict[str, list[str]]  # {class: paths of its images}


def folder(root: Path, stream: bool = False) -> Dataset:
    """Images in class folders in `root`/folder or, if there is no such directory, in `root`.

    The layout is train/CLASS/NAME.png and test/CLASS/NAME.png; the test folder may be named val or validation. If there
    is no such split, the layout is CLASS/NAME.png, and every fifth image of each class, in the order of their names, is
    held out for the test set. Files may be PNG, JPEG, BMP, GIF (its first frame) or WebP. Hidden files are ignored.

    A label is the index of its class among the sorted class names. All images must have one size. If all are grey (of
    16 bits, the upper 8 are taken), they have one channel, otherwise red, green and blue; transparency is ignored.

    Args:
      root: the directory of the data.
      stream: whether images stay on disk and are decoded when they are read. Then `mean` and `std` are those of at most
        `STATISTICS` evenly spaced training images, and the fingerprint is of the training files' paths and sizes in
        bytes.

    Raises:
      DataError: a file is no image or is corrupt, a class is empty or is missing in one split, sizes differ, or the
        images take more than half of the free memory.
    """
    base = root / "folder" if (root / "folder").is_dir() else root
    train, test, source = _splits(base, root)
    names = list(train)
    if missing := [name for name in names if name not in test]:
        raise DataError(f"the test set in {base} lacks these classes of the training set: {', '.join(missing)}")
    if missing := [name for name in test if name not in train]:
        raise DataError(f"the training set in {base} lacks these classes of the test set: {', '.join(missing)}")
    count = sum(len(paths) for paths in train.values())
    paths = [path for split in (train, test) for name in names for path in split[name]]
    labels = np.array([n for split in (train, test) for n, name in enumerate(names) for _ in split[name]], np.int32)
    headers = in_threads(_header, paths)
    shape = _shape(base, paths, headers)
    whole = Files(paths, labels, shape)
    train_files, test_files = whole.take(np.arange(count)), whole.take(np.arange(count, len(whole)))
    digest = _digest(base, paths[:count], headers[:count])
    name = f"folder-{digest}"  # of these images: another folder is another data set
    if stream:
        sampled = min(count, STATISTICS)
        sample = train_files.read(np.arange(sampled) * count // sampled)["image"]
        statistics = pixel_statistics(sample, source)
        return Dataset(name, train_files, test_files, len(names), shape, *statistics, digest, source)
    _require_memory(base, len(whole) * int(np.prod(shape)))
    batches = [files.read(np.arange(len(files))) for files in (train_files, test_files)]
    arrays = [array for batch in batches for array in (batch["image"], batch["label"])]
    return arrays_dataset(name, arrays, source, classes=len(names))


class Files:
    """A `Source` of image files, decoded by threads whenever they are read.

    Args:
      paths: of the files.
      labels: int32 [n].
      image_shape: (height, width, channels) of every image; 1 channel (grey) or 3 (red, green, blue).
    """

    draws = False

    def __init__(self, paths: Sequence[str], labels: np.ndarray, image_shape: tuple[int, int, int]):
        self.paths, self.labels, self.image_shape = list(paths), labels, image_shape

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, indices: np.ndarray, draws: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """See `Source.read`. Raises DataError if a file is corrupt, or its size has changed."""
        images = np.empty((len(indices), *self.image_shape), np.uint8)

        def decode(place: int) -> None:
            images[place] = _decoded(self.paths[indices[place]], self.image_shape)

        in_threads(decode, range(len(indices)))
        return {"image": images, "label": self.labels[indices]}

    def take(self, indices: np.ndarray) -> "Files":
        return Files([self.paths[index] for index in indices], self.labels[indices], self.image_shape)

    def identity(self) -> tuple[Any, ...]:
        """See `Source.identity`. Paths are left out: another host can have the files elsewhere."""
        return len(self), self.labels


def _splits(base: Path, root: Path) -> tuple[Paths, Paths, str]:
    """(training images, test images, where they came from)."""
    test = next((name for name in TEST_FOLDERS if (base / name).is_dir()), None)
    if (base / "train").is_dir():
        if test is None:
            raise DataError(f"{base} has train but no test (or val, or validation): put the test images there")
        return _classes(base / "train"), _classes(base / test), f"images in class folders in {base}: train and {test}"
    if test is not None:
        raise DataError(f"{base} has {test} but no train: put the training images there")
    classes = _classes(base) if base.is_dir() else {}
    if not classes:
        raise DataError(
            f"no images in class folders in {base}: put them in {root / 'folder'}, as train/CLASS/NAME.png and "
            f"test/CLASS/NAME.png"
        )
    for name, paths in classes.items():
        if len(paths) < EVERY:
            raise DataError(
                f"{base / name} holds {len(paths)} images. Without the folders train and test, one image in {EVERY} of "
                f"each class is held out for the test set, which takes {EVERY} or more"
            )
    split = "no train and test: every fifth image of each class, sorted by name, is held out for the test set"
    train = {name: [path for n, path in enumerate(paths, 1) if n % EVERY] for name, paths in classes.items()}
    test = {name: paths[EVERY - 1 :: EVERY] for name, paths in classes.items()}
    return train, test, f"images in class folders in {base} ({split})"


def _classes(directory: Path) -> Paths:
    """The images in the class folders in a directory; classes and images are sorted by name."""
    classes = {}
    for entry in visible(directory):
        if entry.is_dir():
            classes[entry.name] = [_image_path(file) for file in visible(entry)]
            if not classes[entry.name]:
                raise DataError(f"the class folder {entry.path} is empty: put its images there, or remove it")
        elif entry.name.lower().endswith(SUFFIXES):
            raise DataError(f"{entry.path} is in no class folder: put it into the folder of its class")
    if len(classes) == 1:
        raise DataError(f"{directory} has the class {next(iter(classes))} only; a data set needs two or more")
    return classes


def _image_path(file: os.DirEntry) -> str:
    if not file.name.lower().endswith(SUFFIXES) or not file.is_file():
        raise DataError(f"{file.path} is not an image file ({', '.join(SUFFIXES)}): remove it from the class folder")
    return file.path


class _Header(NamedTuple):
    size: tuple[int, int]  # height, width
    grey: bool
    bytes: int  # of the file


def _header(path: str) -> _Header:
    width_and_height, mode = opened(path, lambda image: (image.size, image.mode))
    return _Header(width_and_height[::-1], mode in ("1", "L") or mode.startswith("I"), os.path.getsize(path))


def _shape(base: Path, paths: Sequence[str], headers: Sequence[_Header]) -> tuple[int, int, int]:
    """(height, width, channels) of all images; DataError if their sizes differ."""
    first = headers[0].size
    for path, header in zip(paths, headers, strict=True):
        if header.size != first:
            sizes = ["{} x {}".format(*size) for size in (header.size, first)]
            files = os.path.join(base, *["*"] * len(Path(path).relative_to(base).parts[:-1]), f"*{Path(path).suffix}")
            raise DataError(
                f"{path} is {sizes[0]} pixels (height x width), and {paths[0]} is {sizes[1]}: all images must have one "
                f"size. Resize them in a copy of the folder, for example with ImageMagick: "
                f"mogrify -resize {first[1]}x{first[0]}! {files}"
            )
    return *first, 1 if all(header.grey for header in headers) else 3


def _decoded(path: str, shape: tuple[int, int, int]) -> np.ndarray:
    """The pixels of a file, uint8 [h, w, c]."""
    pixels = opened(path, lambda image: _pixels(image, channels=shape[-1]))
    if pixels.shape != shape:
        raise DataError(f"{path} has changed: it is {list(pixels.shape)} and was {list(shape)}; run again")
    return pixels


def _pixels(image: "Image", channels: int) -> np.ndarray:
    if image.mode.startswith("I"):  # 16 bits of grey
        grey = (np.asarray(image) >> 8).astype(np.uint8)[..., None]
        return np.repeat(grey, channels, axis=-1)
    if channels == 1:
        return np.asarray(image.convert("L"))[..., None]
    return np.asarray(rgb(image))


def _digest(base: Path, paths: Sequence[str], headers: Sequence[_Header]) -> str:
    """The CRC-32 of the files' sorted paths below `base` and sizes in bytes, as eight hexadecimal digits."""
    named = zip((os.path.relpath(path, base).replace(os.sep, "/") for path in paths), headers, strict=True)
    lines = sorted(f"{path}\0{header.bytes}\n" for path, header in named)
    return f"{zlib.crc32(os.fsencode(''.join(lines))):08x}"


def _require_memory(base: Path, needed: int) -> None:
    free = free_memory(swap=False)
    if free is not None and needed > free / 2:
        raise DataError(
            f"the images in {base} take {needed / 1e9:.1f} GB of memory, more than half of the {free / 1e9:.1f} GB "
            f"that are free: add --stream, which leaves them on disk and decodes them when they are needed"
        )
