"""Photographs of many sizes, in files or in records: cropped to one size while they are decoded."""

import math
import os
import warnings
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from experiments.data.pictures import in_threads, opened, rgb
from experiments.run.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

CENTRE = 224 / 256  # of the shorter side, that an evaluation sees
RATIO, TRIES = (3 / 4, 4 / 3), 10  # of a random crop: width / height


class Photograph(NamedTuple):
    """One photograph that is not decoded yet: what errors call it, its path or its bytes, and its class."""

    name: str
    file: str | BytesIO
    label: int


class Stored(Protocol):
    """Where photographs are kept. It is sent to the processes that read, pickled."""

    place: str  # for messages
    cure: str  # what can be done about one that cannot be read

    @property
    def labels(self) -> np.ndarray:
        """int32 [n], of all photographs."""
        ...

    def __len__(self) -> int: ...

    def photograph(self, index: int) -> Photograph:
        """The photograph at this index; DataError if it cannot be read. Called by many threads at once."""
        ...

    def take(self, indices: np.ndarray) -> "Stored":
        """These photographs only, in this order."""
        ...

    def identity(self) -> tuple[Any, ...]:
        """See `Source.identity`."""
        ...


class Files:
    """`Stored` as one file for each photograph.

    Args:
      folder: where the files are.
      names: of the files in it, bytes [n].
      labels: int32 [n].
    """

    cure = "copy it again, or remove it"

    def __init__(self, folder: Path, names: np.ndarray, labels: np.ndarray):
        self.place, self.folder, self.names, self.labels = str(folder), folder, names, labels

    def __len__(self) -> int:
        return len(self.labels)

    def photograph(self, index: int) -> Photograph:
        path = os.path.join(self.folder, os.fsdecode(self.names[index]))
        return Photograph(path, path, int(self.labels[index]))

    def take(self, indices: np.ndarray) -> "Files":
        return Files(self.folder, self.names[indices], self.labels[indices])

    def identity(self) -> tuple[Any, ...]:
        """See `Source.identity`."""
        return b"/".join(self.names), self.labels


class Photographs:
    """A `Source` of photographs of any size, cropped and decoded by threads whenever they are read.

    With `draws` a photograph is cropped and mirrored at random, as training does; without, its centre is read.

    Args:
      stored: where the photographs are, and their labels.
      size: the side of the squares, in pixels.
      crop: the smallest part of a photograph's area that a random crop has.
      skip_corrupt: whether another photograph takes the place of one that cannot be read, where crops are drawn.

    Source of the crops: Szegedy et al. 2015, with the figures of the code of Ramanujan et al. 2020.
    """

    draws = True

    def __init__(self, stored: Stored, size: int, crop: float = 1.0, skip_corrupt: bool = False):
        self.stored, self.size, self.crop, self.skip_corrupt = stored, size, crop, skip_corrupt
        self._corrupt: set[int] = set()

    def __len__(self) -> int:
        return len(self.stored)

    @property
    def labels(self) -> np.ndarray:
        """See `Source.labels`."""
        return self.stored.labels

    def read(self, indices: np.ndarray, draws: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """See `Source.read`. Raises DataError if a photograph cannot be read."""
        images = np.empty((len(indices), self.size, self.size, 3), np.uint8)
        labels = np.empty(len(indices), np.int32)

        def decode(place: int) -> None:
            draw = None if draws is None else int(draws[place])
            index = int(indices[place])
            for step in range(len(self)):
                chosen = (index + step) % len(self)
                try:
                    images[place], labels[place] = self._decoded(chosen, draw)
                    return
                except DataError as error:
                    if draw is None or not self.skip_corrupt:  # an evaluation counts every photograph once
                        raise
                    self._tell(chosen, error)
            raise DataError(f"no photograph in {self.stored.place} can be read")

        in_threads(decode, range(len(indices)))
        return {"image": images, "label": labels}

    def take(self, indices: np.ndarray) -> "Photographs":
        return Photographs(self.stored.take(indices), self.size, self.crop, self.skip_corrupt)

    def identity(self) -> tuple[Any, ...]:
        """See `Source.identity`."""
        return self.stored.identity()

    def _decoded(self, index: int, draw: int | None) -> tuple[np.ndarray, int]:
        name, file, label = self.stored.photograph(index)
        square = opened(file, lambda image: cropped(image, self.size, draw, self.crop), name, self.stored.cure)
        return square, label

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
