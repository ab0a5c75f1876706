"""The settings of a command, in sections. A consumer takes the section that it needs; the flags are flat.

The text under a field is its `--help`. Field names are unique over all sections; `density`, `rounds` and `unit` are in
both Masks and Tickets, which no command has together. A field that is added later needs a default that does what the
program did before it: see `experiments.config.settings`.
"""

from dataclasses import dataclass
from typing import Literal

from experiments.config.limits import MOST, MOST_RATE, counts
from experiments.config.registry import (
    DATASETS,
    DISTRIBUTIONS,
    INITIALIZERS,
    METHODS,
    MODELS,
    OPTIMIZERS,
    TEST_SETS,
)
from experiments.run.errors import UserError, require


@dataclass(frozen=True)
class Masks:
    """Which weights are kept, and what learns."""

    method: Literal[*METHODS] = "edge-popup"
    """Scores learn, weights never: edge-popup keeps the scores of largest magnitude; bernoulli learns the probability
    that each weight is kept; threshold keeps all scores above 0. Weights learn: dense, all of them; random, magnitude,
    snip, grasp and synflow, under masks chosen before training; gradual prunes the smallest as it trains; set and rigl
    replace the smallest by random ones, or by those of the largest gradient."""
    density: float = 0.5
    """Fraction of the weights that is kept, in (0, 1]. dense, which keeps all, and bernoulli and threshold, which learn
    how many, ignore it."""
    distribution: Literal[*DISTRIBUTIONS] = "uniform"
    """How the layers share the density. global: all layers are ranked together; uniform: the same in each layer;
    uniform+, er, erk, erk+: published rules; snip, grasp, synflow: as much as their ranking keeps in each layer."""
    unit: Literal["weight", "neuron"] = "weight"
    """What edge-popup keeps or drops: single weights, or whole neurons and channels of all layers but the last."""
    rounds: int = 0
    """Rounds in which all layers are ranked together before training. 0: one, and 100 for synflow."""
    minimum: int = 0
    """Weights that a ranking of all layers together leaves in each layer at least."""
    rescale: bool = False
    """Multiply each layer's masks by its size / number of ones, so that few weights count as much as all: bernoulli."""
    update_every: int = 100
    """Steps between changes of the masks, until three quarters of training: gradual, set, rigl. Fewer where training is
    too short for five changes."""
    drop_fraction: float = 0.3
    """The part of the kept weights that set and rigl replace at first; it falls to 0 along a cosine."""

    def check(self) -> None:
        """Raises UserError on a setting out of range, or on settings that exclude each other."""
        require(
            self,
            ("density", 0 < self.density <= 1, "the fraction kept, in (0, 1]"),
            ("rounds", self.rounds >= 0, "1 or more, or 0 for the usual number"),
            ("minimum", self.minimum >= 0, "0 or more weights"),
            *counts(self, "update_every"),
            ("drop_fraction", 0 < self.drop_fraction <= 1, "the part of the kept weights, in (0, 1]"),
        )
        if self.unit == "neuron" and (self.method != "edge-popup" or self.distribution != "uniform"):
            raise UserError("--unit neuron is for --method edge-popup and --distribution uniform.")
        if self.distribution == "global" and METHODS[self.method].layerwise:
            valid = ", ".join(name for name in DISTRIBUTIONS if name != "global")
            raise UserError(f"{self.method} needs a --distribution that gives a density to each layer: {valid}.")


@dataclass(frozen=True)
class Model:
    """The network."""

    model: Literal[*MODELS] = "convnet"
    """The network. convnet and lenet-300-100 are the MNIST networks of the literature; mlp and cnn have --width and
    --depth; conv2 to conv8, and with BatchNorm resnet-18 to resnet-110, vgg-11 to vgg-19 and wrn-16 to wrn-28 (WRN-22-2
    is wrn-22 with --widen 2) are those of CIFAR-10; resnet18 to resnet101, without the
    hyphen, and wide-resnet50 are those of ImageNet."""
    width: int = 100
    """Units (mlp) or channels (cnn) of each hidden layer."""
    depth: int = 2
    """Hidden layers of mlp and cnn."""
    dropout: bool = False
    """The convnet's published dropout: whole channels at 0.25 before, units at 0.5 after the first dense layer.
    lenet-300-100: at 0.5 after each hidden layer."""
    biases: bool = False
    """Biases in lenet-300-100, and in the last layer of ImageNet's networks. They are never pruned."""
    affine: bool = False
    """Learned BatchNorm scales and biases. They learn where weights learn; edge-popup and bernoulli
    leave them at 1 and 0."""
    widen: float = 1.0
    """Factor on the published widths of the networks of CIFAR-10."""
    bfloat16: bool = False
    """Compute the network in bfloat16, with activations of half the size. Weights, scores, masks, batch statistics and
    the optimizer stay float32, so the same scores select the same weights."""

    def check(self) -> None:
        """Raises UserError on a setting out of range."""
        require(
            self,
            *counts(self, "width", "depth"),
            ("widen", 0 < self.widen <= 64, "above 0, at most 64"),
        )


@dataclass(frozen=True)
class Init:
    """The weights before training."""

    init: Literal[*INITIALIZERS] = "signed-constant"
    """What the weights are drawn from; signed-deviation: the signs of a glorot-normal draw times its deviation."""
    scale_weights: bool = False
    """Scale the weights by sqrt(1 / --density), as in the paper; also where layers keep other fractions."""
    scale_layers: bool = False
    """Scale the weights of each layer by sqrt(1 / its own density), which --distribution gives it."""

    def check(self) -> None:
        """Raises UserError on settings that exclude each other."""
        if self.scale_weights and self.scale_layers:
            raise UserError("--scale-weights and --scale-layers exclude each other: leave one of them out.")


@dataclass(frozen=True)
class Optim:
    """Batches and the optimizer."""

    batch_size: int = 64
    """Images per step. The last, smaller batch of an epoch is trained on too, except by a network with batch
    statistics, which leaves it out."""
    learning_rate: float = 0.1
    """At the start of training."""
    schedule: Literal["cosine", "cosine-epoch", "constant", "steps", "exponential"] = "cosine"
    """How the learning rate falls. cosine, cosine-epoch: to zero, at every step or once per epoch. steps: to a tenth at
    each of --drop-at. exponential: to --final-rate of itself, evenly at every step. constant: not at all."""
    drop_at: tuple[float, ...] = ()
    """Parts of the training, in (0, 1), at which the learning rate drops to a tenth; with --schedule steps."""
    final_rate: float = 0.01
    """The part of the learning rate that is left in the end; with --schedule exponential."""
    warmup_epochs: float = 0.0
    """Epochs in which the learning rate rises evenly from zero. They are part of the training."""
    nesterov: bool = False
    """Nesterov's momentum in place of the plain one, for SGD."""
    label_smoothing: float = 0.0
    """The part of every label that is spread over all classes, in training."""
    optimizer: Literal[*OPTIMIZERS] = "sgd"
    """Weight decay is added to the gradient, for SGD and for Adam."""
    momentum: float = 0.9
    """Of SGD."""
    weight_decay: float = 0.0
    """Pulls what learns (scores, or weights) towards zero."""

    def check(self) -> None:
        """Raises UserError on a setting out of range."""
        require(
            self,
            *counts(self, "batch_size"),
            ("learning_rate", 0 < self.learning_rate <= MOST_RATE, f"above 0, at most {MOST_RATE:g}"),
            ("momentum", 0 <= self.momentum < 1, "in [0, 1)"),
            ("drop_at", all(0 < part < 1 for part in self.drop_at), "parts of the training, in (0, 1)"),
            ("final_rate", 0 < self.final_rate <= 1, "in (0, 1]"),
            ("warmup_epochs", 0 <= self.warmup_epochs <= MOST["epochs"], "0 or more epochs"),
            ("label_smoothing", 0 <= self.label_smoothing < 1, "in [0, 1)"),
            ("weight_decay", 0 <= self.weight_decay <= MOST_RATE, f"in [0, {MOST_RATE:g}]"),
        )
        if bool(self.drop_at) != (self.schedule == "steps"):
            raise UserError("--drop-at and --schedule steps go together: name the parts of the training, 0.5 0.75 say.")
        if self.nesterov and not self.momentum:
            raise UserError("--nesterov needs a --momentum above 0.")


@dataclass(frozen=True)
class Augment:
    """Random changes of the training images."""

    shift: int = 0
    """Training images are moved at random by up to so many pixels, each way."""
    border: Literal["zero", "reflect"] = "zero"
    """What moves in with --shift: black, or the mirrored border."""
    flip: bool = False
    """Mirror every other training image, left to right, at random."""
    flip_alternately: bool = False
    """In place of --flip: mirror a random half of the training images in the first epoch, and in each later epoch those
    that were not mirrored in the one before (Jordan 2024)."""
    cutout: int = 0
    """A square of so many pixels is set to black, at a random place of every training image."""

    def check(self) -> None:
        """Raises UserError on a setting out of range."""
        require(
            self,
            ("shift", 0 <= self.shift <= 14, "in [0, 14] pixels"),
            ("cutout", 0 <= self.cutout <= 64, "in [0, 64] pixels"),
        )


@dataclass(frozen=True)
class Data:
    """The images."""

    dataset: Literal[*DATASETS] = "auto"
    """auto: MNIST from disk or by download, else the 5000 digits of mnist-5k. cifar10, cifar100, svhn: their official
    files, of CIFAR the binary or the Python version, or what tensorflow-datasets prepared. colour-digits: not CIFAR,
    but MNIST's digits in colour, of the same shape, to try a command on; where MNIST is not on disk, colour-digits-5k.
    idx: any set in MNIST's format. folder: image files in class folders, train/CLASS/* and test/CLASS/*."""
    data_dir: str | None = None
    """Where the data are or will be put. [SUPERMASK_DATA_DIR, else ~/tensorflow_datasets]"""
    train_images: int = 0
    """Train on so many of the training images only, evenly from all classes. 0: on all."""
    validation: int = 0
    """Training images to hold out. Then epochs report them, and the test set is measured once, at the end."""
    stream: bool = False
    """Read the images of a folder from disk as they are needed, instead of holding them all in memory."""
    image_size: int = 224
    """The side of the squares that photographs are cropped to, in pixels: imagenet."""
    crop: float = 0.08
    """The smallest part of a photograph's area that training sees; 1: the whole photograph. Half of them are mirrored:
    imagenet."""
    skip_corrupt: bool = False
    """Let another training photograph take the place of one that cannot be read, and name it: imagenet."""

    def check(self) -> None:
        """Raises UserError on a setting out of range."""
        require(
            self,
            ("train_images", self.train_images >= 0, "0 (all) or more"),
            ("validation", self.validation >= 0, "0 or more images"),
            ("image_size", 8 <= self.image_size <= 2048, "in [8, 2,048] pixels"),
            ("crop", 0 < self.crop <= 1, "a part of the photograph, in (0, 1]"),
        )


_OOD = [name for name in DATASETS if name not in ("auto", "idx")]
_OOD += [name for name, entry in TEST_SETS.items() if not entry.known]


@dataclass(frozen=True)
class Evaluation:
    """What is measured beside loss and accuracy."""

    assess: bool = False
    """Measure calibration, out-of-distribution detection, adversarial robustness (FGSM, 8/255) and, after each epoch,
    the gradient's norm over the kept weights."""
    ood: tuple[Literal[*_OOD], ...] = ()
    """With --assess: out-of-distribution data sets, beside Gaussian noise."""
    shifted: tuple[Literal[*(name for name, entry in TEST_SETS.items() if entry.known)], ...] = ()
    """Sets of other photographs in the classes of ImageNet, on which accuracy is measured at the end: imagenet."""

    def check(self) -> None:
        """Raises UserError on settings that do not go together."""
        if self.ood and not self.assess:
            raise UserError("--ood names the images that --assess measures on: add --assess.")


@dataclass(frozen=True)
class Output:
    """The files of a run."""

    workdir: str | None = None
    """Where the run leaves its files, and resumes from. [runs/<experiment>/<a name made from the settings>]"""
    checkpoint_every: int = 500
    """Steps between checkpoints."""
    restart: bool = False
    """Begin anew: what an earlier run left in the work directory is moved to a folder in it."""

    def check(self) -> None:
        """Raises UserError on a setting out of range."""
        require(self, *counts(self, "checkpoint_every"))


@dataclass(frozen=True)
class Machine:
    """Devices and processes."""

    devices: int = 0
    """How many devices train together, each on its part of every batch; CPUs are simulated. 0: one, or, in several
    processes, all that they have."""
    parallel: Literal["jit", "pmap"] = "jit"
    """How one step runs on many devices: jit over a mesh, or pmap, where each device draws its own shifts."""
    shard_scores: bool = False
    """Split scores, weights and optimizer state over the devices, so that each holds and updates its part."""
    coordinator: str | None = None
    """Train in several processes: auto (the cluster's environment says how: TPU pods, Slurm, Open MPI, Kubernetes), or
    ADDRESS:PORT of the first one."""
    workers: int = 0
    """Processes that read images from disk, for each process that trains. 0: threads of that process."""
    compilation_cache: str | None = None
    """Keep compiled programs in this directory: a run that needs the same ones compiles nothing."""
    num_processes: int | None = None
    """With --coordinator ADDRESS:PORT, how many processes there are."""
    process_id: int | None = None
    """With --coordinator ADDRESS:PORT, which one this is, from 0 on; 0 is at that address, and writes the files."""

    def check(self) -> None:
        """Raises UserError on a setting out of range, or on settings that exclude each other."""
        require(
            self,
            ("devices", self.devices >= 0, "1 or more, or 0 for the usual number"),
            ("workers", 0 <= self.workers <= 1024, "in [0, 1,024]"),
        )
        if self.shard_scores and self.parallel == "pmap":
            raise UserError("pmap keeps all scores on every device: --shard-scores is for --parallel jit.")
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
