"""The published figures that our runs stand beside: what was trained, what came out, and where that is written.

Only figures that were read in their source are here. A figure that a paper shows only as a curve is None.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from experiments.config import tasks
from experiments.config.presets import MNIST, TUTORIAL, ZHOU, recipe
from experiments.reports.commands import Kind


class Figure(NamedTuple):
    """One published figure.

    Attributes:
      what: the network and the method, in words.
      settings: the settings that a run of ours must have to stand beside it, by flat name.
      accuracy: the published test accuracy, a fraction; None where there is only a curve, or no such run.
      epochs: of the published training; None where it is not known, or counted in other units.
      source: where the figure is written.
      headline: whether README shows it.
      kind: which command makes such results; see `commands`.
    """

    what: str
    settings: Mapping[str, Any]
    accuracy: float | None = None
    epochs: int | None = None
    source: str = ""
    headline: bool = False
    kind: Kind = "run"

    @property
    def series(self) -> str:
        """What it shares with the figures of other densities."""
        return re.sub(r", [\d.]+ % kept", "", self.what)


class Experiment(NamedTuple):
    """A published experiment: its figures, in the order of its table."""

    name: str
    title: str
    text: str
    figures: tuple[Figure, ...]


_RAMANUJAN = "Ramanujan et al. 2020, released code and tutorial"
_KOSTER = "as Koster et al. 2022 (Signed Supermasks) quote it"
_ZHOU = "Zhou et al. 2019, as Koster et al. 2022 quote it"
_TANAKA = "Tanaka et al. 2020 (SynFlow), stored results of the released code, mean of 3 seeds"
_RIGL = (
    "Evci et al. 2020 (RigL), an author's table in issue 8 of the released code, which does not name the network; a "
    "replication says WRN-22-2"
)
_WORTSMAN = "Wortsman et al. 2020 (SupSup), output of the released notebook, mean of 5 tasks"
_CONVS = {"conv2": "Conv2", "conv4": "Conv4", "conv6": "Conv6", "conv8": "Conv8"}
_CIFAR = {"dataset": "cifar10", "widen": 1.0}


def _edge_popup() -> tuple[Figure, ...]:
    tenth = dict(zip(_CONVS, (0.65, 0.74, 0.77, 0.70), strict=True))
    dense = dict(zip(_CONVS, (0.6879, 0.7450, 0.7591, 0.7224), strict=True))
    mnist = {"dataset": "mnist", "model": "convnet"}
    found = [
        Figure(
            "MNIST convnet, edge-popup, 50 % kept, the published settings",
            {**mnist, "method": "edge-popup", **TUTORIAL, "density": 0.5, "distribution": "uniform", "shift": 0},
            *(0.9828, 20, _RAMANUJAN, True),
        ),
        Figure(
            "MNIST convnet, edge-popup, 50 % kept, our settings",
            {**mnist, "method": "edge-popup", **recipe(MNIST, "best", "edge-popup"), "density": 0.5},
            headline=True,
        ),
        Figure("MNIST convnet, dense", {**mnist, **recipe(MNIST, "best", "dense")}, headline=True),
    ]
    for model, name in _CONVS.items():
        of_model = {**_CIFAR, "model": model}
        for density in (0.1, 0.3, 0.5, 0.7):
            kept = {**of_model, "method": "edge-popup", "density": density}
            read_off = tenth[model], 100, f"Ramanujan et al. 2020, {_KOSTER}"
            known = read_off if density == 0.1 else (None, 100)
            found.append(Figure(f"{name}, edge-popup, {100 * density:g} % kept", kept, *known))
        baseline = (dense[model], None, "Koster et al. 2022, their own dense training")
        found.append(Figure(f"{name}, dense", {**of_model, "method": "dense"}, *baseline))
    return tuple(found)


def _bernoulli() -> tuple[Figure, ...]:
    best = {"conv2": 0.660, "conv4": 0.725, "conv6": 0.765}
    signed = {"method": "bernoulli", "rescale": True, "init": "signed-deviation"}
    trained = {name: value for name, value in ZHOU.items() if name not in ("model", "init", "epochs")}
    lenet = {"dataset": "mnist", "model": "lenet-300-100", "shift": 0, **trained, **signed}
    fully = Figure("LeNet-300-100 on MNIST, Bernoulli, rescaled, signed weights", lenet, 0.980, 2000, _ZHOU, True)
    return (
        fully,
        *(
            Figure(
                f"{_CONVS[model]}, Bernoulli, rescaled, signed weights",
                {**_CIFAR, "model": model, **signed},
                *(accuracy, 2000, _ZHOU),
            )
            for model, accuracy in best.items()
        ),
    )


def _random() -> tuple[Figure, ...]:
    densities = (0.5, 0.2, 0.1, 0.05)
    tables = {
        ("random masks, ERK", "random"): (94.1, 92.9, 91.5, 89.0),
        ("RigL, ERK", "rigl"): (94.2, 93.6, 92.9, 91.8),
        ("gradual pruning, ERK", "gradual"): (94.0, 93.6, 93.3, 92.3),
    }
    wide = {"dataset": "cifar10", "model": "wrn-22", "widen": 2.0, "distribution": "erk"}
    found = [
        Figure(
            f"WRN-22-2, {name}, {100 * density:g} % kept",
            {**wide, "method": method, "density": density},
            *(percent / 100, None, _RIGL),
        )
        for (name, method), percents in tables.items()
        for density, percent in zip(densities, percents, strict=True)
    ]
    small = {"dataset": "cifar10", "model": "resnet-20", "widen": 1.0}
    found.append(Figure("ResNet-20, dense", {**small, "method": "dense"}))
    for distribution in ("erk", "uniform"):
        masked = {**small, "method": "random", "distribution": distribution, "density": 0.2}
        found.append(Figure(f"ResNet-20, random masks, {distribution}, 20 % kept", masked))
    return tuple(found)


# By method, of compressions 10^0, 10^0.5, ... 10^3; in percent.
_SYNFLOW = {
    "vgg-16": {
        "random": (93.5, 93.1, 91.1, 87.5, 79.1, 49.1, 10.0),
        "magnitude": (93.5, 93.3, 93.1, 92.0, 89.8, 10.0, 10.0),
        "snip": (93.5, 93.3, 92.3, 91.1, 89.1, 84.6, 76.3),
        "grasp": (93.4, 93.1, 91.8, 90.2, 87.5, 82.7, 70.9),
        "synflow": (93.5, 93.5, 93.3, 92.1, 90.1, 86.8, 80.4),
    },
    "resnet-18": {
        "random": (95.1, 94.4, 92.9, 89.6, 83.0, 58.5, 13.5),
        "magnitude": (94.9, 94.9, 94.4, 10.0, 10.0, 10.0, 10.0),
        "snip": (94.9, 94.8, 94.3, 93.2, 90.8, 86.0, 78.6),
        "grasp": (95.0, 94.4, 93.8, 92.1, 89.7, 84.6, 71.4),
        "synflow": (94.8, 94.8, 94.1, 92.7, 90.4, 86.1, 79.9),
    },
}


def _before_training() -> tuple[Figure, ...]:
    names = {"vgg-16": "VGG-16", "resnet-18": "ResNet-18"}
    ranked = {"distribution": "global", "rounds": 0, "minimum": 0}
    return tuple(
        Figure(
            f"{names[model]}, {method}, {100 * density:.3g} % kept",
            {**_CIFAR, "model": model, "method": method, "density": density, **ranked},
            *(percent / 100, None, _TANAKA),
        )
        for model, methods in _SYNFLOW.items()
        for method, percents in methods.items()
        for density, percent in zip((round(10 ** (-i / 2), 6) for i in range(7)), percents, strict=True)
    )


def _tickets() -> tuple[Figure, ...]:
    published = {"sweep": "none", "criterion": "large_final", "kept": "rewind", "unit": "weight", "transfer_to": None}
    lenet = {**published, "model": "lenet-300-100", "dataset": "mnist", "scope": "layer", "fraction": 0.2}
    lenet |= {"density": None, "rewind_step": 0}
    networks = {"ticket": "the ticket", "reinit": "its masks on other weights", "random": "random masks"}
    full = {**lenet, "network": "ticket", "round": 0}
    found = [Figure("LeNet-300-100, all weights", full, headline=True, kind="ticket")]
    for network, what in networks.items():
        settings = {**lenet, "network": network, "round": 7}
        shown = network == "ticket"
        found.append(Figure(f"LeNet-300-100, {what}, 21.1 % kept", settings, headline=shown, kind="ticket"))
    names = {**_CONVS, "resnet-20": "ResNet-20", "vgg-16": "VGG-16"}
    for model in ("conv2", "conv4", "conv6", "resnet-20", "vgg-16"):
        settings = {**published, "model": model, "dataset": "cifar10"}
        full = {**settings, "network": "ticket", "round": 0}
        found.append(Figure(f"{names[model]}, all weights", full, kind="ticket"))
        found += [
            Figure(f"{names[model]}, {what}, last round", {**settings, "network": network, "last": True}, kind="ticket")
            for network, what in networks.items()
        ]
    return tuple(found)


def _many_tasks() -> tuple[Figure, ...]:
    shared = {"dataset": "mnist", "method": "threshold", "width": 300, "depth": 2, "outputs": 100, "epochs": 1}
    settings = {**shared, "tasks": 5, **tasks.RECIPES[tasks.PUBLISHED, "threshold"]}
    del settings["temperature"]  # of the inference of tasks
    ours = {**shared, "tasks": 100, **tasks.RECIPES[tasks.BEST, "threshold"]}
    return (
        Figure(
            "Permuted MNIST, 5 tasks in one network, the published settings",
            settings,
            0.92368,
            1,
            _WORTSMAN,
            True,
            "tasks",
        ),
        Figure("Permuted MNIST, 100 tasks in one network, our settings", ours, headline=True, kind="tasks"),
    )


EXPERIMENTS = (
    Experiment(
        "edge-popup",
        "Edge-popup (Ramanujan et al. 2020)",
        "The weights are random and never trained. The paper has curves only; accuracy at 10 % is what the quoted "
        "authors give for it.",
        _edge_popup(),
    ),
    Experiment(
        "bernoulli",
        "Bernoulli supermasks (Zhou et al. 2019)",
        "The published figures are the best of several variants; the source does not say of which. Ours rescale the "
        "masks, on signed weights. Accuracy is the mean over drawn masks.",
        _bernoulli(),
    ),
    Experiment(
        "tickets",
        "Lottery tickets (Frankle & Carbin 2019; Frankle et al. 2020)",
        "The papers have curves. The first claims that tickets of more than 10 to 20 % of the weights learn faster "
        "than the full network, and reach a higher accuracy. Accuracy is at early stopping.",
        _tickets(),
    ),
    Experiment(
        "random-pruning",
        "Random pruning, and masks that change (Liu et al. 2022; Evci et al. 2020)",
        "The published figures of ResNet-20 are curves.",
        _random(),
    ),
    Experiment(
        "before-training",
        "Pruning before training (Tanaka et al. 2020)",
        "All layers are ranked together. An accuracy of 10 % is chance: a layer collapsed.",
        _before_training(),
    ),
    Experiment(
        "many-tasks",
        "Many tasks, one network (Wortsman et al. 2020)",
        "Permuted MNIST, threshold masks of one random network, 784-300-300-100; the mean over the tasks.",
        _many_tasks(),
    ),
)
