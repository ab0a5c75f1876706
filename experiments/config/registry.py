"""Every choice that a command line offers, by name: data sets, models, methods, saliencies, layer densities.

One line adds one choice. A line names the function that makes it as "module:function" and imports nothing until the
choice is taken, so that `--help` answers at once. `reads` lists the options that the choice takes beside those that
every run has; an option that no choice of a run reads is refused.
"""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal


@dataclass(frozen=True)
class Entry:
    """One choice: where its function is, the options that it reads, and arguments that make it this choice."""

    target: str  # "module:function"
    reads: tuple[str, ...] = ()
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def resolve(self) -> Callable:
        """The function, imported now."""
        module, _, name = self.target.partition(":")
        function = getattr(importlib.import_module(module), name)
        return partial(function, **self.arguments) if self.arguments else function


@dataclass(frozen=True)
class MethodEntry(Entry):
    """A method: `build(setup) -> supermask_jax.methods.Method`, and what the command line must know of it."""

    learns: Literal["scores", "weights"] = "weights"
    layerwise: bool = False  # needs a density for each layer, so that --distribution global is refused
    free_density: str = ""  # why --density means nothing to it, if so


@dataclass(frozen=True)
class SaliencyEntry(Entry):
    """A saliency of the library: scores for pruning before training. It is a method and a layer distribution too."""

    takes: Literal["weights", "batch", "halves", "shape"] = "batch"  # what it sees beside the weights
    rounds: int = 1  # of scoring and pruning, where --rounds is 0
    temperature: float = 1.0  # that the logits are divided by while it scores


DATASETS: Mapping[str, Entry] = {
    "auto": Entry("experiments.data.mnist:auto"),
    "mnist": Entry("experiments.data.mnist:mnist"),
    "mnist-5k": Entry("experiments.data.mnist:mnist_5k"),
    "fashion_mnist": Entry("experiments.data.mnist:fashion_mnist"),
    "kmnist": Entry("experiments.data.mnist:kmnist"),
    "cifar10": Entry("experiments.data.cifar:cifar10"),
    "cifar100": Entry("experiments.data.cifar:cifar100"),
    "svhn": Entry("experiments.data.svhn:svhn"),
    "colour-digits": Entry("experiments.data.colour_digits:colour_digits"),
    "colour-digits-5k": Entry("experiments.data.colour_digits:colour_digits_5k"),
    "idx": Entry("experiments.data.mnist:idx"),
    "folder": Entry("experiments.data.folder:folder", reads=("stream",)),
    "imagenet": Entry("experiments.data.imagenet:imagenet", reads=("image_size", "crop", "skip_corrupt")),
}


@dataclass(frozen=True)
class EvaluatedEntry(Entry):
    """Images that networks are evaluated on and never trained on."""

    known: bool = True  # whether they are in classes of the training set: --shifted takes it, and otherwise --ood


_TEST_SETS = "experiments.data.shifted"
TEST_SETS: Mapping[str, EvaluatedEntry] = {
    "imagenet-v2": EvaluatedEntry(f"{_TEST_SETS}:imagenet_v2", reads=("image_size",)),
    "imagenet-a": EvaluatedEntry(f"{_TEST_SETS}:imagenet_a", reads=("image_size",)),
    "imagenet-o": EvaluatedEntry(f"{_TEST_SETS}:imagenet_o", reads=("image_size",), known=False),
}

_ZOO = "supermask_jax.models.zoo"
MODELS: Mapping[str, Entry] = {
    "convnet": Entry(f"{_ZOO}:mnist_convnet", reads=("dropout",)),
    "lenet-300-100": Entry(f"{_ZOO}:lenet_300_100", reads=("biases", "dropout")),
    "mlp": Entry(f"{_ZOO}:mlp", reads=("width", "depth")),
    "cnn": Entry(f"{_ZOO}:cnn", reads=("width", "depth")),
    **{f"conv{depth}": Entry(f"{_ZOO}:conv_n", ("widen",), {"depth": depth}) for depth in (2, 4, 6, 8)},
    **{
        f"resnet-{depth}": Entry(f"{_ZOO}:cifar_resnet", ("affine", "widen"), {"depth": depth})
        for depth in (20, 32, 44, 56, 110)
    },
    "resnet-18": Entry(f"{_ZOO}:small_resnet_18", ("affine", "widen")),
    **{f"resnet{depth}": Entry(f"{_ZOO}:resnet_{depth}", ("affine", "biases")) for depth in (18, 34, 50, 101)},
    "wide-resnet50": Entry(f"{_ZOO}:wide_resnet_50", ("affine", "biases")),
    **{f"vgg-{depth}": Entry(f"{_ZOO}:vgg", ("affine", "widen"), {"depth": depth}) for depth in (11, 16, 19)},
    **{f"wrn-{depth}": Entry(f"{_ZOO}:wide_resnet", ("affine", "widen"), {"depth": depth}) for depth in (16, 22, 28)},
}

SALIENCIES: Mapping[str, SaliencyEntry] = {
    "magnitude": SaliencyEntry("supermask_jax.saliency:magnitude", takes="weights"),
    "snip": SaliencyEntry("supermask_jax.saliency:snip", takes="batch"),
    "grasp": SaliencyEntry("supermask_jax.saliency:grasp", takes="halves", temperature=200.0),
    "synflow": SaliencyEntry("supermask_jax.saliency:synflow", takes="shape", rounds=100),
}

_FIXED = ("distribution", "scale_weights", "scale_layers")
METHODS: Mapping[str, MethodEntry] = {
    "edge-popup": MethodEntry(
        "experiments.training.methods:edge_popup", (*_FIXED, "unit"), learns="scores", layerwise=True
    ),
    "bernoulli": MethodEntry(
        "experiments.training.methods:bernoulli",
        ("rescale",),
        learns="scores",
        free_density="bernoulli learns how many weights it keeps",
    ),
    "dense": MethodEntry("experiments.training.methods:dense", free_density="dense training keeps every weight"),
    "random": MethodEntry("experiments.training.methods:fixed", _FIXED),
    **{name: MethodEntry("experiments.training.methods:fixed", _FIXED) for name in SALIENCIES},
    "gradual": MethodEntry("experiments.training.methods:gradual", (*_FIXED, "update_every")),
    "set": MethodEntry(
        "experiments.training.methods:sparse_evolutionary", (*_FIXED, "update_every", "drop_fraction"), layerwise=True
    ),
    "rigl": MethodEntry(
        "experiments.training.methods:rigl", (*_FIXED, "update_every", "drop_fraction"), layerwise=True
    ),
    "threshold": MethodEntry(
        "experiments.training.methods:threshold",
        learns="scores",
        free_density="threshold learns how many weights it keeps",
    ),
}


@dataclass(frozen=True)
class DistributionEntry(Entry):
    """How layers share a density: a function of (shapes, density, *takes), or "" where a ranking of all layers says."""

    takes: tuple[Literal["first", "last"], ...] = ()


_RANKED = DistributionEntry("", reads=("rounds", "minimum"))
DISTRIBUTIONS: Mapping[str, DistributionEntry] = {
    "global": _RANKED,
    "uniform": DistributionEntry("supermask_jax.densities:uniform"),
    "uniform+": DistributionEntry("supermask_jax.densities:uniform_plus", takes=("first", "last")),
    "er": DistributionEntry("supermask_jax.densities:er"),
    "erk": DistributionEntry("supermask_jax.densities:erk"),
    "erk+": DistributionEntry("supermask_jax.densities:erk_plus", takes=("last",)),
    **{name: _RANKED for name in SALIENCIES if name != "magnitude"},
}


@dataclass(frozen=True)
class InitializerEntry(Entry):
    """What the frozen or initial weights are drawn from: a function of (key, weights, density=...)."""

    on_host: bool = False  # it computes with values, so it cannot be compiled


INITIALIZERS: Mapping[str, InitializerEntry] = {
    "signed-constant": InitializerEntry("supermask_jax.initializers:signed_constant"),
    "unsigned-constant": InitializerEntry("supermask_jax.initializers:unsigned_constant"),
    "kaiming-normal": InitializerEntry("supermask_jax.initializers:kaiming_normal", on_host=True),
    "kaiming-uniform": InitializerEntry("supermask_jax.initializers:kaiming_uniform"),
    "glorot-normal": InitializerEntry("supermask_jax.initializers:glorot_normal", on_host=True),
    "signed-deviation": InitializerEntry("experiments.training.network:signed_deviation", on_host=True),
}

OPTIMIZERS: Mapping[str, Entry] = {
    "sgd": Entry("optax:sgd", reads=("momentum", "nesterov")),
    "adam": Entry("optax:adam"),
    "rmsprop": Entry("optax:rmsprop", arguments={"decay": 0.99, "eps_in_sqrt": False}),  # as in PyTorch
}

CRITERIA = (  # mask criteria of `supermask_jax.criteria`, by their names there; compared by a test
    "large_final",
    "small_final",
    "large_init",
    "small_init",
    "large_init_large_final",
    "small_init_small_final",
    "magnitude_increase",
    "movement",
    "large_final_same_sign",
    "large_final_diff_sign",
    "magnitude_increase_same_sign",
    "magnitude_increase_diff_sign",
    "random",
)
