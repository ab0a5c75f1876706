"""Random weights that a seed regenerates on every machine: one draw and one scale for each leaf.

Each initializer takes a key and the weights, and draws the chosen leaves anew (by default the kernels); the other
leaves come back unchanged. A leaf's draw depends only on its path and the key. `recipe` says what an initializer draws,
and `redraw` draws it; the numbers themselves come from `supermask_jax.draws`.
"""

import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from supermask_jax.densities import exact
from supermask_jax.draws import DRAWS
from supermask_jax.draws import standard_normal as standard_normal  # public here, too
from supermask_jax.draws import symmetric_uniform as symmetric_uniform
from supermask_jax.trees import Tree, Where, by_path, is_kernel, leaf_key, map_with_name, per_path, prunable

FanIn = Callable[[str, tuple[int, ...]], int]
"""fan_in(path, shape) -> how many inputs each output of the leaf sums."""
FanOut = Callable[[str, tuple[int, ...]], int]
"""fan_out(path, shape) -> how many outputs each input of the leaf goes to."""
Density = float | Mapping[str, float] | None
Recipe = Mapping[str, tuple[str, np.float32]]
"""{path: (name of a draw, scale)} of the leaves that are drawn; the names are those of `supermask_jax.draws.DRAWS`."""

ATTENTION_INPUTS, ATTENTION_OUTPUT = ("query", "key", "value"), "out"


def flax_fan_in(path: str, shape: tuple[int, ...]) -> int:
    """Returns how many inputs each output of a Flax kernel sums: the product of all axes but the last.

    That is right for (in, out), (width, in, out), (height, width, in, out) and attention's output kernel (heads,
    size, out). For attention's query, key and value kernels (in, heads, size) it is the first axis only.

    Args:
      path: the leaf's path: "Conv_0/kernel". Its parent's name tells attention's kernels.
      shape: the leaf's shape.
    """
    return shape[0] if _attention(path, shape) == "in" else math.prod(shape[:-1])


def flax_fan_out(path: str, shape: tuple[int, ...]) -> int:
    """Returns how many outputs each input of a Flax kernel goes to: the product of all axes but the last but one.

    That is right for (in, out), (width, in, out) and (height, width, in, out). For attention's query, key and value
    kernels (in, heads, size) it is heads * size. For attention's output kernel (heads, size, out) it is the last axis
    only; a convolution of one axis looks the same, so the parent's name `out` decides.

    Args:
      path: the leaf's path: "Conv_0/kernel". Its parent's name tells attention's kernels.
      shape: the leaf's shape.
    """
    match _attention(path, shape):
        case "in":
            return math.prod(shape[1:])
        case "out":
            return shape[-1]
    return shape[-1] * math.prod(shape[:-2])


def equinox_fan_in(path: str, shape: tuple[int, ...]) -> int:
    """Returns how many inputs each output of an Equinox or PyTorch weight sums: the product of all axes but the first.

    Args:
      path: the leaf's path, which does not matter.
      shape: (out, in) or (out, in, height, width).
    """
    return math.prod(shape[1:])


def equinox_fan_out(path: str, shape: tuple[int, ...]) -> int:
    """Returns how many outputs each input of an Equinox or PyTorch weight goes to: all axes but the second.

    Args:
      path: the leaf's path, which does not matter.
      shape: (out, in) or (out, in, height, width).
    """
    return shape[0] * math.prod(shape[2:])


def signed_constant(
    key: jax.Array,
    weights: Tree,
    density: Density = None,
    where: Where = is_kernel,
    fan_in: FanIn = flax_fan_in,
) -> Tree:
    """Returns weights of one magnitude per layer, sqrt(2 / fan_in), and random sign.

    Zhou et al. 2019 use another magnitude: see `signed_deviation`.

    Args:
      key: a `jax.random.key`, not the one the scores are drawn with.
      weights: tree whose shapes and dtypes are kept.
      density: None, or the fraction that will be kept, in (0, 1]: one for all leaves, or {path: fraction}. The weights
        are then scaled by sqrt(1 / density).
      where: (path, leaf) -> whether the leaf is drawn anew.
      fan_in: (path, shape) -> the leaf's fan-in; for Equinox or PyTorch layouts, `equinox_fan_in`.

    Raises:
      ValueError: `where` chooses no leaf, or a density is outside (0, 1] or names a path that does not exist.

    Source: Ramanujan et al. 2020, section 4 ("signed Kaiming constant") and section 3.1 (scaling). The released code
    scales by sqrt(1 / (1 - density)); that agrees with the paper at 0.5.
    """
    return redraw(key, weights, recipe("signed_constant", weights, density, where, fan_in))


def unsigned_constant(
    key: jax.Array,
    weights: Tree,
    density: Density = None,
    where: Where = is_kernel,
    fan_in: FanIn = flax_fan_in,
) -> Tree:
    """Returns weights all equal to sqrt(2 / fan_in); nothing is random.

    Args:
      key: a `jax.random.key`, which does not matter; all initializers take one.
      weights: tree whose shapes and dtypes are kept.
      density: None, or the fraction that will be kept, in (0, 1]: one for all leaves, or {path: fraction}. The weights
        are then scaled by sqrt(1 / density).
      where: (path, leaf) -> whether the leaf is drawn anew.
      fan_in: (path, shape) -> the leaf's fan-in; for Equinox or PyTorch layouts, `equinox_fan_in`.

    Raises:
      ValueError: `where` chooses no leaf, or a density is outside (0, 1] or names a path that does not exist.

    Source: the released code of Ramanujan et al. 2020 (unsigned_constant); section 3.1 of the paper (scaling).
    """
    return redraw(key, weights, recipe("unsigned_constant", weights, density, where, fan_in))


def kaiming_normal(
    key: jax.Array,
    weights: Tree,
    density: Density = None,
    where: Where = is_kernel,
    fan_in: FanIn = flax_fan_in,
) -> Tree:
    """Returns weights from N(0, 2 / fan_in).

    Args:
      key: a `jax.random.key`, not the one the scores are drawn with. It must be concrete (not under jit).
      weights: tree whose shapes and dtypes are kept.
      density: None, or the fraction that will be kept, in (0, 1]: one for all leaves, or {path: fraction}. The weights
        are then scaled by sqrt(1 / density).
      where: (path, leaf) -> whether the leaf is drawn anew.
      fan_in: (path, shape) -> the leaf's fan-in; for Equinox or PyTorch layouts, `equinox_fan_in`.

    Raises:
      ValueError: `where` chooses no leaf, or a density is outside (0, 1] or names a path that does not exist.

    Source: He et al. 2015, equation 10, for ReLU; the scaling by the density, Ramanujan et al. 2020, section 3.1.
    """
    return redraw(key, weights, recipe("kaiming_normal", weights, density, where, fan_in))


def glorot_normal(
    key: jax.Array,
    weights: Tree,
    density: Density = None,
    where: Where = is_kernel,
    fan_in: FanIn = flax_fan_in,
    fan_out: FanOut = flax_fan_out,
) -> Tree:
    """Returns weights from N(0, 2 / (fan_in + fan_out)).

    Args:
      key: a `jax.random.key`, not the one the scores are drawn with. It must be concrete (not under jit).
      weights: tree whose shapes and dtypes are kept.
      density: None, or the fraction that will be kept, in (0, 1]: one for all leaves, or {path: fraction}. The weights
        are then scaled by sqrt(1 / density).
      where: (path, leaf) -> whether the leaf is drawn anew.
      fan_in: (path, shape) -> the leaf's fan-in; for Equinox or PyTorch layouts, `equinox_fan_in`.
      fan_out: (path, shape) -> the leaf's fan-out; for Equinox or PyTorch layouts, `equinox_fan_out`.

    Raises:
      ValueError: `where` chooses no leaf, or a density is outside (0, 1] or names a path that does not exist.

    Source: Glorot and Bengio 2010, equation 12 (the variance). Keras's, which Zhou et al. 2019 draw from, cuts the
    normal's tails off at two deviations and widens the rest to this variance; here the tails stay.
    """
    return redraw(key, weights, recipe("glorot_normal", weights, density, where, fan_in, fan_out))


def kaiming_uniform(
    key: jax.Array,
    weights: Tree,
    density: Density = None,
    where: Where = is_kernel,
    fan_in: FanIn = flax_fan_in,
) -> Tree:
    """Returns weights from U(-b, b), b = sqrt(6 / fan_in), whose variance is 2 / fan_in.

    Args:
      key: a `jax.random.key`, not the one the scores are drawn with.
      weights: tree whose shapes and dtypes are kept.
      density: None, or the fraction that will be kept, in (0, 1]: one for all leaves, or {path: fraction}. The weights
        are then scaled by sqrt(1 / density).
      where: (path, leaf) -> whether the leaf is drawn anew.
      fan_in: (path, shape) -> the leaf's fan-in; for Equinox or PyTorch layouts, `equinox_fan_in`.

    Raises:
      ValueError: `where` chooses no leaf, or a density is outside (0, 1] or names a path that does not exist.

    Source: He et al. 2015, equation 10 (the variance), for ReLU.
    """
    return redraw(key, weights, recipe("kaiming_uniform", weights, density, where, fan_in))


def signed_deviation(weights: Tree, where: Where = is_kernel) -> Tree:
    """Returns each chosen weight's sign times the standard deviation of its leaf; a weight of 0 stays 0.

    This is the second published magnitude of a signed constant. `signed_constant`, of Ramanujan et al., computes it
    from the fan-in and draws the signs. This one, of Zhou et al., takes both from weights that were drawn before
    (there, Glorot normal).

    Args:
      weights: tree of concrete arrays (not under jit). The deviation is that of the population: of n, not of n - 1. It
        is computed in float64 and rounded to float32.
      where: (path, leaf) -> whether the leaf is replaced.

    Raises:
      ValueError: `where` chooses no leaf.

    Source: Zhou et al. 2019, section 5, and its released code (make_signed_consts).
    """
    chosen = prunable(weights, where)

    def replace(path: str, leaf: jax.Array) -> jax.Array:
        if path not in chosen:
            return leaf
        values = np.asarray(leaf, np.float64)
        return jnp.asarray(np.sign(values).astype(np.float32) * np.float32(values.std())).astype(leaf.dtype)

    return map_with_name(replace, weights)


INITIALIZERS: Mapping[str, str] = {
    "signed_constant": "sign",
    "unsigned_constant": "full",
    "kaiming_normal": "normal",
    "glorot_normal": "normal",
    "kaiming_uniform": "uniform",
    "signed_deviation": "sign",
}
"""{name of an initializer: what it draws}."""


def recipe(
    name: str,
    weights: Tree,
    density: Density = None,
    where: Where = is_kernel,
    fan_in: FanIn = flax_fan_in,
    fan_out: FanOut = flax_fan_out,
) -> Recipe:
    """Returns what an initializer draws: {path: (draw, scale)}. With the key it is all that the weights come from.

    Args:
      name: of an initializer of this module: "signed_constant".
      weights: tree whose shapes count. For "signed_deviation", the weights that it made: the scale is their magnitude.
      density: None, or the fraction that will be kept, in (0, 1]: one for all leaves, or {path: fraction}. The weights
        are then scaled by sqrt(1 / density).
      where: (path, leaf) -> whether the leaf is drawn.
      fan_in: (path, shape) -> the leaf's fan-in; for Equinox or PyTorch layouts, `equinox_fan_in`.
      fan_out: (path, shape) -> the leaf's fan-out, for "glorot_normal".

    Raises:
      ValueError: there is no such initializer, `where` chooses no leaf, or a density is outside (0, 1] or names a path
        that does not exist.
    """
    if name not in INITIALIZERS:
        raise ValueError(f"there is no initializer {name!r}; there are: {', '.join(INITIALIZERS)}")
    shapes = prunable(weights, where)
    if name == "signed_deviation":
        leaves = by_path(weights)
        return {path: ("sign", np.abs(np.asarray(leaves[path], np.float32)).max(initial=0)) for path in shapes}
    densities = per_path(1.0 if density is None else density, shapes)
    scales = {}
    for path, shape in shapes.items():
        if exact(densities[path]) == 0:
            raise ValueError(f"cannot scale the weights of {path!r} for a density of 0")
        fan = fan_in(path, shape) + (fan_out(path, shape) if name == "glorot_normal" else 0)
        scales[path] = np.float32(math.sqrt(2.0 / fan / float(densities[path])))
        if name == "kaiming_uniform":  # the bound of a uniform variable is sqrt(3) times its deviation
            scales[path] = np.float32(float(scales[path]) * math.sqrt(3))
    return {path: (INITIALIZERS[name], scale) for path, scale in scales.items()}


def redraw(key: jax.Array, weights: Tree, recipe: Recipe) -> Tree:
    """Returns `weights` with the leaves of a recipe drawn anew, in their dtypes; the other leaves are unchanged.

    Args:
      key: a `jax.random.key`; a leaf is drawn with the key of its path. Concrete, where the recipe has a "normal".
      weights: tree whose shapes and dtypes are kept.
      recipe: {path: (draw, scale)}; see `recipe`.
    """

    def draw(path: str, leaf: jax.Array) -> jax.Array:
        if path not in recipe:
            return leaf
        name, scale = recipe[path]
        return DRAWS[name](leaf_key(key, path), leaf.shape, scale).astype(leaf.dtype)

    return map_with_name(draw, weights)


def _attention(path: str, shape: tuple[int, ...]) -> str | None:
    """Which side of Flax's attention a kernel is on: "in" (in, heads, size) or "out" (heads, size, out); else None."""
    parent = path.split("/")[-2:-1]
    if len(shape) != 3 or not parent:
        return None
    return "in" if parent[0] in ATTENTION_INPUTS else "out" if parent[0] == ATTENTION_OUTPUT else None
