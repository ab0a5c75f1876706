"""How a network is judged beside its accuracy: calibration, out-of-distribution detection, robustness, gradients, cost.

Logits are [n, classes] floats, labels [n] integers, sums are in float32. What is array work runs under jit as well;
values are checked only where they are concrete. The choice of measures is that of Liu et al. 2022.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from supermask_jax.products import products_with_data
from supermask_jax.trees import Tree, by_path, ones_and_sizes


def accuracy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Fraction of examples whose highest logit is the label's; of tied logits the first counts.

    Errors as in `negative_log_likelihood`.
    """
    logits, labels = _classified(logits, labels)
    return jnp.mean(jnp.argmax(logits, axis=1) == labels)


def negative_log_likelihood(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean of -log softmax(logits)[label], in nats.

    Raises:
      ValueError: no example, shapes that do not fit, labels that are no integers or no class, a row of logits whose
        highest is not finite (NaN included).
    """
    logits, labels = _classified(logits, labels)
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1))


def brier(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean over examples of the sum over classes of (probability - one-hot label)**2, in [0, 2].

    Errors as in `negative_log_likelihood`. Source: Brier 1950. Some divide by the number of classes; this does not.
    """
    logits, labels = _classified(logits, labels)
    return jnp.mean(jnp.sum(jnp.square(jax.nn.softmax(logits) - jax.nn.one_hot(labels, logits.shape[1])), axis=1))


class Reliability(NamedTuple):
    """What a reliability diagram draws; bin i of [bins] holds confidences in (i / bins, (i + 1) / bins]."""

    count: jax.Array  # int32, the examples in the bin
    confidence: jax.Array  # mean highest probability, 0 in an empty bin
    accuracy: jax.Array  # fraction classified correctly, 0 in an empty bin


def reliability(logits: jax.Array, labels: jax.Array, bins: int = 15) -> Reliability:
    """Count, mean confidence and accuracy of the examples in each bin of confidence, of equal widths.

    The confidence is the highest softmax probability; it is compared with the float32 nearest to each bin's edge.

    Raises:
      ValueError: fewer bins than one, and as in `negative_log_likelihood`.

    Source: Guo et al. 2017, section 2.
    """
    logits, labels = _classified(logits, labels)
    if not (isinstance(bins, int | np.integer) and bins >= 1):
        raise ValueError(f"the number of bins must be a whole number of 1 or more, got {bins}")
    confidence = max_softmax(logits)
    edges = jnp.asarray(np.arange(1, bins) / bins, jnp.float32)
    # A masked sum over [bins, n] adds pairwise; scattered into bins, like numbers pile up one by one and round alike.
    inside = jnp.searchsorted(edges, confidence)[None, :] == jnp.arange(bins)[:, None]
    count = jnp.sum(inside, axis=1, dtype=jnp.int32)
    correct = jnp.sum(inside & (jnp.argmax(logits, axis=1) == labels)[None, :], axis=1, dtype=jnp.int32)
    total = jnp.sum(jnp.where(inside, confidence[None, :], 0), axis=1)
    some = jnp.maximum(count, 1).astype(jnp.float32)
    return Reliability(count, total / some, correct.astype(jnp.float32) / some)


def expected_calibration_error(logits: jax.Array, labels: jax.Array, bins: int = 15) -> jax.Array:
    """Mean over examples of abs(accuracy - mean confidence) of the bin that each is in; an empty bin adds nothing.

    Arguments and errors as in `reliability`. Source: Naeini et al. 2015; Guo et al. 2017, equation 3.
    """
    count, confidence, correct = reliability(logits, labels, bins)
    return jnp.sum(count * jnp.abs(correct - confidence)) / jnp.sum(count)


def max_softmax(logits: jax.Array) -> jax.Array:
    """[n] the highest softmax probability of each row: how much the network takes an input for one that it knows.

    Errors as in `negative_log_likelihood`. Source: Hendrycks & Gimpel 2017, section 3.
    """
    return jnp.max(jax.nn.softmax(_checked_logits(logits)), axis=1)


def auroc(scores_in: jax.Array, scores_out: jax.Array) -> float:
    """Probability that an in-distribution score is above an out-of-distribution one, ties counting one half.

    The area under the ROC curve with in-distribution as the positive class; exact, by ranks, on the host.

    Args:
      scores_in: [n] of in-distribution inputs, higher = taken for known; such as `max_softmax`.
      scores_out: [m] of the others.

    Raises:
      ValueError: scores that are not one axis, or none, or NaN.

    Source: Hendrycks & Gimpel 2017, section 2 (the measure); Mann & Whitney 1947 (the ranks).
    """
    inside, outside = (np.asarray(scores, np.float64) for scores in (scores_in, scores_out))
    for name, scores in (("scores_in", inside), ("scores_out", outside)):
        if scores.ndim != 1 or scores.size == 0 or np.isnan(scores).any():
            raise ValueError(f"{name} must be [n] numbers, at least one and none NaN; got shape {scores.shape}")
    outside = np.sort(outside)
    below, not_above = (int(np.searchsorted(outside, inside, side).sum()) for side in ("left", "right"))
    return (below + not_above) / (2 * inside.size * outside.size)


def fgsm(
    loss_fn: Callable[[jax.Array, jax.Array], jax.Array], images: jax.Array, labels: jax.Array, epsilon: float
) -> jax.Array:
    """Adversarial images clip(x + epsilon * sign(dL/dx), 0, 1); a pixel whose gradient is 0 stays as it is.

    Args:
      loss_fn: (images, labels) -> scalar, the mean loss; **it** normalises the images, if the network wants that.
      images: [n, ...] floats in [0, 1], before normalisation.
      labels: what `loss_fn` takes.
      epsilon: the most that a pixel changes, on the scale of [0, 1].

    Raises:
      ValueError: images that are not floats in [0, 1], a negative epsilon, a gradient that is NaN.

    Source: Goodfellow et al. 2015, section 4; clipped as Kurakin et al. 2017 do.
    """
    images = jnp.asarray(images)
    if not jnp.issubdtype(images.dtype, jnp.floating) or not _holds(images, lambda x: (x >= 0) & (x <= 1)):
        raise ValueError("images must be floats in [0, 1], before normalisation: loss_fn normalises")
    if not _holds(epsilon, lambda value: value >= 0):
        raise ValueError(f"epsilon must not be negative, got {epsilon}")
    gradient = jax.grad(loss_fn)(images, labels)
    if not _holds(gradient, lambda x: ~np.isnan(x)):
        raise ValueError("the loss has a gradient that is NaN")
    return jnp.clip(images + jnp.asarray(epsilon, images.dtype) * jnp.sign(gradient), 0, 1)


def gradient_flow(gradient: Tree, masks: Tree) -> jax.Array:
    """L2 norm of the loss's gradient over the active weights, those whose mask is 1.

    Leaves that have no mask (biases, normalisation) are left out, so that methods compare on the weights that they
    choose among. Without any mask, for a dense network, every leaf counts.

    Args:
      gradient: tree of the gradient with respect to the **parameters**, weights * masks; not to scores.
      masks: a tree like it of 0 or 1, None at leaves that are not prunable; or None.

    Raises:
      ValueError: the trees differ, or masks are not 0/1.

    Source: Evci et al. 2020, "Gradient flow in sparse neural networks"; Liu et al. 2022 (gradient norms of pruned
    networks).
    """
    chosen = by_path(masks)
    if not chosen:
        masks = jax.tree.map(jnp.ones_like, gradient)
    elif not any(isinstance(mask, jax.core.Tracer) for mask in chosen.values()):
        ones_and_sizes(masks)

    def square(slope: jax.Array, mask: jax.Array | None) -> jax.Array | None:
        if mask is None:
            return None
        active = jnp.broadcast_to(jnp.asarray(mask), slope.shape) != 0
        return jnp.sum(jnp.square(slope.astype(jnp.float32)), where=active)

    return jnp.sqrt(sum(jax.tree.leaves(jax.tree.map(square, gradient, masks))))


def parameter_count(weights: Tree, masks: Tree) -> int:
    """How many parameters the masked network has: the ones of the masks, and all of a leaf that has none.

    Args:
      weights: every parameter of the network, biases included; shapes are enough.
      masks: 0 or 1, None at leaves that are not prunable, or None for the dense network. A mask that has length 1
        along an axis of its weight (one for each unit, say) stands for all along that axis.

    Raises:
      ValueError: a mask that has no weight, does not fit it, or is not 0/1.
    """
    return sum(ones for ones, _ in _kept(weights, masks).values())


def flops(apply_fn: Callable[[Tree, jax.Array], Tree], weights: Tree, masks: Tree, input_shape: tuple[int, ...]) -> int:
    """FLOPs of one example's forward pass through the masked network: the sum of `layer_flops`, which see."""
    return sum(layer_flops(apply_fn, weights, masks, input_shape).values())


def layer_flops(
    apply_fn: Callable[[Tree, jax.Array], Tree], weights: Tree, masks: Tree, input_shape: tuple[int, ...]
) -> dict[str, int]:
    """{path: FLOPs} of one example's forward pass: 2 for each multiplication (and addition) of a kept weight.

    Exact for the products of kernels with data, in dense layers, convolutions and attention; a kernel that is used
    twice counts twice, one under `lax.scan` in each iteration. Nothing else is counted: biases, activations,
    normalisation, pooling, products of data with data. As is usual, products with the zeros of padding, and with those
    that a transposed convolution puts between its inputs, count as others do.

    Args:
      apply_fn: (params, inputs) -> outputs; it is traced, not run.
      weights: every parameter of the network; shapes are enough.
      masks: as in `parameter_count`.
      input_shape: of one example, without the batch axis, which `apply_fn` gets all the same. Inputs are float32.

    Returns:
      Only leaves that are multiplied with data.

    Raises:
      ValueError: a leaf with a mask is never multiplied, or none is at all; a kernel is changed on its way (other than
        in shape, order of axes or dtype) or multiplied inside `lax.cond` or `lax.while_loop`, so that its products
        cannot be counted; masks as in `parameter_count`.
    """
    kept = _kept(weights, masks)
    products = products_with_data(apply_fn, weights, input_shape)
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


def _holds(values, condition: Callable[[np.ndarray], np.ndarray]) -> bool:
    """Whether all values meet the condition; True where they are not concrete, as under jit."""
    return isinstance(values, jax.core.Tracer) or bool(np.all(condition(np.asarray(values, np.float32))))


def _checked_logits(logits: jax.Array) -> jax.Array:
    logits = jnp.asarray(logits)
    if logits.ndim != 2 or logits.size == 0 or not jnp.issubdtype(logits.dtype, jnp.floating):
        raise ValueError(f"logits must be [n, classes] floats, not empty; got {logits.dtype} {logits.shape}")
    if not _holds(logits, lambda x: np.isfinite(x.max(axis=1))):
        raise ValueError("logits must not be NaN, and the highest of each row must be finite")
    return logits.astype(jnp.float32)


def _classified(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    logits, labels = _checked_logits(logits), jnp.asarray(labels)
    n, classes = logits.shape
    if labels.shape != (n,) or not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(f"labels must be [{n}] integers, one for each row; got {labels.dtype} {labels.shape}")
    if not _holds(labels, lambda x: (x >= 0) & (x < classes)):
        raise ValueError(f"labels must be classes from 0 to {classes - 1}")
    return logits, labels
