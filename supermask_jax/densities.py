"""How many weights a density keeps, and how a density is divided among layers. Exact arithmetic on the host; no JAX.

`random_masks` takes the layer densities. `shapes` is the `Layout` of the network, which `describe` makes; or
{path: shape} of the prunable leaves, in Flax's layouts: (height, width, in, out) and (in, out). Of Equinox's and
PyTorch's layouts, only a `Layout` knows. Each layer of a stack is a layer of its own; as they have one shape, they have
one density.
"""

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from supermask_jax.leaves import Leaf, flax_leaf

Shapes = Mapping[str, tuple[int, ...]] | Mapping[str, Leaf] | Mapping[str, tuple[int, ...] | Leaf]

UNIFORM_PLUS_LAST = Fraction(1, 5)  # the density below which uniform_plus does not let the last layer fall


def keep_count(density: float | Fraction, n: int) -> int:
    """Returns the number of weights kept of `n` at `density`: ceil(density * n), exactly.

    The density is read as the decimal that is written: 0.1 is one tenth, not the binary float next to it, so that 0.1
    of 30 is 3. This is the only place where a density becomes a count.

    Args:
      density: fraction kept, in [0, 1]; a number or a fractions.Fraction.
      n: number of weights, >= 0.

    Raises:
      ValueError: density is not a number in [0, 1], or n is not a whole number >= 0.

    Published codes count differently: hidden-networks keeps n - int((1 - k) * n), which equals ceil(k * n) up to
    floating-point errors.
    """
    if int(n) != n or n < 0:
        raise ValueError(f"the number of weights must be a whole number >= 0, got {n}")
    return math.ceil(exact(density) * int(n))


def exact(density: Any) -> Fraction:
    """Returns the density as the exact fraction of its decimal form.

    Args:
      density: a number in [0, 1] (Python, NumPy or JAX) or a fractions.Fraction.

    Raises:
      ValueError: it is not a number in [0, 1].
    """
    try:
        value = Fraction(str(density))  # str gives the shortest decimal, also of NumPy and JAX scalars
    except (ValueError, ZeroDivisionError):
        value = Fraction(-1)
    if not 0 <= value <= 1:
        raise ValueError(f"density must be a number in [0, 1] (the fraction kept), got {density!r}")
    return value


def uniform(shapes: Shapes, density: float) -> dict[str, float]:
    """Returns {path: fraction kept} with the same fraction in every layer.

    Args:
      shapes: the `Layout` of the network; or {path: shape} of the layers, (window, in, out) as Flax has them.
      density: fraction kept, in [0, 1].

    Raises:
      ValueError: a density outside [0, 1], no layer, or a layer without weights.
    """
    return dict.fromkeys(_sizes(shapes), float(exact(density)))


def uniform_plus(shapes: Shapes, density: float, first: str, last: str) -> dict[str, float]:
    """Returns {path: fraction kept}: the first layer dense, the last at 1/5 or more, one fraction in the others.

    Of N weights, at a density below 1/5, the last layer keeps 1/5 and the others keep
    (density * N - size of first - size of last / 5) / N. From 1/5 on, every layer but the first keeps `density`.
    The density of all layers together, `overall`, is therefore near `density` but not equal to it: a little below it in
    the first case; above it in the second, by more the larger the first layer is.

    Args:
      shapes: the `Layout` of the network; or {path: shape} of the layers, (window, in, out) as Flax has them.
      density: fraction kept, in [0, 1], of all layers together, about.
      first: the path of the layer that reads the input.
      last: the path of the layer that makes the logits.

    Raises:
      ValueError: the first and the last layer together keep more than the density (the message names the lowest
        feasible one), they are the same layer, a path does not exist, or a density is out of range.

    Source: Liu et al. 2022, section 3 (uniform+), and its released code, which has the same formulas. At infeasible
    densities that code prunes the other layers whole and silently; this raises. First used by Gale et al. 2019.
    """
    sizes, kept = _sizes(shapes), exact(density)
    total = sum(sizes.values())
    _check_path("first", first, shapes)
    _check_path("last", last, shapes)
    if first == last:
        raise ValueError(f"the first and the last layer must be two layers, got {first!r} for both")
    at_last, others = kept, kept
    if kept < UNIFORM_PLUS_LAST:
        ends = sizes[first] + UNIFORM_PLUS_LAST * sizes[last]
        at_last, others = UNIFORM_PLUS_LAST, kept - ends / total
        if others < 0:
            lowest = _rounded_up(min(ends / total, UNIFORM_PLUS_LAST))
            raise ValueError(
                f"{first!r} dense and a fifth of {last!r} keep more than {density} of all weights: "
                f"the density must be at least {lowest}"
            )
    ends_kept = {first: Fraction(1), last: at_last}
    return {path: float(ends_kept.get(path, others)) for path in sizes}


def er(shapes: Shapes, density: float) -> dict[str, float]:
    """Returns {path: fraction kept} by Erdos-Renyi: in proportion to (in + out) / (in * out); `overall` is `density`.

    A convolution's window does not count. A layer whose fraction
    would exceed 1 is made dense, and the other layers share what is left.

    Args:
      shapes: the `Layout` of the network; or {path: shape} of the layers, (window, in, out) as Flax has them.
      density: fraction kept of all layers together, in [0, 1].

    Raises:
      ValueError: a density outside [0, 1], no layer, or a layer without weights.

    Source: Mocanu et al. 2018 (SET); for convolutions, and for layers that would exceed 1, the released code of Liu et
    al. 2022.
    """
    layers = _layers(shapes)
    links = {path: number * sum(shape[-2:]) * math.prod(shape[:-2]) for path, (number, shape) in layers.items()}
    return _shared(links, _sizes(shapes), exact(density))


def erk(shapes: Shapes, density: float | Fraction) -> dict[str, float]:
    """Returns {path: fraction kept} by Erdos-Renyi-Kernel: in proportion to the sum of a layer's axes / their product.

    For a convolution that is (height + width + in + out) / (height * width * in * out). `overall` is `density`. A layer
    whose fraction would exceed 1 is made dense, and the other layers share what is left.

    Args:
      shapes: the `Layout` of the network; or {path: shape} of the layers, (window, in, out) as Flax has them.
      density: fraction kept of all layers together, in [0, 1].

    Raises:
      ValueError: a density outside [0, 1], no layer, or a layer without weights.

    Source: Evci et al. 2020 (RigL), section 3, part 1, and its released code.
    """
    links = {path: number * sum(shape) for path, (number, shape) in _layers(shapes).items()}
    return _shared(links, _sizes(shapes), exact(density))


def erk_plus(shapes: Shapes, density: float, last: str, last_density: float = 1.0) -> dict[str, float]:
    """Returns {path: fraction kept}: `last_density` in the last layer, Erdos-Renyi-Kernel densities in the others.

    In the others the fraction is in proportion to the sum of a layer's axes / their product, at most 1. `overall` is
    `density`.

    Args:
      shapes: the `Layout` of the network; or {path: shape} of the layers, (window, in, out) as Flax has them.
      density: fraction kept of all layers together, in [0, 1].
      last: the path of the layer that makes the logits.
      last_density: fraction kept in the last layer, in [0, 1].

    Raises:
      ValueError: the density is infeasible, because the last layer by itself keeps more, or because dense others would
        not reach it (the message says what is feasible); a path does not exist; a density is out of range.

    Source: Liu et al. 2022, section 3 (ERK+), and its released code. At infeasible densities that code prunes the other
    layers whole and silently; this raises.
    """
    sizes, kept, at_last = _sizes(shapes), exact(density), exact(last_density)
    _check_path("last", last, shapes)
    total, others = sum(sizes.values()), {path: shape for path, shape in shapes.items() if path != last}
    left = kept * total - at_last * sizes[last]
    if not 0 <= left <= total - sizes[last]:
        lowest = at_last * sizes[last] / total
        highest = 1 - (1 - at_last) * sizes[last] / total
        raise ValueError(
            f"with {last_density} of {last!r} kept, the density must be at least {_rounded_up(lowest)} and at most "
            f"{round(1 - _rounded_up(1 - highest), 6)}, got {density}"
        )
    shared = erk(others, left / (total - sizes[last])) if others else {}
    return {path: shared.get(path, float(at_last)) for path in sizes}


def overall(shapes: Shapes, densities: Mapping[str, float]) -> float:
    """Returns the fraction kept of all layers together. Masks keep `keep_count` of each layer, up to one weight more.

    Args:
      shapes: the `Layout` of the network; or {path: shape} of the layers, (window, in, out) as Flax has them.
      densities: {path: fraction kept}, naming every layer.

    Raises:
      ValueError: the two name different paths, or a density is out of range.
    """
    sizes = _sizes(shapes)
    if set(densities) != set(sizes):
        raise ValueError(f"densities must name the layers {', '.join(sizes)}; got {', '.join(densities) or '(none)'}")
    return float(sum(exact(densities[path]) * size for path, size in sizes.items()) / sum(sizes.values()))


def _shared(links: dict[str, int], sizes: dict[str, int], density: Fraction) -> dict[str, float]:
    """{path: epsilon * links / size}, at most 1, where epsilon makes the fraction of all weights `density`."""
    rest = set(sizes)
    while True:
        left = density * sum(sizes.values()) - sum(size for path, size in sizes.items() if path not in rest)
        epsilon = left / sum(links[path] for path in rest)
        over = {path for path in rest if epsilon * links[path] > sizes[path]}
        if not over:  # what goes over stays over: epsilon only grows
            return {path: float(epsilon * links[path] / sizes[path]) if path in rest else 1.0 for path in sizes}
        rest -= over


def _sizes(shapes: Shapes) -> dict[str, int]:
    return {path: number * math.prod(shape) for path, (number, shape) in _layers(shapes).items()}


def _layers(shapes: Shapes) -> dict[str, tuple[int, tuple[int, ...]]]:
    """{path: (how many layers the leaf stacks, the shape of each: a window, in, out)}."""
    if not shapes:
        raise ValueError("there is no layer to give a density to")
    layers = {}
    for path, given in shapes.items():
        shape = given.shape if isinstance(given, Leaf) else tuple(int(n) for n in given)
        if not shape or min(shape) < 1:
            raise ValueError(f"{path!r} has the shape {shape}: a layer has an axis, and weights")
        leaf = given if isinstance(given, Leaf) else flax_leaf(path, shape) if len(shape) > 1 else None
        layers[path] = (leaf.size("stack"), leaf.layer_shape) if leaf else (1, shape)
    return layers


def _check_path(what: str, path: str, shapes: Shapes) -> None:
    if path not in shapes:
        raise ValueError(f"{what}={path!r} is not the path of a layer; there are: {', '.join(shapes)}")


def _rounded_up(value: Fraction) -> float:
    """To six decimals, so that a feasible density that a message names is one."""
    return math.ceil(value * 10**6) / 10**6
