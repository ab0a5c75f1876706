"""The cells of `experiments.compare`: every method at every density, with every seed."""

from collections.abc import Mapping, Sequence
from typing import Any

from experiments.config.registry import METHODS
from experiments.sweeps.cells import Cell, cell

# On a validation set better than edge-popup's recipe at low densities, and no worse at a half.
BY_LAYER = {"distribution": "erk", "scale_weights": True}


def grid(methods: Sequence[str], densities: Sequence[float], seeds: int, settings: Mapping[str, Any]) -> list[Cell]:
    """Returns the cells, labelled with "method" and "asked", the requested density.

    A method that takes no density has one cell for each seed, and the density 1. edge-popup is compared twice: with
    layer densities by erk and scaled weights, and by its recipe.

    Args:
      methods: names of methods.
      densities: fractions kept, in (0, 1).
      seeds: the number of repetitions.
      settings: what all cells share, by flat name.
    """
    variants: dict[str, tuple[str, dict]] = {method: (method, {}) for method in dict.fromkeys(methods)}
    if "edge-popup" in variants:
        variants |= {"edge-popup": ("edge-popup", BY_LAYER), "edge-popup, uniform": ("edge-popup", {})}
    return [
        cell({"method": name, "asked": density}, method, **{**settings, **more, "density": density, "seed": seed})
        for name, (method, more) in variants.items()
        for density in ([1.0] if METHODS[method].free_density else sorted(set(densities), reverse=True))
        for seed in range(seeds)
    ]
