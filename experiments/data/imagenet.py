"""ImageNet, or any photographs of many sizes in class folders: cropped to one size while they are decoded."""

import math
import os
import warnings
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from experiments.data.pictures import in_threads, opened, rgb, visible
from experiments.data.source import Dataset
from experiments.run.errors import DataError, brief

if TYPE_CHECKING:
    from PIL.Image import Image

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of the training photographs, as published code has them
SUFFIXES = (".jpeg", ".jpg", ".png")
TRUTH, CLASSES = "ILSVRC2012_validation_ground_truth.txt", "meta.mat"  # of the development kit
KIT = ("ILSVRC2012_devkit_t12/data", "data", "")  # where these two are looked for
TRAIN_IMAGES = 1_281_167  # of ImageNet; other photographs do not pass for it
CENTRE = 224 / 256  # of the shorter side, that an evaluation sees
RATIO, TRIES = (3 / 4, 4 / 3), 10  # of a random crop: width / height
UNPACK = {
    "ILSVRC2012_img_train.tar": "mkdir -p train && tar -xf ILSVRC2012_img_train.tar -C train && cd train && for t in "
    "*.tar; do mkdir ${t%.tar} && tar -xf $t -C ${t%.tar} && rm $t; done",
    "ILSVRC2012_img_val.tar": "mkdir -p val && tar -xf ILSVRC2012_img_val.tar -C val",
    "ILSVRC2012_devkit_t12.tar.gz": "tar -xzf ILSVRC2012_devkit_t12.tar.gz",
}


def imagenet(root: Path, image_size: int = 224, crop: float = 0.08, skip_corrupt: bool = False) -> Dataset:
    """Photographs in `root`/imagenet or, if there is no such directory, in `root`.

    Training photographs are train/CLASS/NAME.JPEG; a label is the index of its class among the sorted class names.
    Those for evaluation are val/CLASS/NAME.JPEG; or val/NAME.JPEG, and beside val the development kit, unpacked, whose
    files `TRUTH` and `CLASSES` tell the class of each. A file may be JPEG or PNG, whatever its name says, and of any
    colours.

    Args:
      root: the directory of the data.
      image_size: the side of the squares that are read, in pixels.
      crop: the smallest part of a photograph's area that a random crop has.
      skip_corrupt: whether another training photograph takes the place of one that cannot be read. Each such is named.

    The fingerprint is of the names of classes and files, and of the labels: what is in 1.3 million files is not read.

    Raises:
      DataError: there are no photographs, a class is empty, val has classes that train lacks, archives are not
        unpacked, or the development kit does not fit.
    """
    base = root / "imagenet" if (root / "imagenet").is_dir() else root
    for split in ("train", "val"):
        if not (base / split).is_dir():
            raise DataError(_missing(base, split))
    names_of_train, labels, names = _listed(base / "train")
    train = Photographs(base / "train", names_of_train, labels, image_size, crop, skip_corrupt)
    names_of_test, labels, of_test = _listed(base / "val") if _has_folders(base / "val") else _flat(base)
    if unknown := sorted(set(of_test) - set(names)):
        shown = ", ".join(unknown[:5]) + (", ..." if len(unknown) > 5 else "")
        raise DataError(f"{base / 'val'} has classes that {base / 'train'} lacks: {shown}. Both need the same classes")
    place = np.array([names.index(name) for name in of_test], np.int32)
    test = Photographs(base / "val", names_of_test, place[labels], image_size)
    shape, digest = (image_size, image_size, 3), _digest(names, train, test)
    source = f"photographs in {base}: {len(train):,} to train on, {len(test):,} to evaluate on"
    is_whole = (len(train), len(names)) == (TRAIN_IMAGES, 1000)
    name = "imagenet" if is_whole else f"photographs-{digest}"
    return Dataset(name, train, test, len(names), shape, MEAN, STD, digest, source)


class Photographs:
    """A `Source` of image files of any size, cropped and decoded by threads whenever they are read.

    With `draws` a photograph is cropped and mirrored at random, as training does; without, its centre is read.

    Args:
      folder: where the files are.
      names: of the files in it, bytes [n].
      labels: int32 [n].
      size: the side of the squares, in pixels.
      crop, skip_corrupt: as in `imagenet`.

    Source of the crops: Szegedy et al. 2015, with the figures of the code of Ramanujan et al. 2020.
    """

    draws = True

    def __init__(
        self,
        folder: Path,
        names: np.ndarray,
        labels: np.ndarray,
        size: int,
        crop: float = 1.0,
        skip_corrupt: bool = False,
    ):
        self.folder, self.names, self.labels = folder, names, labels
        self.size, self.crop, self.skip_corrupt = size, crop, skip_corrupt
        self._corrupt: set[int] = set()

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, indices: np.ndarray, draws: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """See `Source.read`. Raises DataError if a file cannot be read."""
        images, labels = np.empty((len(indices), self.size, self.size, 3), np.uint8), self.labels[indices]

        def decode(place: int) -> None:
            draw = None if draws is None else int(draws[place])
            index = int(indices[place])
            for step in range(len(self)):
                chosen = (index + step) % len(self)
                try:
                    images[place], labels[place] = self._decoded(chosen, draw), self.labels[chosen]
                    return
                except DataError as error:
                    if draw is None or not self.skip_corrupt:  # an evaluation counts every photograph once
                        raise
                    self._tell(chosen, error)
            raise DataError(f"no photograph in {self.folder} can be read")

        in_threads(decode, range(len(indices)))
        return {"image": images, "label": labels}

    def take(self, indices: np.ndarray) -> "Photographs":
        names, labels = self.names[indices], self.labels[indices]
        return Photographs(self.folder, names, labels, self.size, self.crop, self.skip_corrupt)

    def _decoded(self, index: int, draw: int | None) -> np.ndarray:
        path = os.path.join(self.folder, os.fsdecode(self.names[index]))
        return opened(path, lambda image: cropped(image, self.size, draw, self.crop))

    def _tell(self, index: int, error: DataError) -> None:
        if index not in self._corrupt:
            self._corrupt.add(index)
            warnings.warn(f"{error}: another takes its place ({len(self._corrupt)} so far)", stacklevel=2)


def cropped(image: "Image", size: int, draw: int | None = None, crop: float = 0.08) -> np.ndarray:
    """A square of a photograph, uint8 [size, size, 3].

    Args:
      image: the photograph, not decoded yet. A JPEG is decoded no larger than is needed, at a half, a quarter or an
        eighth of its size.
      size: the side of the square in pixels.
      draw: what a random part and a mirroring are drawn from; None for the centre.
      crop: the smallest part of the photograph's area that is drawn.
    """
    from PIL import Image

    width, height = image.size
    rng = None if draw is None else np.random.Generator(np.random.Philox(draw))
    left, top, right, bottom = _centre(width, height) if rng is None else _part(width, height, crop, rng)
    mirrored = rng is not None and rng.random() < 0.5
    shrink = min((right - left) / size, (bottom - top) / size)
    if shrink >= 2:
        image.draft("RGB", (math.ceil(width / shrink), math.ceil(height / shrink)))
    x, y = image.size[0] / width, image.size[1] / height
    box = (left * x, top * y, right * x, bottom * y)
    square = rgb(image).resize((size, size), Image.Resampling.BILINEAR, box=box)
    pixels = np.asarray(square)
    return pixels[:, ::-1] if mirrored else pixels


def _centre(width: int, height: int) -> tuple[float, float, float, float]:
    side = CENTRE * min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def _part(width: int, height: int, crop: float, rng: np.random.Generator) -> tuple[float, float, float, float]:
    """A random part of a photograph (left, top, right, bottom); the largest one of a valid shape if none fits."""
    low, high = map(math.log, RATIO)
    for _ in range(TRIES):
        area = width * height * (crop + (1 - crop) * rng.random())
        ratio = math.exp(low + (high - low) * rng.random())
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.random() * (width - w + 1)), int(rng.random() * (height - h + 1))
            return left, top, left + w, top + h
    w = min(width, round(height * RATIO[1]))
    h = min(height, round(width / RATIO[0]))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


Listed = tuple[np.ndarray, np.ndarray, list[str]]  # names of files, bytes [n]; labels, int32 [n]; class names


def _listed(folder: Path) -> Listed:
    """The photographs in the class folders in a folder; classes are sorted by name."""
    entries = visible(folder)
    classes = [entry.name for entry in entries if entry.is_dir()]
    if tars := [entry.name for entry in entries if entry.name.endswith(".tar")]:
        raise DataError(
            f"{folder} has archives that are not unpacked ({tars[0]}, ...): cd {folder} && for t in *.tar; do mkdir "
            "${t%.tar} && tar -xf $t -C ${t%.tar} && rm $t; done"
        )
    if loose := [entry.name for entry in entries if entry.name.lower().endswith(SUFFIXES)]:
        raise DataError(f"{folder / loose[0]} lies beside class folders: put it into the folder of its class")
    if len(classes) < 2:
        raise DataError(f"{folder} has {len(classes)} class folders; a data set needs two or more")
    names, labels = [], []
    for number, name in enumerate(classes):
        files = _photographs(folder / name)
        if not files:
            raise DataError(f"the class folder {folder / name} is empty: put its photographs there, or remove it")
        names += [os.fsencode(f"{name}/{file}") for file in files]
        labels.append(np.full(len(files), number, np.int32))
    return np.array(names), np.concatenate(labels), classes


def _flat(base: Path) -> Listed:
    """The photographs of val, which has no folders, and their classes as the development kit has them."""
    files = _photographs(base / "val")
    places = [base / kit for kit in KIT if (base / kit / TRUTH).is_file() and (base / kit / CLASSES).is_file()]
    if not places:
        raise DataError(
            f"{base / 'val'} has no class folders, and {TRUTH} and {CLASSES}, which tell the classes, are not in "
            f"{base / KIT[0]}: {UNPACK['ILSVRC2012_devkit_t12.tar.gz']} in {base}, or put the photographs into class "
            "folders"
        )
    from scipy.io import loadmat

    try:
        truth = np.loadtxt(places[0] / TRUTH, dtype=np.int64, ndmin=1)
        listed = loadmat(places[0] / CLASSES, squeeze_me=True)["synsets"]
        names = {int(number): str(name) for number, name in zip(listed["ILSVRC2012_ID"], listed["WNID"], strict=True)}
        of_each = [names[number] for number in truth.tolist()]
    except Exception as error:  # whatever damaged files make the readers raise
        raise DataError(f"cannot read the classes in {places[0]} ({brief(error)}); unpack the kit again") from error
    if len(files) != len(truth):
        raise DataError(
            f"{base / 'val'} has {len(files):,} photographs, and {TRUTH} tells the classes of {len(truth):,}"
        )
    classes = sorted(set(of_each))
    labels = np.searchsorted(classes, of_each).astype(np.int32)
    return np.array([os.fsencode(file) for file in files]), labels, classes


def _digest(classes: list[str], *sources: Photographs) -> str:
    """The CRC-32 of the names of classes and files, and of the labels, as eight hexadecimal digits."""
    parts = ["/".join(classes).encode()]
    for source in sources:
        parts += [b"/".join(source.names), np.ascontiguousarray(source.labels).tobytes()]
    return f"{zlib.crc32(b'//'.join(parts)):08x}"


def _has_folders(folder: Path) -> bool:
    return any(entry.is_dir() for entry in visible(folder))


def _photographs(folder: Path) -> list[str]:
    return [entry.name for entry in visible(folder) if entry.name.lower().endswith(SUFFIXES)]


def _missing(base: Path, split: str = "train") -> str:
    """What to do where there are no photographs."""
    archive = next((base / name for name in UNPACK if split in name and (base / name).is_file()), None)
    if archive:
        return f"{archive} is not unpacked: cd {base} && {UNPACK[archive.name]}"
    return (
        f"there are no photographs in {base / split}: put them in {base} as train/CLASS/NAME.JPEG and "
        "val/CLASS/NAME.JPEG, or name another directory with --data-dir. ImageNet is never downloaded: image-net.org "
        "gives it to those who register"
    )
