"""Pytrees by path: names of leaves, which are prunable, a key per leaf, masks on weights.

Masks and scores have the structure of `weights`, with None at leaves that are not prunable. Always map with
`weights` as the first tree: then None arrives as an ordinary argument.
"""

import difflib
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Tree = Any
Where = Callable[[str, jax.Array], bool]
"""where(path, leaf) -> whether the leaf is prunable."""

NOT_KERNELS = ("bias", "b", "scale", "embedding")


def path_name(path: tuple[Any, ...]) -> str:
    """Returns a leaf's keys joined by "/": "Conv_0/kernel". A trailing `value` (of an NNX variable) is dropped."""
    if len(path) > 1 and path[-1] == jax.tree_util.GetAttrKey("value"):
        path = path[:-1]
    return jax.tree_util.keystr(path, simple=True, separator="/")


def by_path(tree: Tree) -> dict[str, Any]:
    """Returns {path: leaf} of every leaf that is not None, in the tree's own order.

    Raises:
      ValueError: two leaves have the same path, as those of {"a/b": x, "a": {"b": y}} do.
    """
    leaves = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if path_name(path) in leaves:
            raise ValueError(f"two leaves have the path {path_name(path)!r}; rename one of them")
        leaves[path_name(path)] = leaf
    return leaves


def map_with_name(f: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
    """Returns `jax.tree.map` of a function that also gets the leaf's path name first: f(path, leaf, *other leaves)."""
    return jax.tree_util.tree_map_with_path(lambda path, *leaves: f(path_name(path), *leaves), tree, *rest)


def is_kernel(path: str, leaf: jax.Array) -> bool:
    """Returns whether a leaf is prunable by default: it has two or more axes, and its name is not one of `NOT_KERNELS`.

    The names are Flax's: bias, b, scale, embedding. An Equinox `Embedding` calls its table `weight`; exclude it with a
    predicate of your own.

    Args:
      path: the leaf's keys joined by "/": "Conv_0/kernel". Its name is the last of them.
      leaf: the array, or its shape.
    """
    return jnp.ndim(leaf) >= 2 and path.rsplit("/", 1)[-1] not in NOT_KERNELS


def prunable(weights: Tree, where: Where = is_kernel) -> dict[str, tuple[int, ...]]:
    """Returns {path: shape} of the leaves that `where(path, leaf)` chooses.

    Raises:
      ValueError: `where` chooses no leaf; the message lists the paths that there are.
    """
    leaves = by_path(weights)
    chosen = {path: jnp.shape(leaf) for path, leaf in leaves.items() if where(path, leaf)}
    if not chosen:
        raise ValueError(f"the predicate matches no leaf; the leaves are: {', '.join(leaves) or '(none)'}")
    return chosen


def per_path(value: Any, paths: Iterable[str]) -> dict[str, Any]:
    """Returns one value for each path, from a single value or from a mapping that names every path.

    Raises:
      ValueError: the mapping names a path that is not there, or leaves one out.
    """
    paths = list(paths)
    if not isinstance(value, Mapping):
        return dict.fromkeys(paths, value)
    for name in value:
        if name not in paths:
            near = difflib.get_close_matches(name, paths, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise ValueError(f"no prunable leaf has the path {name!r}{hint}; there are: {', '.join(paths)}")
    missing = [path for path in paths if path not in value]
    if missing:
        raise ValueError(f"the mapping leaves out {', '.join(missing)}; it must name every prunable leaf")
    return {path: value[path] for path in paths}


def leaf_key(key: jax.Array, path: str) -> jax.Array:
    """Returns the key of one leaf: a function of only `key` and the path, so that a new layer changes no other key."""
    return jax.random.fold_in(key, np.uint32(zlib.crc32(path.encode())))


def apply_masks(weights: Tree, masks: Tree) -> Tree:
    """Returns weights * masks in the weights' dtypes; leaves whose mask is None pass unchanged."""
    return jax.tree.map(lambda w, m: w if m is None else w * m.astype(w.dtype), weights, masks)


def layer_densities(masks: Tree) -> dict[str, float]:
    """Returns {path: fraction of ones} of every mask.

    Args:
      masks: tree of 0 or 1, None at leaves that are not prunable. Not for jit.

    Raises:
      ValueError: a mask has values other than 0 and 1 (the message names its path), or there is no mask at all.
    """
    return {path: float(ones / max(size, 1)) for path, (ones, size) in ones_and_sizes(masks).items()}


def density(masks: Tree) -> float:
    """Returns the fraction of ones over all masks together.

    Args:
      masks: tree of 0 or 1, None at leaves that are not prunable. Not for jit.

    Raises:
      ValueError: a mask has values other than 0 and 1 (the message names its path), or there is no mask at all.
    """
    counts = ones_and_sizes(masks).values()
    return sum(ones for ones, _ in counts) / max(sum(size for _, size in counts), 1)


def ones_and_sizes(masks: Tree) -> dict[str, tuple[int, int]]:
    """Returns {path: (number of ones, size)} of every mask.

    Args:
      masks: tree of 0 or 1, None at leaves that are not prunable. Not for jit.

    Raises:
      ValueError: a mask has values other than 0 and 1 (the message names its path), or there is no mask at all.
    """
    leaves = by_path(masks)
    if not leaves:
        raise ValueError("there is no mask: every leaf of the tree is None")
    counts = {}
    for path, mask in leaves.items():
        mask = np.asarray(mask)
        ones = int(np.count_nonzero(mask == 1))
        if ones + int(np.count_nonzero(mask == 0)) != mask.size:
            raise ValueError(f"the mask of {path!r} holds values other than 0 and 1; is it a tree of scores?")
        counts[path] = (ones, mask.size)
    return counts
