"""What a data set is: two sources of examples, and what is known of their images."""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from experiments.run.errors import DataError

COLOURS = ("red", "green", "blue")  # the channels of a set that has three, in their order
CHUNK = 1000  # images that are counted at once: counting takes eight bytes a pixel


class Source(Protocol):
    """Random access to examples, so that their order is up to the caller."""

    draws: bool  # whether `read` crops and mirrors at random

    @property
    def labels(self) -> np.ndarray:
        """int32 [n], of all examples. A source may read them when they are first asked for, which can take minutes."""
        ...

    def __len__(self) -> int: ...

    def read(self, indices: np.ndarray, draws: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """The examples at these indices: {"image": uint8 [k, h, w, c], "label": int32 [k]}.

        A source that crops and mirrors while it decodes does so as `draws` says, uint32 [k], a number for each example;
        without them it reads the example as it is evaluated. Others ignore them.
        """
        ...

    def take(self, indices: np.ndarray) -> "Source":
        """A source of these examples only, in this order."""
        ...

    def identity(self) -> tuple[Any, ...]:
        """Arrays, and what has a repr, that differ where the examples or their order do; as far as they are at hand."""
        ...


class Arrays:
    """A `Source` in memory: `images`, uint8 [n, h, w, c] in 0..255, and `labels`, int32 [n]."""

    draws = False

    def __init__(self, images: np.ndarray, labels: np.ndarray):
        if images.dtype != np.uint8 or images.ndim != 4 or len(images) != len(labels):
            raise ValueError(
                f"images must be uint8 [n, h, w, c] with n labels; got {images.dtype} {list(images.shape)} "
                f"and {len(labels)} labels"
            )
        self.images, self.labels = images, np.asarray(labels, np.int32)

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, indices: np.ndarray, draws: np.ndarray | None = None) -> dict[str, np.ndarray]:
        return {"image": self.images[indices], "label": self.labels[indices]}

    def take(self, indices: np.ndarray) -> "Arrays":
        return Arrays(self.images[indices], self.labels[indices])

    def identity(self) -> tuple[Any, ...]:
        return self.images, self.labels


@dataclass(frozen=True, eq=False)
class Dataset:
    """A training set and a test set of images of one shape.

    Attributes:
      name: the set's true name, never "auto".
      train, test: the examples, with labels 0 to classes - 1.
      classes: how many classes there are.
      image_shape: (height, width, channels).
      mean, std: of each channel of the training pixels, in [0, 1].
      fingerprint: eight hexadecimal digits that change with the training images and with their order.
      source: one line that says where the images came from.
      warning: text that must be shown to the user, if any.
      class_names: of the labels 0 to classes - 1; empty where they have no names.
    """

    name: str
    train: Source
    test: Source
    classes: int
    image_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    fingerprint: str
    source: str
    warning: str | None = None
    class_names: tuple[str, ...] = ()


class Shifted(NamedTuple):
    """Test images of classes that a network knows, from elsewhere than its training images.

    Fields:
      dataset: the images, in `test`. Their labels number the classes of this set.
      classes: int32 [classes of this set], the label that each has in the training set.
    """

    dataset: Dataset
    classes: np.ndarray


def arrays_dataset(
    name: str,
    arrays: Sequence[np.ndarray],
    source: str,
    classes: int = 10,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
) -> Dataset:
    """A `Dataset` in memory.

    Args:
      name, source, classes: as in `Dataset`.
      arrays: training images uint8 [n, h, w, c], training labels [n], test images and test labels.
      mean, std: by which published code normalises this set; None for those of the training pixels.

    Raises:
      DataError: a channel has the same value in all training pixels.
    """
    train, test = Arrays(*arrays[:2]), Arrays(*arrays[2:])
    if mean is None or std is None:
        mean, std = pixel_statistics(train.images, source)
    return Dataset(name, train, test, classes, train.images.shape[1:], mean, std, fingerprint(train.images), source)


def fingerprint(images: np.ndarray) -> str:
    """The CRC-32 of the images' bytes, as eight hexadecimal digits."""
    return f"{zlib.crc32(np.ascontiguousarray(images)):08x}"  # a view of the buffer; tobytes would copy the set


def pixel_statistics(images: np.ndarray, source: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The mean and the standard deviation of each channel of uint8 images [n, h, w, c], scaled to [0, 1].

    Raises DataError, with the `source` of the images, if a channel has the same value in all of them.
    """
    mean, std = [], []
    for channel in range(images.shape[-1]):
        parts = (images[start : start + CHUNK, ..., channel] for start in range(0, len(images), CHUNK))
        counts = sum(np.bincount(part.ravel(), minlength=256) for part in parts)
        if np.count_nonzero(counts) == 1:  # rounding can leave a deviation that is not 0
            of = f" of the {COLOURS[channel]} channel" if images.shape[-1] == len(COLOURS) else ""
            raise DataError(f"all training pixels{of} are equal ({source}); check what is in these files")
        levels = np.arange(256) / 255
        mean.append(float(np.average(levels, weights=counts)))
        std.append(float(np.sqrt(np.average((levels - mean[-1]) ** 2, weights=counts))))
    return tuple(mean), tuple(std)
