"""Rules of matrix products and convolutions of data with constant kernels, and the table of all rules.

A constant that a product reads becomes a part of what is added to the product.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from supermask_jax.channels import (
    Box,
    Broadcast,
    Concatenate,
    Constant,
    Elementwise,
    Part,
    Placed,
    Pool,
    Reduce,
    Reshape,
    Rule,
    Transpose,
    Value,
    bounding,
    compressed,
    entries,
    everything,
)
from supermask_jax.graph import Node, bind

MOST = 0.5
"""Constant channels whose removal costs time of its own are removed where at most this part of the channels is left."""


class Dot(Rule):
    """A product with a constant matrix, summed over one axis or several."""

    def varies(self, node, ins, shape):
        left, right = (_matters(value).astype(np.float32) for value in ins)
        return np.tensordot(left, right, _summed(node)) > 0

    def wants(self, node, ins, kept):
        summed, free, read = _summed(node), _free(node, ins, kept), []
        for value, over, rows in zip(ins, summed, free, strict=True):
            used = _matters(value)[np.ix_(*_joined(rows, over, _whole(value, over)))]
            used = np.moveaxis(used, over, range(len(over)))
            read.append(np.asarray(used.any(tuple(range(len(over), used.ndim)))))
        both = bounding(read[0] & read[1])
        return [_joined(rows, over, both) for rows, over in zip(free, summed, strict=True)]

    def run(self, part, args, constant):
        summed, factors = _summed(part.node), []
        free = _free(part.node, part.ins, part.kept)
        for value, over, rows, want in zip(part.ins, summed, free, part.wants, strict=True):
            data = value.data.astype(np.float64)
            if value.varies.any():  # what the product lacks is constant, or is not read
                data = np.where(entries(want) | value.varies, 0, data)
            factors.append(data[np.ix_(*_joined(rows, over, _whole(value, over)))])
        folded = np.tensordot(factors[0], factors[1], summed)
        return _plus(bind(part.node, args), folded, part, constant), part.kept


class Convolution(Rule):
    """A convolution with a constant kernel. The groups of a grouped one are computed whole, or not at all."""

    def varies(self, node, ins, shape):
        reads, inputs = _connections(node, ins[1])
        axis = node.params["dimension_numbers"].lhs_spec[1]
        varying = ins[0].varies.any(tuple(i for i in range(ins[0].varies.ndim) if i != axis))
        return np.broadcast_to(_along((reads & varying[inputs]).any(1), node, len(shape)), shape)

    def wants(self, node, ins, kept):
        dimensions = node.params["dimension_numbers"]
        image, kernel = everything(ins[0].data.shape), everything(ins[1].data.shape)
        reads, inputs = _connections(node, ins[1])
        outputs = _outputs(node, kept, inputs)
        kernel[dimensions.rhs_spec[0]][:] = outputs
        channels = image[dimensions.lhs_spec[1]]
        if node.params["feature_group_count"] != 1:
            channels[:] = np.isin(np.arange(channels.size), inputs[outputs])
            return [image, kernel]
        read = reads[outputs].any(0)
        varies, constants = _per_channel(ins[0], dimensions.lhs_spec[1])
        channels[:] = read & varies
        if _is_padded(node) and channels.sum() > MOST * (read & (varies | (constants != 0))).sum():
            channels[:] = read & (varies | (constants != 0))
        kernel[dimensions.rhs_spec[1]][:] = channels
        return [image, kernel]

    def run(self, part, args, constant):
        node, (image, kernel), dimensions = part.node, part.ins, part.node.params["dimension_numbers"]
        _, inputs = _connections(node, kernel)
        outputs = _outputs(node, part.kept, inputs)
        have = everything(part.out.data.shape)
        have[dimensions.out_spec[1]][:] = outputs
        groups = node.params["feature_group_count"]
        if groups != 1:  # constants are among the operands
            return bind(node, args, feature_group_count=int(outputs.sum()) * groups // outputs.size), have
        _, constants = _per_channel(image, dimensions.lhs_spec[1])
        constants = np.where(part.wants[0][dimensions.lhs_spec[1]], 0, constants)
        weights = np.moveaxis(kernel.data.astype(np.float64), dimensions.rhs_spec[:2], (0, 1))[outputs]
        folded = np.einsum("oi...,i->o...", weights, constants)
        result = bind(node, args)
        if not _is_padded(node) or not folded.any():
            sums = folded.sum(tuple(range(1, folded.ndim)))
            return _plus(result, _along(sums, node, folded.ndim + 1), part, constant), have
        # Near the border the kernel reads padding and not the constant, so what is added is a convolution of ones.
        folded = np.moveaxis(folded[:, None], (0, 1), dimensions.rhs_spec[:2]).astype(kernel.data.dtype)
        shape = [1 if axis in dimensions.lhs_spec[:2] else n for axis, n in enumerate(image.data.shape)]
        ones = np.ones(shape, image.data.dtype)
        return result + bind(node, [ones, constant(folded, f"{kernel.name} folded")]), have


def rule_of(node: Node, ins: Sequence[Value]) -> Rule:
    """Returns the rule of the operation; that of unknown ones where its operands are not as its own rule needs them."""
    rule = _RULES.get(node.primitive.name, _UNKNOWN)
    varying = [bool(value.varies.any()) for value in ins]
    known = True
    if isinstance(rule, Dot):
        known = not any(node.params["dimension_numbers"][1]) and not all(varying)
    elif isinstance(rule, Convolution):
        known = varying == [True, False] and node.params["batch_group_count"] == 1
    elif isinstance(rule, Placed):
        known = not any(varying[1:])
    return rule if known else _UNKNOWN


def _matters(value: Value) -> np.ndarray:
    """Which entries of a factor of a product make it depend on the input: of data those that vary, of weights not 0."""
    return value.varies if value.varies.any() else value.data != 0


def _summed(node: Node) -> tuple[Sequence[int], Sequence[int]]:
    """The axes of each factor over which a product is summed."""
    return node.params["dimension_numbers"][0]


def _free(node: Node, ins: Sequence[Value], kept: Box) -> list[Box]:
    """The axes of a product's box that come from each factor."""
    first = ins[0].data.ndim - len(_summed(node)[0])
    return [kept[:first], kept[first:]]


def _whole(value: Value, axes: Sequence[int]) -> Box:
    return everything([value.data.shape[axis] for axis in axes])


def _joined(free: Box, over: Sequence[int], summed: Box) -> Box:
    """The box of a factor: `summed` at the axes `over`, and the free axes in order at the others."""
    rest, at = iter(free), dict(zip(over, summed, strict=True))
    return tuple(at[axis] if axis in at else next(rest) for axis in range(len(free) + len(over)))


def _plus(product: Any, added: np.ndarray, part: Part, constant: Constant) -> Any:
    if not added.any():
        return product
    name = next(value.name for value in part.ins if not value.varies.any())
    return product + constant(compressed(added.astype(part.out.data.dtype)), f"{name} folded")


def _connections(node: Node, kernel: Value) -> tuple[np.ndarray, np.ndarray]:
    """([out, inputs of a group] whether a weight is not 0, [out, inputs of a group] the input channel)."""
    weights = np.moveaxis(kernel.data, node.params["dimension_numbers"].rhs_spec[:2], (0, 1))
    reads = (weights != 0).any(tuple(range(2, weights.ndim)))
    groups, (outputs, width) = node.params["feature_group_count"], reads.shape
    return reads, np.repeat(np.arange(groups), outputs // groups)[:, None] * width + np.arange(width)


def _outputs(node: Node, kept: Box, inputs: np.ndarray) -> np.ndarray:
    """Which output channels are computed: in groups, all of a group."""
    outputs = kept[node.params["dimension_numbers"].out_spec[1]]
    return outputs if node.params["feature_group_count"] == 1 else np.isin(inputs[:, 0], inputs[outputs, 0])


def _is_padded(node: Node) -> bool:
    return any(map(any, node.params["padding"])) or any(n != 1 for n in node.params["lhs_dilation"])


def _per_channel(image: Value, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """([channels] whether it depends on the input or on the pixel, [channels] the constants of the others, else 0)."""
    pixels = tuple(i for i in range(image.data.ndim) if i != axis)
    least, most = image.data.min(pixels), image.data.max(pixels)
    varies = image.varies.any(pixels) | (least != most)
    return varies, np.where(varies, 0, most).astype(np.float64)


def _along(channels: np.ndarray, node: Node, rank: int) -> np.ndarray:
    """[channels] of a convolution's result, in its rank."""
    axis = node.params["dimension_numbers"].out_spec[1]
    return channels.reshape(tuple(-1 if i == axis else 1 for i in range(rank)))


_UNKNOWN = Rule()
_RULES: dict[str, Rule] = {
    **dict.fromkeys(("reshape", "squeeze"), Reshape()),
    **dict.fromkeys(("slice", "pad"), Placed()),
    "broadcast_in_dim": Broadcast(),
    "concatenate": Concatenate(),
    "conv_general_dilated": Convolution(),
    "dot_general": Dot(),
    "transpose": Transpose(),
    **dict.fromkeys(
        ("argmax", "argmin", *(f"reduce_{of}" for of in ("and", "max", "min", "or", "prod", "sum"))), Reduce()
    ),
    **dict.fromkeys((f"reduce_window_{of}" for of in ("max", "min", "sum")), Pool()),
    **dict.fromkeys(
        (
            *(
                "abs",
                "acos",
                "acosh",
                "add",
                "add_any",
                "and",
                "asin",
                "asinh",
                "atan",
                "atan2",
                "atanh",
                "cbrt",
                "ceil",
            ),
            *("clamp", "convert_element_type", "copy", "cos", "cosh", "div", "eq", "erf", "erf_inv", "erfc", "exp"),
            *("exp2", "expm1", "floor", "ge", "gt", "integer_pow", "is_finite", "le", "lgamma", "log", "log1p"),
            *("logistic", "lt", "max", "min", "mul", "ne", "neg", "nextafter", "not", "or", "pow", "reduce_precision"),
            *("rem", "round", "rsqrt", "select_n", "sign", "sin", "sinh", "sqrt", "square", "stop_gradient", "sub"),
            *("tan", "tanh", "xor"),
        ),
        Elementwise(),
    ),
}
