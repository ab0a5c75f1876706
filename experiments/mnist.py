"""Find a subnetwork of a randomly weighted network that recognises digits: `python -m experiments.mnist`.

Without flags it runs our best recipe, edge-popup on signed constants. `--preset tutorial` reproduces the published
tutorial. `--method bernoulli` learns the probability that each weight is kept. `--method dense` trains the same
network's weights, for comparison. The other methods train the weights under masks.
"""

from dataclasses import dataclass
from typing import Literal

from experiments.config import presets
from experiments.config.flags import parser
from experiments.config.run import Run
from experiments.config.sections import Model
from experiments.run import command_line

PROG = "python -m experiments.mnist"


@dataclass(frozen=True)
class Config(Run):
    """Find a supermask on MNIST: a subnetwork of a random network, none of whose weights is ever trained."""

    preset: Literal["best", "few-weights", "tutorial", "zhou"] = "best"
    """Our best recipe; few-weights, our recipe for edge-popup at 10 % and less; the published tutorial (of edge-popup);
    or zhou, Zhou et al.'s published settings (of bernoulli): the defaults below are those of the --preset and --method
    given."""


def defaults(
    preset: str = "best", method: str = "edge-popup", model: str = Model.model, density: float | None = None
) -> dict:
    """The settings of a preset for a method, as far as they differ from the fields' own defaults."""
    return presets.mnist(preset, method, model, density)


def main(config: Config) -> dict:
    """Runs to the end, or resumes, and returns the summary that it also writes to summary.json."""
    from experiments.bench import dry_run  # here, so that --help answers at once
    from experiments.training.fit import run

    if config.dry_run:
        return dry_run.show(config)
    return run(config, "mnist")


if __name__ == "__main__":
    command_line.run(main, parser(Config, defaults), PROG)
