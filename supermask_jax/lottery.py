"""Lottery tickets: train, prune by the trained weights, rewind to earlier weights, and train again.

`iterative_pruning` is a loop around a train function that it is given. Rewinding means that every round starts from the
same weights: those of step 0 (Frankle & Carbin 2019), or those of an early step k (Frankle et al. 2020).
"""

from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from supermask_jax.densities import exact, keep_count
from supermask_jax.leaves import Layout
from supermask_jax.selection import highest_of_each, keep_highest, keep_highest_of_all, random_scores
from supermask_jax.trees import (
    Tree,
    Where,
    apply_masks,
    by_path,
    is_kernel,
    layer_counts,
    leaf_key,
    magnitudes,
    map_with_name,
    per_layer,
    prunable,
    stacks_of,
)
from supermask_jax.units import unit_masks, unit_scores

Scope = Literal["global", "layer"]
Unit = Literal["weight", "neuron"]


def full_masks(weights: Tree, where: Where = is_kernel) -> Tree:
    """Returns masks that keep everything: ones at the prunable leaves, None elsewhere.

    Args:
      weights: tree whose shapes and dtypes the masks take.
      where: (path, leaf) -> whether the leaf is prunable; or the `Layout` of the network.

    Raises:
      ValueError: `where` chooses no leaf.
    """
    shapes = prunable(weights, where)
    return map_with_name(lambda path, leaf: jnp.ones_like(leaf) if path in shapes else None, weights)


def prune(
    weights: Tree,
    masks: Tree,
    fraction: float | Mapping[str, float],
    scope: Scope = "global",
    unit: Unit = "weight",
    *,
    minimum: int = 0,
    layout: Layout | None = None,
) -> Tree:
    """Returns masks without the `fraction` of the kept weights whose magnitude is least; nothing pruned comes back.

    Of m weights that are left, `keep_count(1 - fraction, m)` stay, computed on the decimal as written.

    Args:
      weights: every parameter, after training.
      masks: what is left; exactly 0 or 1. Leaves that are None are neither pruned nor counted.
      fraction: the part of what is **left** that is removed, in [0, 1]; with scope "layer" also {path: fraction}.
      scope: "global" ranks all layers as one; "layer" ranks each by itself.
      unit: "weight", or "neuron" for whole output units (neurons, channels), ranked by the mean magnitude of the
        weights that each has left. Units are then counted, and one without any weight left stays pruned. The output
        layer's units are the classes: give it fraction 0, or the mask None.
      minimum: with scope "global", how many weights (or units) each layer keeps at least.
      layout: what tells which leaves stack layers, and which axes are "out". None means the names.

    Returns:
      Masks in the structure of `masks`. A warning names the layers that keep nothing of what was left.

    Raises:
      ValueError: a fraction outside [0, 1], an unknown scope or unit, too few weights for the minimum, paths that do
        not match, a mapping with scope "global", weights that are NaN, masks that are not 0/1.

    Source: Frankle & Carbin 2019, section 2 (each layer by itself, the output layer at half the rate) and section 4
    (globally). Their released code removes one weight more, the threshold itself, and so does open_lth.
    """
    return prune_by(magnitudes(weights, masks), masks, fraction, scope, unit, minimum=minimum, layout=layout)


def prune_by(
    scores: Tree,
    masks: Tree,
    fraction: float | Mapping[str, float],
    scope: Scope = "global",
    unit: Unit = "weight",
    *,
    minimum: int = 0,
    layout: Layout | None = None,
) -> Tree:
    """Returns masks without the `fraction` of the kept weights whose scores are lowest; nothing pruned comes back.

    Of m weights that are left, `keep_count(1 - fraction, m)` stay, computed on the decimal as written.

    Args:
      scores: tree of floats of at most 32 bits, None where `masks` are.
      masks: what is left; exactly 0 or 1. Leaves that are None are neither pruned nor counted.
      fraction: the part of what is **left** that is removed, in [0, 1]; with scope "layer" also {path: fraction}.
      scope: "global" ranks all layers as one; "layer" ranks each by itself.
      unit: "weight", or "neuron" for whole output units (neurons, channels), ranked by the mean score of the weights
        that each has left. Units are then counted, and one without any weight left stays pruned. The output layer's
        units are the classes: give it fraction 0, or the mask None.
      minimum: with scope "global", how many weights (or units) each layer keeps at least.
      layout: what tells which leaves stack layers, and which axes are "out". None means the names.

    Returns:
      Masks in the structure of `masks`. A warning names the layers that keep nothing of what was left.

    Raises:
      ValueError: a fraction outside [0, 1], an unknown scope or unit, too few weights for the minimum, paths that do
        not match, a mapping with scope "global", scores that are NaN, masks that are not 0/1.
    """
    _check_choice("scope", scope, ("global", "layer"))
    _check_choice("unit", unit, ("weight", "neuron"))
    if unit == "neuron":
        of_units = unit_scores(scores, masks, layout=layout), unit_masks(masks, layout=layout)
        kept = prune_by(*of_units, fraction, scope, minimum=minimum, layout=layout)
        return jax.tree.map(lambda mask, unit: mask * unit.astype(mask.dtype), masks, kept)
    left = {layer: ones for layer, (ones, _) in layer_counts(masks, layout).items()}
    if scope == "layer":
        parts = per_layer(fraction, stacks_of(masks, layout))
        counts = {layer: _count_left(part, left[layer]) for layer, part in parts.items()}
        return _in_dtypes(keep_highest(scores, counts, masks, layout=layout), masks)
    if isinstance(fraction, Mapping):
        raise ValueError("a fraction for each path needs scope='layer': a global ranking removes one fraction of all")
    count = _count_left(fraction, sum(left.values()))
    return _in_dtypes(keep_highest_of_all(scores, count, masks, minimum=minimum, layout=layout), masks)


def _in_dtypes(new: Tree, masks: Tree) -> Tree:
    return jax.tree.map(lambda mask, one: one.astype(mask.dtype), masks, new)


def round_fraction(density: float, rounds: int) -> float:
    """Returns the fraction to remove in each of `rounds` rounds so that `density` is left: 1 - density**(1 / rounds).

    It is rounded to twelve decimals. Without the rounding, 0.64 in two rounds gives 0.19999999999999996, which keeps a
    weight too many.

    Args:
      density: fraction kept after all rounds, in [0, 1].
      rounds: their number, >= 1.

    Raises:
      ValueError: the density is outside [0, 1], or there is no round.
    """
    if rounds < 1:
        raise ValueError(f"a density is reached in one round or more, got {rounds}")
    return round(1 - float(exact(density)) ** (1 / rounds), 12)


class Round(NamedTuple):
    """One round of iterative pruning: its masks, and the result of training under them."""

    number: int  # from 0, before anything is pruned
    masks: Tree
    trained: Any  # what `train` returned


def iterative_pruning(
    train: Callable[[Tree, Tree, int], Any],
    weights: Tree,
    masks: Tree,
    rounds: int,
    prune: Callable[[Any, Tree], Tree],
) -> Iterator[Round]:
    """Trains and prunes `rounds` times, and trains what is left; yields rounds + 1 rounds, each after its training.

    Every round starts from the same `weights`: that is rewinding, to the step that they are from. To fine-tune instead,
    let `train` remember its weights. One-shot pruning is one round with a large fraction. The loop that consumes the
    iterator trains; after a break nothing more is trained.

        for round in lottery.iterative_pruning(train, weights, lottery.full_masks(weights), 5, prune):
            print(round.number, sm.density(round.masks))

    Args:
      train: train(weights, masks, number) -> trained, which is anything that `prune` can read; most simply the weights.
      weights: what every round starts from.
      masks: what the first round trains under; usually `full_masks`.
      rounds: how often to prune; 0 trains once.
      prune: prune(trained, masks) -> the next round's masks; such as `partial(lottery.prune, fraction=0.2)`.

    Raises:
      ValueError: when the iteration begins, `rounds` is negative.

    Source: Frankle & Carbin 2019, section 1 and, in appendix B, strategy 1; from a step k: Frankle et al. 2020.
    """
    if rounds < 0:
        raise ValueError(f"the number of rounds must not be negative, got {rounds}")
    for number in range(rounds + 1):
        trained = train(weights, masks, number)
        yield Round(number, masks, trained)
        if number < rounds:
            masks = prune(trained, masks)


def random_like(key: jax.Array, masks: Tree, *, layout: Layout | None = None) -> Tree:
    """Returns random masks with exactly as many ones in each layer as `masks`: a control of an experiment with them.

    Args:
      key: a `jax.random.key`; a leaf's draw depends only on it and the leaf's path.
      masks: exactly 0 or 1, None at leaves that are not pruned. Not for jit.
      layout: what tells which leaves stack layers. None means the names.

    Raises:
      ValueError: masks that are not 0/1.
    """
    counts = {layer: ones for layer, (ones, _) in layer_counts(masks, layout).items()}
    drawn = highest_of_each(random_scores(key, masks, where=lambda path, leaf: True), counts, layout=layout)
    return jax.tree.map(lambda mask, new: new.astype(mask.dtype), masks, drawn)


def reshuffled(key: jax.Array, weights: Tree, masks: Tree) -> Tree:
    """Returns weights whose kept ones are permuted among the kept positions of their layer; all others are unchanged.

    Args:
      key: a `jax.random.key`; a leaf's permutation depends only on it and the leaf's path.
      weights: every parameter.
      masks: 0 or 1, None at leaves that are not pruned. They must be concrete (not under jit).

    Source: Zhou et al. 2019, section 3 ("reshuffle"). Their "reinit" means other weights.
    """

    def shuffle(path: str, weight: jax.Array, mask: jax.Array | None) -> jax.Array:
        if mask is None:
            return weight
        kept = jnp.flatnonzero(mask)
        flat = jnp.asarray(weight).ravel()
        return flat.at[kept].set(jax.random.permutation(leaf_key(key, path), flat[kept])).reshape(weight.shape)

    return map_with_name(shuffle, weights, masks)


def frozen(masks: Tree) -> optax.GradientTransformation:
    """Returns a transformation that multiplies updates by `masks`: last in a chain, it leaves pruned weights unchanged.

    It is for networks whose pruned weights keep their initial value instead of 0: train them densely with it. It must
    be last, because weight decay after it would move pruned weights. Leaves whose mask is None pass. Its state **is**
    the masks, so that a step compiled with one `frozen` also works on the state of another, without a new compilation.

    Args:
      masks: 0 or 1, None at leaves that are not pruned.

    Source: Zhou et al. 2019, section 4 (mask-0 actions).
    """

    def init(weights: Tree) -> Tree:  # copies: a step may donate its state, and the masks are the caller's
        return jax.tree.map(lambda w, mask: None if mask is None else jnp.array(mask, w.dtype), weights, masks)

    def update(updates: Tree, state: Tree, weights: Tree | None = None) -> tuple[Tree, Tree]:
        return apply_masks(updates, state), state

    return optax.GradientTransformation(init, update)


def shrink(weights: Tree, masks: Tree, layers: list[str]) -> Tree:
    """Returns the weights of the smaller network that computes the same as weights * masks, without units pruned whole.

    Removed are, from each kernel but the last, the output units whose mask is all 0, with their biases, and what the
    next kernel reads of them. A dense kernel may read a flattened image, whose channels are innermost (NHWC). The
    smaller network computes the same if a unit of zeros stays 0 until the next kernel: through ReLU, pooling and
    dropout, but not through sigmoid.

    Args:
      weights: every parameter: the kernels of a chain, [..., in, out], and their biases, siblings named "bias".
      masks: 0 or 1, None at leaves that are not pruned.
      layers: the paths of the kernels in the order in which data passes through them.

    Returns:
      A tree like `weights` of smaller arrays, already multiplied by the masks, for the same model with smaller widths.

    Raises:
      ValueError: `layers` are not exactly the kernels, or do not form a chain; a layer is pruned whole; a unit that
        would be removed has a bias that is not 0, which it still passes on.
    """
    leaves = by_path(apply_masks(weights, masks))
    biases = {path: path[: path.rfind("/") + 1] + "bias" for path in layers}
    if sorted(layers) != sorted(path for path in leaves if path not in biases.values()):
        raise ValueError(
            "layers must name every kernel once, in the order of the data, and every other leaf be a bias beside one: "
            f"got {', '.join(layers)} of {', '.join(leaves)}"
        )
    kept = by_path(masks)
    for path, following in pairwise(layers):
        mask = np.asarray(kept.get(path, np.ones(leaves[path].shape)))
        stays = mask.any(axis=tuple(range(mask.ndim - 1)))
        if not stays.any():
            raise ValueError(f"all units of {path!r} are pruned: nothing passes through it")
        if biases[path] in leaves:
            bias = leaves[biases[path]]
            constant = np.flatnonzero(~stays & (np.asarray(bias) != 0))
            if constant.size:
                raise ValueError(
                    f"unit {constant[0]} of {path!r} is pruned, but its bias is {bias[constant[0]]}, not 0"
                )
            leaves[biases[path]] = jnp.compress(stays, bias)
        positions, rest = divmod(leaves[following].shape[-2], stays.size)
        if rest or not positions:
            raise ValueError(f"{following!r} {leaves[following].shape} cannot read the {stays.size} units of {path!r}")
        leaves[path] = jnp.compress(stays, leaves[path], axis=-1)
        leaves[following] = jnp.compress(np.tile(stays, positions), leaves[following], axis=-2)
    return map_with_name(lambda path, leaf: leaves[path], weights)


def _count_left(fraction: float, left: int) -> int:
    try:
        removed = exact(fraction)
    except ValueError:
        raise ValueError(
            f"fraction must be a number in [0, 1] (the part of what is left that is removed), got {fraction!r}"
        ) from None
    return keep_count(1 - removed, left)


def _check_choice(what: str, choice: str, choices: tuple[str, ...]) -> None:
    if choice not in choices:
        raise ValueError(f"{what} must be one of {', '.join(choices)}, got {choice!r}")
