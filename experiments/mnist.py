"""Find a subnetwork of a randomly weighted network that recognises digits: `python -m experiments.mnist`.

With no flags it runs our best recipe, edge-popup on signed constants; `--preset tutorial` reproduces the published
tutorial; `--method bernoulli` learns how likely each weight is kept; `--method dense` trains the same network's
weights, for comparison; the other methods train them under masks.
"""

from dataclasses import dataclass, replace
from typing import Literal

from experiments.run import command_line
from experiments.run.errors import UserError, require

WEIGHTS_LEARN = {"init": "kaiming-normal", "optimizer": "adam", "learning_rate": 1e-3, "shift": 1}
REWIRED = {**WEIGHTS_LEARN, "distribution": "erk"}
RECIPES = {
    ("best", "edge-popup"): {"weight_decay": 2e-4, "shift": 1},
    ("best", "dense"): WEIGHTS_LEARN,
    ("best", "bernoulli"): {"init": "signed-deviation", "rescale": True, "learning_rate": 200.0, "shift": 1},
    ("best", "random"): REWIRED,
    ("best", "magnitude"): {**WEIGHTS_LEARN, "distribution": "global"},
    ("best", "snip"): {**WEIGHTS_LEARN, "distribution": "global"},
    ("best", "grasp"): {**WEIGHTS_LEARN, "distribution": "global"},
    ("best", "synflow"): {**WEIGHTS_LEARN, "distribution": "global"},
    ("best", "gradual"): {**WEIGHTS_LEARN, "distribution": "global"},
    ("best", "set"): REWIRED,
    ("best", "rigl"): REWIRED,
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

    method: Literal[
        "edge-popup",
        "bernoulli",
        "dense",
        "random",
        "magnitude",
        "snip",
        "grasp",
        "synflow",
        "gradual",
        "set",
        "rigl",
    ] = "edge-popup"
    """Scores learn, weights never: edge-popup keeps the highest; bernoulli learns with which probability each weight is
    kept. Weights learn: dense, all of them; random, magnitude, snip, grasp and synflow, under masks chosen so before
    training; gradual prunes the smallest as it trains; set and rigl exchange the smallest for random ones, or for those
    of the largest gradient."""
    preset: Literal["best", "tutorial", "zhou"] = "best"
    """Our best recipe, the published tutorial (of edge-popup), or Zhou et al.'s published settings (of bernoulli): the
    defaults below are those of the --preset and --method given."""
    model: Literal["convnet", "lenet-300-100", "mlp", "cnn"] = "convnet"
    """The network, without biases; mlp and cnn are as wide and deep as --width and --depth say."""
    width: int = 100
    """Units (mlp) or channels (cnn) of each hidden layer."""
    depth: int = 2
    """Hidden layers of mlp and cnn."""
    density: float = 0.5
    """Fraction of the weights that is kept, in (0, 1]. Dense training, which keeps all, and bernoulli, which learns how
    many, ignore it."""
    distribution: Literal["global", "uniform", "uniform+", "er", "erk", "erk+", "snip", "grasp", "synflow"] = "uniform"
    """What part of each layer that makes. global: what ranking all layers together gives; uniform: the same of each;
    uniform+, er, erk, erk+: published rules; snip, grasp, synflow: as much as these would keep there."""
    unit: Literal["weight", "neuron"] = "weight"
    """What edge-popup keeps or drops: single weights, or whole neurons and channels of all layers but the last."""
    rounds: int = 0
    """In how many rounds snip, grasp, synflow or magnitude rank all layers together. 0: in one, and 100 of synflow."""
    minimum: int = 0
    """Weights that ranking all layers together leaves in each at least."""
    update_every: int = 100
    """Steps between changes of the masks, until three quarters of training: gradual, set, rigl. Fewer where training is
    too short for five."""
    drop_fraction: float = 0.3
    """What part of the kept weights set and rigl exchange at first; it falls to 0 along a cosine."""
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
    """Scale the weights by sqrt(1 / --density), as in the paper; also where layers keep other parts."""
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
    dataset: Literal["auto", "mnist", "mnist-5k", "fashion_mnist", "kmnist", "cifar10", "idx"] = "auto"
    """auto: MNIST from disk or by download, else the 5000 digits of mnist-5k. cifar10: the files of its binary version.
    idx: any set in MNIST's format."""
    data_dir: str | None = None
    """Where the data are or will be put. [SUPERMASK_DATA_DIR, else ~/tensorflow_datasets]"""
    train_images: int = 0
    """Train on so many of the training images only, evenly from all classes. 0: on all."""
    judge: bool = False
    """Measure more than accuracy: calibration, out-of-distribution detection, adversarial robustness (FGSM, 8/255) and,
    after each epoch, the gradient's norm over the active weights."""
    strangers: Literal["none", "mnist", "mnist-5k", "fashion_mnist", "kmnist"] = "none"
    """With --judge: a second data set, whose images the network should be unsure of, beside Gaussian noise."""
    validation: int = 0
    """Training images to hold out. Then epochs report them, and the test set is measured once, at the end."""
    workdir: str | None = None
    """Where the run leaves its files, and resumes from. [runs/mnist/<a name made from the settings>]"""
    checkpoint_every: int = 500
    """Steps between checkpoints."""
    devices: int = 0
    """How many devices train together, each on its part of every batch; CPUs are simulated. 0: one, or, in several
    processes, all that they have."""
    parallel: Literal["jit", "pmap"] = "jit"
    """What makes one step of many devices: jit over a mesh, or pmap, where each device draws its own shifts."""
    shard_scores: bool = False
    """Split scores, weights and optimizer state over the devices, so that each holds and updates its part."""
    coordinator: str | None = None
    """Train in several processes: auto (the cluster's environment says how: TPU pods, Slurm, Open MPI, Kubernetes), or
    ADDRESS:PORT of the first one."""
    num_processes: int | None = None
    """With --coordinator ADDRESS:PORT, how many processes there are."""
    process_id: int | None = None
    """With --coordinator ADDRESS:PORT, which one this is, from 0 on; 0 is at that address, and writes the files."""

    def check(self) -> None:
        """Raises UserError on a setting out of range."""
        require(
            self,
            ("density", 0 < self.density <= 1, "the fraction kept, in (0, 1]"),
            ("seed", 0 <= self.seed < 2**32, "a whole number in [0, 2**32)"),
            ("epochs", self.epochs >= 1, "1 or more"),
            ("width", self.width >= 1, "1 or more"),
            ("depth", self.depth >= 1, "1 or more"),
            ("rounds", self.rounds >= 0, "1 or more, or 0 for the usual number"),
            ("minimum", self.minimum >= 0, "0 or more weights"),
            ("update_every", self.update_every >= 1, "1 or more steps"),
            ("drop_fraction", 0 < self.drop_fraction <= 1, "the part of the kept weights, in (0, 1]"),
            ("train_images", self.train_images >= 0, "0 (all) or more"),
            ("batch_size", self.batch_size >= 1, "1 or more"),
            ("checkpoint_every", self.checkpoint_every >= 1, "1 or more steps"),
            ("validation", self.validation >= 0, "0 or more images"),
            ("learning_rate", self.learning_rate > 0, "above 0"),
            ("shift", 0 <= self.shift <= 14, "in [0, 14] pixels"),
            ("momentum", 0 <= self.momentum < 1, "in [0, 1)"),
            ("weight_decay", self.weight_decay >= 0, "0 or more"),
            ("devices", self.devices >= 0, "1 or more, or 0 for the usual number"),
        )
        if self.shard_scores and self.parallel == "pmap":
            raise UserError("pmap keeps all scores on every device: --shard-scores is for --parallel jit.")
        if self.devices and self.batch_size % self.devices:
            raise UserError(f"--batch-size {self.batch_size} does not divide over --devices {self.devices}.")
        self._check_processes()
        if self.dropout and self.model != "convnet":
            raise UserError(f"Dropout is the convnet's, {self.model} was published without: say --no-dropout.")
        if self.scale_weights and self.method in FREE_DENSITY:
            raise UserError(f"--scale-weights scales by --density, and {FREE_DENSITY[self.method]}.")
        if self.rescale and self.method != "bernoulli":
            raise UserError(f"--rescale is for --method bernoulli; {self.method} has no use for it.")
        if self.unit == "neuron" and (self.method != "edge-popup" or self.distribution != "uniform"):
            raise UserError("--unit neuron is for --method edge-popup and --distribution uniform.")
        if self.distribution == "global" and self.method in ("edge-popup", "set", "rigl"):
            valid = "uniform, uniform+, er, erk, erk+, snip, grasp, synflow"
            raise UserError(f"{self.method} needs a --distribution that says what part of each layer: {valid}.")
        together = self.distribution in ("snip", "grasp", "synflow")
        together |= self.distribution == "global" and self.method != "gradual"
        for name in ("minimum", "rounds"):
            if getattr(self, name) and not together:
                raise UserError(
                    f"--{name} is for layers that are ranked together before training; --method {self.method} "
                    f"--distribution {self.distribution} does not."
                )
        if self.strangers != "none" and not self.judge:
            raise UserError("--strangers are what a network is judged on: add --judge.")

    def _check_processes(self) -> None:
        number, this = self.num_processes, self.process_id
        if self.coordinator in (None, "auto"):
            if number is not None or this is not None:
                raise UserError("--num-processes and --process-id go with --coordinator ADDRESS:PORT.")
            return
        address, _, port = self.coordinator.rpartition(":")
        if not address or not port.isdecimal():
            raise UserError(f"--coordinator must be auto or ADDRESS:PORT; got {self.coordinator}.")
        if number is None or this is None:
            raise UserError("--coordinator ADDRESS:PORT needs --num-processes and --process-id.")
        if number < 1 or not 0 <= this < number:
            raise UserError(f"--process-id must be in [0, --num-processes): got {this} of {number}.")
        if self.devices % number:
            raise UserError(f"--devices {self.devices} does not divide over --num-processes {number}.")


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
    from experiments.data import load as data
    from experiments.run import processes
    from experiments.training import fit as runner  # here, so that --help answers at once

    processes.join(config)
    dataset = processes.in_turn(lambda: data.load(config.dataset, config.data_dir))
    strangers = processes.in_turn(lambda: data.load_strangers(config, dataset.name))
    return runner.fit(settled(config, dataset.name), dataset, name="mnist", strangers=strangers)


def settled(config: Config, dataset: str) -> Config:
    """The settings with the name of the images found; those that the method or the model ignores all alike, so that one
    run has one name for its directory."""
    free = {"density": 1.0, "distribution": "uniform"} if config.method in FREE_DENSITY else {}
    free |= {"width": Config.width, "depth": Config.depth} if config.model not in ("mlp", "cnn") else {}
    return replace(config, dataset=dataset, **free)


if __name__ == "__main__":
    command_line.run(main, Config, defaults, prog="python -m experiments.mnist")
