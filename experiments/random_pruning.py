"""How far does random pruning go? Density, layer densities, width and depth: `python -m experiments.random_pruning`.

Two sweeps after Liu et al. 2022. The first trains one network at several densities, under random masks of every
distribution and under the masks of methods that choose. The second trains networks of several widths and depths, dense
and randomly pruned: the paper claims that random pruning catches up as they grow. Each cell is a run of
`experiments.mnist` or `experiments.cifar`. An interrupted or widened sweep resumes with the cells that are missing.
"""

from dataclasses import dataclass
from typing import Literal

from experiments.config import sized
from experiments.config.flags import parser
from experiments.config.limits import MOST_RATE, counts
from experiments.config.registry import DISTRIBUTIONS, METHODS
from experiments.config.sections import Data, Evaluation
from experiments.config.settings import flat
from experiments.run import command_line
from experiments.run.errors import UserError, require

PROG = "python -m experiments.random_pruning"
LAYERWISE = tuple(name for name in DISTRIBUTIONS if name != "global")  # random masks rank nothing
CHOOSING = tuple(  # the methods whose masks are not random, under which weights learn
    name for name, entry in METHODS.items() if entry.learns == "weights" and not entry.free_density and name != "random"
)
# On CIFAR-10: the ResNets of Liu et al. 2022, few epochs of a few of them. paper: all of them, 160 epochs.
_CIFAR = {"model": sized.RESNET, "dataset": "cifar10", "depth": 20, "depths": (20, 32), "widths": (8, 16, 24)}
_CIFAR |= {"learning_rate": 0.1, "workdir": "runs/random_pruning_cifar10"}
_PAPER = {"epochs": 160, "depths": sized.RESNET_DEPTHS, "widths": (8, 16, 24, 32, 40, 48, 56)}
PRESETS = {
    "short": {},
    "cifar": {**_CIFAR, "epochs": 10, "seeds": 1},
    "paper": {**_CIFAR, **_PAPER, "densities": (0.5, 0.4, 0.3, 0.2, 0.1, 0.05), "workdir": "runs/random_pruning_paper"},
}


@dataclass(frozen=True)
class Config:
    """Random pruning (Liu et al. 2022): by density, distribution, width and depth; beside dense training and others."""

    preset: Literal[*PRESETS] = "short"
    """What the defaults below are. short: small networks on MNIST, within the hour. cifar: ResNet-20 and ResNet-32 on
    CIFAR-10, 10 epochs. paper: ResNet-20 to ResNet-110 on CIFAR-10, 160 epochs, for machines with accelerators."""
    densities: tuple[float, ...] = (0.2, 0.1, 0.05)
    """Fractions of the weights that are kept, each in (0, 1)."""
    distributions: tuple[Literal[*LAYERWISE], ...] = ("uniform", "uniform+", "er", "erk", "erk+", "snip", "grasp")
    """How the layers of random masks share the density; see `python -m experiments.mnist --help`."""
    methods: tuple[Literal[*CHOOSING], ...] = ("magnitude", "snip", "grasp", "synflow", "set", "rigl")
    """What random pruning is compared with, beside dense training."""
    model: Literal[*sized.NAMES] = "cnn"
    """The network. In an mlp er and erk are the same. resnet: those of CIFAR-10. The data set decides on the training:
    sets like CIFAR by SGD on shifted and mirrored images, others by Adam."""
    width: int = 16
    """Channels (cnn) or units (mlp) of each hidden layer, or channels of the first stage (resnet), in the sweep over
    distributions and methods."""
    depth: int = 3
    """Hidden layers, or of a resnet all layers, in that sweep."""
    widths: tuple[int, ...] = (4, 8, 16)
    """In the sweep over sizes."""
    depths: tuple[int, ...] = (2, 4)
    """In the sweep over sizes."""
    size_distributions: tuple[Literal[*LAYERWISE], ...] = ("erk",)
    """In the sweep over sizes. Name more for the full grid of density, distribution, width and depth."""
    seeds: int = 3
    """Repetitions, with the seeds 0, 1, ..."""
    epochs: int = 2
    """Passes over the training images, of each run."""
    batch_size: int = 128
    """Images per step."""
    learning_rate: float = 0.01
    """At the start. That of Adam, 0.01, was chosen on a validation set at density 0.1."""
    workdir: str = "runs/random_pruning"
    """Where the pictures and the figures go. Cells go into cells/ beside it, and are shared by all sweeps there."""
    evaluation: Evaluation = Evaluation(assess=True)
    data: Data = Data()

    def check(self) -> None:
        """Raises UserError on a setting out of range."""
        require(
            self,
            ("densities", self.densities and all(0 < d < 1 for d in self.densities), "fractions kept, in (0, 1)"),
            *counts(self, "width", "depth", "widths", "depths", "seeds", "epochs", "batch_size"),
            ("learning_rate", 0 < self.learning_rate <= MOST_RATE, f"above 0, at most {MOST_RATE:g}"),
        )
        sizes = {self.depth, *self.depths}
        if self.model == sized.RESNET and not sizes <= set(sized.RESNET_DEPTHS):
            valid = ", ".join(map(str, sized.RESNET_DEPTHS))
            raise UserError(f"a resnet has a --depth of {valid}; got {', '.join(map(str, sorted(sizes)))}.")
        self.evaluation.check()
        self.data.check()


def defaults(preset: str = "short") -> dict:
    """The settings of a preset, as far as they differ from the fields' own defaults."""
    return {"preset": preset, **PRESETS[preset]}


def main(config: Config) -> dict:
    """Trains, or finishes, every cell, draws the pictures and returns what it writes to summary.json."""
    from experiments.plots import lines, style, sweeps  # here, so that --help answers at once
    from experiments.sweeps import cells, display, random_masks
    from experiments.training.images import open_others

    dataset = cells.open_data(config.data)
    others = open_others(config.evaluation, config.data, dataset)
    names = ("epochs", "batch_size", "learning_rate")
    shared = {name: getattr(config, name) for name in names} | flat(config.evaluation) | flat(config.data)
    if config.preset == "paper":
        shared |= random_masks.PUBLISHED
    repeated = config.densities, config.seeds, shared
    one = sized.Size(config.model, config.width, config.depth)
    grid = random_masks.by_distribution(one, config.distributions, config.methods, *repeated)
    sizes = [sized.Size(config.model, width, depth) for depth in config.depths for width in config.widths]
    grid += random_masks.by_size(sizes, config.size_distributions, *repeated)
    path, summary = cells.carry_out(config.workdir, flat(config), grid, dataset, others)
    for name, draw in (("distributions.png", sweeps.distributions), ("sizes.png", sweeps.sizes)):
        figure = draw(summary)
        if figure is not None:
            style.save(figure, path / name)
    masked = [row for row in summary["rows"] if row["part"] == "distribution" and row["asked"] < 1]
    groups = lines.grouped(masked, "name", "asked", "test_accuracy")
    display.show_table(f"test accuracy on {dataset.name}", groups, "density")
    print(f"figures and pictures: {path}")
    return summary


if __name__ == "__main__":
    command_line.run(main, parser(Config, defaults), PROG)
