"""From the settings to a `supermask_jax.methods.Method`: layer densities, masks before training, keys.

`experiments.config.registry.METHODS` names one function of this room for each method.
"""

from collections.abc import Callable
from fractions import Fraction
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
import optax

import supermask_jax as sm
from experiments.config.registry import DISTRIBUTIONS, SALIENCIES
from experiments.config.sections import Masks
from experiments.run.errors import Infeasible
from experiments.training.network import Network
from supermask_jax import methods
from supermask_jax.methods import Method
from supermask_jax.selection import random_scores
from supermask_jax.trees import Tree, leaf_key, ones_and_sizes, per_path, prunable

SCORED_IMAGES = 10  # of each class, that saliencies are computed from; as published for GraSP


class Setup(NamedTuple):
    """What a method is made from."""

    masks: Masks
    network: Network
    weights: Tree  # before training
    model_state: Tree
    key: jax.Array
    tx: optax.GradientTransformation
    make_loss: Callable[..., Callable] | None = None  # make_loss(temperature=1.0) -> loss_fn
    sample: Callable[[int], dict] | None = None  # so many training images of each class, in the order of the classes
    steps: int = 0  # of training


def edge_popup(setup: Setup) -> Method:
    """Scores learn, and each layer keeps its highest."""
    where = sm.is_kernel
    if setup.masks.unit == "neuron":  # the last layer's neurons are the classes

        def where(path, leaf):
            return sm.is_kernel(path, leaf) and path != setup.network.last

    options = {"where": where, "unit": setup.masks.unit}
    return methods.edge_popup(setup.key, setup.weights, layer_densities(setup), **options)


def bernoulli(setup: Setup) -> Method:
    """Scores learn the probability that each weight is kept."""
    return methods.bernoulli(setup.weights, rescale=setup.masks.rescale)


def threshold(setup: Setup) -> Method:
    """Scores learn, and each weight is kept while its score is above 0."""
    return methods.threshold(setup.key, setup.weights)


def dense(setup: Setup) -> Method:
    """All weights learn."""
    return methods.dense(setup.weights)


def fixed(setup: Setup) -> Method:
    """Weights learn under masks that are chosen before training, by the saliency that names the method or at random."""
    return methods.fixed(setup.weights, masks_by(setup.masks.method, setup))


def gradual(setup: Setup) -> Method:
    """Dense at first, then fewer and fewer of the largest weights."""
    masks = setup.masks
    scope = "global" if masks.distribution == "global" else "layer"
    density = masks.density
    if scope == "layer":
        density = per_path(layer_densities(setup), prunable(setup.weights))
    return methods.gradual(setup.weights, setup.tx, density, steps=setup.steps, every=masks.update_every, scope=scope)


def sparse_evolutionary(setup: Setup) -> Method:
    """SET: the smallest weights make room for random ones."""
    return methods.set(setup.key, setup.weights, masks_by("random", setup), setup.tx, **_exchange(setup))


def rigl(setup: Setup) -> Method:
    """RigL: the smallest weights make room for those of the largest gradient."""
    masks, loss_fn = masks_by("random", setup), setup.make_loss()
    return methods.rigl(setup.key, setup.weights, masks, setup.tx, loss_fn, **_exchange(setup))


def _exchange(setup: Setup) -> dict:
    masks = setup.masks
    return {"steps": setup.steps, "every": masks.update_every, "drop_fraction": masks.drop_fraction}


def masks_by(criterion: str, setup: Setup) -> Tree:
    """Masks of the settings' density, chosen before training: over all layers, or layer by layer.

    Args:
      criterion: "random", or the name of a saliency.
      setup: the settings, the network and its weights.

    Returns:
      0/1 masks in the dtypes of the weights, None at leaves that are not prunable.
    """
    if setup.masks.distribution == "global":
        return _ranked_together(criterion, setup)
    masks = sm.layerwise_masks(_scores_by(criterion, setup)(None), layer_densities(setup))
    return jax.tree.map(lambda weight, mask: None if mask is None else mask.astype(weight.dtype), setup.weights, masks)


def layer_densities(setup: Setup) -> float | dict[str, float | Fraction]:
    """The fraction of each layer that the settings' density and distribution keep.

    Raises:
      Infeasible: no layer densities meet both.
    """
    name = setup.masks.distribution
    if not DISTRIBUTIONS[name].target:
        # The ratios of a saliency, as fractions: a float may round to one weight more.
        ranked = _ranked_together(name, setup)
        return {path: Fraction(ones, size) for path, (ones, size) in ones_and_sizes(ranked).items()}
    return distributed(setup.masks, setup.network, prunable(setup.weights))


def distributed(masks: Masks, network: Network, shapes: dict[str, tuple[int, ...]]) -> float | dict[str, float]:
    """The fraction of each layer that a distribution keeps which looks at shapes only: no ranking by a saliency.

    Raises:
      Infeasible: no layer densities meet both the density and the distribution.
    """
    name, density = masks.distribution, masks.density
    if name == "uniform":
        return density
    entry = DISTRIBUTIONS[name]
    try:
        return entry.resolve()(shapes, density, **{end: getattr(network, end) for end in entry.takes})
    except ValueError as error:
        raise Infeasible(f"--distribution {name} --density {density}: {error}") from error


def _scores_by(criterion: str, setup: Setup) -> Callable[[Tree | None], Tree]:
    """score(masks) -> the scores that a criterion gives to the weights before training, under masks."""
    weights, state, key = setup.weights, setup.model_state, leaf_key(setup.key, criterion)
    if criterion == "random":
        drawn = random_scores(key, weights)
        return lambda masks: drawn
    entry = SALIENCIES[criterion]
    saliency = entry.resolve()
    # What is compiled takes weights and images as arguments: as constants they would be folded, for many seconds.
    if entry.takes == "weights":
        return lambda masks: saliency(weights)
    if entry.takes == "shape":
        seen = None

        def of(weights, seen, **options):
            return saliency(setup.network.logits, weights, setup.network.image_shape, **options)

    else:
        batch = setup.sample(SCORED_IMAGES)
        seen = batch if entry.takes == "batch" else _halves(criterion, batch)
        of = partial(saliency, setup.make_loss(temperature=entry.temperature), key=key)
    score = sm.jit(lambda weights, state, seen, masks: of(weights, seen, masks=masks, model_state=state))
    return lambda masks: score(weights, state, seen, masks)


def _halves(criterion: str, batch: dict[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    """The images of one half of the classes, and of the other."""
    half = len(batch["label"]) // 2
    if not half:
        raise Infeasible(f"{criterion} needs two training images or more")
    return [{name: part[at] for name, part in batch.items()} for at in (slice(half), slice(half, None))]


def _ranked_together(criterion: str, setup: Setup) -> Tree:
    """Masks of the settings' density that a criterion chooses over all layers together, in rounds."""
    masks = setup.masks
    rounds = masks.rounds or (SALIENCIES[criterion].rounds if criterion in SALIENCIES else 1)
    score = _scores_by(criterion, setup)
    try:
        return sm.saliency.prune_in_rounds(score, masks.density, rounds, masks.minimum)
    except ValueError as error:
        raise Infeasible(f"{criterion} at --density {masks.density}: {error}") from error
