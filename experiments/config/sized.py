"""Networks that are chosen by width and depth: which there are, and the settings that make one."""

from typing import Any, NamedTuple

from experiments.config.registry import MODELS

RESNET = "resnet"
RESNET_DEPTHS = tuple(int(name.split("-")[1]) for name, entry in MODELS.items() if "cifar_resnet" in entry.target)
RESNET_WIDTH = 16  # channels of the first stage, as published
NAMES = (*(name for name, entry in MODELS.items() if {"width", "depth"} <= set(entry.reads)), RESNET)


class Size(NamedTuple):
    """A network.

    Attributes:
      model: one of `NAMES`.
      width: units or channels of each hidden layer; of resnet, channels of the first of three stages.
      depth: hidden layers; of resnet, layers in all, one of `RESNET_DEPTHS`.
    """

    model: str
    width: int
    depth: int

    def settings(self) -> dict[str, Any]:
        """Its settings, by flat name."""
        if self.model == RESNET:
            return {"model": f"{RESNET}-{self.depth}", "widen": self.width / RESNET_WIDTH}
        return self._asdict()
