"""The settings of one training run, which `mnist`, `cifar` and every cell of a sweep share."""

from dataclasses import dataclass
from typing import ClassVar

from experiments.config.limits import counts
from experiments.config.registry import DISTRIBUTIONS, METHODS
from experiments.config.sections import (
    Augment,
    Data,
    Evaluation,
    Init,
    Machine,
    Masks,
    Model,
    Optim,
    Output,
)
from experiments.config.settings import changed, without_unread
from experiments.run.errors import UserError, require


@dataclass(frozen=True)
class Run:
    """Train one network by one method on one data set."""

    preset: str = "best"
    """The recipe: the defaults below are those of the --preset and --method given."""
    epochs: int = 10
    """Passes over the training images."""
    seed: int = 0
    """Of everything random, in [0, 2**32). The same command gives the same masks."""
    evaluate: str | None = None
    """Train nothing: evaluate the network in this subnetwork.safetensors, of an earlier run, on the test images."""
    weights: str | None = None
    """Begin with the weights of a ResNet of torchvision, timm or Hugging Face, in this .safetensors or .pth file; most
    need --affine --biases. Scores learn on them, or they are pruned and train on."""
    dry_run: bool = False
    """Train nothing: compile the step for these devices, print what it takes (memory, FLOPs, bytes between devices) and
    how long the training would take on named chips, and stop. ImageNet need not be there."""
    masks: Masks = Masks()
    model: Model = Model()
    init: Init = Init()
    optim: Optim = Optim()
    augment: Augment = Augment()
    data: Data = Data()
    evaluation: Evaluation = Evaluation()
    output: Output = Output()
    machine: Machine = Machine()

    # fmt: off
    ALWAYS_NAMED: ClassVar[frozenset[str]] = frozenset((
        "preset", "method", "density", "distribution", "unit", "rounds", "minimum", "rescale", "update_every",
        "drop_fraction", "model", "width", "depth", "dropout", "init", "scale_weights", "epochs", "batch_size",
        "learning_rate", "schedule", "optimizer", "momentum", "weight_decay", "shift", "dataset", "data_dir",
        "train_images", "validation", "assess", "ood", "workdir", "checkpoint_every", "devices", "parallel",
        "shard_scores", "coordinator", "num_processes", "process_id", "seed",
    ))
    # fmt: on

    def check(self) -> None:
        """Raises UserError on a setting out of range, or on settings that exclude each other."""
        require(
            self,
            ("seed", 0 <= self.seed < 2**32, "a whole number in [0, 2**32)"),
            *counts(self, "epochs"),
        )
        for section in (self.masks, self.model, self.init, self.optim, self.augment, self.data):
            section.check()
        for section in (self.evaluation, self.output, self.machine):
            section.check()
        if self.dry_run and (self.evaluate or self.machine.parallel == "pmap"):
            raise UserError("--dry-run compiles the train step of --parallel jit: leave out --evaluate and pmap.")
        batch, devices, method = self.optim.batch_size, self.machine.devices, self.masks.method
        if devices and batch % devices:
            raise UserError(f"--batch-size {batch} does not divide over --devices {devices}.")
        streams = self.data.dataset == "imagenet" or self.data.stream
        if self.machine.workers and not streams:
            raise UserError(
                "--workers read images that stay on disk (--dataset imagenet, or folder with --stream): leave them out."
            )
        if self.evaluate and (self.weights or self.evaluation.assess or self.model.bfloat16):
            raise UserError("--evaluate takes the network of the file: leave out --weights, --bfloat16 and --assess.")
        if self.weights and (self.init.scale_weights or self.init.scale_layers):
            raise UserError("--weights are taken as they are: leave out --scale-weights and --scale-layers.")
        if self.init.scale_weights and METHODS[method].free_density:
            raise UserError(f"--scale-weights scales by --density, and {METHODS[method].free_density}.")
        if self.init.scale_layers and not DISTRIBUTIONS[self.masks.distribution].target:
            ways = ", ".join(name for name, entry in DISTRIBUTIONS.items() if entry.target)
            raise UserError(
                f"--scale-layers needs layer densities that are known before the weights: --distribution {ways}."
            )


def named(config: Run, dataset: str) -> Run:
    """The settings that a run is stored under: with the name of the data set that was found, and with neutral values
    for all that its method and its model do not read."""
    config = changed(without_unread(config), dataset=dataset)
    config = changed(config, flip=config.augment.flip and not config.augment.flip_alternately)  # which takes its place
    if config.weights:  # nothing is drawn
        config = changed(config, init=Init.init)
    return changed(config, density=1.0) if METHODS[config.masks.method].free_density else config
