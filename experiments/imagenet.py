"""Find or train a sparse network on ImageNet: `python -m experiments.imagenet --model resnet50 --preset paper`."""

from dataclasses import dataclass
from typing import Literal

from experiments.config.flags import parser
from experiments.config.presets import IMAGENET, recipe
from experiments.config.run import Run
from experiments.config.sections import Data, Model
from experiments.run import command_line

PROG = "python -m experiments.imagenet"


@dataclass(frozen=True)
class Config(Run):
    """Find a subnetwork that recognises photographs, or train one by any method, on images that stay on disk."""

    preset: Literal["paper", "random-pruning", "rigl"] = "paper"
    """The recipe: the defaults below are those of the --method given. paper: Ramanujan et al. 2020, 100 epochs, of
    edge-popup and dense; other methods take them over. random-pruning: Liu et al. 2022, of random and dense. rigl: Evci
    et al. 2020, of rigl, set, random and dense."""
    model: Model = Model(model="resnet50")
    data: Data = Data(dataset="imagenet")


def defaults(preset: str = "paper", method: str = "edge-popup") -> dict:
    """The settings of a preset for a method, as far as they differ from the fields' own defaults."""
    return recipe(IMAGENET, preset, method)


def main(config: Config) -> dict:
    """Runs to the end, or resumes, and returns the summary that it also writes to summary.json."""
    from experiments.bench import dry_run  # here, so that --help answers at once
    from experiments.training.fit import run

    if config.dry_run:
        return dry_run.show(config)
    return run(config, "imagenet")


if __name__ == "__main__":
    command_line.run(main, parser(Config, defaults), PROG)
