"""A network as weights and scores, and the mask functions that turn scores into masks."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from supermask_jax.checks import warn_of_emptied
from supermask_jax.densities import exact
from supermask_jax.draws import symmetric_uniform, unit_uniform
from supermask_jax.leaves import FanIn, Layout, stack_of
from supermask_jax.selection import layerwise_masks, straight_through
from supermask_jax.trees import (
    Tree,
    Where,
    apply_masks,
    fan_in_of,
    is_kernel,
    leaf_key,
    map_with_name,
    prunable_floats,
)

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


ProductFn = Callable[[Subnet, Key | None], Params]
"""Pure: what the model is given, by default weights * masks. key None asks for the deterministic product."""


def subnetwork(mask_fn: MaskFn, subnet: Subnet, key: Key | None = None) -> Params:
    """Returns the parameters weights * masks, which the model is given. Leaves that are not prunable pass unchanged.

    Args:
      mask_fn: mask_fn(scores, key) -> masks.
      subnet: the weights and the scores.
      key: a `jax.random.key` for masks that are drawn; None means the deterministic masks, for evaluation.

    Returns:
      A tree like `subnet.weights`, in their dtypes.

    Raises:
      ValueError: a mask has another shape than its weights.
    """
    return apply_masks(subnet.weights, mask_fn(subnet.scores, key))


def identity(scores: Scores, key: Key | None = None) -> Masks:
    """Returns the scores themselves: the mask function of fixed masks. With all scores None it means dense training."""
    return scores


def edge_popup(density: float | Mapping[str, float], layout: Layout | None = None) -> MaskFn:
    """Returns the mask function that keeps the `keep_count(density, size)` scores of largest magnitude in each layer.

    The gradient is straight-through: dL/ds = w * dL/d(w * m) * sign(s), also for weights that are pruned now.

    Args:
      density: fraction kept, in [0, 1]: one for all layers, or {path: fraction} naming every prunable leaf, or
        {"path[i]": fraction} naming the layers of a stack.
      layout: what tells which leaves stack layers, each of which keeps its own count. None means the names, which tell
        it of Flax's layers under `nn.scan`.

    Returns:
      mask_fn(scores, key) -> masks, which ignores the key.

    Raises:
      ValueError: a density is out of range; when the masks are made, also a path that does not match, and NaN scores
        (not under jit, where values are not known: there NaN ranks highest).

    Source: Ramanujan et al. 2020, section 3. Like its released code, this ranks magnitudes; the paper ranks signed
    scores.
    """
    for value in density.values() if isinstance(density, Mapping) else [density]:
        exact(value)  # raises here, not at the first step

    def masks_of(ranked: Scores) -> Masks:
        return layerwise_masks(ranked, density, layout=layout)

    def mask_fn(scores: Scores, key: Key | None = None) -> Masks:
        return straight_through(jax.tree.map(_magnitude, scores), masks_of)

    return mask_fn


@jax.custom_jvp
def _magnitude(score: jax.Array) -> jax.Array:
    return jnp.abs(score)


@_magnitude.defjvp
def _magnitude_jvp(scores, tangents):
    """sign(s), which is 0 at 0, as published; the derivative of jnp.abs is 1 there."""
    return jnp.abs(scores[0]), tangents[0] * jnp.sign(scores[0])


def threshold(t: float = 0.0) -> MaskFn:
    """Returns the mask function that keeps the weights whose score is above a threshold: mask = [s > t].

    Nothing is ranked, so that a mask costs one comparison a weight. How many weights are kept is an outcome. The
    gradient is straight-through: dL/ds = w * dL/d(w * m), also for weights that are pruned now.

    Args:
      t: the threshold, finite. With 0 and the scores of `init_scores`, about half of the weights are kept at first.

    Returns:
      mask_fn(scores, key) -> masks, which ignores the key. A warning names the layers that keep nothing (not under
      jit, where values are not known).

    Raises:
      ValueError: the threshold is not finite; when the masks are made, NaN scores (not under jit, where values are not
        known: there such a weight is pruned).

    Source: Mallya et al. 2018, section 3.2 (a threshold of 0.005); Wortsman et al. 2020, whose released code keeps
    scores >= 0, while here a score that equals the threshold is pruned.
    """
    if not math.isfinite(t):
        raise ValueError(f"the threshold must be finite, got {t!r}")

    def keep(path: str, score: jax.Array) -> jax.Array:
        _refuse_nan(path, score)
        return (score > t).astype(score.dtype)

    def mask_fn(scores: Scores, key: Key | None = None) -> Masks:
        masks = straight_through(scores, lambda scores: map_with_name(keep, scores))
        warn_of_emptied(masks, advice=f"no score there is above {t:g}")
        return masks

    return mask_fn


def bernoulli() -> MaskFn:
    """Returns the mask function that keeps each weight with probability sigmoid(score), drawn anew for each key.

    With a key, mask = u < sigmoid(score), u uniform in [0, 1) and drawn from the key and the leaf's path. With None,
    mask = score > 0, the likelier value of each; that keeps nothing where the scores are all 0 (`zero_scores`).
    The gradient is straight-through to the probability, also for weights that are pruned now:
    dL/ds = w * dL/d(w * m) * p * (1 - p), p = sigmoid(s). How many weights are kept is an outcome, not a setting; a
    warning names the layers that keep nothing (not under jit, where values are not known).

    Raises:
      ValueError: when the masks are made, NaN scores (not under jit, where values are not known: there such a weight
        is pruned and its gradient is NaN).

    Source: Zhou et al. 2019, section 5, and its released code, which draws the masks of an evaluation, too.
    """

    def mask_fn(scores: Scores, key: Key | None = None) -> Masks:
        def draw(path: str, score: jax.Array) -> jax.Array:
            _refuse_nan(path, score)
            uniform = None if key is None else unit_uniform(leaf_key(key, path), score.shape)
            return bernoulli_mask(score, uniform)

        masks = map_with_name(draw, scores)
        warn_of_emptied(masks, advice="the scores there are too low")
        return masks

    return mask_fn


def _refuse_nan(path: str, score: jax.Array) -> None:
    """Raises ValueError on NaN scores; values are looked at only where they are concrete (not under jit)."""
    if not isinstance(score, jax.core.Tracer) and np.isnan(np.asarray(score, np.float32)).any():
        raise ValueError(f"the scores of {path!r} hold NaN")


@jax.custom_vjp
def bernoulli_mask(score: jax.Array, uniform: jax.Array | None) -> jax.Array:
    """Returns one leaf's mask for given uniforms: 1 where uniform < sigmoid(score); with None, where score > 0.

    Args:
      score: [...] floats, the logits of being kept. The probability is computed in float32.
      uniform: [score.shape] float32 in [0, 1), or None. No gradient flows to it.

    Returns:
      [score.shape] exactly 0 or 1, in the dtype of `score`.

    Source: Zhou et al. 2019; Bengio et al. 2013 (the estimator).
    """
    # Scores are compared as they are: the sigmoid of a tiny positive one rounds to 1/2.
    kept = score > 0 if uniform is None else uniform < jax.nn.sigmoid(score.astype(jnp.float32))
    return kept.astype(score.dtype)


def _bernoulli_mask_vjp(score: jax.Array, cotangent: jax.Array) -> tuple[jax.Array, None]:
    wide = score.astype(jnp.float32)
    slope = jax.nn.sigmoid(wide) * jax.nn.sigmoid(-wide)  # p (1 - p), where 1 - p would cancel for p near 1
    return cotangent * slope.astype(cotangent.dtype), None


bernoulli_mask.defvjp(lambda score, uniform: (bernoulli_mask(score, uniform), score), _bernoulli_mask_vjp)


def rescaled(mask_fn: MaskFn, layout: Layout | None = None) -> MaskFn:
    """Returns a mask function that multiplies each layer's masks by size / ones (dynamic weight rescaling).

    The result is not binary: count, compare and store the masks of `mask_fn` itself. The gradient flows through the
    factor, as in the released code. A layer that keeps nothing stays 0; the released code divides by 0 there.

    Args:
      mask_fn: mask_fn(scores, key) -> masks of 0 or 1.
      layout: what tells which leaves stack layers. None means the names.

    Source: Zhou et al. 2019, section 5.
    """

    def scale(path: str, mask: jax.Array) -> jax.Array:
        stack = stack_of(path, mask.shape, layout)
        within = tuple(axis for axis in range(mask.ndim) if axis not in stack)
        # In float32: half precision cannot count.
        ones = jnp.sum(mask, axis=within, keepdims=bool(stack), dtype=jnp.float32)
        size = math.prod(mask.shape[axis] for axis in within)
        factor = size / jnp.where(ones > 0, ones, 1)  # jnp.maximum would halve the gradient at one weight kept
        return mask * factor.astype(mask.dtype)

    def scaled_mask_fn(scores: Scores, key: Key | None = None) -> Masks:
        return map_with_name(scale, mask_fn(scores, key))

    return scaled_mask_fn


def init_scores(key: Key, weights: Params, where: Where = is_kernel, fan_in: FanIn | None = None) -> Scores:
    """Returns float32 scores from U(-1/sqrt(fan_in), 1/sqrt(fan_in)) at the prunable leaves, None elsewhere.

    They are float32 whatever the weights' dtype: in bfloat16, most scores would round an update of theirs to nothing.

    Args:
      key: a `jax.random.key`, not the one the weights were drawn with: a leaf's draw depends only on the key and the
        leaf's path, so that one key would draw a weight and its score from the same bits.
      weights: tree whose shapes the scores take.
      where: (path, leaf) -> whether the leaf is prunable; or the `Layout` of the network.
      fan_in: (path, shape) -> the leaf's fan-in. None: as the layout says; without one, as the names do.

    Raises:
      ValueError: `where` chooses no leaf, or nothing tells a leaf's fan-in.
      TypeError: `where` chooses a leaf that is not of floats.

    Source: the released code of Ramanujan et al. 2020 (kaiming_uniform with a = sqrt(5)).
    """
    shapes, inputs = prunable_floats(weights, where), fan_in_of(fan_in, where)
    drawn = _symmetric(
        key, tuple((path, shape, 1 / math.sqrt(inputs(path, shape) or 1)) for path, shape in shapes.items())
    )
    return map_with_name(lambda path, leaf: drawn.get(path), weights)


@partial(jax.jit, static_argnums=1)
def _symmetric(key: Key, leaves: tuple[tuple[str, tuple[int, ...], float], ...]) -> dict[str, jax.Array]:
    """{path: float32 from U(-bound, bound)} for (path, shape, bound), in one compilation, not one for each shape."""
    return {path: symmetric_uniform(leaf_key(key, path), shape, bound) for path, shape, bound in leaves}


def zero_scores(weights: Params, where: Where = is_kernel) -> Scores:
    """Returns float32 scores of 0 at the prunable leaves, None elsewhere: for `bernoulli`, a probability of 1/2 each.

    They are float32 whatever the weights' dtype: in bfloat16, most scores would round an update of theirs to nothing.

    Args:
      weights: tree whose shapes the scores take.
      where: (path, leaf) -> whether the leaf is prunable; or the `Layout` of the network.

    Raises:
      ValueError: `where` chooses no leaf.
      TypeError: `where` chooses a leaf that is not of floats.

    Source: the released code of Zhou et al. 2019.
    """
    shapes = prunable_floats(weights, where)
    return map_with_name(lambda path, leaf: jnp.zeros(shapes[path], jnp.float32) if path in shapes else None, weights)
