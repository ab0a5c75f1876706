"""Every method at every density, in one picture: `python -m experiments.compare`.

Each cell is a run of `experiments.mnist` with the method's best recipe. An interrupted or widened comparison resumes
with the cells that are missing.
"""

from dataclasses import dataclass
from typing import Literal

from experiments.config.flags import parser
from experiments.config.limits import counts
from experiments.config.registry import METHODS
from experiments.config.sections import Data, Evaluation, Model
from experiments.config.settings import flat
from experiments.run import command_line
from experiments.run.errors import require

PROG = "python -m experiments.compare"
ALL = ("dense", *(method for method in METHODS if method != "dense"))  # the baseline first


@dataclass(frozen=True)
class Config:
    """Compare methods at several densities, with several seeds, on one data set."""

    methods: tuple[Literal[*METHODS], ...] = ALL
    """What to compare; see `python -m experiments.mnist --help`. dense, bernoulli and threshold ignore the
    densities. edge-popup runs twice: with layer densities by erk and scaled weights, and by its recipe."""
    densities: tuple[float, ...] = (0.5, 0.2, 0.1, 0.05, 0.02)
    """Fractions of the weights that are kept, each in (0, 1)."""
    seeds: int = 3
    """Repetitions, with the seeds 0, 1, ..."""
    epochs: int = 5
    """Passes over the training images, of each run."""
    workdir: str = "runs/compare"
    """Where the picture and the figures go. Cells go into cells/ beside it, and are shared by all sweeps there."""
    model: Model = Model(model="lenet-300-100")
    evaluation: Evaluation = Evaluation(assess=True)
    data: Data = Data()

    def check(self) -> None:
        """Raises UserError on a setting out of range."""
        require(
            self,
            ("methods", len(self.methods) >= 1, "one or more methods"),
            ("densities", self.densities and all(0 < d < 1 for d in self.densities), "fractions kept, in (0, 1)"),
            *counts(self, "seeds", "epochs"),
        )
        for section in (self.model, self.evaluation, self.data):
            section.check()


def main(config: Config) -> dict:
    """Trains, or finishes, every cell, draws compare.png and returns what it writes to summary.json."""
    from experiments.plots import lines, style, sweeps  # here, so that --help answers at once
    from experiments.sweeps import cells, comparison, display
    from experiments.training.images import open_others

    dataset = cells.open_data(config.data)
    others = open_others(config.evaluation, config.data, dataset)
    shared = {**cells.of_model(config.model), **flat(config.evaluation), **flat(config.data), "epochs": config.epochs}
    grid = comparison.grid(config.methods, config.densities, config.seeds, shared)
    path, summary = cells.carry_out(config.workdir, flat(config), grid, dataset, others)
    style.save(sweeps.comparison(summary), path / "compare.png")
    masked = [row for row in summary["rows"] if row["asked"] < 1]
    groups = lines.grouped(masked, "method", "asked", "test_accuracy")
    display.show_table(f"test accuracy on {dataset.name}", groups, "density")
    print(f"figures and picture: {path}")
    return summary


if __name__ == "__main__":
    command_line.run(main, parser(Config), PROG)
