"""Masks of the highest scores: of each layer, of all layers, n of every m, of whole units, and at random.

`threshold.highest` computes the exact threshold without a sort.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from supermask_jax.checks import (
    check_arrays,
    check_counts,
    check_scores,
    is_concrete,
    is_count,
    warn_of,
    warn_of_emptied,
)
from supermask_jax.densities import keep_count
from supermask_jax.draws import unit_uniform
from supermask_jax.leaves import Layout, leaf_of, stack_of, unknown_axes
from supermask_jax.threshold import highest, order_key
from supermask_jax.trees import (
    Tree,
    Where,
    by_path,
    is_kernel,
    layer_counts,
    layer_name,
    layout_of,
    leaf_key,
    map_with_name,
    per_layer,
    per_path,
    prunable,
    stacks_of,
)


def keep_highest(
    scores: Tree, counts: Mapping[str, int], within: Tree | None = None, *, layout: Layout | None = None
) -> Tree:
    """Returns masks that keep the `counts[path]` highest scores of each layer, of any sign.

    Ties are broken by flat index, the lowest losing first: what a stable argsort gives, on every machine and mesh.
    -0.0 ties with 0.0. It works under jit, where the counts may be traced.

    Args:
      scores: tree of floats of at most 32 bits, None at leaves that are not prunable.
      counts: {path: number kept}, naming every leaf of `scores`; each in [0, size of the leaf]. Where a leaf stacks
        layers, the number kept of each of them, or {"path[i]": number kept}.
      within: masks; only weights that they keep are chosen from. None means all.
      layout: what tells which leaves stack layers, each of which is ranked by itself. None means the names, which tell
        it of Flax's layers under `nn.scan`.

    Returns:
      Masks, exactly 0 or 1, with the structure, shapes and dtypes of `scores`. A warning names the layers whose count
      is 0, as far as that is known, if other layers keep something.

    Raises:
      ValueError: NaN scores, a count out of range (also: more than `within` keeps), or paths that do not match. Under
        jit values are not known: NaN then ranks by its sign, beyond all numbers, and counts are not checked.
      TypeError: scores that are not floats of at most 32 bits.
    """
    masks, emptied, layers = _highest_of_each(scores, counts, within, layout)
    if len(emptied) < layers:  # a density of 0 for all layers is what was asked for
        warn_of(emptied, "a higher density or count there keeps a weight")
    return masks


def highest_of_each(
    scores: Tree, counts: Mapping[str, int], within: Tree | None = None, layout: Layout | None = None
) -> Tree:
    """Returns the masks of `keep_highest`, without a warning where a layer keeps nothing."""
    return _highest_of_each(scores, counts, within, layout)[0]


def _highest_of_each(
    scores: Tree, counts: Mapping[str, int], within: Tree | None, layout: Layout | None
) -> tuple[Tree, list[str], int]:
    """(the masks, the layers of which they keep nothing, how many layers there are)."""
    check_arrays(scores)
    leaves = by_path(scores)
    allowed = per_path(by_path(within), leaves) if within is not None else {}
    for path, score in leaves.items():
        check_scores(path, score, allowed.get(path))
    stacks = {path: stack_of(path, score.shape, layout) for path, score in leaves.items()}
    layers = {path: tuple(leaves[path].shape[axis] for axis in stack) for path, stack in stacks.items()}
    numbers, keys, wanted, emptied = per_layer(counts, layers), [], [], []
    for path, score in leaves.items():
        forth = (stacks[path], range(len(stacks[path])))
        key, mask = order_key(score, allowed.get(path)), allowed.get(path)
        keys.append(jnp.moveaxis(key, *forth) if stacks[path] else key)
        own = {name: numbers[name] for name in (layer_name(path, i) for i in np.ndindex(*layers[path]))}
        emptied += check_counts(own, score, mask if mask is None or not stacks[path] else jnp.moveaxis(mask, *forth))
        wanted.append(_as_array(list(own.values()), layers[path]))
    masks = highest(keys, wanted, tuple(range(len(keys))), tuple(map(len, stacks.values())))
    back = {
        path: jnp.moveaxis(mask, range(len(stacks[path])), stacks[path]) if stacks[path] else mask
        for path, mask in zip(leaves, masks, strict=True)
    }
    return _as_tree(scores, back), emptied, len(numbers)


def layerwise_masks(scores: Tree, density: float | Mapping[str, float], *, layout: Layout | None = None) -> Tree:
    """Returns masks that keep the highest scores of each layer, `keep_count(density, size)` of them.

    Ties are broken by flat index, the lowest losing first. -0.0 ties with 0.0.

    Args:
      scores: tree of floats of at most 32 bits, None at leaves that are not prunable.
      density: fraction kept, in [0, 1]: one for all leaves, or {path: fraction} naming every leaf of `scores`, or
        {"path[i]": fraction} naming the layers of a stack.
      layout: what tells which leaves stack layers, each of which is ranked by itself. None means the names, which tell
        it of Flax's layers under `nn.scan`.

    Returns:
      Masks, exactly 0 or 1, with the structure, shapes and dtypes of `scores`.

    Raises:
      ValueError: a density out of range, paths that do not match, or NaN scores (under jit values are not known: NaN
        then ranks by its sign, beyond all numbers).
      TypeError: scores that are not floats of at most 32 bits.
    """
    check_arrays(scores)
    return keep_highest(scores, _counts(scores, density, layout), layout=layout)


def global_masks(
    scores: Tree, density: float, within: Tree | None = None, *, minimum: int = 0, layout: Layout | None = None
) -> Tree:
    """Returns masks that keep the `keep_count(density, total size)` highest scores of all leaves taken together.

    Ties are broken by flat index, the lowest losing first; the leaves count as one array, joined in the tree's order.

    Args:
      scores: tree of floats of at most 32 bits, None at leaves that are not prunable.
      density: fraction kept, in [0, 1], of all scores, also of those that `within` excludes.
      within: masks; only weights that they keep are chosen from. None means all.
      minimum: how many weights each layer keeps at least, its best; a smaller layer keeps all that it has. The rest is
        the best of all others.
      layout: what tells which leaves stack layers, for `minimum` and the warning. None means the names.

    Returns:
      Masks, exactly 0 or 1, with the structure, shapes and dtypes of `scores`. A warning names the layers that keep
      nothing of what `within` keeps (not under jit, where values are not known).

    Raises:
      ValueError: a density out of range, above what `within` keeps, or too low for the minimum; paths that do not
        match; NaN scores (under jit values are not known: NaN then ranks by its sign, beyond all numbers).
      TypeError: scores that are not floats of at most 32 bits.
    """
    check_arrays(scores)
    total = sum(score.size for score in by_path(scores).values())
    return keep_highest_of_all(scores, keep_count(density, total), within, minimum=minimum, layout=layout)


def keep_highest_of_all(
    scores: Tree, count: int, within: Tree | None = None, *, minimum: int = 0, layout: Layout | None = None
) -> Tree:
    """Returns masks that keep the `count` highest scores of all leaves taken together.

    Ties are broken by flat index, the lowest losing first; the leaves count as one array, joined in the tree's order.
    -0.0 ties with 0.0. It works under jit, where the count may be traced; with a `minimum`, `within` may not.

    Args:
      scores: tree of floats of at most 32 bits, None at leaves that are not prunable.
      count: how many are kept, in [0, number of scores to choose from].
      within: masks; only weights that they keep are chosen from. None means all.
      minimum: how many weights each layer keeps at least, its best; a smaller layer keeps all that it has. The rest is
        the best of all others.
      layout: what tells which leaves stack layers, for `minimum` and the warning. None means the names.

    Returns:
      Masks, exactly 0 or 1, with the structure, shapes and dtypes of `scores`. A warning names the layers that keep
      nothing of what `within` keeps (not under jit, where values are not known).

    Raises:
      ValueError: NaN scores, a count out of range (also: more than `within` keeps, or too few for the minimum), or
        paths that do not match, or a `within` that is traced, with a `minimum`. Under jit values are not known: NaN
        then ranks by its sign, beyond all numbers, and a traced count is not checked.
      TypeError: scores that are not floats of at most 32 bits.
    """
    chosen = highest_of_all(scores, count, within, minimum, layout)
    if is_concrete(count) and count:  # a count of 0 is what was asked for
        warn_of_emptied(chosen, within, layout)
    return chosen


def highest_of_all(
    scores: Tree, count: int, within: Tree | None = None, minimum: int = 0, layout: Layout | None = None
) -> Tree:
    """Returns the masks of `keep_highest_of_all`, without a warning where a layer keeps nothing."""
    check_arrays(scores)
    leaves = by_path(scores)
    allowed = per_path(by_path(within), leaves) if within is not None else {}
    for path, score in leaves.items():
        check_scores(path, score, allowed.get(path))
    room: Any = 0  # an int, or traced
    for path, score in leaves.items():
        room += jnp.count_nonzero(allowed[path]) if path in allowed else score.size
    if is_concrete((room, count)) and not is_count(count, int(room)):
        raise ValueError(f"cannot keep {count} of the {room} weights to choose from")
    if minimum:
        return _with_minimum(scores, count, within, minimum, layout)
    keys = [order_key(score, allowed.get(path)) for path, score in leaves.items()]
    masks = highest(keys, [count], groups=(0,) * len(leaves))
    return _as_tree(scores, dict(zip(leaves, masks, strict=True)))


def _with_minimum(scores: Tree, count: int, within: Tree | None, minimum: int, layout: Layout | None) -> Tree:
    """Masks of each layer's `minimum` highest scores and, up to `count`, of the highest of all the others."""
    if not isinstance(minimum, int | np.integer) or minimum < 0:
        raise ValueError(f"minimum must be a whole number >= 0, got {minimum!r}")
    if within is not None and not is_concrete(within):
        raise ValueError("a minimum needs to know what `within` keeps: compute such masks outside of jit")
    there = jax.tree.map(lambda score: np.broadcast_to(True, score.shape), scores) if within is None else within
    least = {name: min(minimum, ones) for name, (ones, _) in layer_counts(there, layout).items()}
    if is_concrete(count) and sum(least.values()) > count:
        raise ValueError(f"{count} weights are too few for {minimum} in every layer")
    reserved = highest_of_each(scores, least, within, layout)
    others = jax.tree.map(lambda own, mask: jnp.asarray(mask).astype(bool) & (own == 0), reserved, there)
    return jax.tree.map(jnp.add, reserved, highest_of_all(scores, count - sum(least.values()), others))


def n_m_masks(
    scores: Tree, n: int, m: int, axis: int | Mapping[str, int] | None = None, *, layout: Layout | None = None
) -> Tree:
    """Returns masks that keep the n highest of every m consecutive scores along `axis` of each leaf.

    Ties are broken by position, the lowest losing first. -0.0 ties with 0.0.

    Args:
      scores: tree of floats of at most 32 bits, None at leaves that are not prunable.
      n: how many of m scores are kept.
      m: how many scores form a group. Sparse tensor cores compute with 2 of 4.
      axis: the axis along which m scores are consecutive, negative from the end: one for all leaves, or {path: axis}.
        Hardware needs the axis that is summed over, which in Flax's kernels is -2. None means the last "in" axis, as
        the layout tells it; without one, as the names do.
      layout: what tells which axis is summed over.

    Returns:
      Masks, exactly 0 or 1, with the structure, shapes and dtypes of `scores`.

    Raises:
      ValueError: not 0 <= n <= m, a leaf without that axis or of which nothing tells it, an axis whose size m does not
        divide, paths that do not match, or NaN scores (under jit values are not known: NaN then ranks by its sign,
        beyond all numbers).
      TypeError: scores that are not floats of at most 32 bits.

    Source: Zhou et al. 2021, "Learning N:M fine-grained structured sparse neural networks from scratch", section 3.
    """
    if not (0 <= n <= m and m > 0):
        raise ValueError(f"n of every m scores are kept: 0 <= n <= m and m > 0, got n = {n}, m = {m}")
    if axis is None:
        axis = {path: _summed(path, score.shape, layout) for path, score in by_path(scores).items()}
    axes = per_path(axis, by_path(scores))

    def mask(path: str, score: jax.Array) -> jax.Array:
        check_scores(path, score, None)
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


def _summed(path: str, shape: tuple[int, ...], layout: Layout | None) -> int:
    leaf = leaf_of(path, shape, layout)
    if leaf is None or not leaf.at("in"):
        raise unknown_axes(path, shape)
    return leaf.at("in")[-1]


def random_masks(
    key: jax.Array, weights: Tree, densities: float | Mapping[str, float], where: Where = is_kernel
) -> Tree:
    """Returns random masks with exactly `keep_count(density, size)` ones in each prunable leaf, None at the others.

    Args:
      key: a `jax.random.key`, not the one the weights were drawn with. A leaf's mask depends only on the key, the
        leaf's path, its shape and its density.
      weights: tree whose shapes and dtypes the masks take.
      densities: fraction kept, in [0, 1]: one for all layers, or {path: fraction} naming every prunable leaf, or
        {"path[i]": fraction} naming the layers of a stack.
      where: (path, leaf) -> whether the leaf is prunable; or the `Layout` of the network.

    Returns:
      Masks, exactly 0 or 1, in the dtypes of the weights. Each layer of a stack keeps its own count.

    Raises:
      ValueError: `where` chooses no leaf, a density is out of range, or the paths do not match.
    """
    masks = layerwise_masks(random_scores(key, weights, where), densities, layout=layout_of(where))
    return jax.tree.map(
        lambda weight, mask: None if mask is None else mask.astype(jnp.result_type(weight)), weights, masks
    )


def random_scores(key: jax.Array, weights: Tree, where: Where = is_kernel) -> Tree:
    """Returns float32 scores from U(0, 1) at the prunable leaves, None elsewhere.

    They are float32 whatever the weights' dtype: in bfloat16 most would tie, and ties are broken by position, not at
    random.

    Args:
      key: a `jax.random.key`; a leaf's draw depends only on the key, the leaf's path and its shape.
      weights: tree whose shapes the scores take.
      where: (path, leaf) -> whether the leaf is prunable; or the `Layout` of the network.

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


def _counts(scores: Tree, density: float | Mapping[str, float], layout: Layout | None) -> dict[str, int]:
    """{layer: number kept}."""
    stacks, leaves = stacks_of(scores, layout), by_path(scores)
    sizes = {
        layer_name(path, index): leaves[path].size // max(math.prod(stack), 1)
        for path, stack in stacks.items()
        for index in np.ndindex(*stack)
    }
    return {layer: keep_count(part, sizes[layer]) for layer, part in per_layer(density, stacks).items()}


def _as_tree(scores: Tree, masks: dict[str, jax.Array]) -> Tree:
    return map_with_name(lambda path, score: masks[path].astype(score.dtype), scores)


def _as_array(counts: list[Any], stack: tuple[int, ...]) -> Any:
    """The counts of a stack's layers as one array of its shape; of a leaf that is one layer, the count itself."""
    if not stack:
        return counts[0]
    if is_concrete(counts):
        return np.array([int(count) for count in counts], np.int32).reshape(stack)
    return jnp.stack([jnp.asarray(count, jnp.int32) for count in counts]).reshape(stack)
