"""Which entries of a value depend on the input, which are read, and how an operation computes only those.

There is a rule for each kind of operation; `products` has those of matrix products and convolutions. A set of entries
is a box: it holds, for each axis, which indices are in it.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax.numpy as jnp
import numpy as np
from jax import lax

from supermask_jax.graph import Node, bind

Box: TypeAlias = tuple[np.ndarray, ...]
"""A bool for each index of each axis."""
Constant: TypeAlias = Callable[[np.ndarray, str], Any]
"""constant(array, name) -> the array, which becomes a parameter of the smaller network."""


class Value(NamedTuple):
    """What one example makes of a value, and which of its entries depend on the example."""

    data: np.ndarray
    varies: np.ndarray  # bool, in the shape of the data
    name: str  # of the weights that it is made of; "" of none


class Part(NamedTuple):
    """What is computed of an operation."""

    node: Node
    ins: Sequence[Value]
    out: Value
    kept: Box  # of the result
    wants: Sequence[Box]  # of the operands


class Rule:
    """The rule of operations that are not known: every entry of the results depends on every entry of the operands."""

    compresses = False  # whether constant operands may have length 1 along axes along which they are the same

    def varies(self, node: Node, ins: Sequence[Value], shape: tuple[int, ...]) -> np.ndarray:
        """Returns which entries of a result of that shape depend on an operand that varies."""
        return np.ones(shape, bool)

    def wants(self, node: Node, ins: Sequence[Value], kept: Box) -> list[Box]:
        """Returns what of each operand must be there, so that `kept` of the result can be computed."""
        return [everything(value.data.shape) for value in ins]

    def run(self, part: Part, args: list[Any], constant: Constant) -> tuple[Any, Box]:
        """Returns (what is computed, its box), at least `kept`, from the operands' `wants`; None stands for nothing."""
        return bind(part.node, args), everything(part.out.data.shape)


class Elementwise(Rule):
    """An entry of the result depends on the operands' entries at its place."""

    compresses = True

    def varies(self, node, ins, shape):
        of = [value.varies for value in ins]
        if node.primitive.name == "mul":  # what is multiplied by a constant 0 is 0
            left, right = (~value.varies & (value.data == 0) for value in ins)
            return np.broadcast_to((of[0] & ~right) | (of[1] & ~left), shape)
        if node.primitive.name == "select_n" and not of[0].any():
            return np.broadcast_to(np.choose(ins[0].data.astype(int), of[1:]), shape)
        return np.broadcast_to(functools.reduce(np.logical_or, of), shape)

    def wants(self, node, ins, kept):
        return [_repeated(value.data.shape, kept[: value.data.ndim]) for value in ins]

    def run(self, part, args, constant):
        shape = size(part.kept)
        return bind(part.node, [jnp.broadcast_to(arg, shape) if np.ndim(arg) else arg for arg in args]), part.kept


class Reshape(Rule):
    """The entries in their order, in another shape."""

    def varies(self, node, ins, shape):
        return ins[0].varies.reshape(shape)

    def wants(self, node, ins, kept):
        return [bounding(entries(kept).reshape(ins[0].data.shape))]

    def run(self, part, args, constant):
        have, kept = entries(part.wants[0]).ravel(), entries(part.kept).ravel()
        flat = fit(args[0].reshape(-1), (have,), (kept,), part.out.data.ravel(), constant)
        return flat.reshape(size(part.kept)), part.kept


class Broadcast(Rule):
    """A value that is repeated along axes of length 1 and along new axes."""

    def varies(self, node, ins, shape):
        axes = node.params["broadcast_dimensions"]
        lengths = [ins[0].data.shape[axes.index(axis)] if axis in axes else 1 for axis in range(len(shape))]
        return np.broadcast_to(ins[0].varies.reshape(lengths), shape)

    def wants(self, node, ins, kept):
        return [_repeated(ins[0].data.shape, [kept[axis] for axis in node.params["broadcast_dimensions"]])]

    def run(self, part, args, constant):
        axes = part.node.params["broadcast_dimensions"]
        return lax.broadcast_in_dim(args[0], size(part.kept), axes), part.kept


class Transpose(Rule):
    """The axes in another order."""

    def varies(self, node, ins, shape):
        return ins[0].varies.transpose(node.params["permutation"])

    def wants(self, node, ins, kept):
        return [tuple(kept[axis] for axis in np.argsort(node.params["permutation"]))]

    def run(self, part, args, constant):
        return bind(part.node, args), part.kept


class Placed(Rule):
    """A slice, or a padding with a constant: along each axis, some entries in their order and perhaps others."""

    def varies(self, node, ins, shape):
        places = _places(node, ins[0].data.shape, shape)
        result = np.zeros(shape, bool)
        result[np.ix_(*(to for _, to in places))] = ins[0].varies[np.ix_(*(of for of, _ in places))]
        return result

    def wants(self, node, ins, kept):
        want = everything(ins[0].data.shape, False)
        places = _places(node, ins[0].data.shape, tuple(axis.size for axis in kept))
        for axis, (of, to), kept_there in zip(want, places, kept, strict=True):
            axis[of] = kept_there[to]
        return [want, *((),) * (len(ins) - 1)]

    def run(self, part, args, constant):
        have = everything(part.out.data.shape, False)
        places = _places(part.node, part.ins[0].data.shape, part.out.data.shape)
        for axis, (_, to), kept in zip(have, places, part.kept, strict=True):
            axis[to] = kept[to]
        return fit(args[0], have, part.kept, part.out.data, constant), part.kept


class Concatenate(Rule):
    """Values one after the other along an axis."""

    def varies(self, node, ins, shape):
        return np.concatenate([value.varies for value in ins], node.params["dimension"])

    def wants(self, node, ins, kept):
        axis = node.params["dimension"]
        ends = np.cumsum([value.data.shape[axis] for value in ins])[:-1]
        return [(*kept[:axis], there, *kept[axis + 1 :]) for there in np.split(kept[axis], ends)]

    def run(self, part, args, constant):
        return bind(part.node, [arg for arg in args if arg is not None]), part.kept


class Reduce(Rule):
    """A sum, a maximum and the like along whole axes, of which everything is read."""

    def varies(self, node, ins, shape):
        return ins[0].varies.any(node.params["axes"])

    def wants(self, node, ins, kept):
        want, rest = everything(ins[0].data.shape), iter(kept)
        return [tuple(all_ if axis in node.params["axes"] else next(rest) for axis, all_ in enumerate(want))]

    def run(self, part, args, constant):
        return bind(part.node, args), part.kept


class Pool(Rule):
    """A sum or a maximum of windows: everything is read along axes on which windows are longer than 1."""

    def varies(self, node, ins, shape):
        return np.broadcast_to(ins[0].varies.any(_windowed(node), keepdims=True), shape)

    def wants(self, node, ins, kept):
        want = everything(ins[0].data.shape)
        return [tuple(all_ if axis in _windowed(node) else kept[axis] for axis, all_ in enumerate(want))]

    def run(self, part, args, constant):
        have = everything(part.out.data.shape)
        windowed = _windowed(part.node)
        return bind(part.node, args), tuple(
            all_ if axis in windowed else part.kept[axis] for axis, all_ in enumerate(have)
        )


def fit(x: Any, have: Box, want: Box, data: np.ndarray, constant: Constant) -> Any:
    """Returns the box `want` of a value of which x is the box `have`; other entries are constant, those of `data`."""
    for axis, (there, wanted) in enumerate(zip(have, want, strict=True)):
        if (there != wanted).any():
            x = _take(x, np.where(there, np.cumsum(there) - 1, x.shape[axis])[wanted], axis)
    inside, others = filling(have, want, data)
    if not others.any():
        return x  # what is not there is 0 already
    return jnp.where(compressed(inside), x, constant(others, "constants"))


def filling(have: Box, want: Box, data: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns (which entries of the box `want` are in `have`, the data of the others, compressed)."""
    inside = entries(tuple(there[wanted] for there, wanted in zip(have, want, strict=True)))
    return inside, compressed(np.where(inside, np.zeros((), data.dtype), data[np.ix_(*want)]))


def everything(shape: Sequence[int], there: bool = True) -> Box:
    """Returns the box of all entries; or, with there=False, of none."""
    return tuple(np.full(length, there) for length in shape)


def entries(box: Box) -> np.ndarray:
    """Returns the box as one array of bools in the shape of the value."""
    return functools.reduce(np.multiply.outer, box, np.ones((), bool))


def bounding(those: np.ndarray) -> Box:
    """Returns the smallest box around the entries that are True."""
    axes = range(those.ndim)
    return tuple(np.asarray(those.any(tuple(other for other in axes if other != axis))) for axis in axes)


def size(box: Box) -> tuple[int, ...]:
    """Returns the shape of what is in the box."""
    return tuple(int(axis.sum()) for axis in box)


def compressed(array: np.ndarray) -> np.ndarray:
    """Returns the array with length 1 along every axis along which it is the same."""
    for axis in range(array.ndim):
        first = array.take([0], axis)
        array = first if (array == first).all() else array
    return array


def _take(x: Any, at: np.ndarray, axis: int) -> Any:
    """What is at these indices of an axis, in increasing order; 0 where an index is the length of the axis."""
    there, steps = at.max() < x.shape[axis], np.unique(np.diff(at))
    if there and steps.size <= 1:
        return lax.slice_in_dim(x, int(at[0]), int(at[-1]) + 1, int(steps[0]) if steps.size else 1, axis)
    at_axis = x.at[(slice(None),) * axis + (at,)]
    if there:
        return at_axis.get(mode="promise_in_bounds", unique_indices=True, indices_are_sorted=True)
    return at_axis.get(mode="fill", fill_value=0)


def _repeated(shape: Sequence[int], kept: Sequence[np.ndarray]) -> Box:
    """What is wanted of an operand of that shape, which is repeated along axes on which its length is 1."""
    return tuple(there if there.size == length else np.ones(1, bool) for length, there in zip(shape, kept, strict=True))


def _places(node: Node, shape: Sequence[int], out: Sequence[int]) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each axis, (indices of the operand, the indices of the result where they are)."""
    if node.primitive.name == "slice":
        strides = node.params["strides"] or (1,) * len(shape)
        limits = zip(node.params["start_indices"], node.params["limit_indices"], strides, strict=True)
        return [(of := np.arange(*limit), np.arange(of.size)) for limit in limits]
    places = []
    for length, (low, _, between), end in zip(shape, node.params["padding_config"], out, strict=True):
        to = int(low) + np.arange(length) * (int(between) + 1)
        of = np.flatnonzero((to >= 0) & (to < end))
        places.append((of, to[of]))
    return places


def _windowed(node: Node) -> tuple[int, ...]:
    """The axes along which windows are longer than 1, padded, or not at every entry."""
    names = ("window_dimensions", "window_strides", "window_dilation", "base_dilation", "padding")
    axes = zip(*(node.params[name] for name in names), strict=True)
    return tuple(i for i, (*ones, padding) in enumerate(axes) if any(n != 1 for n in ones) or any(padding))
