"""Find or train a sparse network on CIFAR-10: `python -m experiments.cifar --model resnet-20 --method snip`."""

from dataclasses import dataclass
from typing import Literal

from experiments.config import presets
from experiments.config.flags import parser
from experiments.config.run import Run
from experiments.config.sections import Data, Model
from experiments.run import command_line

PROG = "python -m experiments.cifar"


@dataclass(frozen=True)
class Config(Run):
    """Find a subnetwork that recognises the objects of CIFAR-10, or train one by any method."""

    preset: Literal["quick", "few-weights", "paper", "zhou"] = "quick"
    """The recipe: the defaults below are those of the --method and --model given. quick: few epochs. few-weights: the
    same, of edge-popup at 10 % and less. paper: the published settings, 100 or 160 epochs. zhou: Zhou et al.'s settings
    of bernoulli, 2000 epochs of Conv4."""
    model: Model = Model(model=presets.CIFAR_MODEL)
    data: Data = Data(dataset="cifar10")


def defaults(
    preset: str = "quick", method: str = "edge-popup", model: str = presets.CIFAR_MODEL, density: float | None = None
) -> dict:
    """The settings of a preset for a method and a model, as far as they differ from the fields' own defaults."""
    return presets.cifar(preset, method, model, density)


def main(config: Config) -> dict:
    """Runs to the end, or resumes, and returns the summary that it also writes to summary.json."""
    from experiments.bench import dry_run  # here, so that --help answers at once
    from experiments.training.fit import run

    if config.dry_run:
        return dry_run.show(config)
    return run(config, "cifar")


if __name__ == "__main__":
    command_line.run(main, parser(Config, defaults), PROG)
