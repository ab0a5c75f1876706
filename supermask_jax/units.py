"""Whole output units: a dense layer's neurons, a convolution's channels."""

import jax
import jax.numpy as jnp

from supermask_jax.leaves import Layout, leaf_of
from supermask_jax.trees import Tree, by_path, map_with_name, per_path


def unit_scores(scores: Tree, within: Tree | None = None, *, layout: Layout | None = None) -> Tree:
    """Returns the mean score of each output unit's weights, for structured pruning: [..., out] -> [1, ..., 1, out].

    A unit is a dense layer's neuron or a convolution's output channel: an entry of the "out" axes, in each layer of a
    stack. Masks of units broadcast over the kernel.

    Args:
      scores: tree of floats, None at leaves that are not prunable.
      within: masks; the mean is over the weights that they keep, and 0 for a unit of which they keep none. None means
        all.
      layout: what tells the axes. None means the names: of a leaf called weight, which is Equinox's, the first axis is
        "out", of others the last.

    Returns:
      A tree like `scores`, of float32, with the length 1 along every axis that is summed.

    Raises:
      ValueError: paths of `within` that do not match.
    """
    leaves = by_path(scores)
    allowed = per_path(by_path(within), leaves) if within is not None else {}

    def mean(path: str, score: jax.Array) -> jax.Array:
        kept = allowed[path] != 0 if path in allowed else jnp.ones(score.shape, bool)
        over = {"axis": within_units(path, score.shape, layout), "keepdims": True, "dtype": jnp.float32}
        return jnp.sum(score, where=kept, **over) / jnp.maximum(jnp.sum(kept, **over), 1)

    return map_with_name(mean, scores)


def unit_masks(masks: Tree, *, layout: Layout | None = None) -> Tree:
    """Returns 1 for each output unit of which a mask keeps any weight, else 0: [..., out] -> [1, ..., 1, out].

    Args:
      masks: tree of 0 or 1, None at leaves that are not prunable.
      layout: what tells which axes are "out". None means the names: of a leaf called weight, the first axis, of others
        the last.

    Returns:
      A tree like `masks`, in their dtypes.
    """

    def of_units(path: str, mask: jax.Array) -> jax.Array:
        return jnp.max(mask, axis=within_units(path, mask.shape, layout), keepdims=True)

    return map_with_name(of_units, masks)


def within_units(path: str, shape: tuple[int, ...], layout: Layout | None = None) -> tuple[int, ...]:
    """Returns the axes of a kernel along which the weights of one output unit lie: its window and its "in" axes.

    Where nothing tells the axes, the last one is "out".
    """
    leaf = leaf_of(path, shape, layout)
    if leaf is None:
        return tuple(range(len(shape) - 1))
    return leaf.at("window", "in")
