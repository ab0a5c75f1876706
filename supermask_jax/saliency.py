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

from supermask_jax import trees
from supermask_jax.criteria import CRITERIA, RANKED, criterion  # public here too, where they were before
from supermask_jax.densities import exact, keep_count
from supermask_jax.selection import keep_highest, keep_highest_of_all
from supermask_jax.trees import Tree, Where, apply_masks, by_path, is_kernel, map_with_name, ones_and_sizes, prunable

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
      where: (path, leaf) -> whether the leaf is prunable.

    Returns:
      A tree like `weights`, None at leaves that are not prunable.

    Raises:
      ValueError: `where` chooses no leaf.

    Source: Han et al. 2015; Frankle & Carbin 2019, section 2. For iterative magnitude pruning see `lottery`.
    """
    shapes = prunable(weights, where)
    return map_with_name(lambda path, leaf: jnp.abs(leaf) if path in shapes else None, weights)


def snip(
    loss_fn: Loss,
    weights: Tree,
    batch: Tree,
    *,
    masks: Tree | None = None,
    model_state: Tree = None,
    key: jax.Array | None = None,
    where: Where = is_kernel,
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
      where: (path, leaf) -> whether the leaf is prunable.

    Returns:
      A tree like `weights` in their dtypes, None at leaves that are not prunable; higher = kept.

    Raises:
      ValueError: `where` chooses no leaf, or `masks` are not 0/1 or do not fit the leaves that it chooses.
      TypeError: `where` chooses a leaf that is not of floats.

    Source: Lee et al. 2019, section 4.1. The released code draws the weights anew before it scores them; here the given
    ones are scored.
    """
    kernels, params = _network(weights, masks, where)
    slopes, _ = jax.grad(lambda k: loss_fn(params(k), model_state, batch, key), has_aux=True)(kernels)
    return _like(weights, {path: jnp.abs(kernel * slopes[path]) for path, kernel in kernels.items()})


def grasp(
    loss_fn: Loss,
    weights: Tree,
    batches: Iterable[Tree],
    *,
    masks: Tree | None = None,
    model_state: Tree = None,
    key: jax.Array | None = None,
    where: Where = is_kernel,
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
      where: (path, leaf) -> whether the leaf is prunable.

    Returns:
      A tree like `weights` in their dtypes, None at leaves that are not prunable; higher = kept.

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

    flow = total([gradient(kernels, batch) for batch in batches])
    curved = total([jax.jvp(lambda k, b=batch: gradient(k, b), (kernels,), (flow,))[1] for batch in batches])
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
      where: (path, leaf) -> whether the leaf is prunable.

    Returns:
      A tree like `weights` in their dtypes, None at leaves that are not prunable; higher = kept.

    Raises:
      ValueError: `where` chooses no leaf; `masks` are not 0/1 or do not fit the leaves that it chooses; a score is not
        finite, or every score is 0 because the masks cut the outputs off from the inputs (under jit, where values are
        not known, neither is checked; `prune_in_rounds` checks both).
      TypeError: `where` chooses a leaf that is not of floats.

    Source: Tanaka et al. 2020, section 6 and its released code.
    """
    kernels, params = _network(jax.tree.map(_absolute, weights), masks, where)
    kept = by_path(params(kernels))
    kernels = {path: _unit_inflow(kept[path]) for path in kernels}
    ones = jnp.ones((1, *input_shape), jnp.result_type(*kernels.values()))
    state = jax.tree.map(_absolute, model_state)
    slopes = jax.grad(lambda k: jnp.sum(apply_fn(params(k), state, ones)))(kernels)
    scores = {path: kernel * slopes[path] for path, kernel in kernels.items()}
    _check_ranking(scores, "no path from the inputs to the outputs is left")
    return _like(weights, scores)


def prune_in_rounds(score_fn: Callable[[Tree | None], Tree], density: float, rounds: int, minimum: int = 0) -> Tree:
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
            masks = jax.tree.map(jnp.ones_like, scores)  # already here, so that the next rounds compile nothing
            sizes = {path: score.size for path, score in by_path(scores).items()}
            least = {path: min(minimum, size) for path, size in sizes.items()}
            last = keep_count(final, sum(sizes.values()))
            if sum(least.values()) > last:
                raise ValueError(f"density {density} keeps {last} weights: too few for {minimum} in every layer")
        count = last
        if number < rounds:  # and the decimals must not take it below the last
            count = max(last, keep_count(round(float(final) ** (number / rounds), 12), sum(sizes.values())))
        masks = _highest_with_least(scores, count, least, masks)
    empty = [path for path, (ones, size) in ones_and_sizes(masks).items() if size and not ones]
    if empty:
        warnings.warn(f"pruned whole: {', '.join(empty)}; minimum=1 keeps a weight in every layer", stacklevel=2)
    return masks


iterative = prune_in_rounds
"""The former name of `prune_in_rounds`, which stays."""


def _network(weights: Tree, masks: Tree | None, where: Where) -> tuple[Kernels, Callable[[Kernels], Tree]]:
    """The prunable leaves, {path: weight}, and the function that puts such leaves under the masks into all parameters.

    A gradient through that function is 0 at what the masks prune.
    """
    leaves = by_path(weights)
    kernels = {path: jnp.asarray(leaves[path]) for path in prunable(weights, where)}
    for path, kernel in kernels.items():
        if not jnp.issubdtype(kernel.dtype, jnp.floating):
            raise TypeError(f"only floats are prunable; {path!r} has {kernel.dtype}")
    if masks is not None:
        for path, mask in trees.per_path(by_path(masks), kernels).items():
            if mask.shape != kernels[path].shape:
                raise ValueError(f"the mask of {path!r} has shape {mask.shape}, its weights {kernels[path].shape}")
        if _known(masks):
            trees.ones_and_sizes(masks)  # raises on anything but 0 and 1

    def params(kernels: Kernels) -> Tree:
        whole = map_with_name(lambda path, leaf: kernels.get(path, leaf), weights)
        return whole if masks is None else apply_masks(whole, masks)

    return kernels, params


def _like(weights: Tree, scores: Mapping[str, jax.Array]) -> Tree:
    return map_with_name(lambda path, leaf: scores.get(path), weights)


def _absolute(leaf: jax.Array) -> jax.Array:
    leaf = jnp.asarray(leaf)
    return jnp.abs(leaf) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf


def _unit_inflow(kernel: jax.Array) -> jax.Array:
    """[..., out] divided by the mean of what flows into each output, weighted by the same.

    Weighted, because with most outputs pruned all meets in a few, and divided by a plain mean it overflows again.
    """
    inflow = jnp.sum(kernel, axis=tuple(range(kernel.ndim - 1)), dtype=jnp.float32)
    total = jnp.sum(inflow)
    mean = jnp.sum(inflow * (inflow / jnp.where(total > 0, total, 1)))
    return kernel / jnp.where(mean > 0, mean, 1).astype(kernel.dtype)


def _check_ranking(scores: Tree, why: str) -> None:
    """Raises ValueError on scores that rank nothing: not all finite, or all 0 (for the reason `why`).

    Under jit values are not known, and nothing is raised.
    """
    if not _known(scores):
        return
    leaves = {path: np.asarray(score) for path, score in by_path(scores).items()}
    for path, score in leaves.items():
        if not np.all(np.isfinite(score)):
            raise ValueError(f"the scores of {path!r} are not finite")
    if not any(np.any(score) for score in leaves.values()):
        raise ValueError(f"every score is 0: {why}")


def _known(tree: Tree) -> bool:
    """Whether the values of all leaves are known, as they are not under jit."""
    return not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))


def _highest_with_least(scores: Tree, count: int, least: Mapping[str, int], within: Tree) -> Tree:
    """Masks of the `least[path]` highest scores of each leaf and, up to `count`, of the highest of all the others."""
    if not any(least.values()):
        return keep_highest_of_all(scores, count, within)
    reserved = keep_highest(scores, least, within)
    others = jax.tree.map(jnp.subtract, within, reserved)
    return jax.tree.map(jnp.add, reserved, keep_highest_of_all(scores, count - sum(least.values()), others))


def _whole(name: str, number: int, at_least: int) -> int:
    if not isinstance(number, int | np.integer) or number < at_least:
        raise ValueError(f"{name} must be a whole number >= {at_least}, got {number!r}")
    return int(number)
