"""Find a subnetwork of a randomly weighted network that recognises digits: `python -m experiments.mnist`.

With no flags it runs our best recipe, edge-popup on signed constants; `--preset tutorial` reproduces the published
tutorial; `--method bernoulli` learns how likely each weight is kept; `--method dense` trains the same network's
weights, for comparison.
"""

from dataclasses import dataclass, replace
from typing import Literal

from experiments import command_line
from experiments.errors import UserError

RECIPES = {
    ("best", "edge-popup"): {"weight_decay": 2e-4, "shift": 1},
    ("best", "dense"): {"init": "kaiming-normal", "optimizer": "adam", "learning_rate": 1e-3, "shift": 1},
    ("best", "bernoulli"): {"init": "signed-deviation", "rescale": True, "learning_rate": 200.0, "shift": 1},
    # simple_mnist_example.py of Ramanujan et al. 2020, with the flags of its tutorial.
    ("tutorial", "edge-popup"): {
        "init": "kaiming-normal",
        "epochs": 20,
        "learning_rate": 0.01,
        "schedule": "cosine-epoch",
        "weight_decay": 5e-4,
        "dropout": True,
    },
}
RECIPES["tutorial", "dense"] = RECIPES["tutorial", "edge-popup"]
# train_supermask.py of Zhou et al. 2019, with the flags of its README; their 2000 epochs see pixels from 0 to 255.
RECIPES["zhou", "bernoulli"] = {
    "model": "lenet-300-100",
    "init": "glorot-normal",
    "epochs": 60,
    "batch_size": 250,
    "learning_rate": 100.0,
    "schedule": "constant",
}
FREE_DENSITY = {"bernoulli": "bernoulli learns how many weights it keeps", "dense": "dense training keeps every weight"}


@dataclass(frozen=True)
class Config:
    """Find a supermask on MNIST: a subnetwork of a random network, none of whose weights is ever trained."""

    method: Literal["edge-popup", "bernoulli", "dense"] = "edge-popup"
    """edge-popup learns scores and keeps the highest; bernoulli learns with which probability each weight is kept;
    dense trains the weights of the same network."""
    preset: Literal["best", "tutorial", "zhou"] = "best"
    """Our best recipe, the published tutorial (of edge-popup), or Zhou et al.'s published settings (of bernoulli): the
    defaults below are those of the --preset and --method given."""
    model: Literal["convnet", "lenet-300-100"] = "convnet"
    """The network; neither has biases here."""
    density: float = 0.5
    """Fraction of each layer's weights that is kept, in (0, 1]. Dense training, which keeps all, and bernoulli, which
    learns how many, ignore it."""
    init: Literal[
        "signed-constant",
        "unsigned-constant",
        "kaiming-normal",
        "kaiming-uniform",
        "glorot-normal",
        "signed-deviation",
    ] = "signed-constant"
    """What the weights are drawn from; signed-deviation: the signs of a glorot-normal draw times its deviation."""
    scale_weights: bool = False
    """Scale the weights by sqrt(1 / density), as in the paper."""
    rescale: bool = False
    """Multiply each layer's masks by its size / number of ones, so that few weights weigh as much as all: bernoulli."""
    epochs: int = 10
    """Passes over the training images."""
    batch_size: int = 64
    """Images per step; the last, smaller batch of an epoch is trained on too."""
    learning_rate: float = 0.1
    """At the start; the schedule takes it to zero."""
    schedule: Literal["cosine", "cosine-epoch", "constant"] = "cosine"
    """How the learning rate falls: at every step, once per epoch (as published), or not at all."""
    optimizer: Literal["sgd", "adam"] = "sgd"
    """Adam ignores --momentum; its weight decay is added to the gradient, like that of SGD."""
    momentum: float = 0.9
    """Of SGD."""
    weight_decay: float = 0.0
    """Pulls what learns (scores, or weights) towards zero."""
    dropout: bool = False
    """The convnet's published dropout: whole channels at 0.25 before, units at 0.5 after the first dense layer."""
    shift: int = 0
    """Training images are moved at random by up to so many pixels, each way."""
    seed: int = 0
    """Of everything random, in [0, 2**32). The same command gives the same masks."""
    dataset: Literal["auto", "mnist", "mnist-5k", "fashion_mnist", "kmnist", "idx"] = "auto"
    """auto: MNIST from disk or by download, else the 5000 digits of mnist-5k. idx: any set in MNIST's format."""
    data_dir: str | None = None
    """Where the data are or will be put. [SUPERMASK_DATA_DIR, else ~/tensorflow_datasets]"""
    validation: int = 0
    """Training images to hold out. Then epochs report them, and the test set is measured once, at the end."""
    workdir: str | None = None
    """Where the run leaves its files, and resumes from. [runs/mnist/<a name made from the settings>]"""
    checkpoint_every: int = 500
    """Steps between checkpoints."""

    def check(self) -> None:
        """Raises UserError on a setting out of range."""
        for name, valid, says in (
            ("density", 0 < self.density <= 1, "the fraction kept, in (0, 1]"),
            ("seed", 0 <= self.seed < 2**32, "a whole number in [0, 2**32)"),
            ("epochs", self.epochs >= 1, "1 or more"),
            ("batch_size", self.batch_size >= 1, "1 or more"),
            ("checkpoint_every", self.checkpoint_every >= 1, "1 or more steps"),
            ("validation", self.validation >= 0, "0 or more images"),
            ("learning_rate", self.learning_rate > 0, "above 0"),
            ("shift", 0 <= self.shift <= 14, "in [0, 14] pixels"),
            ("momentum", 0 <= self.momentum < 1, "in [0, 1)"),
            ("weight_decay", self.weight_decay >= 0, "0 or more"),
        ):
            if not valid:
                raise UserError(f"--{name.replace('_', '-')} must be {says}; got {getattr(self, name)}.")
        if self.dropout and self.model != "convnet":
            raise UserError("Dropout is the convnet's, LeNet-300-100 was published without: say --no-dropout.")
        if self.scale_weights and self.method in FREE_DENSITY:
            raise UserError(f"--scale-weights scales by --density, and {FREE_DENSITY[self.method]}.")
        if self.rescale and self.method != "bernoulli":
            raise UserError(f"--rescale is for --method bernoulli; {self.method} has no use for it.")


def defaults(preset: str = "best", method: str = "edge-popup") -> dict:
    """The settings of a preset for a method, as far as they differ from the fields' own defaults.

    Raises:
      UserError: the preset has none for this method.
    """
    if (preset, method) not in RECIPES:
        valid = [f"--preset {p} --method {m}" for p, m in RECIPES]
        raise UserError(f"no --preset {preset} for --method {method}. There are: {'; '.join(valid)}.")
    return {"preset": preset, "method": method, **RECIPES[preset, method]}


def main(config: Config) -> dict:
    """Runs to the end, or resumes, and returns the summary that it also writes to summary.json."""
    from experiments import data, methods, runner  # here, so that --help answers at once

    dataset = data.load(config.dataset, config.data_dir)
    density = 1.0 if config.method in FREE_DENSITY else config.density  # one run, one name for its directory
    config = replace(config, dataset=dataset.name, density=density)
    return runner.fit(config, dataset, methods.METHODS[config.method], name="mnist")


if __name__ == "__main__":
    command_line.run(main, Config, defaults, prog="python -m experiments.mnist")
