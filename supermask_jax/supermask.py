"""A network as weights and scores, and the mask functions that turn scores into masks."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from supermask_jax.densities import exact
from supermask_jax.initializers import FanIn, flax_fan_in, symmetric_uniform
from supermask_jax.selection import layerwise_masks, straight_through
from supermask_jax.trees import Tree, Where, apply_masks, is_kernel, leaf_key, map_with_name, prunable

Params = Tree
Scores = Tree
Masks = Tree
Key = jax.Array
MaskFn = Callable[[Scores, Key | None], Masks]
"""Pure: masks from scores. key None asks for the deterministic mask, the one to evaluate."""


class Subnet(NamedTuple):
    """Every parameter of a network, and what its masks are computed from. Both are pytrees."""

    weights: Params
    scores: Scores  # like weights, None at leaves that are not prunable; higher = kept


def subnetwork(mask_fn: MaskFn, subnet: Subnet, key: Key | None = None) -> Params:
    """The parameters weights * masks, to be given to the model. Leaves that are not prunable pass as they are."""
    return apply_masks(subnet.weights, mask_fn(subnet.scores, key))


def identity(scores: Scores, key: Key | None = None) -> Masks:
    """The mask function of fixed masks: the scores are the masks. With all scores None it is dense training."""
    return scores


def edge_popup(density: float | Mapping[str, float]) -> MaskFn:
    """Mask function that keeps, in each layer, the `keep_count(density, size)` scores of largest magnitude.

    The gradient is straight-through: dL/ds = w * dL/d(w * m) * sign(s), for weights that are now pruned as well.

    Args:
      density: fraction kept, in [0, 1]; one for all layers, or {path: fraction} naming each prunable leaf.

    Raises:
      ValueError: a density is out of range; when the masks are made, also a path that does not match, and NaN scores
        (not under jit, where values are not known: there NaN ranks highest).

    Source: Ramanujan et al. 2020, section 3 and its released code (which ranks magnitudes; the paper, signed scores).
    """
    for value in density.values() if isinstance(density, Mapping) else [density]:
        exact(value)  # raises here, not at the first step

    def mask_fn(scores: Scores, key: Key | None = None) -> Masks:
        return straight_through(jax.tree.map(_magnitude, scores), lambda ranked: layerwise_masks(ranked, density))

    return mask_fn


@jax.custom_jvp
def _magnitude(score: jax.Array) -> jax.Array:
    return jnp.abs(score)


@_magnitude.defjvp
def _magnitude_jvp(scores, tangents):
    """sign(s), which is 0 at 0, as published; the derivative of jnp.abs is 1 there."""
    return jnp.abs(scores[0]), tangents[0] * jnp.sign(scores[0])


def init_scores(key: Key, weights: Params, where: Where = is_kernel, fan_in: FanIn = flax_fan_in) -> Scores:
    """Scores from U(-1/sqrt(fan_in), 1/sqrt(fan_in)) at the prunable leaves, None elsewhere.

    Args:
      key: a `jax.random.key`, not the one the weights were drawn with: a leaf's draw depends on the key and the
        leaf's path alone, and from one key a weight and its score would be drawn from the same bits.
      weights: tree whose shapes and dtypes the scores take.
      where: (path, leaf) -> whether the leaf is prunable.
      fan_in: (path, shape) -> the leaf's fan-in; for Equinox or PyTorch layouts, `equinox_fan_in`.

    Raises:
      ValueError: `where` chooses no leaf.
      TypeError: it chooses a leaf that is not of floats.

    Source: the released code of Ramanujan et al. 2020 (kaiming_uniform with a = sqrt(5)).
    """
    shapes = prunable(weights, where)

    def draw(path: str, leaf: jax.Array) -> Any:
        if path not in shapes:
            return None
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(f"only floats are prunable; {path!r} has {leaf.dtype}")
        bound = 1 / math.sqrt(fan_in(path, leaf.shape))
        return symmetric_uniform(leaf_key(key, path), leaf.shape, bound).astype(leaf.dtype)

    return map_with_name(draw, weights)
