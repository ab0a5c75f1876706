"""The settings of `experiments.import_weights`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from experiments.run.errors import UserError, require


@dataclass(frozen=True)
class Imported:
    """Which file is read, of which network, and what is kept of it."""

    file: Annotated[Positional[Path | None], arg(metavar="FILE")] = None
    """The .safetensors file, or the .pth file that torch.save wrote."""
    model: Literal["resnet18", "resnet34", "resnet50", "resnet101", "wide-resnet50"] = "resnet50"
    """The network that the file is of."""
    affine: bool = True
    """Whether its BatchNorms have learned scales and biases."""
    biases: bool = True
    """Whether its last layer has biases."""
    classes: int = 1000
    """Of its last layer."""
    hidden_network: bool = False
    """The file is of Ramanujan et al. 2020: it has scores, and its masks are taken. Most of these files are
    --no-affine --no-biases."""
    density: float | None = None
    """Keep this fraction of the weights, those of the largest magnitude. With --hidden-network, what its layers keep,
    which their code calls prune_rate; not given, its scores are masks already. [all weights are kept]"""
    scope: Literal["layer", "global"] = "layer"
    """Rank the weights of each layer, or of all layers together."""
    image_size: int = 224
    """The side of the images that it is meant for, in pixels."""
    output: Path = Path("subnetwork.safetensors")
    """The file to write."""
    overwrite: bool = False
    """Replace the file to write, if it is there."""

    def check(self) -> None:
        """Raises UserError on a setting out of range, or without a file."""
        if self.file is None:
            raise UserError("name the file to read: FILE, which torch.save wrote or whose name ends with .safetensors.")
        require(
            self,
            ("density", self.density is None or 0 < self.density <= 1, "the fraction kept, in (0, 1]"),
            ("classes", 2 <= self.classes <= 2**20, "in [2, 1,048,576]"),
            ("image_size", 8 <= self.image_size <= 2048, "in [8, 2,048] pixels"),
        )
        file, output = self.file.expanduser(), self.output.expanduser()
        if output.is_dir():
            raise UserError(f"{self.output} is a directory; name a file with --output.")
        is_input = output.exists() and file.exists() and output.samefile(file)
        if output.exists() and (is_input or not self.overwrite):
            raise UserError(f"{self.output} is there already; name another file with --output, or say --overwrite.")
        if self.scope == "global" and self.density is None:
            raise UserError("--scope says how weights are ranked, and none are pruned: give a --density.")
        if self.hidden_network and self.scope == "global":
            raise UserError("--hidden-network has masks for each layer: leave out --scope.")
