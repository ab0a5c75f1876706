"""The recipes: what a preset sets for a method, by the flat names of the settings."""

from collections.abc import Mapping

from experiments.config.registry import METHODS, MODELS, SALIENCIES
from experiments.run.errors import UserError

WEIGHTS_LEARN = {"init": "kaiming-normal", "optimizer": "adam", "learning_rate": 1e-3, "shift": 1}
SCORES_LEARN = {"weight_decay": 2e-4, "shift": 1}
# simple_mnist_example.py of Ramanujan et al. 2020, with the flags of its tutorial.
TUTORIAL = {
    "init": "kaiming-normal",
    "epochs": 20,
    "learning_rate": 0.01,
    "schedule": "cosine-epoch",
    "weight_decay": 5e-4,
    "dropout": True,
}
# train_supermask.py of Zhou et al. 2019, with the flags of its README; their 2000 epochs see pixels from 0 to 255.
ZHOU = {
    "model": "lenet-300-100",
    "init": "glorot-normal",
    "epochs": 60,
    "batch_size": 250,
    "learning_rate": 100.0,
    "schedule": "constant",
}

# For fewer weights than the half at which the other recipes were chosen; `_few_weights` adds the learning rate.
FEW_WEIGHTS = {"density": 0.1, "distribution": "erk", "scale_layers": True}

Recipes = Mapping[tuple[str, str], Mapping]  # (preset, method): settings


def _best(weights_learn: dict, scores_learn: dict) -> dict:
    """The recipe of every method, from those of the methods whose weights learn and of those whose scores do."""
    return {
        **{("best", name): weights_learn if of.learns == "weights" else scores_learn for name, of in METHODS.items()},
        **{("best", name): {**weights_learn, "distribution": "global"} for name in (*SALIENCIES, "gradual")},
        **{("best", name): {**weights_learn, "distribution": "erk"} for name in ("random", "set", "rigl")},
    }


MNIST: Recipes = {
    **_best(WEIGHTS_LEARN, SCORES_LEARN),
    ("best", "bernoulli"): {"init": "signed-deviation", "rescale": True, "learning_rate": 200.0, "shift": 1},
    ("few-weights", "edge-popup"): {**SCORES_LEARN, **FEW_WEIGHTS},
    ("tutorial", "edge-popup"): TUTORIAL,
    ("tutorial", "dense"): TUTORIAL,
    ("zhou", "bernoulli"): ZHOU,
}

# SGD with the weight decay, the random shift and the mirroring of He et al. 2016; not compared with other recipes yet.
_CIFAR_IMAGES = {"batch_size": 128, "shift": 4, "flip": True}
_CIFAR_WEIGHTS = {**_CIFAR_IMAGES, "init": "kaiming-normal", "weight_decay": 1e-4, "affine": True}
_CIFAR_SCORES = {**_CIFAR_IMAGES, "weight_decay": 1e-4}
_CIFAR_BERNOULLI = {**_CIFAR_IMAGES, "rescale": True, "learning_rate": 200.0}
# The configurations of the released code of Ramanujan et al. 2020 (configs/smallscale): of edge-popup, of dense
# training and of their version of Bernoulli supermasks, whose rate is that of Conv2, 4 and 6. The weights of the last
# are drawn as Zhou et al. 2019 draw them.
_CIFAR_PAPER = {**_CIFAR_IMAGES, "epochs": 100, "schedule": "cosine-epoch"}
# Of pruning before training, as Wang et al. 2020 train VGG-19 (GraSP, CIFAR): 160 epochs, a tenth of the rate at 1/2
# and 3/4. Their ResNet-32 has a weight decay of 1e-4.
_CIFAR_PRUNED_PAPER = {
    **_CIFAR_WEIGHTS,
    "epochs": 160,
    "schedule": "steps",
    "drop_at": (0.5, 0.75),
    "weight_decay": 5e-4,
}

CIFAR_MODEL = "resnet-20"  # where neither a flag nor a recipe names one
CIFAR: Recipes = {
    **{("quick", method): settings for (_, method), settings in _best(_CIFAR_WEIGHTS, _CIFAR_SCORES).items()},
    ("quick", "bernoulli"): _CIFAR_BERNOULLI,
    ("few-weights", "edge-popup"): {**_CIFAR_SCORES, **FEW_WEIGHTS},
    ("paper", "edge-popup"): {**_CIFAR_PAPER, "weight_decay": 1e-4},
    ("paper", "dense"): {**_CIFAR_WEIGHTS, **_CIFAR_PAPER, "learning_rate": 0.01},
    ("paper", "bernoulli"): {**_CIFAR_PAPER, "learning_rate": 200.0, "init": "signed-deviation"},
    # train_supermask.py of Zhou et al. 2019 for its networks of CIFAR-10, without its pixels from 0 to 255.
    ("zhou", "bernoulli"): {**ZHOU, "model": "conv4", "epochs": 2000},
    ("paper", "random"): {**_CIFAR_PRUNED_PAPER, "distribution": "erk"},
    **{("paper", name): {**_CIFAR_PRUNED_PAPER, "distribution": "global"} for name in SALIENCIES},
}

# configs/largescale of the released code of Ramanujan et al. 2020. Its photographs are cropped at random as they are
# decoded. The rate is for batches of 256.
_IMAGENET_PAPER = {
    "epochs": 100,
    "batch_size": 256,
    "learning_rate": 0.256,
    "schedule": "cosine-epoch",
    "warmup_epochs": 5.0,
    "momentum": 0.875,
    "weight_decay": 3.0517578125e-05,
    "label_smoothing": 0.1,
    "checkpoint_every": 5000,
}
# Liu et al. 2022, Wide ResNet-50: appendix for the settings, and the README of the released code for the rest.
_IMAGENET_PRUNED = {
    "init": "kaiming-normal",
    "affine": True,
    "batch_size": 768,
    "learning_rate": 0.4,
    "schedule": "steps",
    "warmup_epochs": 5.0,
    "weight_decay": 1e-4,
    "label_smoothing": 0.1,
    "checkpoint_every": 1000,
}
# Evci et al. 2020: SGD as in the released code, 32,000 steps of 4,096 images, masks that change until three quarters of
# them. Their first layer is dense; ours has the density that ERK gives it (0.86 of ResNet-50's where 0.2 are kept).
_IMAGENET_RIGL = {
    "init": "kaiming-normal",
    "affine": True,
    "epochs": 102,
    "batch_size": 4096,
    "learning_rate": 1.6,
    "schedule": "steps",
    "drop_at": (30 / 102, 70 / 102, 90 / 102),
    "warmup_epochs": 5.0,
    "nesterov": True,
    "weight_decay": 1e-4,
    "label_smoothing": 0.1,
    "checkpoint_every": 1000,
}
_IMAGENET_SPARSE = {**_IMAGENET_RIGL, "density": 0.2, "distribution": "erk"}

_IMAGENET_WEIGHTS = {**_IMAGENET_PAPER, "init": "kaiming-normal", "affine": True}

IMAGENET: Recipes = {
    # Published for edge-popup and dense training; the others have the settings of the one that learns what they learn.
    **{
        ("paper", method): {**settings, "density": 0.3} if not METHODS[method].free_density else settings
        for (_, method), settings in _best(_IMAGENET_WEIGHTS, _IMAGENET_PAPER).items()
    },
    ("random-pruning", "random"): {
        **_IMAGENET_PRUNED,
        "epochs": 100,
        "drop_at": (0.3, 0.6, 0.9),
        "density": 0.3,
        "distribution": "erk+",
    },
    ("random-pruning", "dense"): {**_IMAGENET_PRUNED, "epochs": 90, "drop_at": (30 / 90, 60 / 90, 80 / 90)},
    **{("rigl", method): _IMAGENET_SPARSE for method in ("rigl", "set", "random")},
    ("rigl", "dense"): _IMAGENET_RIGL,
}

# Frankle & Carbin 2019, figure 2, as a replication and the released code of Zhou et al. 2019 have it: Adam, batches of
# 60, Glorot weights, the output layer at half the rate of dense layers. The number of rounds on CIFAR-10 is ours.
_TICKETS = {"rounds": 20, "trials": 5, "checkpoint_every": 10_000}
_CONV_TICKETS = {**_TICKETS, "dataset": "cifar10", "eval_every": 200}
# The defaults of open_lth (Frankle et al. 2020) for CIFAR-10: SGD, 160 epochs of 391 steps, a tenth of the rate after
# 80 and 120 epochs, a fifth of all weights in each round, and 500 steps of training before the weights that are rewound
# to. The numbers of rounds and trials are ours. The held-out images make our epochs 351 steps; the steps are theirs.
_BATCHNORM_TICKETS = {
    **_CIFAR_IMAGES,
    "dataset": "cifar10",
    "init": "kaiming-normal",
    "affine": True,
    "optimizer": "sgd",
    "learning_rate": 0.1,
    "weight_decay": 1e-4,
    "schedule": "steps",
    "drop_at": (0.5, 0.75),
    "steps": 160 * 391,
    "eval_every": 1000,
    "rewind_step": 500,
    "scope": "global",
    "rounds": 10,
    "checkpoint_every": 5000,
}

LOTTERY: Mapping[str, Mapping] = {  # preset: settings of `experiments.lottery`
    "short": {},
    "paper": {**_TICKETS, "steps": 50_000},
    "conv2": {**_CONV_TICKETS, "model": "conv2", "learning_rate": 2e-4, "steps": 20_000, "conv_fraction": 0.1},
    "conv4": {**_CONV_TICKETS, "model": "conv4", "learning_rate": 3e-4, "steps": 25_000, "conv_fraction": 0.1},
    "conv6": {**_CONV_TICKETS, "model": "conv6", "learning_rate": 3e-4, "steps": 30_000, "conv_fraction": 0.15},
    "resnet-20": {**_BATCHNORM_TICKETS, "model": "resnet-20"},
    "vgg-16": {**_BATCHNORM_TICKETS, "model": "vgg-16", "spare_output": True},
}


def is_cifar(dataset: str) -> bool:
    """Whether a data set's images are those of CIFAR or like them, 32 x 32 in colour."""
    return dataset.startswith(("cifar", "svhn", "colour-digits"))


def best_recipe(dataset: str, method: str, model: str) -> dict:
    """The settings of our best recipe for a method on a data set, as far as they differ from the fields' defaults."""
    return cifar("quick", method, model) if is_cifar(dataset) else recipe(MNIST, "best", method)


def mnist(preset: str, method: str, model: str, density: float | None = None) -> dict:
    """The settings of a preset of `experiments.mnist`; arguments and errors as in `recipe`.

    Args:
      model: the network's name.
      density: fraction kept, where the user names it; the learning rate for few weights falls with it.
    """
    return _few_weights(recipe(MNIST, preset, method), model, density)


def _few_weights(settings: dict, model: str, density: float | None) -> dict:
    """A preset's settings, with the learning rate if it is the preset for few weights."""
    if settings["preset"] == "few-weights":
        settings["learning_rate"] = edge_popup_rate(model, density or settings["density"], by_layer=True)
    return settings


def cifar(preset: str, method: str, model: str, density: float | None = None) -> dict:
    """The settings of a preset of `experiments.cifar`; arguments and errors as in `mnist`.

    The quick recipe has a lower rate where weights learn in a network without BatchNorm: at 0.03, Conv2 falls to 10 %.
    """
    settings = _few_weights(recipe(CIFAR, preset, method), model, density)
    if preset == "quick" and METHODS[method].learns == "weights" and "affine" not in MODELS[model].reads:
        settings["learning_rate"] = 0.01  # of 10,000 images, Adam at 0.0005 and 0.001 did worse in three epochs
    return settings


DENSE_LAYERS = ("lenet-300-100", "mlp")  # networks without a convolution


def edge_popup_rate(model: str, density: float, by_layer: bool) -> float:
    """The learning rate of edge-popup for scaled weights; the recipes' own was chosen at a half of the weights.

    A fifth of the density; the density itself where there is no convolution and each layer's weights are scaled by its
    own density. At most 0.1. docs/results/bits.md has the runs. With convolutions, the higher rate leaves Conv2 at 10 %
    of its weights little better than chance.

    Args:
      model: the network's name.
      density: fraction kept, in (0, 1].
      by_layer: each layer's weights are scaled by its own density, and not all by that of the network.
    """
    return round(min(density * (1.0 if by_layer and model in DENSE_LAYERS else 0.2), 0.1), 6)


def recipe(recipes: Recipes, preset: str, method: str) -> dict:
    """The settings of a preset for a method, as far as they differ from the fields' own defaults.

    Raises:
      UserError: the preset has none for this method.
    """
    if (preset, method) not in recipes:
        methods = ", ".join(m for p, m in recipes if p == preset)
        presets = ", ".join(p for p, m in recipes if m == method)
        there_is = f"it is for --method {methods}" if methods else f"there is --preset {presets}"
        raise UserError(f"no --preset {preset} for --method {method}: {there_is}.")
    return {"preset": preset, "method": method, **recipes[preset, method]}
