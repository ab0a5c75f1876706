"""A user's script with the public API: mypy checks its types, and a test runs it."""

from collections.abc import Iterator
from functools import partial
from typing import assert_type

import jax
import jax.numpy as jnp
import optax

import supermask_jax as sm
from supermask_jax import dynamic, lottery, methods, metrics, parallel, saliency
from supermask_jax.models import zoo

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


def images(number: int) -> Iterator[Batch]:
    for index in range(number):
        key = jax.random.key(index)
        yield {"image": jax.random.normal(key, (8, 6, 6, 1)), "label": jax.random.randint(key, (8,), 0, 3)}


def main() -> dict[str, float]:
    net = zoo.mlp(3, width=8)
    assert_type(net.first, str)
    batch = next(images(1))
    weights = net.module.init(jax.random.key(0), batch["image"])["params"]

    def loss_fn(
        params: sm.supermask.Params, model_state: None, batch: Batch, key: jax.Array | None
    ) -> tuple[jax.Array, tuple[None, Metrics]]:
        logits = net.module.apply({"params": params}, batch["image"])
        assert isinstance(logits, jax.Array)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        return jnp.mean(losses), (model_state, {"accuracy": metrics.accuracy(logits, batch["label"])})

    # Selection and densities.
    shapes = {path: tuple(leaf.shape) for path, leaf in sm.trees.by_path(weights).items()}
    density = sm.densities.erk(shapes, 0.3)
    assert_type(density, dict[str, float])
    assert_type(sm.keep_count(0.3, 10), int)
    masks = sm.random_masks(jax.random.key(1), weights, density)
    assert_type(sm.density(masks), float)
    assert_type(sm.layer_densities(masks), dict[str, float])

    # Edge-popup, by hand.
    tx = optax.sgd(0.1, 0.9)
    mask_fn = sm.edge_popup(0.3)
    assert_type(mask_fn, sm.MaskFn)
    subnet = sm.Subnet(weights, sm.init_scores(jax.random.key(2), weights))
    state = sm.init_state(subnet, tx, jax.random.key(3), learns="scores")
    step = sm.jit(sm.make_train_step(mask_fn, loss_fn, tx, learns="scores"))
    for batch in images(3):
        state, seen = step(state, batch)
        assert_type(state, sm.TrainState)
        assert_type(seen, dict[str, jax.Array])
    assert_type(step.lower(state, batch), jax.stages.Lowered)

    # A whole method.
    method = methods.rigl(jax.random.key(4), weights, masks, tx, loss_fn, steps=3)
    assert_type(method, sm.Method)
    assert_type(method.product, sm.ProductFn | None)
    state = sm.init_state(method.subnet, tx, jax.random.key(5), learns=method.learns)
    step = sm.jit(sm.make_train_step(method.mask_fn, loss_fn, tx, learns=method.learns, product=method.product))
    for number, batch in enumerate(images(3), start=1):
        state, seen = step(state, batch)
        if method.update and number % method.update_every == 0:
            state = method.update(number, state, batch)

    # Pruning before training, and after it.
    score = sm.jit(lambda masks: saliency.snip(loss_fn, weights, batch, masks=masks))
    masks = saliency.prune_in_rounds(score, 0.3, rounds=2)
    masks = lottery.prune(state.subnet.weights, masks, 0.2)
    prune = partial(lottery.prune, fraction=0.2)
    for round in lottery.iterative_pruning(lambda weights, masks, number: weights, weights, masks, 1, prune):
        assert_type(round.number, int)
    assert_type(dynamic.cosine_fraction(0, 10), float)

    # Measures, and many devices.
    cost = metrics.flops(lambda params, x: net.module.apply({"params": params}, x), weights, masks, (6, 6, 1))
    assert_type(cost, int)
    mesh = parallel.mesh(1)
    placed = parallel.place_state(mesh, state)
    assert_type(placed, sm.TrainState)
    loss: float = float(step(placed, parallel.shard_batch(mesh, batch))[1]["loss"])
    return {"loss": loss, "density": sm.density(masks), "flops": cost}


def mistakes(step: sm.backend.Jitted[[sm.TrainState, Batch], sm.TrainState], state: sm.TrainState) -> None:
    """Not run: each line must be a type error, or mypy reports that its ignore is unused."""
    step(state)  # type: ignore[call-arg]  # no batch
    step(state, state)  # type: ignore[arg-type]  # a state as the batch
    sm.init_state(state.subnet, optax.sgd(0.1), state.key, learns="both")  # type: ignore[arg-type]
    sm.edge_popup("0.3")  # type: ignore[arg-type]
    lottery.prune(state.subnet.weights, state.subnet.scores, 0.2, scope="all")  # type: ignore[arg-type]
    methods.gradual(state.subnet.weights, optax.sgd(0.1), 0.3)  # type: ignore[call-arg]  # no steps


if __name__ == "__main__":
    print(main())
