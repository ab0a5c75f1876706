"""The cells of `experiments.bits`, and the files of their networks: how large each is, and how accurate."""

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import supermask_jax as sm
from experiments.config.presets import edge_popup_rate
from experiments.config.registry import METHODS, MODELS
from experiments.config.run import named
from experiments.config.sections import Init, Model
from experiments.data.source import Dataset
from experiments.plots.bits import MASKS_ONLY
from experiments.run.display import show_warning
from experiments.run.errors import UserError
from experiments.sweeps import cells
from experiments.sweeps.cells import Cell, cell
from experiments.training.evaluation import Evaluator, Split
from experiments.training.network import network
from supermask_jax import artifact
from supermask_jax.trees import map_with_name

OWN_DTYPE = "float32"  # of trained weights, and so of the file that a run leaves
ACCURACIES = (0.9, 0.95, 0.97, 0.98, 0.985)  # the smallest file that reaches each is shown
SMALL_DEPTH = 2  # hidden layers
FIGURES = ("test_accuracy", "test_loss")  # of a run, in its file
LABELS = ("family", "network", "asked")  # of a cell


def grid(
    methods: Sequence[str],
    densities: Sequence[float],
    distributions: Sequence[str],
    seeds: int,
    settings: Mapping[str, Any],
) -> list[Cell]:
    """Returns the cells of one network, labelled with "family", "network" and "asked", the requested density.

    A method that takes no density has one cell for each seed, and the density 1. A method whose scores learn
    and whose layers have densities is a family for each distribution.

    Args:
      methods: names of methods.
      densities: fractions kept, in (0, 1).
      distributions: how the layers of supermasks share a density.
      seeds: the number of repetitions.
      settings: what all cells share, by flat name; "model" among them.
    """
    families: dict[str, tuple[str, dict]] = {}
    for method in dict.fromkeys(methods):
        if METHODS[method].learns == "scores" and "distribution" in METHODS[method].reads:
            families |= {f"{method}, {name}": (method, {"distribution": name}) for name in dict.fromkeys(distributions)}
        else:
            families[method] = method, {}
    return [
        cell(
            {"family": family, "network": settings["model"], "asked": density},
            method,
            **{
                **settings,
                **more,
                **_recipe(method, settings["model"], density, **more),
                "density": density,
                "seed": seed,
            },
        )
        for family, (method, more) in families.items()
        for density in ([1.0] if METHODS[method].free_density else sorted(set(densities), reverse=True))
        for seed in range(seeds)
    ]


def _recipe(method: str, model: str, density: float, distribution: str = "uniform") -> dict[str, Any]:
    """What differs from the method's best recipe, which was chosen at a half of the weights.

    Each layer's weights are scaled by its own density, which in uniform layers is that of the network.
    """
    if method != "edge-popup":
        return {}
    layers = distribution != "uniform"
    rate = edge_popup_rate(model, density, layers)
    return {"scale_layers" if layers else "scale_weights": True, "learning_rate": rate}


def small(models: Sequence[str], widths: Sequence[int], seeds: int, settings: Mapping[str, Any]) -> list[Cell]:
    """Returns the cells of small dense networks, with the labels of `grid`; a family for each of the models.

    Args:
      models: networks that have a width and a depth.
      widths: units or channels of each of their hidden layers.
      seeds, settings: as in `grid`.
    """
    unread = {name for entry in MODELS.values() for name in entry.reads}  # the options of the large network
    shared = {name: value for name, value in settings.items() if name not in unread}
    return [
        cell(
            {"family": f"dense {model}", "network": f"{model}, width {width}", "asked": 1.0},
            "dense",
            **{**shared, "model": model, "width": width, "depth": SMALL_DEPTH, "seed": seed},
        )
        for model in dict.fromkeys(models)
        for width in sorted(set(widths), reverse=True)
        for seed in range(seeds)
    ]


def files(
    folder: Path, grid: Sequence[Cell], rows: Sequence[dict], dtypes: Sequence[str], dataset: Dataset
) -> list[dict]:
    """Returns a row for each file: that of its cell, with what the file holds, its bytes, and its accuracy.

    A run leaves its network as a file. Trained weights are stored again in each of the other number formats, in
    networks/ of the sweep's directory. Every network is loaded from its file and evaluated on all test images. A file
    that is missing, or cannot be made, is left out, and a printed line says why.

    Args:
      folder: the sweep's directory; the cells lie in cells/ beside it.
      grid: the cells.
      rows: of those cells that are finished.
      dtypes: what trained weights are stored in.
      dataset: with the test images.

    Returns:
      The rows, with "line" (the name in the legend), "stored", "file_bytes", "test_accuracy" and "test_loss" of the
      file, and "trained_accuracy", which the run recorded.

    Raises:
      UserError: the directory cannot be written to.
    """
    of_cell = {(*labels.values(), config.seed): config for labels, config in grid}
    converted, evaluators, made = folder / "networks", {}, []
    try:
        converted.mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {converted} ({error}); name another with --workdir") from error
    for row in rows:
        config = of_cell[(*(row[label] for label in LABELS), row["seed"])]
        name = cells.directory(named(config, dataset.name))
        own = folder.parent / "cells" / name / artifact.FILE
        trained = METHODS[config.masks.method].learns == "weights"
        for stored in dict.fromkeys(dtypes) if trained else (MASKS_ONLY,):
            try:
                file = own
                if stored not in (OWN_DTYPE, MASKS_ONLY):
                    file = _convert(own, converted / f"{name}-{stored}.safetensors", stored)
                figures = _evaluate(file, config.model, dataset, evaluators)
            except (OSError, ValueError) as error:
                show_warning(f"left out: {row['family']}, {row['network']}, seed {row['seed']}, {stored}: {error}")
                continue
            line = f"{row['family']}, {stored}" if trained else row["family"]
            more = {"line": line, "stored": stored, "file_bytes": file.stat().st_size, **figures}
            made.append(row | more | {"trained_accuracy": row["test_accuracy"]})
    return made


def _convert(own: Path, file: Path, dtype: Any) -> Path:
    """Stores a network with its trained weights in another number format; returns the file."""
    weights, masks, state, about = sm.load_subnetwork(own)
    about = {name: value for name, value in about.items() if name not in FIGURES}  # they are of other weights
    if not jax.tree.leaves(masks):  # what no mask is on is not converted: of a dense network, all

        def kept(path, leaf):
            return jnp.ones_like(leaf) if sm.is_kernel(path, leaf) else None

        masks = map_with_name(kept, weights)
    sm.save_subnetwork(file, sm.Subnet(weights, masks), artifact.Stored(dtype), model_state=state, about=about)
    return file


def _evaluate(file: Path, model: Model, dataset: Dataset, evaluators: dict[tuple, Evaluator]) -> dict[str, float]:
    """The "test_loss" and "test_accuracy" of the network in a file; what is compiled for a network is used again."""
    weights, masks, state, about = sm.load_subnetwork(file)
    mean, std = tuple(about["mean"]), tuple(about["std"])
    if (model, mean, std) not in evaluators:
        normalised = dataclasses.replace(dataset, mean=mean, std=std)
        net = network(model, Init(), dataset.classes, dataset.image_shape)
        method = sm.Method("weights", sm.identity, sm.Subnet(weights, masks))
        evaluators[model, mean, std] = Evaluator(method, net, normalised)
    evaluator = evaluators[model, mean, std]
    _, params = evaluator.masked(sm.Subnet(weights, masks))
    return evaluator.figures(params, state, Split("test", dataset.test))


def show(points: Sequence[Mapping[str, Any]], dataset: str) -> None:
    """Prints every point, and for each line the smallest file that reaches an accuracy.

    Args:
      points: as `experiments.plots.bits.points` makes them.
      dataset: its name.
    """
    console = Console(file=sys.stdout)
    table = Table(title=f"files of networks and their test accuracy on {dataset}; *: none is smaller and as accurate")
    table.add_column("network")
    for head in ("kept", "bytes", "accuracy", "*"):
        table.add_column(head, justify="right")
    for point in points:
        what = escape(f"{point['line']} ({point['network']})")
        kept, size = f"{point['density']:.2%}", f"{point['file_bytes']:,.0f}"
        table.add_row(what, kept, size, f"{point['test_accuracy']:.2%}", "*" if point["front"] else "")
    console.print(table)
    table = Table(title="bytes of the smallest file that reaches a test accuracy")
    table.add_column("accuracy")
    for accuracy in ACCURACIES:
        table.add_column(f"{accuracy:.1%}", justify="right")
    for line in dict.fromkeys(point["line"] for point in points):
        table.add_row(escape(line), *(_smallest(points, line, accuracy) for accuracy in ACCURACIES))
    console.print(table)


def _smallest(points: Sequence[Mapping[str, Any]], line: str, accuracy: float) -> str:
    sizes = [p["file_bytes"] for p in points if p["line"] == line and p["test_accuracy"] >= accuracy]
    return f"{min(sizes):,.0f}" if sizes else ""
