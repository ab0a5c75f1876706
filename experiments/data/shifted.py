"""Photographs that networks of ImageNet are evaluated on and never trained on: ImageNet-V2, ImageNet-A, ImageNet-O."""

from pathlib import Path

import numpy as np

from experiments.data.imagenet import MEAN, STD, digest, listed
from experiments.data.photographs import Files, Photographs
from experiments.data.source import Dataset
from experiments.run.errors import DataError

V2 = "imagenetv2-matched-frequency-format-val"  # the folder in the archive
ARCHIVES = {  # by the name of the set: its archive, and where that is published
    "imagenet-v2": ("imagenetv2-matched-frequency.tar.gz", "github.com/modestyachts/ImageNetV2"),
    "imagenet-a": ("imagenet-a.tar", "github.com/hendrycks/natural-adv-examples"),
    "imagenet-o": ("imagenet-o.tar", "github.com/hendrycks/natural-adv-examples"),
}


def imagenet_v2(root: Path, image_size: int = 224) -> Dataset:
    """ImageNet-V2, matched frequency: 10,000 photographs of the 1,000 classes of ImageNet, collected anew.

    The files are `root`/imagenetv2-matched-frequency-format-val/INDEX/NAME.jpeg, or in `root`/imagenet-v2. INDEX, 0 to
    999, is the place of a class among the sorted WNIDs. As published, accuracy is taken over all classes.

    Args:
      root: the directory of the data.
      image_size: the side of the squares that are read, in pixels.

    Raises:
      DataError: the photographs are missing, or a class folder is empty.

    Source: Recht et al. 2019, "Do ImageNet classifiers generalize to ImageNet?".
    """
    return _test_images("imagenet-v2", root, image_size, V2)


def imagenet_a(root: Path, image_size: int = 224) -> Dataset:
    """ImageNet-A: 7,500 photographs of 200 classes of ImageNet, chosen because a ResNet-50 got them wrong.

    The files are `root`/imagenet-a/WNID/NAME.jpg. As published, accuracy is taken over these 200 classes only: the
    logits of the others are dropped.

    Args:
      root: the directory of the data.
      image_size: the side of the squares that are read, in pixels.

    Raises:
      DataError: the photographs are missing, or a class folder is empty.

    Source: Hendrycks et al. 2021, "Natural adversarial examples".
    """
    return _test_images("imagenet-a", root, image_size)


def imagenet_o(root: Path, image_size: int = 224) -> Dataset:
    """ImageNet-O: 2,000 photographs of things that are in none of the 1,000 classes of ImageNet.

    The files are `root`/imagenet-o/WNID/NAME.jpg. A folder has the name of a class of ImageNet that its photographs are
    mistaken for. So the labels are not the truth, and nothing is computed from them.

    It is an out-of-distribution set like any other here: the figure is the area under the ROC curve of the highest
    probability over all classes, against all test images of the data set. The published figure is another one, and they
    must not be compared: the area under the precision-recall curve, with these photographs as the positives, of the
    highest probability over the 200 classes of the folders, against ImageNet's validation images of these 200 classes.

    Args:
      root: the directory of the data.
      image_size: the side of the squares that are read, in pixels.

    Raises:
      DataError: the photographs are missing, or a class folder is empty.

    Source: Hendrycks et al. 2021, "Natural adversarial examples", and its released code.
    """
    return _test_images("imagenet-o", root, image_size)


def _test_images(name: str, root: Path, image_size: int, *folders: str) -> Dataset:
    """The photographs in the class folders of the first of these folders, or of the one that is named like the set."""
    folder = next((root / each for each in folders if (root / each).is_dir()), root / name)
    if not folder.is_dir():
        archive, published = ARCHIVES[name]
        if (root / archive).is_file():
            raise DataError(f"{root / archive} is not unpacked: cd {root} && tar -xf {archive}")
        raise DataError(
            f"{name} is not in {root}: put {archive} there, which {published} publishes, and unpack it: "
            f"cd {root} && tar -xf {archive}"
        )
    files, labels, names = listed(folder)
    stored = Files(folder, files, labels)
    test = Photographs(stored, image_size)
    shape, source = (image_size, image_size, 3), f"photographs in {folder}"
    nothing = test.take(np.arange(0))  # to train on
    crc = digest(names, stored)
    return Dataset(name, nothing, test, len(names), shape, MEAN, STD, crc, source, class_names=tuple(names))
