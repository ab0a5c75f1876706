"""The cells of `experiments.random_pruning`: random masks by density, layer densities, width and depth."""

from collections.abc import Mapping, Sequence
from typing import Any

from experiments.sweeps.cells import Cell, cell


def by_distribution(
    distributions: Sequence[str],
    methods: Sequence[str],
    densities: Sequence[float],
    seeds: int,
    settings: Mapping[str, Any],
) -> list[Cell]:
    """Returns the cells of one network: dense, and at each density under random masks and under those of methods.

    Args:
      distributions: of random masks.
      methods: what random masks are compared with.
      densities: fractions kept, in (0, 1).
      seeds: the number of repetitions.
      settings: what all cells share, by flat name; "width" and "depth" among them.
    """
    size = {name: settings[name] for name in ("width", "depth")}
    cells = _cells("distribution", "dense", "dense", 1.0, size, seeds, settings)
    for density in sorted(set(densities), reverse=True):
        for distribution in dict.fromkeys(distributions):
            more = {**settings, "distribution": distribution}
            cells += _cells("distribution", f"random, {distribution}", "random", density, size, seeds, more)
        for method in dict.fromkeys(methods):
            cells += _cells("distribution", method, method, density, size, seeds, settings)
    return cells


def by_size(
    widths: Sequence[int],
    depths: Sequence[int],
    distributions: Sequence[str],
    densities: Sequence[float],
    seeds: int,
    settings: Mapping[str, Any],
) -> list[Cell]:
    """Returns the cells of every width and depth: dense, and under random masks at each density.

    Args:
      widths, depths: of the networks.
      distributions, densities, seeds, settings: as in `by_distribution`.
    """
    cells = []
    for depth in sorted(set(depths)):
        for width in sorted(set(widths)):
            size = {"width": width, "depth": depth}
            cells += _cells("size", "dense", "dense", 1.0, size, seeds, settings)
            for distribution in dict.fromkeys(distributions):
                for density in sorted(set(densities), reverse=True):
                    name, more = f"random, {distribution}, {100 * density:g}% kept", {"distribution": distribution}
                    cells += _cells("size", name, "random", density, size, seeds, {**settings, **more})
    return cells


def _cells(
    part: str, name: str, method: str, density: float, size: dict, seeds: int, settings: Mapping[str, Any]
) -> list[Cell]:
    """One cell for each seed."""
    labels = {"part": part, "name": name, "asked": density, **size}
    return [cell(labels, method, **{**settings, **size, "density": density, "seed": seed}) for seed in range(seeds)]
