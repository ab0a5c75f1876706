"""Whole methods: where the masks come from, which tree learns, and how the masks change while it does.

A `Method` is all that a training loop must know. Here is the loop, for any of them:

    method = sm.methods.rigl(k_method, weights, masks, tx, loss_fn, steps=steps)
    state = sm.init_state(method.subnet, tx, k_train, learns=method.learns)
    step = sm.jit(sm.make_train_step(method.mask_fn, loss_fn, tx, learns=method.learns, product=method.product))
    for number, batch in enumerate(batches, start=1):
        state, metrics = step(state, batch)
        if method.update and number % method.update_every == 0:
            state = method.update(number, state, batch)
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from supermask_jax import supermask
from supermask_jax.backend import jit
from supermask_jax.densities import exact
from supermask_jax.dynamic import (
    cosine_fraction,
    cubic_density,
    dense_gradient,
    drop_and_grow,
    magnitude_masks,
    replace_masks,
)
from supermask_jax.leaves import FanIn, Layout
from supermask_jax.lottery import Scope, Unit, full_masks
from supermask_jax.saliency import magnitude
from supermask_jax.selection import global_masks, random_scores
from supermask_jax.supermask import Key, MaskFn, Masks, Params, ProductFn, Scores, Subnet, identity, subnetwork
from supermask_jax.train import Learns, LossFn, TrainState
from supermask_jax.trees import (
    Tree,
    Where,
    apply_masks,
    by_path,
    is_kernel,
    layout_of,
    map_with_name,
    ones_and_sizes,
    per_layer,
    stacks_of,
)
from supermask_jax.units import within_units

Update = Callable[[int, TrainState, Tree], TrainState]
"""update(step, state, batch) -> the state with new masks, after `step` steps; the batch is that of the last step."""

FEWEST_UPDATES = 5  # as long as the training has so many steps; a shorter interval then replaces `every`


class Method(NamedTuple):
    """What a training loop must know of a method."""

    learns: Learns  # the tree that the optimizer updates
    mask_fn: MaskFn  # masks of exactly 0 or 1: what is counted, compared and stored
    subnet: Subnet  # the weights, and the scores (or masks) to start from
    product: ProductFn | None = None  # what the model is given; None: weights * masks
    sampled: bool = False  # masks are drawn from the key, so that one subnet is many networks
    update: Update | None = None  # changes the masks; to be called when `update_every` divides the steps done
    update_every: int = 0  # steps


def edge_popup(
    key: Key,
    weights: Params,
    density: float | Mapping[str, float],
    *,
    where: Where = is_kernel,
    fan_in: FanIn | None = None,
    unit: Unit = "weight",
) -> Method:
    """Edge-popup: scores learn, weights are frozen, and each layer keeps the scores of largest magnitude.

    Args:
      key: a `jax.random.key`, not the one that the weights were drawn with. The scores are drawn from it.
      weights: every parameter of the network; they never change.
      density: fraction kept, in [0, 1]: one for all layers, or {path: fraction} naming every prunable leaf, or
        {"path[i]": fraction} naming the layers of a stack.
      where: (path, leaf) -> whether the leaf is prunable; or the `Layout` of the network, which `describe` makes.
      fan_in: (path, shape) -> the leaf's fan-in; scores start from U(-1/sqrt(fan_in), 1/sqrt(fan_in)). None: as the
        layout says; without one, as the names do.
      unit: "weight": a score for each weight. "neuron": a score for each output unit, and units are kept whole; exclude
        the output layer with `where`, because its units are the classes.

    Returns:
      A method that learns "scores". With "neuron" the scores have the length 1 along all axes but those that count
      units and stacked layers, and the masks are as large as the weights all the same.

    Raises:
      ValueError: `where` chooses no leaf, nothing tells a leaf's fan-in, a density is out of range or has other
        paths, or the unit is unknown.
      TypeError: `where` chooses a leaf that is not of floats.

    Source: Ramanujan et al. 2020, section 3.
    """
    if unit not in ("weight", "neuron"):
        raise ValueError(f"unit must be 'weight' or 'neuron', got {unit!r}")
    layout = layout_of(where)
    mask_fn = supermask.edge_popup(density, layout)
    scores = supermask.init_scores(key, weights, where, fan_in)
    per_layer(density, stacks_of(scores, layout))  # raises here, not at the first step
    if unit == "neuron":
        mask_fn = _of_weights(mask_fn, weights)
        scores = map_with_name(partial(_of_units, layout), scores)
    return Method("scores", mask_fn, Subnet(weights, scores))


def bernoulli(weights: Params, *, rescale: bool = False, where: Where = is_kernel) -> Method:
    """Bernoulli supermasks: the scores are logits of keeping each weight, and masks are drawn anew at every step.

    Args:
      weights: every parameter of the network; they never change.
      rescale: whether a layer's masked weights are multiplied by size / (number kept) (dynamic weight rescaling).
      where: (path, leaf) -> whether the leaf is prunable; or the `Layout` of the network.

    Returns:
      A method that learns "scores", all 0 at the start: every weight is as likely kept as not. How many weights are
      kept is an outcome.

    Raises:
      ValueError: `where` chooses no leaf.
      TypeError: `where` chooses a leaf that is not of floats.

    Source: Zhou et al. 2019, section 5.
    """
    mask_fn = supermask.bernoulli()
    product = partial(subnetwork, supermask.rescaled(mask_fn, layout_of(where))) if rescale else None
    subnet = Subnet(weights, supermask.zero_scores(weights, where))
    return Method("scores", mask_fn, subnet, product, sampled=True)


def threshold(
    key: Key,
    weights: Params,
    t: float = 0.0,
    *,
    where: Where = is_kernel,
    fan_in: FanIn | None = None,
) -> Method:
    """Threshold masks: scores learn, weights are frozen, and each weight is kept while its score is above a threshold.

    Args:
      key: a `jax.random.key`, not the one that the weights were drawn with. The scores are drawn from it.
      weights: every parameter of the network; they never change.
      t: the threshold, finite.
      where: (path, leaf) -> whether the leaf is prunable; or the `Layout` of the network, which `describe` makes.
      fan_in: (path, shape) -> the leaf's fan-in; scores start from U(-1/sqrt(fan_in), 1/sqrt(fan_in)). None: as the
        layout says; without one, as the names do.

    Returns:
      A method that learns "scores". How many weights are kept is an outcome.

    Raises:
      ValueError: `where` chooses no leaf, nothing tells a leaf's fan-in, or the threshold is not finite.
      TypeError: `where` chooses a leaf that is not of floats.

    Source: Wortsman et al. 2020, "Supermasks in superposition"; Mallya et al. 2018.
    """
    scores = supermask.init_scores(key, weights, where, fan_in)
    return Method("scores", supermask.threshold(t), Subnet(weights, scores))


def dense(weights: Params) -> Method:
    """Dense training: every weight learns, and nothing is pruned (every score is None).

    Args:
      weights: every parameter of the network, at its initial value.
    """
    return Method("weights", identity, Subnet(weights, jax.tree.map(lambda _: None, weights)))


def fixed(weights: Params, masks: Masks) -> Method:
    """Training under fixed masks: the weights learn, and the masks stay as they are given.

    Args:
      weights: every parameter of the network, at its initial value.
      masks: exactly 0 or 1, in the structure and the shapes of the weights, None at leaves that are not pruned. They
        come from `random_masks`, a saliency, a lottery ticket or elsewhere.

    Returns:
      A method that learns "weights", which start as weights * masks: some optimizers (LARS, LAMB) measure the norm of
      the weights that they are given, and must not measure pruned ones.

    Raises:
      ValueError: masks that are not 0/1, or do not fit the weights.
    """
    masks = _fitting(weights, masks)
    return Method("weights", identity, Subnet(apply_masks(weights, masks), masks))


def gradual(
    weights: Params,
    tx: optax.GradientTransformation,
    density: float | Mapping[str, float],
    *,
    steps: int,
    every: int = 100,
    until: float = 0.75,
    scope: Scope = "global",
    where: Where = is_kernel,
    minimum: int = 0,
) -> Method:
    """Gradual magnitude pruning: training starts dense, and the smallest weights are pruned step by step.

    The density falls on the cubic of `dynamic.cubic_density` from 1 at step 0 to exactly `density` at the last update.
    Nothing pruned comes back.

    Args:
      weights: every parameter of the network, at its initial value.
      tx: the optimizer of the training.
      density: fraction kept in the end, in [0, 1]: of all prunable weights together with scope "global", of each layer
        with "layer", where {path: fraction} naming every prunable leaf is possible as well.
      steps: the length of the training, in steps.
      every: steps between updates. Where fewer than five updates would fit, they come more often.
      until: the part of the training, in (0, 1], after which the masks no longer change.
      scope: "global" ranks all layers as one; "layer" ranks each by itself.
      where: (path, leaf) -> whether the leaf is prunable; or the `Layout` of the network.
      minimum: with scope "global", how many weights each layer keeps at least.

    Raises:
      ValueError: a number out of range, an unknown scope, {path: fraction} with scope "global" or of other paths, or
        `where` chooses no leaf.

    Source: Zhu & Gupta 2017, section 3.
    """
    if scope not in ("global", "layer"):
        raise ValueError(f"scope must be 'global' or 'layer', got {scope!r}")
    if scope == "global" and isinstance(density, Mapping):
        raise ValueError("a density for each path needs scope='layer': a global ranking keeps one fraction of all")
    layout, subnet = layout_of(where), Subnet(weights, full_masks(weights, where))
    of_layers = per_layer(density, stacks_of(subnet.scores, layout))
    for part in of_layers.values():
        exact(part)
    interval, end = _updates(steps, every, until)

    def update(step: int, state: TrainState, batch: Tree) -> TrainState:
        if step > end:
            return state

        def now(final: float) -> float:  # at the end as it was given: a float may round to one weight more
            return final if step == end else cubic_density(step, 0, end, float(final))

        current, masks = state.subnet
        if isinstance(density, Mapping) or scope == "layer":
            masks = magnitude_masks(current, masks, {name: now(d) for name, d in of_layers.items()}, layout=layout)
        else:
            masks = global_masks(magnitude(current, where), now(density), masks, minimum=minimum, layout=layout)
        return replace_masks(state, tx, masks)

    return Method("weights", identity, subnet, update=update, update_every=interval)


def set(
    key: Key,
    weights: Params,
    masks: Masks,
    tx: optax.GradientTransformation,
    *,
    steps: int,
    every: int = 100,
    until: float = 0.75,
    drop_fraction: float = 0.3,
    layout: Layout | None = None,
) -> Method:
    """Sparse evolutionary training (SET): at every update the smallest weights are dropped, and others grown at random.

    Every layer keeps its number of weights. Grown weights start at 0.

    Args:
      key: a `jax.random.key`; the update after step t draws from fold_in(key, t).
      weights: every parameter of the network, at its initial value.
      masks: exactly 0 or 1, in the structure and the shapes of the weights, None at leaves that are not pruned: what
        the training starts with; usually `random_masks`.
      tx: the optimizer of the training.
      steps: the length of the training, in steps.
      every: steps between updates. Where fewer than five updates would fit, they come more often.
      until: the part of the training, in (0, 1], after which the masks no longer change.
      drop_fraction: the part of a layer's kept weights that is dropped, in [0, 1], at first; it falls to 0 on the half
        cosine of `dynamic.cosine_fraction`. The paper keeps it constant.
      layout: what tells which leaves stack layers, each of which keeps its number of weights. None means the names.

    Raises:
      ValueError: a number out of range, or masks that are not 0/1 or do not fit the weights.

    Source: Mocanu et al. 2018; the decay of the fraction is that of Evci et al. 2020, section 3, part 2.
    """

    masks = _fitting(weights, masks)
    paths = by_path(masks).keys()

    def growth(step: int, state: TrainState, batch: Tree) -> Scores:
        return random_scores(jax.random.fold_in(key, step), weights, where=lambda path, leaf: path in paths)

    return _rewired(weights, masks, tx, growth, steps, every, until, drop_fraction, layout)


def rigl(
    key: Key,
    weights: Params,
    masks: Masks,
    tx: optax.GradientTransformation,
    loss_fn: LossFn,
    *,
    steps: int,
    every: int = 100,
    until: float = 0.75,
    drop_fraction: float = 0.3,
    layout: Layout | None = None,
) -> Method:
    """RigL: at every update the smallest weights are dropped, and those grown whose gradient is largest.

    Every layer keeps its number of weights. Grown weights start at 0. The gradient is that of the loss on the batch
    that `update` is given, with the state's `model_state`; it is compiled once.

    Args:
      key: a `jax.random.key`; after step t the loss is given fold_in(key, t), for dropout.
      weights: every parameter of the network, at its initial value.
      masks: exactly 0 or 1, in the structure and the shapes of the weights, None at leaves that are not pruned: what
        the training starts with; usually `random_masks`, with the densities of `densities.erk`.
      tx: the optimizer of the training.
      loss_fn: loss_fn(params, model_state, batch, key) -> (loss, (model_state, metrics)), that of the training.
      steps: the length of the training, in steps.
      every: steps between updates. Where fewer than five updates would fit, they come more often.
      until: the part of the training, in (0, 1], after which the masks no longer change.
      drop_fraction: the part of a layer's kept weights that is dropped, in [0, 1], at first; it falls to 0 on the half
        cosine of `dynamic.cosine_fraction`.
      layout: what tells which leaves stack layers, each of which keeps its number of weights. None means the names.

    Raises:
      ValueError: a number out of range, or masks that are not 0/1 or do not fit the weights.

    Source: Evci et al. 2020, section 3. In the released code an update replaces a training step; here it comes between
    two.
    """

    @jit
    def gradient(subnet: Subnet, model_state: Tree, batch: Tree, key: Key) -> Scores:
        return dense_gradient(loss_fn, subnet, batch, model_state=model_state, key=key)

    def growth(step: int, state: TrainState, batch: Tree) -> Scores:
        slopes = gradient(state.subnet, state.model_state, batch, jax.random.fold_in(key, step))
        return jax.tree.map(jnp.abs, slopes)

    return _rewired(weights, _fitting(weights, masks), tx, growth, steps, every, until, drop_fraction, layout)


def _rewired(
    weights: Params,
    masks: Masks,
    tx: optax.GradientTransformation,
    growth: Callable[[int, TrainState, Tree], Scores],
    steps: int,
    every: int,
    until: float,
    drop_fraction: float,
    layout: Layout | None,
) -> Method:
    """Masks whose smallest weights make room, at every update, for those of the highest `growth` score."""
    interval, end = _updates(steps, every, until)
    cosine_fraction(0, end, drop_fraction)  # raises here, not at the first update

    def update(step: int, state: TrainState, batch: Tree) -> TrainState:
        if step >= end:
            return state
        fraction = cosine_fraction(step, end, drop_fraction)
        grown = drop_and_grow(*state.subnet, growth(step, state, batch), fraction, layout=layout)
        return replace_masks(state, tx, grown)

    subnet = Subnet(apply_masks(weights, masks), masks)  # so that no optimizer measures the norm of what is pruned
    return Method("weights", identity, subnet, update=update, update_every=interval)


def _updates(steps: int, every: int, until: float) -> tuple[int, int]:
    """(steps between updates, the step of the last one)."""
    for name, number in (("steps", steps), ("every", every)):
        if not isinstance(number, int | np.integer) or number < 1:
            raise ValueError(f"{name} must be a whole number >= 1, got {number!r}")
    if not 0 < until <= 1:
        raise ValueError(f"until must be in (0, 1] (the part of the training in which masks change), got {until!r}")
    last = int(exact(until) * steps)
    every = min(int(every), max(last // FEWEST_UPDATES, 1))
    return every, max(last // every, 1) * every


def _fitting(weights: Params, masks: Masks) -> Masks:
    """The masks in the dtypes of the weights; ValueError where they are not 0/1 or do not fit."""
    ones_and_sizes(masks)
    leaves = by_path(weights)
    for path, mask in by_path(masks).items():
        if path not in leaves:
            raise ValueError(f"there is a mask of {path!r} but no weight; there are: {', '.join(leaves)}")
        if jnp.shape(mask) != jnp.shape(leaves[path]):
            raise ValueError(f"the mask of {path!r} has shape {jnp.shape(mask)}, its weight {jnp.shape(leaves[path])}")
    return jax.tree.map(lambda w, m: None if m is None else jnp.asarray(m, w.dtype), weights, masks)


def _of_units(layout: Layout | None, path: str, score: jax.Array) -> jax.Array:
    """The scores of a leaf's output units: the first of each unit's weights."""
    within = within_units(path, score.shape, layout)
    return score[tuple(slice(1) if axis in within else slice(None) for axis in range(score.ndim))]


def _of_weights(mask_fn: MaskFn, weights: Params) -> MaskFn:
    """A mask function of units as one of weights: a unit's mask is that of each weight into it."""
    shapes = {path: jnp.shape(leaf) for path, leaf in by_path(weights).items()}

    def mask_weights(scores: Scores, key: Key | None = None) -> Masks:
        return map_with_name(lambda path, mask: jnp.broadcast_to(mask, shapes[path]), mask_fn(scores, key))

    return mask_weights
