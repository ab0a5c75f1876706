"""Masks that change while weights learn: gradual magnitude pruning, SET and RigL.

The masks are the scores slot of a state that learns "weights" under `identity`. Every so many steps new ones are
computed here, on the host, and `replace_masks` puts them into the state; the compiled step goes on as it is.
"""

import math
from collections.abc import Mapping
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import optax

from supermask_jax.densities import exact, keep_count
from supermask_jax.selection import keep_highest
from supermask_jax.supermask import Key, Masks, Params, Scores, Subnet, identity, subnetwork
from supermask_jax.train import LossFn, TrainState
from supermask_jax.trees import Tree, by_path, ones_and_sizes, per_path


def cubic_density(step: int, begin: int, end: int, final: float, initial: float = 1.0) -> float:
    """The density of gradual pruning at a step: `initial` up to `begin`, `final` from `end` on, a cubic between them.

    final + (initial - final) * (1 - (step - begin) / (end - begin))**3: fast at first, slowly towards the end.

    Raises:
      ValueError: steps that are not whole numbers >= 0, `begin` after `end`, densities outside [0, 1], or a final
        density above the initial one.

    Source: Zhu & Gupta 2017, equation 1, there for the part that is pruned.
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
    """The fraction for `drop_and_grow` at a step: half a cosine from `initial` at step 0 to 0 from `end` on.

    initial / 2 * (1 + cos(pi * step / end)), to twelve decimals: without that half of 0.3 is 0.15000000000000002.

    Raises:
      ValueError: steps that are not whole numbers >= 0, or `initial` outside [0, 1].

    Source: Evci et al. 2020 (RigL), section 3, part 2.
    """
    step, end, initial = _whole("step", step), _whole("end", end), _fraction(initial)
    if step >= end:
        return 0.0
    return round(float(initial) / 2 * (1 + math.cos(math.pi * step / end)), 12)


def magnitude_masks(weights: Params, masks: Masks, densities: float | Mapping[str, float]) -> Masks:
    """Masks of the `keep_count(density, size)` largest magnitudes of each layer among those that `masks` keep.

    Args:
      weights: every parameter.
      masks: what is left; exactly 0 or 1, None at leaves that are not pruned.
      densities: fraction kept of all weights of a layer, pruned ones included; one for all, or {path: fraction}.

    Raises:
      ValueError: a density above what is left (nothing pruned comes back) or out of range, paths that do not match,
        weights that are NaN, masks that are not 0/1.

    Source: Zhu & Gupta 2017, section 3, with `cubic_density`.
    """
    sizes = {path: size for path, (_, size) in ones_and_sizes(masks).items()}
    counts = {path: keep_count(part, sizes[path]) for path, part in per_path(densities, sizes).items()}
    return keep_highest(_magnitudes(weights, masks), counts, within=masks)


def drop_and_grow(weights: Params, masks: Masks, growth: Scores, fraction: float | Mapping[str, float]) -> Masks:
    """Masks without the kept weights of least magnitude, and with as many others of highest `growth`, in each layer.

    Of m kept, `keep_count(1 - fraction, m)` stay. Every weight that is not among them can be grown, also one that was
    dropped just now, as in RigL's released code: so there are always enough to grow, and each layer's count stays.
    Other fractions compile nothing new.

    Args:
      weights: every parameter.
      masks: what is kept; exactly 0 or 1, None at leaves that are not pruned.
      growth: scores, higher = grown: `selection.random_scores` with a key for each update (SET), or the magnitude of
        `dense_gradient` (RigL). Leaves where `masks` are None are ignored.
      fraction: the part of what is kept that is dropped, in [0, 1]; one for all layers, or {path: fraction}. See
        `cosine_fraction`.

    Raises:
      ValueError: a fraction out of range, paths that do not match, weights or growth that are NaN, masks not 0/1.

    Source: Mocanu et al. 2018 (SET); Evci et al. 2020 (RigL), section 3, parts 3 and 4, and its released code, which
    adds noise to the magnitudes.
    """
    left = {path: ones for path, (ones, _) in ones_and_sizes(masks).items()}
    stay = {path: keep_count(1 - _fraction(part), left[path]) for path, part in per_path(fraction, left).items()}
    kept = keep_highest(_magnitudes(weights, masks), stay, within=masks)
    growth = jax.tree.map(lambda weight, mask, score: None if mask is None else score, weights, masks, growth)
    candidates = jax.tree.map(lambda mask: 1 - mask, kept)
    grown = keep_highest(growth, {path: left[path] - stay[path] for path in left}, within=candidates)
    return jax.tree.map(lambda old, new: old + new.astype(old.dtype), kept, grown)


def dense_gradient(
    loss_fn: LossFn, subnet: Subnet, batch: Tree, *, model_state: Tree = None, key: Key | None = None
) -> Tree:
    """The loss's gradient by weights * masks, also where the masks are 0; None at leaves that are not masked.

    What a train step cannot see: its gradient, by the weights, is this one times the masks. Its magnitude is RigL's
    growth score. To be compiled by the caller, for one `loss_fn`.

    Args:
      loss_fn: as for `make_train_step`; what it returns beside the loss is dropped.
      subnet: weights, and masks as its scores.
      batch: as for the step; RigL uses the batch of the step that the update replaces.
      model_state: batch statistics and the like.
      key: for dropout.

    Raises:
      ValueError: all masks are None.

    Source: Evci et al. 2020 (RigL), section 3, part 4.
    """
    if not by_path(subnet.scores):
        raise ValueError("there is no mask: every leaf of the subnet's scores is None")
    params = subnetwork(identity, subnet)
    gradient, _ = jax.grad(lambda params: loss_fn(params, model_state, batch, key), has_aux=True)(params)
    return jax.tree.map(lambda slope, mask: None if mask is None else slope, gradient, subnet.scores)


def replace_masks(state: TrainState, tx: optax.GradientTransformation, masks: Masks) -> TrainState:
    """The state with new masks. A weight that was not kept and now is starts at 0, and so does what `tx` holds of it.

    That is every leaf of the optimizer state that is shaped like the weights (momentum, Adam's moments). All else is as
    it was: dropped weights with their momentum, which may move them, unseen; biases, steps, key. The masks are copied,
    so that a step may donate the state, and take the shapes and dtypes of the old ones: nothing is compiled again.

    Args:
      state: of `init_state(..., learns="weights")`, whose scores are masks.
      tx: the optimizer that made it. Put no `lottery.frozen` into it: it would go on freezing by the old masks.
      masks: exactly 0 or 1, with the structure and shapes of the state's.

    Raises:
      ValueError: masks that are not 0/1 or do not match the state's, an optimizer state that is not of `tx`, or a `tx`
        whose state cannot be told from the weights', as that of `lottery.frozen`.

    Source: Evci et al. 2020 (RigL), section 3, part 4, and its released code.
    """
    before = state.subnet.scores
    ones_and_sizes(before), ones_and_sizes(masks)  # raise on what is not 0/1
    shapes, given = ({path: np.shape(mask) for path, mask in by_path(tree).items()} for tree in (before, masks))
    if given != shapes or jax.tree.structure(before) != jax.tree.structure(masks):
        raise ValueError(f"the new masks must have the structure of the state's, {shapes}; got {given}")
    grown = jax.tree.map(lambda old, new: (np.asarray(old) == 0) & (np.asarray(new) == 1), before, masks)

    def cleared(leaf, new):  # optax.masked leaves MaskedNodes behind; Adafactor's row sums have a shape of their own
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
    # From the old mask, whose dtype and place on the devices they take; from what is given they take the values alone.
    copies = jax.tree.map(
        lambda old, new: jnp.where(np.asarray(new) == 1, jnp.ones_like(old), jnp.zeros_like(old)), before, masks
    )
    return state._replace(subnet=Subnet(weights, copies), opt_state=opt_state)


def _magnitudes(weights: Params, masks: Masks) -> Scores:
    return jax.tree.map(lambda weight, mask: None if mask is None else jnp.abs(weight), weights, masks)


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
