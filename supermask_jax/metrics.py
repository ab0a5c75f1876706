"""Measures of a network beside its accuracy: calibration, out-of-distribution detection, robustness, gradients, cost.

Logits are [n, classes] floats, labels [n] integers, sums are in float32. The functions of arrays also work under jit;
there values are not known, and not checked. The choice of measures is that of Liu et al. 2022.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from supermask_jax.flops import flops, layer_flops, parameter_count  # costs are measures too
from supermask_jax.trees import Tree, by_path, ones_and_sizes

__all__ = [
    "Reliability",
    "accuracy",
    "auroc",
    "brier",
    "expected_calibration_error",
    "fgsm",
    "flops",
    "gradient_flow",
    "layer_flops",
    "max_softmax",
    "negative_log_likelihood",
    "parameter_count",
    "reliability",
]


def accuracy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns the fraction of examples whose highest logit is the label's; of tied logits the first counts.

    Args:
      logits: [n, classes] floats.
      labels: [n] integers in [0, classes).

    Returns:
      A float32 scalar in [0, 1].

    Raises:
      ValueError: no example, shapes that do not fit, labels that are not integers or not classes, a row of logits whose
        highest is not finite (NaN included).
    """
    logits, labels = _classified(logits, labels)
    return jnp.mean(jnp.argmax(logits, axis=1) == labels)


def negative_log_likelihood(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns the mean over examples of -log softmax(logits)[label], in nats.

    Args:
      logits: [n, classes] floats.
      labels: [n] integers in [0, classes).

    Returns:
      A float32 scalar >= 0.

    Raises:
      ValueError: no example, shapes that do not fit, labels that are not integers or not classes, a row of logits whose
        highest is not finite (NaN included).
    """
    logits, labels = _classified(logits, labels)
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1))


def brier(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns the Brier score: the mean over examples of the sum over classes of (probability - one-hot label)**2.

    Args:
      logits: [n, classes] floats.
      labels: [n] integers in [0, classes).

    Returns:
      A float32 scalar in [0, 2]. Some divide it by the number of classes; this does not.

    Raises:
      ValueError: no example, shapes that do not fit, labels that are not integers or not classes, a row of logits whose
        highest is not finite (NaN included).

    Source: Brier 1950.
    """
    logits, labels = _classified(logits, labels)
    right = jax.nn.one_hot(labels, logits.shape[1], dtype=logits.dtype)
    return jnp.mean(jnp.sum(jnp.square(jax.nn.softmax(logits) - right), axis=1))


class Reliability(NamedTuple):
    """The values of a reliability diagram, [bins] each; bin i is of confidences in (i / bins, (i + 1) / bins]."""

    count: jax.Array  # type: ignore[assignment]  # int32, the examples in the bin; hides tuple.count
    confidence: jax.Array  # mean highest probability, 0 in an empty bin
    accuracy: jax.Array  # fraction classified correctly, 0 in an empty bin


def reliability(logits: jax.Array, labels: jax.Array, bins: int = 15) -> Reliability:
    """Returns count, mean confidence and accuracy of the examples in each bin of confidence.

    The confidence is the highest softmax probability. The bins have equal widths; a confidence is compared with the
    float32 nearest to each bin's edge.

    Args:
      logits: [n, classes] floats.
      labels: [n] integers in [0, classes).
      bins: their number, >= 1.

    Raises:
      ValueError: fewer bins than one, no example, shapes that do not fit, labels that are not integers or not classes,
        a row of logits whose highest is not finite (NaN included).

    Source: Guo et al. 2017, section 2.
    """
    logits, labels = _classified(logits, labels)
    if not (isinstance(bins, int | np.integer) and bins >= 1):
        raise ValueError(f"the number of bins must be a whole number of 1 or more, got {bins}")
    confidence = max_softmax(logits)
    edges = jnp.asarray(np.arange(1, bins) / bins, jnp.float32)
    # A masked sum over [bins, n] adds pairwise. A scatter into bins adds one by one, and rounding errors accumulate.
    inside = jnp.searchsorted(edges, confidence)[None, :] == jnp.arange(bins)[:, None]
    count = jnp.sum(inside, axis=1, dtype=jnp.int32)
    correct = jnp.sum(inside & (jnp.argmax(logits, axis=1) == labels)[None, :], axis=1, dtype=jnp.int32)
    total = jnp.sum(jnp.where(inside, confidence[None, :], 0), axis=1)
    some = jnp.maximum(count, 1).astype(jnp.float32)
    return Reliability(count, total / some, correct.astype(jnp.float32) / some)


def expected_calibration_error(logits: jax.Array, labels: jax.Array, bins: int = 15) -> jax.Array:
    """Returns the mean over examples of abs(accuracy - mean confidence) in each example's bin; empty bins add nothing.

    Args:
      logits: [n, classes] floats.
      labels: [n] integers in [0, classes).
      bins: the number of bins of equal widths that the confidences (highest softmax probabilities) fall into, >= 1.

    Returns:
      A float32 scalar in [0, 1].

    Raises:
      ValueError: fewer bins than one, no example, shapes that do not fit, labels that are not integers or not classes,
        a row of logits whose highest is not finite (NaN included).

    Source: Naeini et al. 2015; Guo et al. 2017, equation 3.
    """
    count, confidence, correct = reliability(logits, labels, bins)
    return jnp.sum(count * jnp.abs(correct - confidence)) / jnp.sum(count)


def max_softmax(logits: jax.Array) -> jax.Array:
    """Returns the highest softmax probability of each row: the baseline score of out-of-distribution detection.

    Args:
      logits: [n, classes] floats.

    Returns:
      [n] float32 in [1 / classes, 1], higher for inputs that the network takes for in-distribution.

    Raises:
      ValueError: no example, or a row of logits whose highest is not finite (NaN included).

    Source: Hendrycks & Gimpel 2017, section 3.
    """
    return jnp.max(jax.nn.softmax(_checked_logits(logits)), axis=1)


def auroc(scores_in: jax.Array, scores_out: jax.Array) -> float:
    """Returns the probability that an in-distribution score is above an out-of-distribution one; ties count one half.

    That is the area under the ROC curve with in-distribution as the positive class. It is exact, computed from ranks on
    the host.

    Args:
      scores_in: [n] scores of in-distribution inputs, higher = more likely in-distribution; such as `max_softmax`.
      scores_out: [m] scores of out-of-distribution inputs.

    Raises:
      ValueError: scores that have another number of axes than one, or are empty, or NaN.

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
    """Returns adversarial images clip(x + epsilon * sign(dL/dx), 0, 1); a pixel with gradient 0 does not change.

    Args:
      loss_fn: loss_fn(images, labels) -> scalar, the mean loss. It normalises the images itself, if the network needs
        that.
      images: [n, ...] floats in [0, 1], before normalisation.
      labels: the labels that `loss_fn` takes.
      epsilon: the most that a pixel changes, on the scale of [0, 1].

    Raises:
      ValueError: images that are not floats in [0, 1], a negative epsilon, a gradient that is NaN.

    Source: Goodfellow et al. 2015, section 4; clipped as by Kurakin et al. 2017.
    """
    images = jnp.asarray(images)
    if not jnp.issubdtype(images.dtype, jnp.floating) or not _all(images, lambda x: (x >= 0) & (x <= 1)):
        raise ValueError("images must be floats in [0, 1], before normalisation: loss_fn normalises")
    if not _all(epsilon, lambda value: value >= 0):
        raise ValueError(f"epsilon must not be negative, got {epsilon}")
    gradient = jax.grad(loss_fn)(images, labels)
    if not _all(gradient, lambda x: ~np.isnan(x)):
        raise ValueError("the loss has a gradient that is NaN")
    return jnp.clip(images + jnp.asarray(epsilon, images.dtype) * jnp.sign(gradient), 0, 1)


def gradient_flow(gradient: Tree, masks: Tree) -> jax.Array:
    """Returns the L2 norm of the loss's gradient over the active weights, those whose mask is 1.

    Leaves that have no mask (biases, normalisation) are left out, so that methods are compared on the weights that they
    choose among. Without any mask, for a dense network, every leaf counts.

    Args:
      gradient: tree of the gradient with respect to the **parameters**, weights * masks; not to scores.
      masks: a tree like it of 0 or 1, None at leaves that are not prunable; or None.

    Returns:
      A float32 scalar.

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


def _all(values: Any, condition: Callable[[np.ndarray], np.ndarray]) -> bool:
    """Whether all values meet the condition; True where they are not concrete, as under jit."""
    return isinstance(values, jax.core.Tracer) or bool(np.all(condition(np.asarray(values, np.float32))))


def _checked_logits(logits: jax.Array) -> jax.Array:
    logits = jnp.asarray(logits)
    if logits.ndim != 2 or logits.size == 0 or not jnp.issubdtype(logits.dtype, jnp.floating):
        raise ValueError(f"logits must be [n, classes] floats, not empty; got {logits.dtype} {logits.shape}")
    if not _all(logits, lambda x: np.isfinite(x.max(axis=1))):
        raise ValueError("logits must not be NaN, and the highest of each row must be finite")
    return logits.astype(jnp.float32)


def _classified(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    logits, labels = _checked_logits(logits), jnp.asarray(labels)
    n, classes = logits.shape
    if labels.shape != (n,) or not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(f"labels must be [{n}] integers, one for each row; got {labels.dtype} {labels.shape}")
    if not _all(labels, lambda x: (x >= 0) & (x < classes)):
        raise ValueError(f"labels must be classes from 0 to {classes - 1}")
    return logits, labels
