"""A trained network rebuilt inside a random one by masks only: the construction of the strong lottery ticket proofs.

A target layer [in, out] becomes two random layers, [in, in * width] and [in * width, out]: `width` candidates for each
input. The first mask keeps one weight of each intermediate neuron: neuron i * width + t reads input i, times u. The
second mask keeps, for each target weight, some of its input's candidates.

Because relu(u * x) = max(u, 0) * x for x >= 0, the candidates of the weight from i to j are the products
max(u, 0) * v. About half have u < 0 and are 0. All outputs share the u of an input; each has its own v. A weight stays
0 if each of its candidates is 0 or has the wrong sign, which (3/4)**width of the weights do. Such weights have the
largest errors.

**The inputs must not be negative** (pixels in [0, 1] are not); this is not checked here. There are no biases.

Source: Malach et al. 2020 (the network twice as deep; polynomial width); Pensia et al. 2020 and Orseau et al. 2020
(sums of candidates; logarithmic width). They also serve negative inputs, with candidates of both signs of u.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from supermask_jax.draws import symmetric_uniform
from supermask_jax.trees import Tree, by_path, leaf_key, ones_and_sizes

FORMS = ("product", "subset-sum")
WIDEST = 32
"""The most values `nearest_subsets` chooses from: a half then has 2**16 subsets."""


def random_network(key: jax.Array, target: Sequence[jax.Array], width: int) -> Tree:
    """Returns random weights to rebuild `target` in: {"Dense_0": {"kernel": [in, in * width]}, "Dense_1": ..., ...}.

    They fit `LeNet300100(classes, use_bias=False, hidden=hidden)`, where `hidden` lists the last axes of all kernels
    but the last. Weights are from U(-1, 1). Those of each second layer are multiplied by the target layer's largest
    magnitude, so that the products reach as far as its weights. (The theory divides the target by it instead; ReLU
    commutes with a positive factor.) Apart from that constant, a leaf's draw depends only on `key` and its path.

    Args:
      key: a `jax.random.key`, not the one that the target was drawn with.
      target: the kernels [in, out] of an MLP without biases, in the order of the data.
      width: candidates per input, >= 1.

    Raises:
      ValueError: the target is not such a chain of finite kernels, or the width is not a whole number >= 1.

    Source: Malach et al. 2020 (weights from U(-1, 1)).
    """
    kernels = _kernels(target)
    if width // 1 != width or width < 1:
        raise ValueError(f"width must be a whole number >= 1 (candidates per input), got {width}")
    weights = {}
    for layer, kernel in enumerate(kernels):
        inputs, outputs = kernel.shape
        neurons = inputs * int(width)
        scale = float(np.abs(kernel).max()) or 1.0  # a layer of zeros is matched by empty masks at any scale
        for name, shape, bound in zip(_pair(layer), ((inputs, neurons), (neurons, outputs)), (1.0, scale), strict=True):
            weights[name] = {"kernel": symmetric_uniform(leaf_key(key, f"{name}/kernel"), shape, bound)}
    return weights


def subset_masks(weights: Tree, target: Sequence[jax.Array], form: str) -> Tree:
    """Returns masks for `weights` with which they compute nearly the same as the target on inputs >= 0. Not for jit.

    "product" keeps, for each target weight, the one candidate nearest to it, or none where 0 is as near; a weight's
    error falls about as 1 / width. "subset-sum" keeps the candidates whose sum is nearest, the best subset; the error
    falls exponentially. Both keep one weight of every intermediate neuron, even where u < 0 makes it useless.

    Args:
      weights: made by `random_network` for this target, or weights of those shapes from any other distribution.
      target: the kernels [in, out] of an MLP without biases, in the order of the data.
      form: one of `FORMS`.

    Returns:
      A tree like `weights`, exactly 0 or 1.

    Raises:
      ValueError: the form is unknown, the target is not a chain of finite kernels, the weights do not fit it or are not
        finite, or the width is above `WIDEST` for "subset-sum".

    Source: Malach et al. 2020 for "product", Pensia et al. 2020 for "subset-sum".
    """
    if form not in FORMS:
        raise ValueError(f"form must be one of {', '.join(FORMS)}, got {form!r}")
    kernels, pairs, masks = _kernels(target), _pairs(weights), {}
    if [(first.shape[0], second.shape[1]) for first, second in pairs] != [kernel.shape for kernel in kernels]:
        raise ValueError(f"the weights do not fit the target {_shapes(kernels)}: they are {_shapes(sum(pairs, ()))}")
    choose = _nearest_product if form == "product" else _nearest_sum
    for layer, (kernel, (first, second)) in enumerate(zip(kernels, pairs, strict=True)):
        kept = choose(_products(first, second), kernel).reshape(second.shape)
        for name, mask in zip(_pair(layer), (_one_input_each(first), kept), strict=True):
            masks[name] = {"kernel": jnp.asarray(mask, jnp.asarray(weights[name]["kernel"]).dtype)}
    return masks


def effective_kernels(weights: Tree, masks: Tree) -> list[jax.Array]:
    """Returns the kernels [in, out], float32, of the MLP half as deep that equals weights * masks on inputs >= 0.

    Args:
      weights: pairs of layers, {"Dense_0": {"kernel": [in, in * width]}, "Dense_1": ..., ...}.
      masks: made by `subset_masks` for these weights.

    Raises:
      ValueError: the weights are not pairs of layers, a mask is not 0/1, or a first mask is not that of `subset_masks`:
        a neuron that reads anything but its one input computes no multiple of it.
    """
    ones_and_sizes(masks)  # raises
    pairs, kept = _pairs(weights), _pairs(masks)
    same = jax.tree.map(np.shape, pairs) == jax.tree.map(np.shape, kept)
    if not same or not all(np.array_equal(mask, _one_input_each(mask)) for mask, _ in kept):
        raise ValueError("the masks are not what subset_masks makes for these weights")
    products = [_products(*pair) for pair in pairs]
    return [
        jnp.asarray((product * mask.reshape(product.shape)).sum(axis=1), jnp.float32)
        for product, (_, mask) in zip(products, kept, strict=True)
    ]


def nearest_subsets(values: np.ndarray, sums: np.ndarray) -> np.ndarray:
    """Returns, for each row of `values`, the subset (possibly empty) whose sum is nearest to the row's entry of `sums`.

    It is exact up to the rounding of float64. Time grows as 2**(k / 2), and memory is bounded.

    Args:
      values: [n, k] numbers, k at most `WIDEST`.
      sums: [n] numbers.

    Returns:
      bool [n, k], True for the members of the subset.

    Raises:
      ValueError: k is above `WIDEST`.

    Source: Horowitz and Sahni 1974 (meet in the middle). Here the sums of both halves are sorted together, and
    neighbours are compared.
    """
    values, sums = np.asarray(values, np.float64), np.asarray(sums, np.float64)
    number, size = values.shape
    if size > WIDEST:
        raise ValueError(f"a nearest subset is looked for among at most {WIDEST} values, got {size}")
    chosen = np.empty((number, size), bool)
    rows = 2**19 >> (size + 1) // 2  # at a time: about a million sums of halves
    for start in range(0, number, rows):
        chosen[start : start + rows] = _nearest_subsets(values[start : start + rows], sums[start : start + rows])
    return chosen


def _nearest_subsets(values: np.ndarray, sums: np.ndarray) -> np.ndarray:
    half = values.shape[1] // 2
    reached = _subset_sums(values[:, :half])
    wanted = sums[:, None] - _subset_sums(values[:, half:])  # of the first half, by each subset of the second
    both = np.concatenate([reached, wanted], axis=1)
    order = np.argsort(both, axis=1, kind="stable")
    of_first = order < reached.shape[1]
    gaps = np.diff(np.take_along_axis(both, order, axis=1), axis=1)
    gaps[of_first[:, 1:] == of_first[:, :-1]] = np.inf
    place = gaps.argmin(axis=1)[:, None]
    met = np.take_along_axis(order, np.concatenate([place, place + 1], axis=1), axis=1)
    subsets = met.min(axis=1, keepdims=True), met.max(axis=1, keepdims=True) - reached.shape[1]
    sizes = half, values.shape[1] - half
    members = [(subset >> np.arange(size)) & 1 for subset, size in zip(subsets, sizes, strict=True)]
    return np.concatenate(members, axis=1) == 1


def _subset_sums(values: np.ndarray) -> np.ndarray:
    """[n, 2**k] sums of each row's subsets; bit t of a column's number says whether value t is in."""
    sums = np.zeros((len(values), 1))
    for value in values.T:
        sums = np.concatenate([sums, sums + value[:, None]], axis=1)
    return sums


def _nearest_product(products: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    none = np.zeros_like(products[:, :1])
    best = np.abs(np.concatenate([none, products], axis=1) - kernel[:, None]).argmin(axis=1)  # ties: none, the first
    return np.equal(best[:, None], 1 + np.arange(products.shape[1])[:, None])


def _nearest_sum(products: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    if products.shape[1] > WIDEST:
        raise ValueError(f"the width must be at most {WIDEST} for 'subset-sum', got {products.shape[1]}")
    kept = np.zeros(products.shape, bool)
    useful: np.ndarray = np.any(products, axis=2)  # half of the candidates are 0; a search without them is far quicker
    counts: np.ndarray = np.sum(useful, axis=1)
    for count in np.unique(counts[counts > 0]):
        inputs = np.flatnonzero(counts == count)
        which = np.nonzero(useful[inputs])[1].reshape(len(inputs), count)
        values = products[inputs[:, None], which].swapaxes(1, 2)  # [inputs, out, count]
        subsets = nearest_subsets(values.reshape(-1, count), kernel[inputs].ravel())
        kept[inputs[:, None], which] = subsets.reshape(values.shape).swapaxes(1, 2)
    return kept


def _products(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """[in, width, out] float64: max(u, 0) * v of each input's candidates, for each output."""
    inputs = len(first)
    gains = np.maximum(np.einsum("iit->it", first.reshape(inputs, inputs, -1)), 0).astype(np.float64)
    return gains[:, :, None] * second.reshape(*gains.shape, -1)


def _one_input_each(first: np.ndarray) -> np.ndarray:
    """[in, in * width] with one 1 in each column: neuron i * width + t reads input i."""
    inputs, neurons = first.shape
    return np.repeat(np.eye(inputs, dtype=np.float32), neurons // inputs, axis=1)


def _pair(layer: int) -> tuple[str, str]:
    return f"Dense_{2 * layer}", f"Dense_{2 * layer + 1}"


def _pairs(weights: Tree) -> list[tuple[np.ndarray, np.ndarray]]:
    leaves = by_path(weights)
    names = [f"Dense_{number}/kernel" for number in range(len(leaves))]  # counted: Dense_10 sorts before Dense_2
    if not leaves or len(leaves) % 2 or set(leaves) != set(names):
        raise ValueError(f"need Dense_0/kernel, Dense_1/kernel and so on, an even number, got {', '.join(leaves)}")
    kernels = _kernels([leaves[name] for name in names])
    if any(first.shape[1] % first.shape[0] for first in kernels[::2]):
        raise ValueError(f"each first layer must be [in, in * width], got {_shapes(kernels)}")
    return list(zip(kernels[::2], kernels[1::2], strict=True))


def _kernels(target: Sequence[jax.Array]) -> list[np.ndarray]:
    if isinstance(target, Mapping):
        raise ValueError("kernels must be a sequence in the order of the data; a mapping has no such order")
    kernels = [np.asarray(kernel, np.float32) for kernel in target]
    if not kernels or any(kernel.ndim != 2 or not kernel.size for kernel in kernels):
        raise ValueError(f"kernels must be [in, out] each, and there are no biases, got {_shapes(kernels)}")
    if any(before.shape[1] != after.shape[0] for before, after in pairwise(kernels)):
        raise ValueError(f"each kernel must read what the one before it puts out, got {_shapes(kernels)}")
    if not all(np.isfinite(kernel).all() for kernel in kernels):
        raise ValueError("kernels must be finite; there is a NaN or an infinity")
    return kernels


def _shapes(kernels: Sequence[Any]) -> str:
    return ", ".join(str(list(np.shape(kernel))) for kernel in kernels) or "none"
