"""The cost of a masked network: its parameters and its FLOPs, counted in the traced network.

Each leaf of the weights is followed, through operations that only move its numbers, to the matrix products and
convolutions that use it. A leaf that cannot be followed raises: leaving it out would make the count wrong silently.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.extend import core

from supermask_jax.trees import Tree, by_path, ones_and_sizes


class _Kernel(NamedTuple):
    """What was made of one leaf and no data."""

    path: str
    changed_by: str | None = None  # the primitive after which its numbers are no longer the leaf's


_Known: TypeAlias = _Kernel | Literal["data"] | None  # of a value: from a leaf; from the network's inputs; from neither
_MOVES = {
    *("reshape", "transpose", "squeeze", "broadcast_in_dim", "rev"),
    *("convert_element_type", "copy", "stop_gradient", "sharding_constraint"),
}
_PRODUCTS = {"dot_general", "conv_general_dilated"}


def parameter_count(weights: Tree, masks: Tree) -> int:
    """Returns how many parameters the masked network has: the ones of the masks, and every entry of unmasked leaves.

    Args:
      weights: every parameter of the network, biases included; shapes are enough.
      masks: 0 or 1, None at leaves that are not prunable; or None for the dense network. A mask of length 1 along an
        axis of its weight (one entry for each output unit, say) stands for all entries along that axis.

    Raises:
      ValueError: a mask that has no weight, does not fit it, or is not 0/1.
    """
    return sum(ones for ones, _ in _kept(weights, masks).values())


def flops(apply_fn: Callable[[Tree, jax.Array], Tree], weights: Tree, masks: Tree, input_shape: tuple[int, ...]) -> int:
    """Returns the FLOPs of one example's forward pass through the masked network: 2 for each product of a kept weight.

    Only products of kernels with data are counted, in dense layers, convolutions and attention: no biases, activations,
    normalisation or pooling. `layer_flops` has the figures of each leaf, whose sum this is.

    Args:
      apply_fn: apply_fn(params, inputs) -> outputs; it is traced, not run.
      weights: every parameter of the network; shapes are enough.
      masks: 0 or 1, None at leaves that are not prunable; or None for the dense network. A mask of length 1 along an
        axis of its weight stands for all entries along that axis.
      input_shape: of one example, without the batch axis: (28, 28, 1). Inputs are float32 [1, *input_shape].

    Raises:
      ValueError: a leaf with a mask is never multiplied with data, or no leaf is; the products of a kernel cannot be
        counted; a mask has no weight, does not fit it, or is not 0/1.
    """
    return sum(layer_flops(apply_fn, weights, masks, input_shape).values())


def layer_flops(
    apply_fn: Callable[[Tree, jax.Array], Tree], weights: Tree, masks: Tree, input_shape: tuple[int, ...]
) -> dict[str, int]:
    """Returns {path: FLOPs} of one example's forward pass: 2 for each multiplication (and addition) of a kept weight.

    The count is exact for the products of kernels with data, in dense layers, convolutions and attention. A kernel that
    is used twice counts twice, one under `lax.scan` in each iteration. Nothing else is counted: biases, activations,
    normalisation, pooling, products of data with data. Products with the zeros of padding count like others, and so do
    those that a transposed convolution puts between its inputs.

    Args:
      apply_fn: apply_fn(params, inputs) -> outputs; it is traced, not run.
      weights: every parameter of the network; shapes are enough.
      masks: 0 or 1, None at leaves that are not prunable; or None for the dense network. A mask of length 1 along an
        axis of its weight (one entry for each output unit, say) stands for all entries along that axis.
      input_shape: of one example, without the batch axis: (28, 28, 1). Inputs are float32 [1, *input_shape].

    Returns:
      Only leaves that are multiplied with data.

    Raises:
      ValueError: a leaf with a mask is never multiplied with data, or no leaf is; a kernel is changed before it is
        multiplied (other than in shape, order of axes or dtype), or multiplied inside `lax.cond` or `lax.while_loop`,
        so that its products cannot be counted; a mask has no weight, does not fit it, or is not 0/1.
    """
    kept = _kept(weights, masks)
    products = products_with_data(apply_fn, weights, input_shape)
    unused = [path for path in by_path(masks) if not products[path]]
    if unused or not any(products.values()):
        raise ValueError(f"apply_fn multiplies the inputs with none of the weights of {', '.join(unused or kept)}")
    return {path: 2 * products[path] * ones // size for path, (ones, size) in kept.items() if products[path]}


def products_with_data(
    apply_fn: Callable[[Tree, jax.Array], Tree], weights: Tree, input_shape: tuple[int, ...]
) -> dict[str, int]:
    """Returns {path: multiplications} of each leaf's weights with data in one example's forward pass; 0 where none is.

    Every weight of a leaf is multiplied equally often: its size divides the number of multiplications.

    Args:
      apply_fn: apply_fn(params, inputs) -> outputs; it is traced, not run.
      weights: every parameter of the network; shapes are enough.
      input_shape: of one example, without the batch axis: (28, 28, 1). Inputs are float32 [1, *input_shape].

    Raises:
      ValueError: a leaf is changed before it is multiplied with data (other than in shape, order of axes or dtype), or
        may be multiplied where the number of times is not known (`lax.cond`, `lax.while_loop`).
    """
    products = dict.fromkeys(by_path(weights), 0)
    inputs = jax.ShapeDtypeStruct((1, *input_shape), jnp.float32)
    jaxpr = jax.make_jaxpr(apply_fn)(weights, inputs).jaxpr
    _count(jaxpr, [*map(_Kernel, products), "data"], 1, products)
    return products


def _count(jaxpr: core.Jaxpr, inputs: list[_Known], times: int, products: dict[str, int]) -> list[_Known]:
    """Adds what the jaxpr multiplies in `times` runs to `products`; returns what is known of its outputs."""
    known: dict[core.Var, _Known] = dict(zip(jaxpr.invars, inputs, strict=True))

    def known_of(variables: Sequence[Any]) -> list[_Known]:
        return [None if isinstance(v, core.Literal) else known.get(v) for v in variables]

    for eqn in jaxpr.eqns:
        name, operands = eqn.primitive.name, known_of(eqn.invars)
        inner = list(core.jaxprs_in_params(eqn.params))
        kernels = [operand for operand in operands if isinstance(operand, _Kernel)]
        data = "data" in operands
        out: _Known = "data" if data else _after(name, kernels[0]) if kernels else None
        outs: list[_Known] = [out] * len(eqn.outvars)
        if name in _PRODUCTS and data and kernels:
            (kernel,) = kernels
            if kernel.changed_by:
                raise ValueError(
                    f"{kernel.path!r} goes through {kernel.changed_by!r} before it is multiplied with data: "
                    "how often each of its weights is used cannot be counted"
                )
            products[kernel.path] += times * _multiplications(eqn)
        elif name == "scan":
            carry = slice(eqn.params["num_consts"], eqn.params["num_consts"] + eqn.params["num_carry"])
            if data:  # from the second iteration on, whatever it was in the first
                operands[carry] = ["data"] * eqn.params["num_carry"]
            _count(inner[0], operands, times * eqn.params["length"], products)
        elif len(inner) == 1 and _shapes(inner[0].invars) == _shapes(eqn.invars):  # jit, remat, custom derivatives
            outs = _count(inner[0], operands, times, products)
        elif data and kernels and any(map(_multiplies, inner)):
            paths = ", ".join(kernel.path for kernel in kernels)
            raise ValueError(f"products inside {name!r}, which uses {paths}, cannot be counted")
        known |= zip(eqn.outvars, outs, strict=True)
    return known_of(jaxpr.outvars)


def _after(name: str, kernel: _Kernel) -> _Kernel:
    return kernel if name in _MOVES or kernel.changed_by else kernel._replace(changed_by=name)


def _multiplications(eqn: core.JaxprEqn) -> int:
    """The size of what comes out, times the number of products that each entry sums."""
    left, right = _shapes(eqn.invars)
    dimensions = eqn.params["dimension_numbers"]
    if eqn.primitive.name == "dot_general":
        summed = math.prod(left[axis] for axis in dimensions[0][0])
    else:
        summed = math.prod(right[axis] for axis in dimensions.rhs_spec[1:])
    return summed * math.prod(_shapes(eqn.outvars)[0])


def _multiplies(jaxpr: core.Jaxpr) -> bool:
    return any(
        eqn.primitive.name in _PRODUCTS or any(map(_multiplies, core.jaxprs_in_params(eqn.params)))
        for eqn in jaxpr.eqns
    )


def _shapes(variables: Sequence[Any]) -> list[tuple[int, ...]]:
    return [getattr(v.aval, "shape", ()) for v in variables]


def _kept(weights: Tree, masks: Tree) -> dict[str, tuple[int, int]]:
    """{path: (weights kept, size)} of every leaf of the weights."""
    shapes = {path: jnp.shape(leaf) for path, leaf in by_path(weights).items()}
    counts = {path: (math.prod(shape), math.prod(shape)) for path, shape in shapes.items()}
    for path, mask in by_path(masks).items():
        if path not in shapes:
            raise ValueError(f"there is a mask of {path!r} but no weight; there are: {', '.join(shapes)}")
        shape, weight = jnp.shape(mask), shapes[path]
        if len(shape) != len(weight) or any(a not in (1, b) for a, b in zip(shape, weight, strict=True)):
            raise ValueError(f"the mask of {path!r} has shape {shape}, its weight {weight}")
        ones, size = ones_and_sizes({path: mask})[path]
        counts[path] = (ones * counts[path][1] // max(size, 1), counts[path][1])
    return counts
