"""ImageNet without ImageNet: its numbers of photographs and classes, for programs that are compiled and never run."""

from typing import Any

import numpy as np

from experiments.data.imagenet import MEAN, STD, TEST_IMAGES, TRAIN_IMAGES
from experiments.data.source import Dataset

CLASSES = 1000


class Blank:
    """A `Source` of so many black squares of a side, in pixels, all of class 0."""

    draws = True

    def __init__(self, count: int, side: int):
        self.labels, self._shape = np.zeros(count, np.int32), (side, side, 3)

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, indices: np.ndarray, draws: np.ndarray | None = None) -> dict[str, np.ndarray]:
        return {"image": np.zeros((len(indices), *self._shape), np.uint8), "label": self.labels[indices]}

    def take(self, indices: np.ndarray) -> "Blank":
        return Blank(len(indices), self._shape[0])

    def identity(self) -> tuple[Any, ...]:
        return len(self), self._shape


def blank_imagenet(image_size: int = 224, classes: int = CLASSES) -> Dataset:
    """A data set that is like ImageNet in all but its photographs."""
    train, test = Blank(TRAIN_IMAGES, image_size), Blank(TEST_IMAGES, image_size)
    return Dataset("imagenet", train, test, classes, (image_size, image_size, 3), MEAN, STD, "", "no photographs")
