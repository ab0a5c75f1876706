"""Scores that say which weights to keep: higher = kept. The selection makes masks of them.

At initialisation, `snip` and `grasp` look at the loss, `synflow` at the weights alone; `iterative` makes masks of such
scores in rounds. The mask criteria of Zhou et al. 2019 compare a layer's `initial` weights with its `final` ones.
"""

from collections.abc import Callable, Iterable, Mapping

import jax
import jax.numpy as jnp

from supermask_jax import trees
from supermask_jax.rounds import check_ranking, iterative, known
from supermask_jax.trees import Tree, Where, apply_masks, by_path, is_kernel, leaf_key, map_with_name, prunable

__all__ = ["CRITERIA", "RANKED", "criterion", "grasp", "iterative", "magnitude", "snip", "synflow"]


def magnitude(weights: Tree, where: Where = is_kernel) -> Tree:
    """Scores abs(weight) at the prunable leaves, None elsewhere.

    Args:
      weights: tree of arrays.
      where: (path, leaf) -> whether the leaf is prunable.

    Raises:
      ValueError: `where` chooses no leaf.

    Source: Han et al. 2015; Frankle & Carbin 2019, section 2. For one-shot and iterative pruning see `lottery`.
    """
    shapes = prunable(weights, where)
    return map_with_name(lambda path, leaf: jnp.abs(leaf) if path in shapes else None, weights)


def snip(
    loss_fn: Callable,
    weights: Tree,
    batch: Tree,
    *,
    masks: Tree | None = None,
    model_state: Tree = None,
    key: jax.Array | None = None,
    where: Where = is_kernel,
) -> Tree:
    """Scores abs(dL/dm) = abs(w * dL/d(w * m)) at mask m = 1: to first order, what pruning a weight does to the loss.

    Not normalised: the published division by their sum ranks the same. The published code also draws the weights anew
    before it scores them; here those given are scored. Works under `jax.jit`, and is fast there.

    Args:
      loss_fn: loss_fn(params, model_state, batch, key) -> (loss, (model_state, metrics)), as for training.
      weights: every parameter, at its initial value.
      batch: one batch, large enough to show every class.
      masks: score the subnetwork weights * masks, and 0 what they prune; None: the dense network.
      model_state, key: what `loss_fn` is to be given.
      where: (path, leaf) -> whether the leaf is prunable.

    Returns:
      A tree like `weights` in their dtypes, None at leaves that are not prunable; higher = kept.

    Raises:
      ValueError: `where` chooses no leaf, or `masks` are not 0/1 or do not fit the leaves that it chooses.
      TypeError: it chooses a leaf that is not of floats.

    Source: Lee et al. 2019, section 4.1.
    """
    kernels, params = _network(weights, masks, where)
    slopes, _ = jax.grad(lambda k: loss_fn(params(k), model_state, batch, key), has_aux=True)(kernels)
    return _like(weights, {path: jnp.abs(kernel * slopes[path]) for path, kernel in kernels.items()})


def grasp(
    loss_fn: Callable,
    weights: Tree,
    batches: Iterable[Tree],
    *,
    masks: Tree | None = None,
    model_state: Tree = None,
    key: jax.Array | None = None,
    where: Where = is_kernel,
) -> Tree:
    """Scores w * Hg: to first order, what half the squared norm of the gradient loses when a weight is pruned.

    g and H are the gradient and the Hessian in the prunable weights of the sum of all batches' losses. Each batch is
    seen twice, and no Hessian is made. The published score is -w * Hg, divided by the size of its sum, and its highest
    are removed: the same ranking. Its loss divides the logits by a temperature of 200: that belongs in `loss_fn`; and
    its two batches are ten images of each class in one half of the classes, and in the other.

    Args:
      batches: a list of batches; each is scored with the same `model_state` and `key`.

    Everything else is as in `snip`; ValueError also for no batch, or for a mapping, which is a single one.

    Source: Wang et al. 2020, section 4, algorithms 1 and 2.
    """
    if isinstance(batches, Mapping):
        raise ValueError("batches must be a list of batches; put a single one in a list")
    batches = list(batches)
    if not batches:
        raise ValueError("there is no batch to score the weights on")
    kernels, params = _network(weights, masks, where)

    def gradient(kernels: dict, batch: Tree) -> dict:
        return jax.grad(lambda k: loss_fn(params(k), model_state, batch, key), has_aux=True)(kernels)[0]

    def total(trees: list[dict]) -> dict:
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
    """Scores abs(w) * dR/dabs(w): the flow through each weight. R is the sum of the outputs for an input of ones.

    R is of the network with every floating number in `weights` and `model_state` replaced by its magnitude: no data
    is needed. Made for `iterative`, with 100 rounds.

    Each kernel is divided by a constant, its mean inflow: the published product of all layers, in float64, overflows
    float32 in deep networks. In a chain of layers with biases and running means of 0, as at initialisation, that
    multiplies all scores by one positive number, and the ranking is the published one. Where paths of different
    length meet (skip connections, biases) they weigh differently against each other, and the ranking is another.

    Args:
      apply_fn: apply_fn(params, model_state, inputs) -> outputs, the logits, in evaluation mode: with the running
        statistics of BatchNorm, and no dropout.
      weights: every parameter, at its initial value.
      input_shape: of one example, without the batch axis: (28, 28, 1). The input is ones [1, *input_shape].

    Everything else is as in `snip`; ValueError also when every score is 0 because nothing flows from the inputs to
    the outputs, or one is not finite (not under jit, where values are not known; `iterative` sees them).

    Source: Tanaka et al. 2020, section 6 and its released code.
    """
    kernels, params = _network(jax.tree.map(_absolute, weights), masks, where)
    kept = by_path(params(kernels))
    kernels = {path: _unit_inflow(kept[path]) for path in kernels}
    ones = jnp.ones((1, *input_shape), jnp.result_type(*kernels.values()))
    state = jax.tree.map(_absolute, model_state)
    slopes = jax.grad(lambda k: jnp.sum(apply_fn(params(k), state, ones)))(kernels)
    scores = {path: kernel * slopes[path] for path, kernel in kernels.items()}
    check_ranking(scores, "no path from the inputs to the outputs is left")
    return _like(weights, scores)


def _network(weights: Tree, masks: Tree | None, where: Where) -> tuple[dict[str, jax.Array], Callable[[dict], Tree]]:
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
        if known(masks):
            trees.ones_and_sizes(masks)  # raises on anything but 0 and 1

    def params(kernels: dict[str, jax.Array]) -> Tree:
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


def _large_final(initial: jax.Array, final: jax.Array) -> jax.Array:
    return jnp.abs(final)


def _large_init(initial: jax.Array, final: jax.Array) -> jax.Array:
    return jnp.abs(initial)


def _magnitude_increase(initial: jax.Array, final: jax.Array) -> jax.Array:
    return jnp.abs(final) - jnp.abs(initial)


def _movement(initial: jax.Array, final: jax.Array) -> jax.Array:
    return jnp.abs(final - initial)


def _negated(score: Callable) -> Callable:
    return lambda initial, final: -score(initial, final)


def _if_same_sign(score: Callable) -> Callable:
    return lambda initial, final: jnp.where(jnp.sign(initial) == jnp.sign(final), score(initial, final), 0)


def _if_diff_sign(score: Callable) -> Callable:
    return lambda initial, final: jnp.where(jnp.sign(initial) != jnp.sign(final), score(initial, final), 0)


CRITERIA: Mapping[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "large_final": _large_final,
    "small_final": _negated(_large_final),
    "large_init": _large_init,
    "small_init": _negated(_large_init),
    "magnitude_increase": _magnitude_increase,
    "movement": _movement,
    "large_final_same_sign": _if_same_sign(_large_final),
    "large_final_diff_sign": _if_diff_sign(_large_final),
    "magnitude_increase_same_sign": _if_same_sign(_magnitude_increase),
    "magnitude_increase_diff_sign": _if_diff_sign(_magnitude_increase),
}
"""{name: (initial, final) -> scores} of one layer's arrays, for the criteria that look at each weight alone."""

RANKED: Mapping[str, tuple[str, str]] = {
    "large_init_large_final": ("large_init", "large_final"),
    "small_init_small_final": ("small_init", "small_final"),
}
"""{name: two criteria} whose score is the smaller of a weight's percentile ranks by the two."""


def criterion(
    name: str,
    initial: Tree,
    final: Tree,
    *,
    masks: Tree | None = None,
    key: jax.Array | None = None,
    where: Where = is_kernel,
) -> Tree:
    """Scores by one of the mask criteria of Zhou et al., None at leaves that are not prunable.

    As in the released code, the criteria that ask for a sign score a weight of the other sign 0. For
    magnitude_increase that is above every weight that has the right sign and shrank. A 0 has a sign of its own,
    that of no other number. The released code breaks ties at random, selection here by flat index.

    Args:
      name: one of `CRITERIA` or `RANKED`, or "random".
      initial: the weights that training started from.
      final: the weights that it ended with; a tree like `initial`.
      masks: what `RANKED` ranks among, in each layer: the weights that they keep; None means all. The scores of the
        others mean nothing, so select `within` the same masks.
      key: a `jax.random.key`, which "random" needs; a leaf's draw depends on it and the leaf's path alone.
      where: (path, leaf) -> whether the leaf is prunable.

    Raises:
      ValueError: the name is unknown, or "random" has no key, or `where` chooses no leaf.

    Source: Zhou et al. 2019, sections 2 and 5, and its released code (get_weight_init.py), where the two of `RANKED`
    are a search for one percentile that both magnitudes exceed: the order is the same, and exact here.
    """
    names = [*CRITERIA, *RANKED, "random"]
    if name not in names:
        raise ValueError(f"there is no mask criterion {name!r}; there are: {', '.join(names)}")
    if name == "random" and key is None:
        raise ValueError("the criterion 'random' needs a key")
    shapes = prunable(initial, where)
    kept = {} if masks is None else by_path(masks)

    def score(path: str, before: jax.Array, after: jax.Array) -> jax.Array | None:
        if path not in shapes:
            return None
        if name == "random":  # float32: in bfloat16 most would tie, and ties are not random
            return jax.random.uniform(leaf_key(key, path), before.shape)
        if name in CRITERIA:
            return CRITERIA[name](before, after)
        ranks = [_percentile_ranks(CRITERIA[part](before, after), kept.get(path)) for part in RANKED[name]]
        return jnp.minimum(*ranks)

    return map_with_name(score, initial, final)


def _percentile_ranks(scores: jax.Array, mask: jax.Array | None) -> jax.Array:
    """[scores.shape] float32 in [0, 1): the share of the kept scores that are lower. Equal scores share a rank."""
    candidates = scores if mask is None else jnp.where(mask != 0, scores, jnp.inf)  # what is not kept sorts last
    number = scores.size if mask is None else jnp.count_nonzero(mask)
    lower = jnp.searchsorted(jnp.sort(candidates.ravel()), scores.ravel()).reshape(scores.shape)
    return lower.astype(jnp.float32) / jnp.maximum(jnp.asarray(number, jnp.float32), 1)
