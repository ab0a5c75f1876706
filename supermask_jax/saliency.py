"""Scores that say which weights to keep: higher = kept. The selection makes masks of them.

`snip` and `grasp` look at the loss, `synflow` and `magnitude` at the weights only. `prune_in_rounds` makes masks of
such scores, in one round or in many.
"""

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from supermask_jax.checks import is_concrete, warn_of_emptied
from supermask_jax.criteria import CRITERIA, RANKED, criterion  # public here too, where they were before
from supermask_jax.densities import exact, keep_count
from supermask_jax.leaves import Layout, stack_of
from supermask_jax.selection import highest_of_all
from supermask_jax.trees import (
    Tree,
    Where,
    apply_masks,
    at_most_32_bits,
    by_path,
    is_kernel,
    layer_counts,
    layout_of,
    map_with_name,
    mean_over,
    ones_and_sizes,
    per_path,
    prunable,
    prunable_floats,
)
from supermask_jax.units import within_units

__all__ = [
    "CRITERIA",
    "RANKED",
    "criterion",
    "grasp",
    "iterative",
    "magnitude",
    "prune_in_rounds",
    "snip",
    "synflow",
]

Loss = Callable[[Tree, Tree, Tree, Any], tuple[jax.Array, tuple[Tree, dict[str, jax.Array]]]]
"""loss_fn(params, model_state, batch, key) -> (loss, (model_state, metrics)), that of the training; key may be None."""
Kernels = dict[str, jax.Array]


def magnitude(weights: Tree, where: Where = is_kernel) -> Tree:
    """Returns abs(weight) as scores, for magnitude pruning; higher = kept.

    Args:
      weights: tree of arrays.
      where: (path, leaf) -> whether the leaf is prunable; or the `Layout` of the network.

    Returns:
      A tree like `weights`, None at leaves that are not prunable.

    Raises:
      ValueError: `where` chooses no leaf.

    Source: Han et al. 2015; Frankle & Carbin 2019, section 2. For iterative magnitude pruning see `lottery`.
    """
    shapes = prunable(weights, where)
    return map_with_name(lambda path, leaf: at_most_32_bits(jnp.abs(leaf)) if path in shapes else None, weights)


def snip(
    loss_fn: Loss,
    weights: Tree,
    batch: Tree,
    *,
    masks: Tree | None = None,
    model_state: Tree = None,
    key: jax.Array | None = None,
    where: Where = is_kernel,
    axis_name: str | None = None,
) -> Tree:
    """Returns abs(dL/dm) at mask m = 1 as scores: to first order, how much pruning a weight changes the loss.

    That is abs(w * dL/d(w * m)). The published scores are divided by their sum, which ranks the same. Compile it with
    `jit` for speed:

        score = sm.jit(lambda weights, batch: saliency.snip(loss_fn, weights, batch))

    Args:
      loss_fn: loss_fn(params, model_state, batch, key) -> (loss, (model_state, metrics)), that of the training.
      weights: every parameter of the network, at its initial value.
      batch: one batch, large enough to show every class.
      masks: 0 or 1, None at leaves that are not pruned: scores the subnetwork weights * masks, and 0 what they prune.
        None means the dense network.
      model_state: batch statistics and the like, that `loss_fn` is given.
      key: for dropout, that `loss_fn` is given.
      where: (path, leaf) -> whether the leaf is prunable; or the `Layout` of the network.
      axis_name: the pmap axis over which the gradient is averaged. On a mesh under jit, none is needed.

    Returns:
      A tree like `weights` in their dtypes (float32 for float64), None at leaves that are not prunable; higher =
      kept. A warning names the leaves whose scores are all 0 (not under jit, where values are not known): ties are kept
      by index, not by merit.

    Raises:
      ValueError: `where` chooses no leaf, or `masks` are not 0/1 or do not fit the leaves that it chooses.
      TypeError: `where` chooses a leaf that is not of floats.

    Source: Lee et al. 2019, section 4.1. The released code draws the weights anew before it scores them; here the given
    ones are scored.
    """
    kernels, params = _network(weights, masks, where)
    slopes, _ = jax.grad(lambda k: loss_fn(params(k), model_state, batch, key), has_aux=True)(kernels)
    slopes = mean_over(axis_name, slopes)
    scores = {path: jnp.abs(kernel * slopes[path]) for path, kernel in kernels.items()}
    _warn_of_ties(scores, masks)
    return _like(weights, scores)


def grasp(
    loss_fn: Loss,
    weights: Tree,
    batches: Iterable[Tree],
    *,
    masks: Tree | None = None,
    model_state: Tree = None,
    key: jax.Array | None = None,
    where: Where = is_kernel,
    axis_name: str | None = None,
) -> Tree:
    """Returns w * Hg as scores: to first order, how much pruning a weight lowers half the squared norm of the gradient.

    g and H are the gradient and the Hessian, by the prunable weights, of the sum of all batches' losses. Each batch is
    passed through twice, and no Hessian is stored. Compile it with `jit` for speed.

    Args:
      loss_fn: loss_fn(params, model_state, batch, key) -> (loss, (model_state, metrics)). The published loss divides
        the logits by a temperature of 200; to do the same, give a `loss_fn` that does it.
      weights: every parameter of the network, at its initial value.
      batches: a list of batches; each is scored with the same `model_state` and `key`. The published ones are two: ten
        images of each class in one half of the classes, and ten of each in the other.
      masks: 0 or 1, None at leaves that are not pruned: scores the subnetwork weights * masks, and 0 what they prune.
        None means the dense network.
      model_state: batch statistics and the like, that `loss_fn` is given.
      key: for dropout, that `loss_fn` is given.
      where: (path, leaf) -> whether the leaf is prunable; or the `Layout` of the network.
      axis_name: the pmap axis over which the gradient is averaged. On a mesh under jit, none is needed.

    Returns:
      A tree like `weights` in their dtypes (float32 for float64), None at leaves that are not prunable; higher = kept.

    Raises:
      ValueError: there is no batch, or a mapping in place of a list; `where` chooses no leaf; `masks` are not 0/1 or do
        not fit the leaves that it chooses.
      TypeError: `where` chooses a leaf that is not of floats.

    Source: Wang et al. 2020, section 4, algorithms 1 and 2. The published score is -w * Hg divided by its sum's size,
    and its highest are removed: the same ranking.
    """
    if isinstance(batches, Mapping):
        raise ValueError("batches must be a list of batches; put a single one in a list")
    batches = list(batches)
    if not batches:
        raise ValueError("there is no batch to score the weights on")
    kernels, params = _network(weights, masks, where)

    def gradient(kernels: Kernels, batch: Tree) -> Kernels:
        return jax.grad(lambda k: loss_fn(params(k), model_state, batch, key), has_aux=True)(kernels)[0]

    def total(trees: list[Kernels]) -> Kernels:
        return jax.tree.map(lambda *leaves: sum(leaves), *trees)

    def along_flow(kernels: Kernels, batch: Tree) -> jax.Array:
        return jnp.sum(jnp.stack([jnp.vdot(slope, flow[path]) for path, slope in gradient(kernels, batch).items()]))

    flow = mean_over(axis_name, total([gradient(kernels, batch) for batch in batches]))
    # Reverse over reverse: layers with derivatives of their own (jax.custom_vjp) have no forward mode.
    curved = mean_over(axis_name, total([jax.grad(along_flow)(kernels, batch) for batch in batches]))
    return _like(weights, {path: kernel * curved[path] for path, kernel in kernels.items()})


def synflow(
    apply_fn: Callable[[Tree, Tree, jax.Array], jax.Array],
    weights: Tree,
    input_shape: tuple[int, ...],
    *,
    masks: Tree | None = None,
    model_state: Tree = None,
    where: Where = is_kernel,
) -> Tree:
    """Returns abs(w) * dR/dabs(w) as scores, where R is the sum of the outputs for an input of ones; it needs no data.

    R is that of the network with every floating number in `weights` and `model_state` replaced by its magnitude. Prune
    by it in 100 rounds, with `prune_in_rounds`.

    Each kernel is first divided by a constant, its mean inflow. Without that, R is a product over all layers, which in
    deep networks overflows float32; the released code computes in float64. In a chain of layers with biases and running
    means of 0, as at initialisation, the constants multiply all scores by one positive number, and the ranking is the
    published one. Where paths of different length meet (skip connections, biases), they weigh differently against each
    other, and the ranking differs from the published one.

    Args:
      apply_fn: apply_fn(params, model_state, inputs) -> outputs, the logits, in evaluation mode: with the running
        statistics of BatchNorm, and no dropout.
      weights: every parameter of the network, at its initial value.
      input_shape: of one example, without the batch axis: (28, 28, 1). The input is ones [1, *input_shape].
      masks: 0 or 1, None at leaves that are not pruned: scores the subnetwork weights * masks, and 0 what they prune.
        None means the dense network.
      model_state: batch statistics and the like, that `apply_fn` is given.
      where: (path, leaf) -> whether the leaf is prunable; or the `Layout` of the network.

    Returns:
      A tree like `weights` in their dtypes (float32 for float64), None at leaves that are not prunable; higher = kept.

    Raises:
      ValueError: `where` chooses no leaf; `masks` are not 0/1 or do not fit the leaves that it chooses; a score is not
        finite, or every score is 0 because the masks cut the outputs off from the inputs (under jit, where values are
        not known, neither is checked; `prune_in_rounds` checks both).
      TypeError: `where` chooses a leaf that is not of floats.

    Source: Tanaka et al. 2020, section 6 and its released code.
    """
    kernels, params = _network(jax.tree.map(_absolute, weights), masks, where)
    kept = by_path(params(kernels))
    kernels = {path: _unit_inflow(path, kept[path], layout_of(where)) for path in kernels}
    ones = jnp.ones((1, *input_shape), jnp.result_type(*kernels.values()))
    state = jax.tree.map(_absolute, model_state)
    slopes = jax.grad(lambda k: jnp.sum(apply_fn(params(k), state, ones)))(kernels)
    scores = {path: kernel * slopes[path] for path, kernel in kernels.items()}
    _check_ranking(scores, "no path from the inputs to the outputs is left")
    return _like(weights, scores)


def prune_in_rounds(
    score_fn: Callable[[Tree | None], Tree],
    density: float,
    rounds: int,
    minimum: int = 0,
    *,
    layout: Layout | None = None,
) -> Tree:
    """Returns masks after `rounds` rounds of scoring what is left and keeping the best of it, all layers ranked as one.

    After round r the fraction density**(r / rounds) of all weights is left, after the last one exactly `density`, each
    rounded up to whole weights; nothing pruned comes back. One round is one-shot pruning.

    It is a loop on the host and not for jit; compile `score_fn`, which is compiled twice, for None and for masks:

        score = sm.jit(lambda masks: saliency.synflow(apply_fn, weights, (28, 28, 1), masks=masks))
        masks = saliency.prune_in_rounds(score, density=0.1, rounds=100)

    Args:
      score_fn: score_fn(masks) -> scores of weights * masks; masks are None in the first round.
      density: fraction of all weights kept in the end, in [0, 1].
      rounds: how often to score and prune, >= 1.
      minimum: how many weights each layer keeps at least, its best; a smaller layer keeps all. The rest is the best of
        all remaining weights.
      layout: what tells which leaves stack layers. None means the names.

    Returns:
      Masks, exactly 0 or 1, with the structure and dtypes of the scores. A warning names the layers that keep nothing.

    Raises:
      ValueError: density, rounds or minimum out of range; the density keeps fewer weights than `minimum` in each
        layer; scores that are not finite, or all 0.

    Source: Tanaka et al. 2020, algorithm 1, which is SynFlow with 100 rounds; with SNIP, de Jorge et al. 2020 and
    Verdenius et al. 2020. The densities in between are rounded to twelve decimals, so that floating-point errors keep
    no weight too many.
    """
    final, rounds = exact(density), _whole("rounds", rounds, 1)
    minimum = _whole("minimum", minimum, 0)
    masks = None
    for number in range(1, rounds + 1):
        scores = score_fn(masks)
        _check_ranking(scores, f"nothing to choose by in round {number}")
        if masks is None:
            _warn_of_ties(by_path(scores), None)
            masks = jax.tree.map(jnp.ones_like, scores)  # already here, so that the next rounds compile nothing
            sizes = [size for _, size in layer_counts(masks, layout).values()]
            last = keep_count(final, sum(sizes))
            if sum(min(minimum, size) for size in sizes) > last:
                raise ValueError(f"density {density} keeps {last} weights: too few for {minimum} in every layer")
        count = last
        if number < rounds:  # and the decimals must not take it below the last
            count = max(last, keep_count(round(float(final) ** (number / rounds), 12), sum(sizes)))
        masks = highest_of_all(scores, count, masks, minimum, layout)
        if not count:  # nothing is left to score
            break
    if last:  # a density of 0 is what was asked for
        warn_of_emptied(masks, layout=layout)
    return masks


iterative = prune_in_rounds
"""The former name of `prune_in_rounds`, which stays."""


def _network(weights: Tree, masks: Tree | None, where: Where) -> tuple[Kernels, Callable[[Kernels], Tree]]:
    """The prunable leaves, {path: weight}, and the function that puts such leaves under the masks into all parameters.

    A gradient through that function is 0 at what the masks prune.
    """
    leaves = by_path(weights)
    kernels = {path: jnp.asarray(leaves[path]) for path in prunable_floats(weights, where)}
    if masks is not None:
        for path, mask in per_path(by_path(masks), kernels).items():
            if mask.shape != kernels[path].shape:
                raise ValueError(f"the mask of {path!r} has shape {mask.shape}, its weights {kernels[path].shape}")
        if is_concrete(masks):
            ones_and_sizes(masks)  # raises on anything but 0 and 1

    def params(kernels: Kernels) -> Tree:
        whole = map_with_name(lambda path, leaf: kernels.get(path, leaf), weights)
        return whole if masks is None else apply_masks(whole, masks)

    return kernels, params


def _like(weights: Tree, scores: Mapping[str, jax.Array]) -> Tree:
    return map_with_name(lambda path, leaf: at_most_32_bits(scores[path]) if path in scores else None, weights)


def _absolute(leaf: jax.Array) -> jax.Array:
    leaf = jnp.asarray(leaf)
    return jnp.abs(leaf) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf


def _unit_inflow(path: str, kernel: jax.Array, layout: Layout | None) -> jax.Array:
    """A kernel divided by the mean of what flows into each output, weighted by the same; in a stack, each layer.

    Weighted, because with most outputs pruned all meets in a few, and divided by a plain mean it overflows again.
    """
    within, stack = within_units(path, kernel.shape, layout), stack_of(path, kernel.shape, layout)
    outputs = tuple(axis for axis in range(kernel.ndim) if axis not in stack)
    inflow = jnp.sum(kernel, axis=within, keepdims=True, dtype=jnp.float32)
    total = jnp.sum(inflow, axis=outputs, keepdims=True)
    mean = jnp.sum(inflow * (inflow / jnp.where(total > 0, total, 1)), axis=outputs, keepdims=True)
    return kernel / jnp.where(mean > 0, mean, 1).astype(kernel.dtype)


def _warn_of_ties(scores: Kernels, masks: Tree | None) -> None:
    """Warns of leaves whose scores are all 0 although the masks keep some of them; under jit nothing is known."""
    if not is_concrete((scores, masks)):
        return
    kept = {} if masks is None else by_path(masks)
    tied = [
        path
        for path, score in scores.items()
        if score.size and not np.any(np.asarray(score)) and (path not in kept or np.any(np.asarray(kept[path])))
    ]
    if tied and len(tied) < len(scores):
        warnings.warn(
            f"every score is 0 in {', '.join(tied)}: the loss does not depend on them; is there a scale of 0 behind "
            "them (sm.initializers.open_gates), or are they not used?",
            stacklevel=3,
        )


def _check_ranking(scores: Tree, why: str) -> None:
    """Raises ValueError on scores that rank nothing: not all finite, or all 0 (for the reason `why`).

    Under jit values are not known, and nothing is raised.
    """
    if not is_concrete(scores):
        return
    leaves = {path: np.asarray(score) for path, score in by_path(scores).items()}
    for path, score in leaves.items():
        if not np.all(np.isfinite(score)):
            raise ValueError(f"the scores of {path!r} are not finite")
    if not any(np.any(score) for score in leaves.values()):
        raise ValueError(f"every score is 0: {why}")


def _whole(name: str, number: int, at_least: int) -> int:
    if not isinstance(number, int | np.integer) or number < at_least:
        raise ValueError(f"{name} must be a whole number >= {at_least}, got {number!r}")
    return int(number)
