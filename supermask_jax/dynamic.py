"""Masks that change while weights learn: the parts of gradual magnitude pruning, SET and RigL.

The masks are the scores of a state that learns "weights" under `identity`. At intervals, these functions compute new
masks on the host, and `replace_masks` puts them into the state; the step is not compiled again. `methods` has the whole
methods.
"""

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from supermask_jax.densities import exact, keep_count
from supermask_jax.leaves import Layout
from supermask_jax.selection import highest_of_each, keep_highest
from supermask_jax.supermask import Key, Masks, Params, Scores, Subnet, identity, subnetwork
from supermask_jax.train import LossFn, TrainState
from supermask_jax.trees import (
    Tree,
    at_most_32_bits,
    by_path,
    layer_counts,
    magnitudes,
    mean_over,
    ones_and_sizes,
    per_layer,
    stacks_of,
)


def cubic_density(step: int, begin: int, end: int, final: float, initial: float = 1.0) -> float:
    """Returns the density of gradual pruning at a step: `initial` until `begin`, `final` from `end`, a cubic between.

    The cubic is final + (initial - final) * (1 - (step - begin) / (end - begin))**3: it falls fast at first, and slowly
    towards the end.

    Args:
      step: steps done, a whole number >= 0.
      begin: the step at which pruning begins.
      end: the step of the last pruning, not before `begin`.
      final: fraction kept in the end, in [0, 1].
      initial: fraction kept at first, in [0, 1], not below `final`.

    Raises:
      ValueError: steps that are not whole numbers >= 0, `begin` after `end`, densities outside [0, 1], or a final
        density above the initial one.

    Source: Zhu & Gupta 2017, equation 1, there for the fraction that is pruned.
    """
    step, begin, end = _whole("step", step), _whole("begin", begin), _whole("end", end)
    first, last = exact(initial), exact(final)
    if begin > end:
        raise ValueError(f"pruning begins before it ends, got begin = {begin}, end = {end}")
    if last > first:
        raise ValueError(f"pruning only removes: the final density {final} is above the initial one, {initial}")
    if step >= end or step <= begin:
        return float(last if step >= end else first)
    ahead = Fraction(end - step, end - begin)
    return float(last + (first - last) * ahead**3)


def cosine_fraction(step: int, end: int, initial: float = 0.3) -> float:
    """Returns the fraction for `drop_and_grow` at a step: half a cosine from `initial` at step 0 to 0 from `end` on.

    That is initial / 2 * (1 + cos(pi * step / end)), rounded to twelve decimals. Without the rounding, half of 0.3
    would be 0.15000000000000002.

    Args:
      step: steps done, a whole number >= 0.
      end: the step from which on nothing is dropped.
      initial: the fraction at step 0, in [0, 1].

    Raises:
      ValueError: steps that are not whole numbers >= 0, or `initial` outside [0, 1].

    Source: Evci et al. 2020 (RigL), section 3, part 2.
    """
    step, end, first = _whole("step", step), _whole("end", end), _fraction(initial)
    if step >= end:
        return 0.0
    return round(float(first) / 2 * (1 + math.cos(math.pi * step / end)), 12)


def magnitude_masks(
    weights: Params, masks: Masks, densities: float | Mapping[str, float], *, layout: Layout | None = None
) -> Masks:
    """Returns masks of the `keep_count(density, size)` largest magnitudes of each layer among those that `masks` keep.

    Ties are broken by flat index, the lowest losing first.

    Args:
      weights: every parameter.
      masks: what is left; exactly 0 or 1, None at leaves that are not pruned.
      densities: fraction kept of all weights of a layer, pruned ones included: one for all, or {path: fraction}, or
        {"path[i]": fraction} for the layers of a stack.
      layout: what tells which leaves stack layers. None means the names.

    Returns:
      Masks with the structure of `masks`; nothing pruned comes back.

    Raises:
      ValueError: a density above what is left or out of range, paths that do not match, weights that are NaN, masks
        that are not 0/1.

    Source: Zhu & Gupta 2017, section 3, with the densities of `cubic_density`.
    """
    sizes = {layer: size for layer, (_, size) in layer_counts(masks, layout).items()}
    parts = per_layer(densities, stacks_of(masks, layout))
    counts = {layer: keep_count(part, sizes[layer]) for layer, part in parts.items()}
    return keep_highest(magnitudes(weights, masks), counts, masks, layout=layout)


def drop_and_grow(
    weights: Params,
    masks: Masks,
    growth: Scores,
    fraction: float | Mapping[str, float],
    *,
    layout: Layout | None = None,
) -> Masks:
    """Returns masks that drop the kept weights of least magnitude and grow those of highest `growth`, layer by layer.

    Of m kept weights, `keep_count(1 - fraction, m)` stay. Any other weight can be grown, also one that was just
    dropped; that is how the released code of RigL works. There are then always enough weights to grow, and every layer
    keeps its count. Other fractions compile nothing new.

    Args:
      weights: every parameter.
      masks: what is kept; exactly 0 or 1, None at leaves that are not pruned.
      growth: scores, higher = grown: `selection.random_scores` with a key for each update (SET), or the magnitude of
        `dense_gradient` (RigL). Leaves where `masks` are None are ignored.
      fraction: the part of the kept weights that is dropped, in [0, 1]: one for all layers, or {path: fraction}. See
        `cosine_fraction`.
      layout: what tells which leaves stack layers, each of which keeps its count. None means the names.

    Returns:
      Masks with the structure, dtypes and layer counts of `masks`.

    Raises:
      ValueError: a fraction out of range, paths that do not match, weights or growth that are NaN, masks that are not
        0/1.

    Source: Mocanu et al. 2018 (SET); Evci et al. 2020 (RigL), section 3, parts 3 and 4. RigL's released code adds noise
    to the magnitudes.
    """
    left = {layer: ones for layer, (ones, _) in layer_counts(masks, layout).items()}
    parts = per_layer(fraction, stacks_of(masks, layout))
    stay = {layer: keep_count(1 - _fraction(part), left[layer]) for layer, part in parts.items()}
    kept = highest_of_each(magnitudes(weights, masks), stay, masks, layout=layout)
    growth = jax.tree.map(
        lambda weight, mask, score: None if mask is None else at_most_32_bits(score), weights, masks, growth
    )
    candidates = jax.tree.map(lambda mask: 1 - mask, kept)
    grown = highest_of_each(growth, {layer: left[layer] - stay[layer] for layer in left}, candidates, layout=layout)
    return jax.tree.map(lambda old, new: old + new.astype(old.dtype), kept, grown)


def dense_gradient(
    loss_fn: LossFn,
    subnet: Subnet,
    batch: Tree,
    *,
    model_state: Tree = None,
    key: Key | None = None,
    axis_name: str | None = None,
) -> Tree:
    """Returns the loss's gradient by weights * masks, also where the masks are 0; None at leaves that have no mask.

    A train step does not compute it: its gradient by the weights is this one times the masks. Its magnitude is RigL's
    growth score. Compile it with `jit`, for one `loss_fn`.

    Args:
      loss_fn: loss_fn(params, model_state, batch, key) -> (loss, (model_state, metrics)), that of the training; only
        the loss is used.
      subnet: the weights, and masks as its scores.
      batch: the batch that the gradient is computed on.
      model_state: batch statistics and the like, that `loss_fn` is given.
      key: for dropout, that `loss_fn` is given.
      axis_name: the pmap axis over which the gradient is averaged. On a mesh under jit, none is needed.

    Returns:
      A tree like the weights, None where `subnet.scores` are None.

    Raises:
      ValueError: all masks are None.

    Source: Evci et al. 2020 (RigL), section 3, part 4.
    """
    if not by_path(subnet.scores):
        raise ValueError("there is no mask: every leaf of the subnet's scores is None")
    params = subnetwork(identity, subnet)
    gradient, _ = jax.grad(lambda params: loss_fn(params, model_state, batch, key), has_aux=True)(params)
    gradient = mean_over(axis_name, gradient)
    return jax.tree.map(lambda slope, mask: None if mask is None else slope, gradient, subnet.scores)


def replace_masks(state: TrainState, tx: optax.GradientTransformation, masks: Masks) -> TrainState:
    """Returns the state with new masks. Newly kept weights start at 0, and so does the optimizer's state of them.

    The optimizer's state of a weight is its entry in every leaf that is shaped like the weights (momentum, Adam's
    moments). Everything else stays: dropped weights and their momentum, which may still move them without any effect;
    biases, steps, the key. The masks are copied, so that a step may donate the state, and take the shapes and dtypes of
    the old ones, so that nothing is compiled again.

    Args:
      state: of `init_state(..., learns="weights")`, whose scores are masks.
      tx: the optimizer that made the state. It must not contain `lottery.frozen`, which would keep freezing by old
        masks.
      masks: exactly 0 or 1, with the structure and shapes of the state's.

    Raises:
      ValueError: masks that are not 0/1 or do not match the state's; an optimizer state that is not of `tx`; a `tx`
        whose state cannot be told from the weights', as that of `lottery.frozen`.

    Source: Evci et al. 2020 (RigL), section 3, part 4, and its released code.
    """
    before = state.subnet.scores
    ones_and_sizes(before), ones_and_sizes(masks)  # raise on what is not 0/1
    shapes, given = ({path: np.shape(mask) for path, mask in by_path(tree).items()} for tree in (before, masks))
    structures: tuple[Any, Any] = jax.tree.structure(before), jax.tree.structure(masks)
    if given != shapes or structures[0] != structures[1]:
        raise ValueError(f"the new masks must have the structure of the state's, {shapes}; got {given}")
    grown = jax.tree.map(lambda old, new: (np.asarray(old) == 0) & (np.asarray(new) == 1), before, masks)

    def cleared(
        leaf: Any, new: Any
    ) -> Any:  # optax.masked leaves MaskedNodes behind; Adafactor's row sums have a shape of their own
        if new is None or isinstance(leaf, optax.MaskedNode) or jnp.shape(leaf) != new.shape:
            return leaf
        return jnp.where(new, 0, leaf)

    try:
        opt_state = optax.tree_utils.tree_map_params(
            tx, cleared, state.opt_state, grown, is_leaf=lambda node: isinstance(node, optax.MaskedNode)
        )
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            "optax.tree_utils.tree_map_params cannot read the optimizer state: it must be of this tx and of the "
            "weights, and tx without a transformation whose init looks at the weights, such as lottery.frozen"
        ) from error
    weights = jax.tree.map(cleared, state.subnet.weights, grown)
    # Made from the old masks, so that they have their dtype and place on the devices; only the values are the new ones.
    copies = jax.tree.map(
        lambda old, new: jnp.where(np.asarray(new) == 1, jnp.ones_like(old), jnp.zeros_like(old)), before, masks
    )
    return state._replace(subnet=Subnet(weights, copies), opt_state=opt_state)


def _fraction(part: float) -> Fraction:
    try:
        return exact(part)
    except ValueError:
        raise ValueError(
            f"fraction must be a number in [0, 1] (the part of what is kept that is dropped), got {part!r}"
        ) from None


def _whole(name: str, steps: int) -> int:
    if not float(steps).is_integer() or steps < 0:
        raise ValueError(f"{name} must be a whole number of steps >= 0, got {steps}")
    return int(steps)
