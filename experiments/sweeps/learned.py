"""The learned cells of `experiments.pruning_only`: edge-popup by width, depth and number of training images."""

from collections.abc import Mapping, Sequence
from typing import Any

from experiments.sweeps.cells import Cell, cell
from experiments.sweeps.sizes import FAMILIES, TRAIN_IMAGES, width_for


class Learned:
    """The cells of edge-popup on one data set.

    Args:
      examples: how many images a cell trains on, unless the part says otherwise.
      image_shape, classes: of the data set.
      epochs: passes over `examples`. Cells that train on fewer images pass over them more often, so that the number of
        steps is the same.
      seeds: the number of repetitions.
      settings: what all cells share, by flat name.
    """

    def __init__(
        self,
        examples: int,
        image_shape: tuple[int, int, int],
        classes: int,
        epochs: int,
        seeds: int,
        settings: Mapping[str, Any],
    ):
        self._examples, self._shape, self._classes = examples, image_shape, classes
        self._epochs, self._seeds, self._settings = epochs, seeds, settings

    def grid(self, families: Sequence[str], parts: Sequence[str]) -> list[Cell]:
        """Returns the cells of these parts ("width", "depth", "narrow", "data"), of one family after the other."""
        of_part = {"width": self._width, "depth": self._depth, "narrow": self._narrow, "data": self._data}
        return [
            cell
            for family in dict.fromkeys(families)
            for part, cells in of_part.items()
            if part in parts
            for cell in cells(family)
        ]

    def _width(self, family: str) -> list[Cell]:
        """Subnetworks of weights and of neurons, by width."""
        widths, depth = FAMILIES[family].widths, FAMILIES[family].depth
        return [
            cell
            for unit in ("weight", "neuron")
            for width in widths
            for cell in self._cells("width", family, f"{family}, {unit}s", width, depth, unit=unit)
        ]

    def _depth(self, family: str) -> list[Cell]:
        """By depth, with equal parameters."""
        name = f"{family}, {FAMILIES[family].parameters:,} parameters"
        widths = {depth: width_for(family, depth, self._shape, self._classes) for depth in FAMILIES[family].depths}
        return [cell for depth, width in widths.items() for cell in self._cells("depth", family, name, width, depth)]

    def _narrow(self, family: str) -> list[Cell]:
        """By depth, at one narrow width."""
        width = FAMILIES[family].narrow
        name = f"{family}, width {width}"
        depths = FAMILIES[family].depths
        return [cell for depth in depths for cell in self._cells("narrow", family, name, width, depth)]

    def _data(self, family: str) -> list[Cell]:
        """By the number of training images."""
        width, depth = FAMILIES[family].width, FAMILIES[family].depth
        name = f"{family}, {depth} layers of {width}"
        fewer = [{"train_images": count} for count in TRAIN_IMAGES if count < self._examples]
        return [cell for more in (*fewer, {}) for cell in self._cells("data", family, name, width, depth, **more)]

    def _cells(self, part: str, family: str, name: str, width: int, depth: int, **more: Any) -> list[Cell]:
        """One cell for each seed."""
        images = more.get("train_images", self._examples)
        labels = {"part": part, "name": name, "width": width, "depth": depth, "train_images": images}
        settings = {**self._settings, **more, "model": family, "width": width, "depth": depth}
        settings["epochs"] = round(self._epochs * self._examples / images)
        return [cell(labels, "edge-popup", **settings, seed=seed) for seed in range(self._seeds)]
