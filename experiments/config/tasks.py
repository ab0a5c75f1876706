"""The settings of `experiments.many_tasks`: the tasks, the network that they share, how a task is inferred."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from experiments.config.limits import MOST_RATE, counts
from experiments.config.registry import METHODS
from experiments.config.sections import Data, Optim
from experiments.config.settings import changed, flat, without_unread
from experiments.run.errors import UserError, require

MOST_TASKS = 10_000
BEST, PUBLISHED = "best", "published"
CHANGE_NO_MASK = ("tasks", "inferred_images", "temperature")  # a run may resume with others

# Chosen on 10,000 held-out training images, and never on test images: docs/results/many_tasks.md.
RECIPES: Mapping[tuple[str, str], Mapping[str, Any]] = {
    (BEST, "threshold"): {"optimizer": "adam", "learning_rate": 1e-3, "batch_size": 32},
    (BEST, "edge-popup"): {"optimizer": "adam", "learning_rate": 1e-3, "batch_size": 32},
    # mnist.ipynb of Wortsman et al. 2020.
    (PUBLISHED, "threshold"): {
        "optimizer": "rmsprop",
        "learning_rate": 1e-4,
        "schedule": "constant",
        "batch_size": 128,
        "temperature": 1.0,
    },
}


@dataclass(frozen=True)
class ManyTasks:
    """Many tasks in one random network: a mask for each task, while the weights are never trained."""

    preset: Literal["best", "published"] = "best"
    """Our best recipe, or the published one of Wortsman et al. (of threshold): the defaults below are those of the
    --preset and --method given."""
    tasks: int = 5
    """How many tasks there are. Task 0 has the images as they are; every other task has the pixels of all images in an
    order of its own. A run that has fewer tasks in its work directory trains the missing ones only."""
    method: Literal["threshold", "edge-popup"] = "threshold"
    """What a task's mask is made of, by scores that learn: the weights whose score is above 0, or the highest scores of
    each layer."""
    density: float = 0.5
    """Fraction of each layer that edge-popup keeps, in (0, 1]. threshold, which learns how many, ignores it."""
    width: int = 300
    """Units of each hidden layer."""
    depth: int = 2
    """Hidden layers."""
    outputs: int = 100
    """Outputs of the network. Those beyond the number of classes are never right; published: 100 for 10 classes."""
    epochs: int = 1
    """Passes over the training images, of each task."""
    inferred_images: int = 1000
    """Test images, evenly from all tasks, whose task is inferred from the image alone."""
    temperature: float = 10.0
    """What the outputs are divided by in the entropy that a task is inferred from; published: 1."""
    seed: int = 0
    """Of everything random, in [0, 2**32). The same command gives the same masks."""
    workdir: str | None = None
    """Where the run leaves its files, and resumes from. [runs/many_tasks/<a name made from the settings>]"""
    restart: bool = False
    """Begin anew: what an earlier run left in the work directory is moved to a folder in it."""
    optim: Optim = Optim(optimizer="adam", learning_rate=1e-3, batch_size=32)
    data: Data = Data()

    # fmt: off
    ALWAYS_NAMED: ClassVar[frozenset[str]] = frozenset((
        "preset", "tasks", "method", "density", "width", "depth", "outputs", "epochs", "inferred_images",
        "temperature", "seed", "workdir", "batch_size", "learning_rate", "schedule", "optimizer", "momentum",
        "weight_decay", "dataset", "data_dir", "train_images", "validation", "stream",
    ))
    # fmt: on

    def check(self) -> None:
        """Raises UserError on a setting out of range."""
        require(
            self,
            ("tasks", 1 <= self.tasks <= MOST_TASKS, f"in [1, {MOST_TASKS:,}]"),
            ("density", 0 < self.density <= 1, "the fraction kept, in (0, 1]"),
            *counts(self, "width", "depth", "epochs", "inferred_images"),
            *counts(self, "outputs", least=2),
            ("temperature", 0 < self.temperature <= MOST_RATE, f"above 0, at most {MOST_RATE:g}"),
            ("seed", 0 <= self.seed < 2**32, "a whole number in [0, 2**32)"),
        )
        self.optim.check()
        self.data.check()


def recipe(preset: str = BEST, method: str = "threshold") -> dict[str, Any]:
    """The settings of a preset for a method, as far as they differ from the fields' own defaults.

    Raises:
      UserError: the preset has none for this method.
    """
    if (preset, method) not in RECIPES:
        raise UserError(f"no --preset {preset} for --method {method}: there is --preset {BEST}.")
    return {"preset": preset, "method": method, **RECIPES[preset, method]}


def named(config: ManyTasks, dataset: str) -> ManyTasks:
    """The settings that a run is stored under: with the name of the data set that was found, and with neutral values
    for what its choices do not read."""
    config = changed(without_unread(config), dataset=dataset)
    return changed(config, density=1.0) if METHODS[config.method].free_density else config


def of_masks(config: ManyTasks) -> dict[str, Any]:
    """The settings by flat name that bear on the masks of a task."""
    return {name: value for name, value in flat(config).items() if name not in CHANGE_NO_MASK}
