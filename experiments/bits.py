"""How accurate is a network of so many bytes? `python -m experiments.bits`.

Every network is one file on disk, and is evaluated from that file: supermasks, of which the file holds a seed and the
masks; pruned networks, whose kept weights are stored in several number formats; and small dense networks. Each cell is
a run of `experiments.mnist`. An interrupted or widened sweep resumes with the cells that are missing.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from experiments.config.flags import parser
from experiments.config.limits import counts
from experiments.config.registry import DISTRIBUTIONS, METHODS, MODELS
from experiments.config.sections import Data, Model
from experiments.config.settings import flat
from experiments.run import command_line
from experiments.run.errors import require

PROG = "python -m experiments.bits"
SUPERMASKS = tuple(name for name, entry in METHODS.items() if entry.learns == "scores")
LAYERWISE = tuple(name for name in DISTRIBUTIONS if name != "global")
SIZED = tuple(name for name, entry in MODELS.items() if {"width", "depth"} <= set(entry.reads))
DTYPES = ("float32", "int8", "int4")  # what trained weights are stored in, each of them in a file of its own


@dataclass(frozen=True)
class Config:
    """Accuracy against bits: supermasks, pruned networks and small dense networks, by the size of their files."""

    methods: tuple[Literal[*METHODS], ...] = (*SUPERMASKS, "gradual", "dense")
    """What to compare; see `python -m experiments.mnist --help`. Of methods whose scores learn, a file holds a seed and
    the masks. Of those whose weights learn, it holds the kept weights, once in each of --dtypes."""
    densities: tuple[float, ...] = (0.5, 0.3, 0.2, 0.1, 0.05, 0.02, 0.01)
    """Fractions of the weights that are kept, each in (0, 1). A method that takes no density has one cell for each
    seed."""
    distributions: tuple[Literal[*LAYERWISE], ...] = ("uniform", "erk")
    """How the layers of supermasks share the density. Other methods have their recipe's."""
    dtypes: tuple[Literal[*DTYPES], ...] = DTYPES
    """What trained weights are stored in, after their training."""
    small: tuple[Literal[*SIZED], ...] = ("mlp",)
    """With dense: the small networks that are trained beside --model. They have two hidden layers."""
    widths: tuple[int, ...] = (4, 8, 16, 32, 64)
    """Units (mlp) or channels (cnn) of each hidden layer of the small networks."""
    seeds: int = 1
    """Repetitions, with the seeds 0, 1, ..."""
    epochs: int = 10
    """Passes over the training images, of each run."""
    workdir: str = "runs/bits"
    """Where the picture, the figures and the converted files go. Cells go into cells/ beside it, and are shared by all
    sweeps there."""
    model: Model = Model(model="lenet-300-100")
    data: Data = Data()

    def check(self) -> None:
        """Raises UserError on a setting out of range."""
        require(
            self,
            ("methods", len(self.methods) >= 1, "one or more methods"),
            ("densities", self.densities and all(0 < d < 1 for d in self.densities), "fractions kept, in (0, 1)"),
            ("distributions", len(self.distributions) >= 1, "one or more distributions"),
            ("dtypes", len(self.dtypes) >= 1, "one or more number formats"),
            *counts(self, "widths", "seeds", "epochs"),
        )
        self.model.check()
        self.data.check()


def main(config: Config) -> dict:
    """Trains, or finishes, every cell, evaluates its files, draws bits.png and returns what summary.json holds."""
    from experiments.plots import bits as plots  # here, so that --help answers at once
    from experiments.plots import style
    from experiments.sweeps import bits, cells

    dataset = cells.open_data(config.data)
    shared = {**cells.of_model(config.model), **flat(config.data), "epochs": config.epochs}
    grid = bits.grid(config.methods, config.densities, config.distributions, config.seeds, shared)
    if "dense" in config.methods:
        grid += bits.small(config.small, config.widths, config.seeds, shared)

    def complete(path: Path, summary: dict) -> dict:
        rows = bits.files(path, grid, summary["rows"], config.dtypes, dataset)
        return {**summary, "rows": rows, "points": plots.points(rows)}

    path, summary = cells.carry_out(config.workdir, flat(config), grid, dataset, complete=complete)
    style.save(plots.bits(summary), path / "bits.png")
    bits.show(summary["points"], dataset.name)
    print(f"figures and picture: {path}")
    return summary


if __name__ == "__main__":
    command_line.run(main, parser(Config), PROG)
