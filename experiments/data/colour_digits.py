"""MNIST's digits in colour, of the shape and number of classes of CIFAR-10. They are not CIFAR-10.

They let a command for CIFAR-10 be tried without its files, and a network be moved between MNIST and CIFAR-10. A digit's
colour is drawn from the place of its image in the set and never from its label, so that it tells nothing of the class.
"""

import dataclasses
from pathlib import Path

import numpy as np

from experiments.data import mnist
from experiments.data.source import Arrays, Dataset, arrays_dataset
from experiments.data.tfds import Unavailable

BORDER = 2  # pixels of black on each side of an image
DARKEST = 55  # of the channels of a colour, whose brightest is 255: every digit can be seen


def colour_digits(root: Path) -> Dataset:
    """MNIST in colour, 60,000 + 10,000 images of 32 x 32, or colour-digits-5k with a warning where it is not on disk.

    Nothing is downloaded. Raises DataError if MNIST is on disk and damaged.
    """
    try:
        grey = mnist.on_disk(root)
    except Unavailable as reason:
        few = colour_digits_5k(root)
        warning = mnist.fallback_warning("NOT CIFAR, AND NOT THE FULL MNIST IN COLOUR", few.name, reason)
        return dataclasses.replace(few, warning=warning)
    return _coloured("colour-digits", grey)


def colour_digits_5k(root: Path | None = None) -> Dataset:
    """The digits of mnist-5k in colour: 4,000 training and 1,000 test images of 32 x 32. `root` is not read."""
    return _coloured("colour-digits-5k", mnist.mnist_5k(root))


def _coloured(name: str, grey: Dataset) -> Dataset:
    train, test = grey.train, grey.test
    assert isinstance(train, Arrays) and isinstance(test, Arrays)
    colours = drawn_colours(len(train) + len(test))
    arrays = (
        tinted(train.images, colours[: len(train)]),
        train.labels,
        tinted(test.images, colours[len(train) :]),
        test.labels,
    )
    return arrays_dataset(name, arrays, f"MNIST's digits in colour, not CIFAR: {grey.source}")


def drawn_colours(count: int) -> np.ndarray:
    """Colours uint8 [count, 3], each drawn from its index alone, the same with every version of NumPy.

    The draw is SplitMix64 (Steele et al. 2014): the index is scaled, mixed, and gives a byte to each channel.
    """
    bits = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        bits = (bits ^ (bits >> np.uint64(shift))) * np.uint64(factor)
    bits ^= bits >> np.uint64(31)
    channels = (bits[:, None] >> np.array([0, 8, 16], np.uint64) & np.uint64(255)).astype(np.int64)
    lowest, highest = channels.min(1, keepdims=True), channels.max(1, keepdims=True)
    return (255 - (highest - channels) * (255 - DARKEST) // np.maximum(highest - lowest, 1)).astype(np.uint8)


def tinted(images: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """Images uint8 [n, h + 4, w + 4, 3]: the grey ones [n, h, w, 1] in their colours [n, 3], on black."""
    n, height, width, _ = images.shape
    out = np.zeros((n, height + 2 * BORDER, width + 2 * BORDER, 3), np.uint8)
    inside = slice(BORDER, BORDER + height), slice(BORDER, BORDER + width)
    for channel in range(3):  # one at a time: a product takes two bytes a pixel
        product = images[..., 0].astype(np.uint16) * colours[:, None, None, channel]
        out[:, *inside, channel] = product // 255
    return out
