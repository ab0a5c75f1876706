"""The methods by their command-line names: each says what the masks come from and what learns."""

from collections.abc import Callable, Mapping
from fractions import Fraction
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import supermask_jax as sm
from experiments.run.errors import Infeasible
from experiments.training import recipe
from experiments.training.stepper import compiling
from supermask_jax import densities, dynamic, lottery, saliency
from supermask_jax.selection import random_scores
from supermask_jax.trees import Tree, by_path, leaf_key, map_with_name, ones_and_sizes, per_path, prunable

GRASP_TEMPERATURE = 200  # of the published code
ROUNDS = {"synflow": 100}  # as published; the others prune in one
SCORED_IMAGES = 10  # of each class, that saliencies are computed from; as published for GraSP
SETTLED = 0.75  # the part of training after which masks no longer change; as published for RigL
FEWEST_UPDATES = 5  # until then, in training too short for --update-every


class Task(NamedTuple):
    """What `runner.fit` trains."""

    mask_fn: sm.MaskFn  # exactly 0 or 1: what is counted, compared and drawn
    forward: sm.MaskFn  # what the weights are multiplied by, in training and evaluation
    subnet: sm.Subnet
    learns: str
    sampled: bool = False  # whether masks are drawn: then a network is many, and evaluated as such
    update: Callable[[int, sm.TrainState, Any], sm.TrainState] | None = None  # (step, state, batch), between steps ...
    update_every: int = 0  # ... so many of them


class Start(NamedTuple):
    """What a method starts from."""

    config: Any
    weights: Tree
    key: jax.Array
    tx: optax.GradientTransformation
    model: Any
    make_loss: Callable[..., Callable] | None = None  # make_loss(temperature=1.0) -> loss_fn
    sample: Callable[[int], dict] | None = None  # so many training images of each class, in the order of the classes
    steps: int = 0  # of training


def edge_popup(start: Start) -> Task:
    draw = sm.init_scores if start.config.unit == "weight" else _neuron_scores
    scores = compiling(partial(draw, weights=start.weights, where=_where(start)))(start.key)
    mask_fn = sm.edge_popup(layer_densities(start))
    if start.config.unit == "neuron":
        mask_fn = _spread(mask_fn, start.weights)
    return Task(mask_fn, mask_fn, sm.Subnet(start.weights, scores), "scores")


def bernoulli(start: Start) -> Task:
    mask_fn = sm.bernoulli()
    forward = sm.rescaled(mask_fn) if start.config.rescale else mask_fn
    return Task(mask_fn, forward, sm.Subnet(start.weights, sm.zero_scores(start.weights)), "scores", sampled=True)


def dense(start: Start) -> Task:
    return _weights_learn(start, jax.tree.map(lambda _: None, start.weights))


def fixed(criterion: str, start: Start) -> Task:
    """Weights learn under the masks that a criterion chose before training."""
    return _weights_learn(start, masks_by(criterion, start))


def gradual(start: Start) -> Task:
    """Zhu & Gupta 2017: dense at first, then fewer and fewer of the largest weights."""
    every, end = _updates(start)
    is_global = start.config.distribution == "global"
    final = start.config.density if is_global else per_path(layer_densities(start), prunable(start.weights))

    def update(step: int, state: sm.TrainState, batch) -> sm.TrainState:
        if step > end:
            return state

        def now(density):  # in the end as it was given: a fraction would be rounded, and one weight too many kept
            return density if step == end else dynamic.cubic_density(step, 0, end, float(density))

        weights, masks = state.subnet
        if is_global:
            masks = sm.global_masks(saliency.magnitude(weights), now(final), masks)
        else:
            masks = dynamic.magnitude_masks(weights, masks, {path: now(density) for path, density in final.items()})
        return dynamic.replace_masks(state, start.tx, masks)

    return _weights_learn(start, lottery.full_masks(start.weights), update, every)


def sparse_evolutionary(start: Start) -> Task:
    """SET, Mocanu et al. 2018: the smallest weights go, others come back at random."""
    return _rewired(start, lambda step, state, batch: random_scores(jax.random.fold_in(start.key, step), start.weights))


def rigl(start: Start) -> Task:
    """Evci et al. 2020: the smallest weights go, those come back whose gradient is largest."""
    loss_fn = start.make_loss()
    gradient = compiling(lambda subnet, batch, key: dynamic.dense_gradient(loss_fn, subnet, batch, key=key))

    def growth(step: int, state: sm.TrainState, batch) -> Tree:
        return jax.tree.map(jnp.abs, gradient(state.subnet, batch, jax.random.fold_in(start.key, step)))

    return _rewired(start, growth)


METHODS: Mapping[str, Callable[[Start], Task]] = {
    "edge-popup": edge_popup,
    "bernoulli": bernoulli,
    "dense": dense,
    "random": partial(fixed, "random"),
    "magnitude": partial(fixed, "magnitude"),
    "snip": partial(fixed, "snip"),
    "grasp": partial(fixed, "grasp"),
    "synflow": partial(fixed, "synflow"),
    "gradual": gradual,
    "set": sparse_evolutionary,
    "rigl": rigl,
}


def masks_by(criterion: str, start: Start) -> Tree:
    """Masks of the settings' density, chosen by a criterion before training: over all layers, or layer by layer.

    criterion: "random", or a saliency: "magnitude", "snip", "grasp", "synflow".
    """
    if start.config.distribution == "global":
        return _by_rank(criterion, start)
    masks = sm.layerwise_masks(_scores_by(criterion, start)(None), layer_densities(start))
    return jax.tree.map(lambda weight, mask: None if mask is None else mask.astype(weight.dtype), start.weights, masks)


def layer_densities(start: Start) -> float | dict[str, float | Fraction]:
    """What part of each layer the settings' density and distribution keep.

    Raises:
      Infeasible: they cannot be had together.
    """
    config, shapes = start.config, prunable(start.weights)
    first, last = recipe.end_layers(config)
    try:
        match config.distribution:
            case "uniform":
                return config.density
            case "uniform+":
                return densities.uniform_plus(shapes, config.density, first, last)
            case "er":
                return densities.er(shapes, config.density)
            case "erk":
                return densities.erk(shapes, config.density)
            case "erk+":
                return densities.erk_plus(shapes, config.density, last)
    except ValueError as error:
        raise Infeasible(f"--distribution {config.distribution} --density {config.density}: {error}") from error
    # The ratios of a saliency, as fractions: a float may round to one weight more.
    masks = _by_rank(config.distribution, start)
    return {path: Fraction(ones, size) for path, (ones, size) in ones_and_sizes(masks).items()}


def _scores_by(criterion: str, start: Start) -> Callable[[Tree | None], Tree]:
    """score(masks) -> the scores that a criterion gives to the weights at the start, under masks."""
    weights, key = start.weights, leaf_key(start.key, criterion)
    # What is compiled takes weights and images as arguments: as constants they would be folded, for many seconds.
    match criterion:
        case "random":
            drawn = random_scores(key, weights)
            return lambda masks: drawn
        case "magnitude":
            return lambda masks: saliency.magnitude(weights)
        case "snip":
            loss_fn, seen = start.make_loss(), start.sample(SCORED_IMAGES)
            score = compiling(lambda weights, seen, masks: saliency.snip(loss_fn, weights, seen, masks=masks, key=key))
        case "grasp":
            batch, loss_fn = start.sample(SCORED_IMAGES), start.make_loss(temperature=GRASP_TEMPERATURE)
            half = len(batch["label"]) // 2  # as published: one half of the classes, then the other
            if not half:
                raise Infeasible("grasp needs two training images or more")
            seen = [{name: part[at] for name, part in batch.items()} for at in (slice(half), slice(half, None))]
            score = compiling(lambda weights, seen, masks: saliency.grasp(loss_fn, weights, seen, masks=masks, key=key))
        case "synflow":
            seen = None
            shape = start.sample(1)["image"].shape[1:]

            def apply_fn(params, model_state, inputs):
                return start.model.apply({"params": params}, inputs)

            score = compiling(lambda weights, seen, masks: saliency.synflow(apply_fn, weights, shape, masks=masks))
        case _:
            raise ValueError(f"there is no criterion {criterion!r}")
    return lambda masks: score(weights, seen, masks)


def _by_rank(criterion: str, start: Start) -> Tree:
    """Masks of the settings' density that a criterion chooses over all layers together, in rounds."""
    config = start.config
    rounds = config.rounds or ROUNDS.get(criterion, 1)
    score = _scores_by(criterion, start)
    try:
        return saliency.iterative(score, config.density, rounds, config.minimum)
    except ValueError as error:
        raise Infeasible(f"{criterion} at --density {config.density}: {error}") from error


def _weights_learn(start: Start, masks: Tree, update=None, every: int = 0) -> Task:
    subnet = sm.Subnet(start.weights, masks)
    return Task(sm.identity, sm.identity, subnet, "weights", update=update, update_every=every)


def _rewired(start: Start, growth: Callable[[int, sm.TrainState, Any], Tree]) -> Task:
    """Random masks whose smallest weights make room, at every update, for those of the highest `growth` score."""
    every, end = _updates(start)

    def update(step: int, state: sm.TrainState, batch) -> sm.TrainState:
        if step >= end:
            return state
        fraction = dynamic.cosine_fraction(step, end, start.config.drop_fraction)
        masks = dynamic.drop_and_grow(*state.subnet, growth(step, state, batch), fraction)
        return dynamic.replace_masks(state, start.tx, masks)

    return _weights_learn(start, masks_by("random", start), update, every)


def _updates(start: Start) -> tuple[int, int]:
    """(steps between changes of the masks, the step of the last one)."""
    settled = int(SETTLED * start.steps)
    every = min(start.config.update_every, max(settled // FEWEST_UPDATES, 1))
    return every, max(settled // every, 1) * every


def _where(start: Start) -> Callable[[str, jax.Array], bool]:
    """The prunable leaves: all kernels, or, where whole neurons are pruned, those but the last: its are the classes."""
    if start.config.unit == "weight":
        return sm.is_kernel
    _, last = recipe.end_layers(start.config)
    return lambda path, leaf: sm.is_kernel(path, leaf) and path != last


def _neuron_scores(key: jax.Array, weights: Tree, where) -> Tree:
    """A score for each output unit, [1, ..., 1, out], drawn like those of weights."""
    drawn = sm.init_scores(key, weights, where)
    return map_with_name(lambda path, score: score[(slice(1),) * (score.ndim - 1)], drawn)


def _spread(mask_fn: sm.MaskFn, weights: Tree) -> sm.MaskFn:
    """A mask function of units as one of weights: a unit's mask is that of each weight into it."""
    shapes = {path: leaf.shape for path, leaf in by_path(weights).items()}

    def spread(scores: Tree, key: jax.Array | None = None) -> Tree:
        return map_with_name(lambda path, mask: jnp.broadcast_to(mask, shapes[path]), mask_fn(scores, key))

    return spread
