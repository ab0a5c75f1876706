"""Is pruning all you need? Width and depth decide: `python -m experiments.pruning_only`.

Two halves after Malach et al. 2020. Constructive: a trained MLP is approximated by choosing, for each of its weights, a
subset of the random products of a wider random network. That takes a minute, and is computed each time. Learned: the
subnetworks that edge-popup learns in networks of several widths, depths and training sets. Each learned cell is a run
of `experiments.mnist`. An interrupted or widened sweep resumes with the cells that are missing.
"""

from dataclasses import dataclass
from typing import Literal

from experiments.config.flags import parser
from experiments.config.limits import counts
from experiments.config.sections import Data
from experiments.config.settings import flat
from experiments.run import command_line
from experiments.run.errors import require
from experiments.sweeps.sizes import FAMILIES

PROG = "python -m experiments.pruning_only"
PARTS = ("construction", "width", "depth", "narrow", "data")


@dataclass(frozen=True)
class Config:
    """Pruning is all you need (Malach et al. 2020): by construction, and learned by edge-popup."""

    parts: tuple[Literal[*PARTS], ...] = PARTS
    """construction: approximate a trained 784-32-10 MLP. The others train edge-popup. width: subnetworks of weights and
    of neurons, by width; depth: by depth at equal parameters; narrow: by depth at one narrow width; data: by the number
    of training images at equal steps."""
    families: tuple[Literal[*FAMILIES], ...] = tuple(FAMILIES)
    """Networks of dense layers, and of convolutions."""
    construction_widths: tuple[int, ...] = (1, 2, 4, 8, 12, 16, 20, 24, 32)
    """Random products to choose from for each weight of the target."""
    density: float = 0.5
    """Fraction of each layer that edge-popup keeps, in (0, 1)."""
    seeds: int = 3
    """Repetitions, with the seeds 0, 1, ..."""
    epochs: int = 3
    """Passes over the training images, of each run. Over fewer images there are more, so that the steps are equal."""
    batch_size: int = 128
    """Images per step."""
    workdir: str = "runs/pruning_only"
    """Where the pictures and the figures go. Cells go into cells/ beside it, and are shared by all sweeps there."""
    data: Data = Data()

    def check(self) -> None:
        """Raises UserError on a setting out of range."""
        require(
            self,
            ("parts", len(self.parts) >= 1, "one or more parts"),
            ("families", len(self.families) >= 1, "one or more families"),
            ("construction_widths", all(1 <= w <= 32 for w in self.construction_widths), "each in [1, 32]"),
            ("density", 0 < self.density < 1, "the fraction kept, in (0, 1)"),
            *counts(self, "seeds", "epochs", "batch_size"),
        )
        self.data.check()


def main(config: Config) -> dict:
    """Trains, or finishes, every part, draws the pictures and returns what it writes to summary.json."""
    from experiments.plots import lines, style, sweeps  # here, so that --help answers at once
    from experiments.sweeps import cells, construction, display
    from experiments.sweeps.learned import Learned
    from experiments.training.images import splits

    dataset = cells.open_data(config.data)
    trained_on, _ = splits(config.data, dataset)
    shared = {"density": config.density, "batch_size": config.batch_size, **flat(config.data)}
    about = len(trained_on.train), dataset.image_shape, dataset.classes
    grid = Learned(*about, config.epochs, config.seeds, shared).grid(config.families, config.parts)
    built = {}
    if "construction" in config.parts:
        built = construction.construct(config.construction_widths, config.seeds, trained_on)
    path, summary = cells.carry_out(config.workdir, flat(config), grid, dataset, construction=built)
    if built:
        style.save(sweeps.construction(summary), path / "construction.png")
    if summary["rows"]:
        style.save(sweeps.learned(summary), path / "learned.png")
    for part, (x, label) in sweeps.PARTS.items():
        groups = lines.grouped([row for row in summary["rows"] if row["part"] == part], "name", x, "test_accuracy")
        if groups:
            display.show_table(f"test accuracy of edge-popup on {dataset.name}, by {label}", groups, "network")
    print(f"figures and pictures: {path}")
    return summary


if __name__ == "__main__":
    command_line.run(main, parser(Config), PROG)
