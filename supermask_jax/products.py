"""How often each weight is multiplied with data, read from the traced network: what its FLOPs are counted from.

A leaf of the weights is followed through what only moves its numbers to the matrix product or convolution that uses it.
Where that is not possible it raises: a layer left out silently would be a wrong count.
"""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core

from supermask_jax.trees import Tree, by_path


class _Kernel(NamedTuple):
    """What was made of one leaf and no data."""

    path: str
    changed_by: str | None = None  # the primitive after which its numbers are no longer the leaf's


_Known = _Kernel | Literal["data"] | None  # of a value: from a leaf; from the network's inputs; from neither
_MOVES = {
    *("reshape", "transpose", "squeeze", "broadcast_in_dim", "rev"),
    *("convert_element_type", "copy", "stop_gradient", "sharding_constraint"),
}
_PRODUCTS = {"dot_general", "conv_general_dilated"}


def products_with_data(
    apply_fn: Callable[[Tree, jax.Array], Tree], weights: Tree, input_shape: tuple[int, ...]
) -> dict[str, int]:
    """{path: multiplications} of all weights of each leaf with data, in one example's forward pass; 0 where none is.

    Every weight of a leaf is multiplied equally often: the multiplications divide by its size.

    Args:
      apply_fn: (params, inputs) -> outputs; it is traced, not run.
      weights: every parameter of the network; shapes are enough.
      input_shape: of one example, without the batch axis, which `apply_fn` gets all the same. Inputs are float32.

    Raises:
      ValueError: a leaf is changed before it is multiplied with data (by more than its shape, the order of its entries
        or its dtype), or may be multiplied where the number of times is not known (`lax.cond`, `lax.while_loop`).
    """
    products = dict.fromkeys(by_path(weights), 0)
    inputs = jax.ShapeDtypeStruct((1, *input_shape), jnp.float32)
    jaxpr = jax.make_jaxpr(apply_fn)(weights, inputs).jaxpr
    _count(jaxpr, [*map(_Kernel, products), "data"], 1, products)
    return products


def _count(jaxpr: core.Jaxpr, inputs: list[_Known], times: int, products: dict[str, int]) -> list[_Known]:
    """Adds what the jaxpr multiplies in `times` runs to `products`; returns what is known of its outputs."""
    known: dict[core.Var, _Known] = dict(zip(jaxpr.invars, inputs, strict=True))

    def known_of(variables) -> list[_Known]:
        return [None if isinstance(v, core.Literal) else known.get(v) for v in variables]

    for eqn in jaxpr.eqns:
        name, operands = eqn.primitive.name, known_of(eqn.invars)
        inner = list(core.jaxprs_in_params(eqn.params))
        kernels = [operand for operand in operands if isinstance(operand, _Kernel)]
        data = "data" in operands
        out = "data" if data else _after(name, kernels[0]) if kernels else None
        outs = [out] * len(eqn.outvars)
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
    return summed * math.prod(eqn.outvars[0].aval.shape)


def _multiplies(jaxpr: core.Jaxpr) -> bool:
    return any(
        eqn.primitive.name in _PRODUCTS or any(map(_multiplies, core.jaxprs_in_params(eqn.params)))
        for eqn in jaxpr.eqns
    )


def _shapes(variables) -> list[tuple[int, ...]]:
    return [getattr(v.aval, "shape", ()) for v in variables]
