"""Networks of any width and depth, and the sizes that `experiments.pruning_only` trains. Imports nothing heavy."""

from collections.abc import Mapping
from typing import NamedTuple

from experiments.run.errors import UserError


class Family(NamedTuple):
    """The sizes of one kind of network, in the parts of the sweep; width: units or channels of each hidden layer."""

    widths: tuple[int, ...]  # of the part "width"
    depths: tuple[int, ...]  # of the parts "depth" and "narrow"
    parameters: int  # at every depth of the part "depth"
    narrow: int  # width at every depth of the part "narrow"
    width: int  # of the part "data"
    depth: int  # of the parts "data" and "width"


FAMILIES: Mapping[str, Family] = {
    "mlp": Family((10, 30, 100, 300, 1000), (1, 2, 4, 8), parameters=100_000, narrow=20, width=100, depth=2),
    "cnn": Family((8, 16, 32), (2, 4, 8), parameters=10_000, narrow=8, width=16, depth=3),
}
TRAIN_IMAGES = (1_000, 4_000, 15_000, 60_000)  # of the part "data", as far as there are so many


def width_for(family: str, depth: int, image_shape: tuple[int, int, int] = (28, 28, 1), classes: int = 10) -> int:
    """Returns the width at which a network of that depth has the family's number of parameters, or just below it.

    Args:
      family: "mlp" or "cnn".
      depth: the number of hidden layers.
      image_shape: (height, width, channels) of the images.
      classes: of the last layer.

    Raises:
      UserError: width 1 has more already.
    """
    height, across, channels = image_shape
    if family == "mlp":
        inputs, square, outputs = height * across * channels, 1, classes
    else:  # convolutions of 3 x 3; the last layer sees 2 x 2 of their results
        inputs, square, outputs = 9 * channels, 9, 4 * classes
    width, most = 0, FAMILIES[family].parameters
    while (inputs + outputs) * (width + 1) + square * (depth - 1) * (width + 1) ** 2 <= most:
        width += 1
    if not width:
        raise UserError(
            f"images of {height} x {across} x {channels} are too large for an {family} of {most:,} parameters: "
            "leave out the part depth, or take smaller images."
        )
    return width
