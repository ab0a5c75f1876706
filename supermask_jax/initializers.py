"""Random weights that a seed regenerates on every machine: one draw and one scale for each leaf.

Each initializer takes a key and the weights, and draws the chosen leaves anew (by default the kernels); the other
leaves come back unchanged. A leaf's draw depends only on its path and the key. `recipe` says what an initializer draws,
and `redraw` draws it; the numbers themselves come from `supermask_jax.draws`.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from supermask_jax.densities import exact
from supermask_jax.draws import DRAWS
from supermask_jax.draws import standard_normal as standard_normal  # public here, too
from supermask_jax.draws import symmetric_uniform as symmetric_uniform
from supermask_jax.leaves import FanIn, FanOut
from supermask_jax.names import gate_stack, is_gate
from supermask_jax.trees import (
    Tree,
    Where,
    by_path,
    fan_in_of,
    fan_out_of,
    is_kernel,
    layer_name,
    layout_of,
    leaf_key,
    map_with_name,
    per_layer,
    prunable_floats,
    stacks_of,
)

Density = float | Mapping[str, float] | None
Recipe = Mapping[str, tuple[str, np.float32]]
"""{path: (name of a draw, scale)} of the leaves that are drawn; the names are those of `supermask_jax.draws.DRAWS`."""


def signed_constant(
    key: jax.Array,
    weights: Tree,
    density: Density = None,
    where: Where = is_kernel,
    fan_in: FanIn | None = None,
) -> Tree:
    """Returns weights of one magnitude per layer, sqrt(2 / fan_in), and random sign.

    Zhou et al. 2019 use another magnitude: see `signed_deviation`.

    Args:
      key: a `jax.random.key`, not the one the scores are drawn with.
      weights: tree whose shapes and dtypes are kept.
      density: None, or the fraction that will be kept, in (0, 1]: one for all leaves, or {path: fraction}. The weights
        are then scaled by sqrt(1 / density).
      where: (path, leaf) -> whether the leaf is drawn anew; or the `Layout` of the network.
      fan_in: (path, shape) -> the leaf's fan-in. None: as the layout says; without one, as the names do.

    Raises:
      ValueError: `where` chooses no leaf; nothing tells a leaf's fan-in; a density is outside (0, 1]; the densities
        are not of the chosen paths, or the layers of a stack have several.
      TypeError: `where` chooses a leaf that is not of floats.

    Source: Ramanujan et al. 2020, section 4 ("signed Kaiming constant") and section 3.1 (scaling). The released code
    scales by sqrt(1 / (1 - density)); that agrees with the paper at 0.5.
    """
    return redraw(key, weights, recipe("signed_constant", weights, density, where, fan_in))


def unsigned_constant(
    key: jax.Array,
    weights: Tree,
    density: Density = None,
    where: Where = is_kernel,
    fan_in: FanIn | None = None,
) -> Tree:
    """Returns weights all equal to sqrt(2 / fan_in); nothing is random.

    Args:
      key: a `jax.random.key`, which does not matter; all initializers take one.
      weights: tree whose shapes and dtypes are kept.
      density: None, or the fraction that will be kept, in (0, 1]: one for all leaves, or {path: fraction}. The weights
        are then scaled by sqrt(1 / density).
      where: (path, leaf) -> whether the leaf is drawn anew; or the `Layout` of the network.
      fan_in: (path, shape) -> the leaf's fan-in. None: as the layout says; without one, as the names do.

    Raises:
      ValueError: `where` chooses no leaf; nothing tells a leaf's fan-in; a density is outside (0, 1]; the densities
        are not of the chosen paths, or the layers of a stack have several.
      TypeError: `where` chooses a leaf that is not of floats.

    Source: the released code of Ramanujan et al. 2020 (unsigned_constant); section 3.1 of the paper (scaling).
    """
    return redraw(key, weights, recipe("unsigned_constant", weights, density, where, fan_in))


def kaiming_normal(
    key: jax.Array,
    weights: Tree,
    density: Density = None,
    where: Where = is_kernel,
    fan_in: FanIn | None = None,
) -> Tree:
    """Returns weights from N(0, 2 / fan_in).

    Args:
      key: a `jax.random.key`, not the one the scores are drawn with. It must be concrete: the normals are
        drawn on the host.
      weights: tree whose shapes and dtypes are kept.
      density: None, or the fraction that will be kept, in (0, 1]: one for all leaves, or {path: fraction}. The weights
        are then scaled by sqrt(1 / density).
      where: (path, leaf) -> whether the leaf is drawn anew; or the `Layout` of the network.
      fan_in: (path, shape) -> the leaf's fan-in. None: as the layout says; without one, as the names do.

    Raises:
      ValueError: `where` chooses no leaf; nothing tells a leaf's fan-in; a density is outside (0, 1]; the densities
        are not of the chosen paths, or the layers of a stack have several.
      TypeError: `where` chooses a leaf that is not of floats.

    Source: He et al. 2015, equation 10, for ReLU; the scaling by the density, Ramanujan et al. 2020, section 3.1.
    """
    return redraw(key, weights, recipe("kaiming_normal", weights, density, where, fan_in))


def glorot_normal(
    key: jax.Array,
    weights: Tree,
    density: Density = None,
    where: Where = is_kernel,
    fan_in: FanIn | None = None,
    fan_out: FanOut | None = None,
) -> Tree:
    """Returns weights from N(0, 2 / (fan_in + fan_out)).

    Args:
      key: a `jax.random.key`, not the one the scores are drawn with. It must be concrete: the normals are
        drawn on the host.
      weights: tree whose shapes and dtypes are kept.
      density: None, or the fraction that will be kept, in (0, 1]: one for all leaves, or {path: fraction}. The weights
        are then scaled by sqrt(1 / density).
      where: (path, leaf) -> whether the leaf is drawn anew; or the `Layout` of the network.
      fan_in: (path, shape) -> the leaf's fan-in. None: as the layout says; without one, as the names do.
      fan_out: (path, shape) -> the leaf's fan-out. None: as the layout says; without one, as the names do.

    Raises:
      ValueError: `where` chooses no leaf; nothing tells a leaf's fan-in; a density is outside (0, 1]; the densities
        are not of the chosen paths, or the layers of a stack have several.
      TypeError: `where` chooses a leaf that is not of floats.

    Source: Glorot and Bengio 2010, equation 12 (the variance). Keras's, which Zhou et al. 2019 draw from, cuts the
    normal's tails off at two deviations and widens the rest to this variance; here the tails stay.
    """
    return redraw(key, weights, recipe("glorot_normal", weights, density, where, fan_in, fan_out))


def kaiming_uniform(
    key: jax.Array,
    weights: Tree,
    density: Density = None,
    where: Where = is_kernel,
    fan_in: FanIn | None = None,
) -> Tree:
    """Returns weights from U(-b, b), b = sqrt(6 / fan_in), whose variance is 2 / fan_in.

    Args:
      key: a `jax.random.key`, not the one the scores are drawn with.
      weights: tree whose shapes and dtypes are kept.
      density: None, or the fraction that will be kept, in (0, 1]: one for all leaves, or {path: fraction}. The weights
        are then scaled by sqrt(1 / density).
      where: (path, leaf) -> whether the leaf is drawn anew; or the `Layout` of the network.
      fan_in: (path, shape) -> the leaf's fan-in. None: as the layout says; without one, as the names do.

    Raises:
      ValueError: `where` chooses no leaf; nothing tells a leaf's fan-in; a density is outside (0, 1]; the densities
        are not of the chosen paths, or the layers of a stack have several.
      TypeError: `where` chooses a leaf that is not of floats.

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
      where: (path, leaf) -> whether the leaf is replaced; or the `Layout` of the network. The deviation is of the whole
        leaf, also where it stacks layers.

    Raises:
      ValueError: `where` chooses no leaf.
      TypeError: `where` chooses a leaf that is not of floats.

    Source: Zhou et al. 2019, section 5, and its released code (make_signed_consts).
    """
    chosen = prunable_floats(weights, where)

    def replace(path: str, leaf: jax.Array) -> jax.Array:
        if path not in chosen:
            return leaf
        values = np.asarray(leaf, np.float64)
        return jnp.asarray(np.sign(values).astype(np.float32) * np.float32(values.std())).astype(leaf.dtype)

    return map_with_name(replace, weights)


def open_gates(weights: Tree, value: float = 1.0, where: Where | None = None) -> Tree:
    """Returns the weights with `value` in place of every scale or gate that is all 0. Each layer of a stack is looked
    at by itself.

    Networks often start with such leaves, as the last normalisation of a residual block, and let them learn. Frozen,
    they keep their branch dead: its scores never move.

    Args:
      weights: tree of concrete arrays (not under jit).
      value: what such leaves are set to.
      where: (path, leaf) -> whether the data is multiplied by the leaf, entry by entry. None: the name says so: scale,
        gamma, gain, gate, alpha and the like, and the weight of a normalisation. A `Layout` that was read from the
        network knows better: a scale that the network adds to 1, or puts through a sigmoid, is no gate.
    """
    layout = layout_of(where)

    def open_one(path: str, leaf: jax.Array) -> jax.Array:
        gate = layout.leaf(path, jnp.shape(leaf)).gate if layout is not None else (where or is_gate)(path, leaf)
        if not gate:
            return leaf
        leaf = jnp.asarray(leaf)
        stack = gate_stack(leaf.shape)
        within = tuple(axis for axis in range(leaf.ndim) if axis not in stack)
        closed = ~np.any(np.asarray(leaf), axis=within, keepdims=True)
        return jnp.where(jnp.asarray(closed), jnp.full_like(leaf, value), leaf)

    return map_with_name(open_one, weights)


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
    fan_in: FanIn | None = None,
    fan_out: FanOut | None = None,
) -> Recipe:
    """Returns what an initializer draws: {path: (draw, scale)}. With the key it is all that the weights come from.

    Args:
      name: of an initializer of this module: "signed_constant".
      weights: tree whose shapes count. For "signed_deviation", the weights that it made: the scale is their magnitude.
      density: None, or the fraction that will be kept, in (0, 1]: one for all leaves, or {path: fraction}. The weights
        are then scaled by sqrt(1 / density).
      where: (path, leaf) -> whether the leaf is drawn; or the `Layout` of the network.
      fan_in: (path, shape) -> the leaf's fan-in. None: as the layout says; without one, as the names do.
      fan_out: (path, shape) -> the leaf's fan-out, for "glorot_normal".

    Raises:
      ValueError: there is no such initializer; `where` chooses no leaf; nothing tells a leaf's fan-in; a density is
        outside (0, 1] or names a path that does not exist, or the layers of a stack have several.
      TypeError: `where` chooses a leaf that is not of floats.
    """
    if name not in INITIALIZERS:
        raise ValueError(f"there is no initializer {name!r}; there are: {', '.join(INITIALIZERS)}")
    shapes = prunable_floats(weights, where)
    if name == "signed_deviation":
        leaves = by_path(weights)
        return {path: ("sign", np.abs(np.asarray(leaves[path], np.float32)).max(initial=0)) for path in shapes}
    densities = _of_leaves(1.0 if density is None else density, weights, shapes, where)
    inputs, outputs = fan_in_of(fan_in, where), fan_out_of(fan_out, where)
    scales = {}
    for path, shape in shapes.items():
        if exact(densities[path]) == 0:
            raise ValueError(f"cannot scale the weights of {path!r} for a density of 0")
        fan = inputs(path, shape) + (outputs(path, shape) if name == "glorot_normal" else 0)
        fan = fan or 1  # of a leaf without entries
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


def _of_leaves(density: Any, weights: Tree, shapes: Iterable[str], where: Where) -> dict[str, float]:
    """{path: density}; the layers of a stack, which are drawn as one, have the same."""
    stacks = stacks_of(map_with_name(lambda path, leaf: leaf if path in shapes else None, weights), layout_of(where))
    densities, of_leaf = per_layer(density, stacks), {}
    for path, stack in stacks.items():
        layers = [layer_name(path, index) for index in np.ndindex(*stack)]
        several = {name: densities[name] for name in layers}
        if len({exact(part) for part in several.values()}) > 1:
            raise ValueError(f"the layers of {path!r} are scaled as one and have several densities: {several}")
        of_leaf[path] = next(iter(several.values()), 1.0)
    return of_leaf
