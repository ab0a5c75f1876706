"""Masks of the highest scores: of each layer, of all layers, n of every m, of whole units, and at random.

The hard part, an exact threshold without a sort, is `threshold.highest`.
"""

from collections.abc import Callable, Mapping
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from supermask_jax.densities import keep_count
from supermask_jax.threshold import highest, order_key
from supermask_jax.trees import Tree, Where, by_path, is_kernel, leaf_key, map_with_name, per_path, prunable


def keep_highest(scores: Tree, counts: Mapping[str, int], within: Tree | None = None) -> Tree:
    """Masks that keep the `counts[path]` highest scores of each leaf, any sign.

    Ties are broken by flat index, the lowest losing first: what a stable argsort gives, on every machine and
    mesh. -0.0 ties with 0.0. Works under `jax.jit`, where the counts may be traced.

    Args:
      scores: tree of floats of at most 32 bits, None at leaves that are not prunable.
      counts: {path: number kept}, naming every leaf of `scores`; each in [0, size of the leaf].
      within: masks; only weights that they keep are chosen from.

    Returns:
      Masks, exactly 0 or 1, with the structure, shapes and dtypes of `scores`.

    Raises:
      ValueError: NaN scores, a count out of range (also: more than `within` keeps), or paths that do not match. Under
        jit values are not known: NaN then ranks by its sign, beyond all numbers, and counts are taken as they are.
      TypeError: scores that are not floats of at most 32 bits.
    """
    leaves = by_path(scores)
    allowed = per_path(by_path(within), leaves) if within is not None else {}
    counts = per_path(counts, leaves)
    for path, score in leaves.items():
        _check(path, score, counts[path], allowed.get(path))
    keys = [order_key(score, allowed.get(path)) for path, score in leaves.items()]
    masks = highest(keys, list(counts.values()), groups=tuple(range(len(keys))))
    return _as_tree(scores, dict(zip(leaves, masks, strict=True)))


def layerwise_masks(scores: Tree, density: float | Mapping[str, float]) -> Tree:
    """Masks that keep the highest scores of each leaf, `keep_count(density, size)` of them.

    `density` is one fraction in [0, 1] or {path: fraction}. Everything else as in `keep_highest`.
    """
    return keep_highest(scores, _counts(scores, density))


def global_masks(scores: Tree, density: float, within: Tree | None = None) -> Tree:
    """Masks that keep the `keep_count(density, total size)` highest scores of all leaves taken together.

    `density` counts out of all weights, also of those that `within` (masks) leaves out of the choice. Everything else
    as in `keep_highest_of_all`.
    """
    total = sum(score.size for score in by_path(scores).values())
    return keep_highest_of_all(scores, keep_count(density, total), within)


def keep_highest_of_all(scores: Tree, count: int, within: Tree | None = None) -> Tree:
    """Masks that keep the `count` highest scores of all leaves taken together.

    Ties: the leaves count as one array, joined in the tree's order. Everything else as in `keep_highest`.
    """
    leaves = by_path(scores)
    allowed = per_path(by_path(within), leaves) if within is not None else {}
    room = 0
    for path, score in leaves.items():
        _check(path, score, 0, allowed.get(path))
        room += jnp.count_nonzero(allowed[path]) if path in allowed else score.size
    if not isinstance(room - count, jax.core.Tracer) and not 0 <= count <= room:
        raise ValueError(f"cannot keep {count} of the {room} weights to choose from")
    keys = [order_key(score, allowed.get(path)) for path, score in leaves.items()]
    masks = highest(keys, [count], groups=(0,) * len(leaves))
    return _as_tree(scores, dict(zip(leaves, masks, strict=True)))


def n_m_masks(scores: Tree, n: int, m: int, axis: int | Mapping[str, int]) -> Tree:
    """Masks that keep the n highest of every m consecutive scores along `axis` of each leaf.

    Args:
      scores: tree of floats of at most 32 bits, None at leaves that are not prunable.
      n, m: how many are kept of how many; 2 of 4 is what sparse tensor cores compute with.
      axis: the axis along which m scores are consecutive, negative from the end; one, or {path: axis}. Hardware wants
        the axis that is summed over: -2 of Flax's kernels.

    Returns:
      Masks, exactly 0 or 1, as in `keep_highest`; so are ties, and the scores that are refused.

    Raises:
      ValueError: not 0 <= n <= m, or a leaf has no such axis, or one that m does not divide.

    Source: Zhou et al. 2021, "Learning N:M fine-grained structured sparse neural networks from scratch", section 3.
    """
    if not (0 <= n <= m and m > 0):
        raise ValueError(f"n of every m scores are kept: 0 <= n <= m and m > 0, got n = {n}, m = {m}")
    axes = per_path(axis, by_path(scores))

    def mask(path: str, score: jax.Array) -> jax.Array:
        _check(path, score, 0, None)
        if not -score.ndim <= axes[path] < score.ndim or score.shape[axes[path]] % m:
            raise ValueError(f"{path!r} {score.shape} has no axis {axes[path]} whose size {m} divides")
        at = axes[path] % score.ndim
        keys = order_key(score).reshape(*score.shape[:at], score.shape[at] // m, m, *score.shape[at + 1 :])
        place = lax.broadcasted_iota(jnp.int32, keys.shape, at + 1)
        above = jnp.zeros(keys.shape, jnp.int32)  # how many of the m rank higher
        for rival in range(m):
            other = lax.slice_in_dim(keys, rival, rival + 1, axis=at + 1)
            above += ((other > keys) | ((other == keys) & (rival > place))).astype(jnp.int32)
        return (above < n).astype(score.dtype).reshape(score.shape)

    return map_with_name(mask, scores)


def unit_scores(scores: Tree, within: Tree | None = None) -> Tree:
    """The mean score of each output unit's weights, for structured pruning: [..., out] -> [1, ..., 1, out], float32.

    A unit is an entry of the last axis: of a Flax kernel, a dense layer's neuron or a convolution's output channel.
    Masks of units spread over the kernel by broadcasting.

    Args:
      scores: tree of floats, None at leaves that are not prunable.
      within: masks; the mean is over the weights that they keep, and 0 for a unit of which they keep none.
    """
    leaves = by_path(scores)
    allowed = per_path(by_path(within), leaves) if within is not None else {}

    def mean(path: str, score: jax.Array) -> jax.Array:
        kept = allowed[path] != 0 if path in allowed else jnp.ones(score.shape, bool)
        over = {"axis": tuple(range(score.ndim - 1)), "keepdims": True, "dtype": jnp.float32}
        return jnp.sum(score, where=kept, **over) / jnp.maximum(jnp.sum(kept, **over), 1)

    return map_with_name(mean, scores)


def unit_masks(masks: Tree) -> Tree:
    """1 for each output unit of which any weight is kept, else 0: [..., out] -> [1, ..., 1, out]."""
    return jax.tree.map(lambda mask: jnp.max(mask, axis=tuple(range(mask.ndim - 1)), keepdims=True), masks)


def random_masks(
    key: jax.Array, weights: Tree, densities: float | Mapping[str, float], where: Where = is_kernel
) -> Tree:
    """Random masks with exactly `keep_count(density, size)` ones in each prunable leaf, None at the others.

    Args:
      key: a `jax.random.key`, not the one the weights were drawn with; a leaf's mask depends on the key, the leaf's
        path, its shape and its density alone.
      weights: tree whose shapes and dtypes the masks take.
      densities: fraction kept, in [0, 1]; one for all layers, or {path: fraction} naming each prunable leaf.
      where: (path, leaf) -> whether the leaf is prunable.

    Raises:
      ValueError: `where` chooses no leaf, a density is out of range, or the paths do not match.
    """
    masks = layerwise_masks(random_scores(key, weights, where), densities)
    return jax.tree.map(lambda weight, mask: None if mask is None else mask.astype(weight.dtype), weights, masks)


def random_scores(key: jax.Array, weights: Tree, where: Where = is_kernel) -> Tree:
    """float32 scores from U(0, 1) at the prunable leaves, None elsewhere; arguments as in `random_masks`.

    float32 whatever the weights' dtype: in bfloat16 most would tie, and ties are not random.
    """
    shapes = prunable(weights, where)
    return map_with_name(
        lambda path, leaf: jax.random.uniform(leaf_key(key, path), leaf.shape) if path in shapes else None, weights
    )


def top_k_mask(scores: jax.Array, density: float) -> jax.Array:
    """Mask of one array's `keep_count(density, size)` highest scores, with the straight-through gradient.

    Args:
      scores: floats of any shape and sign.
      density: fraction kept, in [0, 1].

    Returns:
      [scores.shape] exactly 0 or 1, in the dtype of `scores`. The cotangent passes to `scores` unchanged.

    Source: Ramanujan et al. 2020, section 3 (the estimator), there applied to abs(scores).
    """
    return straight_through(scores, lambda s: layerwise_masks({"scores": s}, density)["scores"])


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def straight_through(scores: Tree, masks_of: Callable[[Tree], Tree]) -> Tree:
    """`masks_of(scores)`, whose backward pass hands the masks' cotangent to the scores unchanged.

    A custom_vjp keeps the forward mask exact; m + s - stop_gradient(s) would round.
    Source: Bengio et al. 2013; Ramanujan et al. 2020, equation 5.
    """
    return masks_of(scores)


straight_through.defvjp(
    lambda scores, masks_of: (masks_of(scores), None),
    lambda masks_of, residuals, cotangent: (cotangent,),
)


def _counts(scores: Tree, density: float | Mapping[str, float]) -> dict[str, int]:
    leaves = by_path(scores)
    return {path: keep_count(d, leaves[path].size) for path, d in per_path(density, leaves).items()}


def _as_tree(scores: Tree, masks: dict[str, jax.Array]) -> Tree:
    return map_with_name(lambda path, score: masks[path].astype(score.dtype), scores)


def _check(path: str, score: jax.Array, count, allowed: jax.Array | None) -> None:
    """Raises on what is wrong with a leaf; values are looked at only where they are concrete (not under jit)."""
    if not jnp.issubdtype(score.dtype, jnp.floating) or score.dtype.itemsize > 4:
        raise TypeError(f"scores must be floats of at most 32 bits; {path!r} has {score.dtype}")
    room = score.size
    if not isinstance(score, jax.core.Tracer) and np.isnan(np.asarray(score, np.float32)).any():
        raise ValueError(f"the scores of {path!r} hold NaN")
    if allowed is not None and allowed.shape != score.shape:
        raise ValueError(f"the mask of {path!r} has shape {allowed.shape}, its scores {score.shape}")
    if allowed is not None and not isinstance(allowed, jax.core.Tracer):
        room = int(np.count_nonzero(np.asarray(allowed)))
    if not isinstance(count, jax.core.Tracer) and not (count == int(count) and 0 <= count <= room):
        raise ValueError(f"cannot keep {count} of the {room} weights to choose from in {path!r}")
