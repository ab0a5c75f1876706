"""Models of other people's kinds, whole: what the library does to their kernels, under the layout of the network."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from zoo import NEEDS, ZOO

import supermask_jax as sm
from supermask_jax import initializers, lottery, saliency
from supermask_jax.trees import by_path, layer_counts, stacks_of

pytestmark = pytest.mark.slow
STEPS = 20
CLASSES = 4
KEYS = jax.random.split(jax.random.key(0), 5)


@functools.cache
def drawn(name):
    """(an animal whose kernels are signed constants and whose gates are open, its layout, its loss)."""
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    animal = ZOO[name](False)
    layout = sm.describe(animal.apply_fn, animal.weights, animal.inputs)
    weights = initializers.signed_constant(KEYS[0], initializers.open_gates(animal.weights), where=layout)
    labels = np.arange(len(jax.eval_shape(animal.apply_fn, weights, animal.inputs))) % CLASSES

    def loss_fn(params, model_state, batch, key):
        logits = animal.apply_fn(params, batch).astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), (model_state, {})

    return animal._replace(weights=weights), layout, loss_fn


@pytest.mark.parametrize("name", ZOO)
def test_twenty_steps_of_edge_popup_lower_the_loss_and_move_the_scores_of_every_kernel(name):
    animal, layout, loss_fn = drawn(name)
    method = sm.methods.edge_popup(KEYS[1], animal.weights, 0.5, where=layout)
    tx = optax.adam(0.02)
    state = sm.init_state(method.subnet, tx, KEYS[2], learns=method.learns)
    step = jax.jit(sm.make_train_step(method.mask_fn, loss_fn, tx, learns=method.learns))
    losses = []
    for _ in range(STEPS):
        state, metrics = step(state, animal.inputs)
        losses.append(float(metrics["loss"]))
    assert np.isfinite(losses).all() and min(losses[-3:]) < 0.9 * losses[0]
    assert step._cache_size() == 1
    before, after = by_path(method.subnet.scores), by_path(state.subnet.scores)
    assert set(before) == set(animal.kernels)
    for path, score in before.items():
        assert score.dtype == jnp.float32
        stack = layout[path].stack
        moved = np.moveaxis(np.asarray(after[path] != score), stack, range(len(stack)))
        assert moved.reshape(animal.kernels[path][0], -1).any(axis=1).all(), f"{path}: a layer's scores never move"
    jax.tree.map(np.testing.assert_array_equal, state.subnet.weights, animal.weights)
    masks = method.mask_fn(state.subnet.scores, None)
    for layer, (ones, size) in layer_counts(masks, layout).items():
        assert ones == sm.keep_count(0.5, size), layer


@pytest.mark.parametrize("name", ZOO)
def test_random_masks_take_erk_densities_in_every_layer(name):
    animal, layout, _ = drawn(name)
    densities = sm.densities.erk(layout, 0.3)
    masks = sm.random_masks(KEYS[3], animal.weights, densities, layout)
    counts = layer_counts(masks, layout)
    for path, stack in stacks_of(masks, layout).items():
        layers = [counts[layer] for layer in counts if layer == path or layer.startswith(f"{path}[")]
        assert len(layers) == max(int(np.prod(stack)), 1) == animal.kernels[path][0]
        assert {ones for ones, _ in layers} == {sm.keep_count(densities[path], layers[0][1])}
    assert sm.densities.overall(layout, densities) == pytest.approx(0.3)


@pytest.mark.parametrize("name", ZOO)
def test_snip_and_one_round_of_pruning_keep_their_counts(name):
    animal, layout, loss_fn = drawn(name)
    scores = saliency.snip(loss_fn, animal.weights, animal.inputs, where=layout)
    masks = sm.global_masks(scores, 0.4, minimum=1, layout=layout)
    total = sum(size for _, size in layer_counts(masks, layout).values())
    assert sum(ones for ones, _ in layer_counts(masks, layout).values()) == sm.keep_count(0.4, total)
    assert all(ones for ones, _ in layer_counts(masks, layout).values())
    trained = jax.tree.map(lambda w: w * 1.5, animal.weights)
    left = lottery.prune(trained, masks, 0.2, "layer", layout=layout)
    for layer, (ones, _) in layer_counts(left, layout).items():
        assert ones == sm.keep_count(0.8, layer_counts(masks, layout)[layer][0])
