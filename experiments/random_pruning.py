"""How far does random pruning go? Density, layer densities, width and depth: `python -m experiments.random_pruning`.

Two sweeps after Liu et al. 2022. The first trains one network at several densities, under random masks of every
distribution and under the masks of methods that choose. The second trains networks of several widths and depths, dense
and randomly pruned: the paper claims that random pruning catches up as they grow. Each cell is a run of
`experiments.mnist`. An interrupted or widened sweep resumes with the cells that are missing.
"""

from dataclasses import dataclass
from typing import Literal

from experiments.config.flags import parser
from experiments.config.registry import DISTRIBUTIONS, METHODS, MODELS
from experiments.config.sections import Data, Evaluation
from experiments.config.settings import flat
from experiments.run import command_line
from experiments.run.errors import require

PROG = "python -m experiments.random_pruning"
LAYERWISE = tuple(name for name in DISTRIBUTIONS if name != "global")  # random masks rank nothing
CHOOSING = tuple(  # the methods whose masks are not random, under which weights learn
    name for name, entry in METHODS.items() if entry.learns == "weights" and not entry.free_density and name != "random"
)
SIZED = tuple(name for name, entry in MODELS.items() if {"width", "depth"} <= set(entry.reads))


@dataclass(frozen=True)
class Config:
    """Random pruning (Liu et al. 2022): by density, distribution, width and depth; beside dense training and others."""

    densities: tuple[float, ...] = (0.2, 0.1, 0.05)
    """Fractions of the weights that are kept, each in (0, 1)."""
    distributions: tuple[Literal[*LAYERWISE], ...] = ("uniform", "uniform+", "er", "erk", "erk+", "snip", "grasp")
    """How the layers of random masks share the density; see `python -m experiments.mnist --help`."""
    methods: tuple[Literal[*CHOOSING], ...] = ("magnitude", "snip", "grasp", "synflow", "set", "rigl")
    """What random pruning is compared with, beside dense training."""
    model: Literal[*SIZED] = "cnn"
    """The network. In an mlp er and erk are the same."""
    width: int = 16
    """Channels (cnn) or units (mlp) of each hidden layer, in the sweep over distributions and methods."""
    depth: int = 3
    """Hidden layers, in that sweep."""
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
    """Of Adam, at the start; chosen on a validation set at density 0.1."""
    workdir: str = "runs/random_pruning"
    """Where the pictures and the figures go. Cells go into cells/ beside it, and are shared by all sweeps there."""
    evaluation: Evaluation = Evaluation(assess=True)
    data: Data = Data()

    def check(self) -> None:
        """Raises UserError on a setting out of range."""
        require(
            self,
            ("densities", self.densities and all(0 < d < 1 for d in self.densities), "fractions kept, in (0, 1)"),
            ("width", self.width >= 1, "1 or more"),
            ("depth", self.depth >= 1, "1 or more"),
            ("widths", all(w >= 1 for w in self.widths), "1 or more each"),
            ("depths", all(d >= 1 for d in self.depths), "1 or more each"),
            ("seeds", self.seeds >= 1, "1 or more"),
            ("epochs", self.epochs >= 1, "1 or more"),
            ("batch_size", self.batch_size >= 1, "1 or more"),
            ("learning_rate", 0 < self.learning_rate < float("inf"), "above 0, and finite"),
        )
        self.evaluation.check()
        self.data.check()


def main(config: Config) -> dict:
    """Trains, or finishes, every cell, draws the pictures and returns what it writes to summary.json."""
    from experiments.data.load import load_ood  # here, so that --help answers at once
    from experiments.plots import lines, style, sweeps
    from experiments.sweeps import cells, display, random_masks

    dataset = cells.open_data(config.data)
    ood = load_ood(config.evaluation.ood, config.data.data_dir, dataset)
    names = ("model", "width", "depth", "epochs", "batch_size", "learning_rate")
    shared = {name: getattr(config, name) for name in names} | flat(config.evaluation) | flat(config.data)
    repeated = config.densities, config.seeds, shared
    grid = random_masks.by_distribution(config.distributions, config.methods, *repeated)
    grid += random_masks.by_size(config.widths, config.depths, config.size_distributions, *repeated)
    path, summary = cells.carry_out(config.workdir, flat(config), grid, dataset, ood)
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
    command_line.run(main, parser(Config), PROG)
