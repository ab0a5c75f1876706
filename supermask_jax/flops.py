"""The cost of a masked network: its parameters and its FLOPs, counted in the traced network.

A leaf whose products cannot be counted raises: leaving it out would make the count wrong silently.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from supermask_jax.trees import Tree, by_path, ones_and_sizes
from supermask_jax.usage import multiplications


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
      ValueError: a leaf with a mask is never multiplied with data, or no leaf is; how often each weight of a kernel is
        used is not known (it is cut, shifted or mixed with another leaf before it is multiplied, or that happens inside
        `lax.cond` or `lax.while_loop`); a mask has no weight, does not fit it, or is not 0/1.
    """
    kept = _kept(weights, masks)
    products = multiplications(apply_fn, weights, jax.ShapeDtypeStruct((1, *input_shape), jnp.float32))
    unused = [path for path in by_path(masks) if not products[path]]
    if unused or not any(products.values()):
        raise ValueError(f"apply_fn multiplies the inputs with none of the weights of {', '.join(unused or kept)}")
    return {path: 2 * products[path] * ones // size for path, (ones, size) in kept.items() if products[path]}


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
