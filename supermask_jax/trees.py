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

from supermask_jax.leaves import FanIn, FanOut, Layout, named_fan_in, named_fan_out, stack_of
from supermask_jax.names import is_kernel as is_kernel  # public here, too
from supermask_jax.names import shape_of

Tree = Any
Where = Callable[[str, jax.Array], bool] | Layout
"""where(path, leaf) -> whether the leaf is prunable. A `Layout` says so, and what the axes of the leaf do."""


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


def nested(leaves: Mapping[str, Any]) -> Tree:
    """Returns {path: leaf} as nested dictionaries, which Flax takes; the leaf itself where its path is empty.

    Raises:
      ValueError: one path leads through another.
    """
    if list(leaves) == [""]:
        return leaves[""]
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, last = path.split("/")
        inside = tree
        for parent in parents:
            inside = inside.setdefault(parent, {})
            if not isinstance(inside, dict):
                raise ValueError(f"it has a leaf at {path!r} and one above it")
        if last in inside:
            raise ValueError(f"it has a leaf at {path!r} and one below it")
        inside[last] = leaf
    return tree


def map_with_name(f: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
    """Returns `jax.tree.map` of a function that also gets the leaf's path name first: f(path, leaf, *other leaves)."""
    return jax.tree_util.tree_map_with_path(lambda path, *leaves: f(path_name(path), *leaves), tree, *rest)


def prunable(weights: Tree, where: Where = is_kernel) -> dict[str, tuple[int, ...]]:
    """Returns {path: shape} of the leaves that `where(path, leaf)` chooses.

    Raises:
      ValueError: `where` chooses no leaf; the message lists the paths that there are.
      TypeError: a leaf is neither an array nor a number.
    """
    leaves = by_path(weights)
    chosen = {path: checked_shape(path, leaf) for path, leaf in leaves.items() if where(path, leaf)}
    if not chosen:
        raise ValueError(f"the predicate matches no leaf; the leaves are: {', '.join(leaves) or '(none)'}")
    return chosen


def prunable_floats(weights: Tree, where: Where = is_kernel) -> dict[str, tuple[int, ...]]:
    """Returns {path: shape} of the leaves that `where(path, leaf)` chooses.

    Raises:
      ValueError: `where` chooses no leaf; the message lists the paths that there are.
      TypeError: a chosen leaf is not of real floating-point numbers.
    """
    chosen, leaves = prunable(weights, where), by_path(weights)
    for path in chosen:
        kind = leaves[path].dtype if hasattr(leaves[path], "dtype") else type(leaves[path]).__name__
        if isinstance(kind, str) or not jnp.issubdtype(kind, jnp.floating):
            raise TypeError(f"only floats are prunable; {path!r} has {kind}")
    return chosen


def at_most_32_bits(scores: jax.Array | None) -> jax.Array | None:
    """Returns the scores in float32 if they are wider, as those of float64 weights are: the selection ranks 32 bits."""
    return scores.astype(jnp.float32) if scores is not None and scores.dtype.itemsize > 4 else scores


def magnitudes(weights: Tree, masks: Tree) -> Tree:
    """Returns |weight| in at most 32 bits, None where there is no mask."""
    return jax.tree.map(lambda weight, mask: None if mask is None else at_most_32_bits(jnp.abs(weight)), weights, masks)


def checked_shape(path: str, leaf: Any) -> tuple[int, ...]:
    """Returns the shape of a leaf as Python integers.

    Raises:
      TypeError: the leaf is neither an array nor a number.
    """
    if not hasattr(leaf, "shape") and not isinstance(leaf, int | float | complex | np.number):
        raise TypeError(f"the leaves of weights are arrays; {path!r} is a {type(leaf).__name__}")
    return shape_of(leaf)


def layout_of(where: Where | None) -> Layout | None:
    """Returns `where` if it is a `Layout`, which tells what the axes of the leaves do; else None: the names tell."""
    return where if isinstance(where, Layout) else None


def fan_in_of(fan_in: FanIn | None, where: Where | None = None) -> FanIn:
    """Returns the given fan_in(path, shape); of None, that of the layout that `where` is, or that of the names."""
    layout = layout_of(where)
    return fan_in or (layout.fan_in if layout is not None else named_fan_in)


def fan_out_of(fan_out: FanOut | None, where: Where | None = None) -> FanOut:
    """Returns the given fan_out(path, shape); of None, that of the layout that `where` is, or that of the names."""
    layout = layout_of(where)
    return fan_out or (layout.fan_out if layout is not None else named_fan_out)


def per_path(value: Any, paths: Iterable[str]) -> dict[str, Any]:
    """Returns one value for each path, from a single value or from a mapping that names every path.

    Raises:
      ValueError: the mapping names a path that is not there, or leaves one out.
    """
    return per_layer(value, dict.fromkeys(paths, ()))


def layer_name(path: str, index: tuple[int, ...]) -> str:
    """Returns the name of a layer in a stack: "blocks/Dense_0/kernel[3]"; of a leaf that stacks none, its path."""
    return f"{path}[{','.join(map(str, index))}]" if index else path


def per_layer(value: Any, stacks: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Returns {layer: value}, from a single value or from a mapping; a layer of a stack is called "path[i]".

    Args:
      value: one for all, or {path: value} or {"path[i]": value} naming every layer.
      stacks: {path: how many layers the leaf stacks, by axis}; () for a leaf that is one layer.

    Raises:
      ValueError: the mapping names a layer that is not there, or leaves one out.
    """
    layers = {layer_name(path, index): path for path, stack in stacks.items() for index in np.ndindex(*stack)}
    if not isinstance(value, Mapping):
        return dict.fromkeys(layers, value)
    for name in value:
        if name not in layers and name not in stacks:
            near = difflib.get_close_matches(name, stacks, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise ValueError(f"no prunable leaf has the path {name!r}{hint}; there are: {', '.join(stacks)}")
    missing = [name for name, path in layers.items() if name not in value and path not in value]
    if missing:
        raise ValueError(f"the mapping leaves out {', '.join(missing)}; it must name every prunable leaf")
    return {name: value[name] if name in value else value[path] for name, path in layers.items()}


def leaf_key(key: jax.Array, path: str) -> jax.Array:
    """Returns the key of one leaf: a function of only `key` and the path, so that a new layer changes no other key."""
    return jax.random.fold_in(key, np.uint32(zlib.crc32(path.encode())))


def mean_over(axis_name: str | None, tree: Tree) -> Tree:
    """Returns the mean of every leaf over the devices of a pmap axis; of None, the tree itself."""
    return tree if axis_name is None else jax.lax.pmean(tree, axis_name)


def apply_masks(weights: Tree, masks: Tree) -> Tree:
    """Returns weights * masks in the weights' dtypes; leaves whose mask is None pass unchanged.

    Raises:
      ValueError: a mask has another shape than its weights.
    """

    def masked(path: str, weight: jax.Array, mask: jax.Array | None) -> jax.Array:
        if mask is None:
            return weight
        if jnp.shape(mask) != jnp.shape(weight):
            raise ValueError(f"the mask of {path!r} has shape {jnp.shape(mask)}, its weights {jnp.shape(weight)}")
        return weight * mask.astype(weight.dtype)

    return map_with_name(masked, weights, masks)


def stacks_of(tree: Tree, layout: Layout | None = None) -> dict[str, tuple[int, ...]]:
    """Returns {path: shape of the axes that count layers}; () for a leaf that is one layer.

    Args:
      tree: masks or scores, None at leaves that are not prunable.
      layout: what tells the axes; None means the names.
    """
    shapes = {path: jnp.shape(leaf) for path, leaf in by_path(tree).items()}
    return {path: tuple(shape[axis] for axis in stack_of(path, shape, layout)) for path, shape in shapes.items()}


def layer_densities(masks: Tree, layout: Layout | None = None) -> dict[str, float]:
    """Returns {path: fraction of ones} of every mask; of each layer of a stack, {"path[i]": fraction of ones}.

    Args:
      masks: tree of 0 or 1, None at leaves that are not prunable. Not for jit.
      layout: what tells which leaves stack layers; None means the names, which tell it of Flax's layers under
        `nn.scan`.

    Raises:
      ValueError: a mask has values other than 0 and 1 (the message names its path), or there is no mask at all.
    """
    return {name: float(ones / max(size, 1)) for name, (ones, size) in layer_counts(masks, layout).items()}


def layer_counts(masks: Tree, layout: Layout | None = None) -> dict[str, tuple[int, int]]:
    """Returns {name: (number of ones, size)} of every layer; of a stack, by "path[i]".

    Args:
      masks: tree of 0 or 1, None at leaves that are not prunable. Not for jit.
      layout: what tells which leaves stack layers; None means the names.

    Raises:
      ValueError: a mask has values other than 0 and 1 (the message names its path), or there is no mask at all.
    """
    whole, counts = ones_and_sizes(masks), {}
    for path, mask in by_path(masks).items():
        stack = stack_of(path, jnp.shape(mask), layout)
        if not stack:
            counts[path] = whole[path]
            continue
        layers = np.moveaxis(np.asarray(mask), stack, range(len(stack)))
        for index in np.ndindex(*layers.shape[: len(stack)]):
            counts[layer_name(path, index)] = (int(np.count_nonzero(layers[index])), layers[index].size)
    return counts


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
