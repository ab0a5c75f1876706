"""The cells of `experiments.random_pruning`: random masks by density, layer densities, width and depth."""

from collections.abc import Mapping, Sequence
from typing import Any

from experiments.config.sized import Size
from experiments.sweeps.cells import Cell, cell

# Liu et al. 2022: ResNets on CIFAR-10, dense and sparse; the rate drops after 80 and 120 of 160 epochs.
PUBLISHED = {"schedule": "steps", "drop_at": (0.5, 0.75), "weight_decay": 5e-4}


def by_distribution(
    size: Size,
    distributions: Sequence[str],
    methods: Sequence[str],
    densities: Sequence[float],
    seeds: int,
    settings: Mapping[str, Any],
) -> list[Cell]:
    """Returns the cells of one network: dense, and at each density under random masks and under those of methods.

    Args:
      size: the network.
      distributions: of random masks.
      methods: what random masks are compared with.
      densities: fractions kept, in (0, 1).
      seeds: the number of repetitions.
      settings: what all cells share beside the network, by flat name.
    """
    cells = _cells("distribution", "dense", "dense", 1.0, size, seeds, settings)
    for density in sorted(set(densities), reverse=True):
        for distribution in dict.fromkeys(distributions):
            more = {**settings, "distribution": distribution}
            cells += _cells("distribution", f"random, {distribution}", "random", density, size, seeds, more)
        for method in dict.fromkeys(methods):
            cells += _cells("distribution", method, method, density, size, seeds, settings)
    return cells


def by_size(
    sizes: Sequence[Size],
    distributions: Sequence[str],
    densities: Sequence[float],
    seeds: int,
    settings: Mapping[str, Any],
) -> list[Cell]:
    """Returns the cells of every network: dense, and under random masks at each density.

    Args:
      sizes: the networks.
      distributions, densities, seeds, settings: as in `by_distribution`.
    """
    cells = []
    for size in sorted(set(sizes), key=lambda size: (size.depth, size.width)):
        cells += _cells("size", "dense", "dense", 1.0, size, seeds, settings)
        for distribution in dict.fromkeys(distributions):
            for density in sorted(set(densities), reverse=True):
                name, more = f"random, {distribution}, {100 * density:g}% kept", {"distribution": distribution}
                cells += _cells("size", name, "random", density, size, seeds, {**settings, **more})
    return cells


def _cells(
    part: str, name: str, method: str, density: float, size: Size, seeds: int, settings: Mapping[str, Any]
) -> list[Cell]:
    """One cell for each seed."""
    labels = {"part": part, "name": name, "asked": density, "width": size.width, "depth": size.depth}
    of_cell = {**settings, **size.settings(), "density": density}
    return [cell(labels, method, **of_cell, seed=seed) for seed in range(seeds)]
