"""Masks of the highest scores: of each layer, of all layers, n of every m, of whole units, and at random.

`threshold.highest` computes the exact threshold without a sort.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from supermask_jax.densities import keep_count
from supermask_jax.draws import unit_uniform
from supermask_jax.threshold import highest, order_key
from supermask_jax.trees import Tree, Where, by_path, is_kernel, leaf_key, map_with_name, per_path, prunable


def keep_highest(scores: Tree, counts: Mapping[str, int], within: Tree | None = None) -> Tree:
    """Returns masks that keep the `counts[path]` highest scores of each leaf, of any sign.

    Ties are broken by flat index, the lowest losing first: what a stable argsort gives, on every machine and mesh.
    -0.0 ties with 0.0. It works under jit, where the counts may be traced.

    Args:
      scores: tree of floats of at most 32 bits, None at leaves that are not prunable.
      counts: {path: number kept}, naming every leaf of `scores`; each in [0, size of the leaf].
      within: masks; only weights that they keep are chosen from. None means all.

    Returns:
      Masks, exactly 0 or 1, with the structure, shapes and dtypes of `scores`.

    Raises:
      ValueError: NaN scores, a count out of range (also: more than `within` keeps), or paths that do not match. Under
        jit values are not known: NaN then ranks by its sign, beyond all numbers, and counts are not checked.
      TypeError: scores that are not floats of at most 32 bits.
    """
    leaves = by_path(scores)
    allowed = per_path(by_path(within), leaves) if within is not None else {}
    wanted = per_path(counts, leaves)
    for path, score in leaves.items():
        _check(path, score, wanted[path], allowed.get(path))
    keys = [order_key(score, allowed.get(path)) for path, score in leaves.items()]
    masks = highest(keys, list(wanted.values()), groups=tuple(range(len(keys))))
    return _as_tree(scores, dict(zip(leaves, masks, strict=True)))


def layerwise_masks(scores: Tree, density: float | Mapping[str, float]) -> Tree:
    """Returns masks that keep the highest scores of each leaf, `keep_count(density, size)` of them.

    Ties are broken by flat index, the lowest losing first. -0.0 ties with 0.0.

    Args:
      scores: tree of floats of at most 32 bits, None at leaves that are not prunable.
      density: fraction kept, in [0, 1]: one for all leaves, or {path: fraction} naming every leaf of `scores`.

    Returns:
      Masks, exactly 0 or 1, with the structure, shapes and dtypes of `scores`.

    Raises:
      ValueError: a density out of range, paths that do not match, or NaN scores (under jit values are not known: NaN
        then ranks by its sign, beyond all numbers).
      TypeError: scores that are not floats of at most 32 bits.
    """
    return keep_highest(scores, _counts(scores, density))


def global_masks(scores: Tree, density: float, within: Tree | None = None) -> Tree:
    """Returns masks that keep the `keep_count(density, total size)` highest scores of all leaves taken together.

    Ties are broken by flat index, the lowest losing first; the leaves count as one array, joined in the tree's order.

    Args:
      scores: tree of floats of at most 32 bits, None at leaves that are not prunable.
      density: fraction kept, in [0, 1], of all scores, also of those that `within` excludes.
      within: masks; only weights that they keep are chosen from. None means all.

    Returns:
      Masks, exactly 0 or 1, with the structure, shapes and dtypes of `scores`.

    Raises:
      ValueError: a density out of range, or above what `within` keeps; paths that do not match; NaN scores (under jit
        values are not known: NaN then ranks by its sign, beyond all numbers).
      TypeError: scores that are not floats of at most 32 bits.
    """
    total = sum(score.size for score in by_path(scores).values())
    return keep_highest_of_all(scores, keep_count(density, total), within)


def keep_highest_of_all(scores: Tree, count: int, within: Tree | None = None) -> Tree:
    """Returns masks that keep the `count` highest scores of all leaves taken together.

    Ties are broken by flat index, the lowest losing first; the leaves count as one array, joined in the tree's order.
    -0.0 ties with 0.0. It works under jit, where the count may be traced.

    Args:
      scores: tree of floats of at most 32 bits, None at leaves that are not prunable.
      count: how many are kept, in [0, number of scores to choose from].
      within: masks; only weights that they keep are chosen from. None means all.

    Returns:
      Masks, exactly 0 or 1, with the structure, shapes and dtypes of `scores`.

    Raises:
      ValueError: NaN scores, a count out of range (also: more than `within` keeps), or paths that do not match. Under
        jit values are not known: NaN then ranks by its sign, beyond all numbers, and the count is not checked.
      TypeError: scores that are not floats of at most 32 bits.
    """
    leaves = by_path(scores)
    allowed = per_path(by_path(within), leaves) if within is not None else {}
    room: Any = 0  # an int, or traced
    for path, score in leaves.items():
        _check(path, score, 0, allowed.get(path))
        room += jnp.count_nonzero(allowed[path]) if path in allowed else score.size
    if not isinstance(room - count, jax.core.Tracer) and not 0 <= count <= room:
        raise ValueError(f"cannot keep {count} of the {room} weights to choose from")
    keys = [order_key(score, allowed.get(path)) for path, score in leaves.items()]
    masks = highest(keys, [count], groups=(0,) * len(leaves))
    return _as_tree(scores, dict(zip(leaves, masks, strict=True)))


def n_m_masks(scores: Tree, n: int, m: int, axis: int | Mapping[str, int]) -> Tree:
    """Returns masks that keep the n highest of every m consecutive scores along `axis` of each leaf.

    Ties are broken by position, the lowest losing first. -0.0 ties with 0.0.

    Args:
      scores: tree of floats of at most 32 bits, None at leaves that are not prunable.
      n: how many of m scores are kept.
      m: how many scores form a group. Sparse tensor cores compute with 2 of 4.
      axis: the axis along which m scores are consecutive, negative from the end: one for all leaves, or {path: axis}.
        Hardware needs the axis that is summed over, which in Flax's kernels is -2.

    Returns:
      Masks, exactly 0 or 1, with the structure, shapes and dtypes of `scores`.

    Raises:
      ValueError: not 0 <= n <= m, a leaf without that axis, an axis whose size m does not divide, paths that do not
        match, or NaN scores (under jit values are not known: NaN then ranks by its sign, beyond all numbers).
      TypeError: scores that are not floats of at most 32 bits.

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
    """Returns the mean score of each output unit's weights, for structured pruning: [..., out] -> [1, ..., 1, out].

    A unit is an entry of the last axis: of a Flax kernel, a dense layer's neuron or a convolution's output channel.
    Masks of units broadcast over the kernel.

    Args:
      scores: tree of floats, None at leaves that are not prunable.
      within: masks; the mean is over the weights that they keep, and 0 for a unit of which they keep none. None means
        all.

    Returns:
      A tree like `scores`, of float32 [1, ..., 1, out].

    Raises:
      ValueError: paths of `within` that do not match.
    """
    leaves = by_path(scores)
    allowed = per_path(by_path(within), leaves) if within is not None else {}

    def mean(path: str, score: jax.Array) -> jax.Array:
        kept = allowed[path] != 0 if path in allowed else jnp.ones(score.shape, bool)
        over = {"axis": tuple(range(score.ndim - 1)), "keepdims": True, "dtype": jnp.float32}
        return jnp.sum(score, where=kept, **over) / jnp.maximum(jnp.sum(kept, **over), 1)

    return map_with_name(mean, scores)


def unit_masks(masks: Tree) -> Tree:
    """Returns 1 for each output unit of which a mask keeps any weight, else 0: [..., out] -> [1, ..., 1, out].

    Args:
      masks: tree of 0 or 1, None at leaves that are not prunable. A unit is an entry of the last axis.

    Returns:
      A tree like `masks`, in their dtypes.
    """
    return jax.tree.map(lambda mask: jnp.max(mask, axis=tuple(range(mask.ndim - 1)), keepdims=True), masks)


def random_masks(
    key: jax.Array, weights: Tree, densities: float | Mapping[str, float], where: Where = is_kernel
) -> Tree:
    """Returns random masks with exactly `keep_count(density, size)` ones in each prunable leaf, None at the others.

    Args:
      key: a `jax.random.key`, not the one the weights were drawn with. A leaf's mask depends only on the key, the
        leaf's path, its shape and its density.
      weights: tree whose shapes and dtypes the masks take.
      densities: fraction kept, in [0, 1]: one for all layers, or {path: fraction} naming every prunable leaf.
      where: (path, leaf) -> whether the leaf is prunable.

    Returns:
      Masks, exactly 0 or 1, in the dtypes of the weights.

    Raises:
      ValueError: `where` chooses no leaf, a density is out of range, or the paths do not match.
    """
    masks = layerwise_masks(random_scores(key, weights, where), densities)
    return jax.tree.map(lambda weight, mask: None if mask is None else mask.astype(weight.dtype), weights, masks)


def random_scores(key: jax.Array, weights: Tree, where: Where = is_kernel) -> Tree:
    """Returns float32 scores from U(0, 1) at the prunable leaves, None elsewhere.

    They are float32 whatever the weights' dtype: in bfloat16 most would tie, and ties are broken by position, not at
    random.

    Args:
      key: a `jax.random.key`; a leaf's draw depends only on the key, the leaf's path and its shape.
      weights: tree whose shapes the scores take.
      where: (path, leaf) -> whether the leaf is prunable.

    Raises:
      ValueError: `where` chooses no leaf.
    """
    drawn = _uniform(key, tuple(prunable(weights, where).items()))
    return map_with_name(lambda path, leaf: drawn.get(path), weights)


@partial(jax.jit, static_argnums=1)
def _uniform(key: jax.Array, shapes: tuple[tuple[str, tuple[int, ...]], ...]) -> dict[str, jax.Array]:
    """{path: float32 from U(0, 1)} for pairs of path and shape, in one compilation instead of one for each shape."""
    return {path: unit_uniform(leaf_key(key, path), shape) for path, shape in shapes}


def top_k_mask(scores: jax.Array, density: float) -> jax.Array:
    """Returns the mask of one array's `keep_count(density, size)` highest scores, with the straight-through gradient.

    Args:
      scores: floats of any shape and sign, of at most 32 bits.
      density: fraction kept, in [0, 1].

    Returns:
      [scores.shape] exactly 0 or 1, in the dtype of `scores`. The cotangent passes to `scores` unchanged.

    Raises:
      ValueError: a density out of range, or NaN scores (not under jit, where values are not known).
      TypeError: scores that are not floats of at most 32 bits.

    Source: Ramanujan et al. 2020, section 3 (the estimator), there applied to abs(scores).
    """
    return straight_through(scores, lambda s: layerwise_masks({"scores": s}, density)["scores"])


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def straight_through(scores: Tree, masks_of: Callable[[Tree], Tree]) -> Tree:
    """Returns `masks_of(scores)`; its backward pass gives the masks' cotangent to the scores unchanged.

    A custom_vjp keeps the forward mask exact; m + s - stop_gradient(s) would round.

    Args:
      scores: tree of floats.
      masks_of: scores -> masks of the same structure, shapes and dtypes.

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


def _check(path: str, score: jax.Array, count: Any, allowed: jax.Array | None) -> None:
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
