"""The table: every method keeps every invariant. A new method is a new row."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import supermask_jax as sm
from experiments import methods, recipe
from experiments.mnist import FREE_DENSITY, RECIPES, Config
from supermask_jax.trees import by_path, leaf_key

STEPS = 6
KEY = jax.random.key(4)
LEARNS = {"edge-popup": "scores", "bernoulli": "scores", "dense": "weights"}
RATES = {"edge-popup": 0.05, "bernoulli": 20.0, "dense": 0.05}


def config(method, density=0.3, **more):
    rates = {"learning_rate": RATES[method], "weight_decay": 1e-3, "momentum": 0.9}
    return dataclasses.replace(Config(), method=method, density=density, model="lenet-300-100", **rates, **more)


def batch():
    images = jax.random.randint(jax.random.key(9), (16, 8, 8, 1), 0, 256).astype(jnp.uint8)
    return {"image": images, "label": jnp.arange(16) % 10, "weight": jnp.ones(16)}


def start(method, density=0.3, seed=0, **more):
    settings = config(method, density, **more)
    model = recipe.build_model(settings, classes=10)
    key = jax.random.key(seed)
    weights = recipe.draw_weights(settings, model, (8, 8, 1), leaf_key(key, "weights"))
    task = methods.METHODS[method](settings, weights, leaf_key(key, "scores"))
    tx = recipe.make_optimizer(settings, optax.constant_schedule(settings.learning_rate))
    state = sm.init_state(task.subnet, tx, leaf_key(key, "train"), learns=task.learns)
    step = jax.jit(sm.make_train_step(task.forward, recipe.make_loss(model, 0.5, 0.25), tx, learns=task.learns))
    return task, state, step


@functools.cache
def run(method, density=0.3, seed=0):
    task, state, step = start(method, density, seed)
    first = None
    for _ in range(STEPS):
        state, metrics = step(state, batch())
        first = metrics["loss"] if first is None else first
    return task, state, step, (first, metrics["loss"])


each_method = pytest.mark.parametrize("method", methods.METHODS)
masked_method = pytest.mark.parametrize("method", [m for m in methods.METHODS if m != "dense"])
counted_method = pytest.mark.parametrize("method", [m for m in methods.METHODS if m not in FREE_DENSITY])


def test_the_table_the_command_line_and_the_presets_name_the_same_methods():
    choices = Config.__dataclass_fields__["method"].type.__args__
    assert set(choices) == set(methods.METHODS) == set(LEARNS) == {method for _, method in RECIPES}


@each_method
def test_loss_goes_down(method):
    *_, (first, last) = run(method)
    assert last < first


@each_method
def test_what_does_not_learn_is_bit_identical(method):
    task, state, *_ = run(method)
    frozen = "weights" if LEARNS[method] == "scores" else "scores"
    assert task.learns == LEARNS[method]
    jax.tree.map(np.testing.assert_array_equal, getattr(state.subnet, frozen), getattr(task.subnet, frozen))


@each_method
def test_what_learns_changes_in_every_leaf(method):
    task, state, *_ = run(method)
    before, after = by_path(getattr(task.subnet, task.learns)), by_path(getattr(state.subnet, task.learns))
    assert before and all(not np.array_equal(before[path], after[path]) for path in before)


@masked_method
@pytest.mark.parametrize("key", [None, 5])
def test_masks_are_binary_before_and_after_training(method, key):
    task, state, *_ = run(method)
    key = None if key is None else jax.random.key(key)
    for subnet in (task.subnet, state.subnet):
        for path, mask in by_path(task.mask_fn(subnet.scores, key)).items():
            assert set(np.unique(mask)) <= {0.0, 1.0}
            assert mask.dtype == by_path(subnet.weights)[path].dtype
    assert all(set(np.unique(mask)) == {0.0, 1.0} for mask in by_path(task.mask_fn(state.subnet.scores, key)).values())


@counted_method
@pytest.mark.parametrize("density", [0.3, 0.7])
def test_masks_have_exact_counts_before_and_after_training(method, density):
    task, state, *_ = run(method, density)
    for subnet in (task.subnet, state.subnet):
        for path, mask in by_path(task.mask_fn(subnet.scores, None)).items():
            assert np.count_nonzero(mask) == sm.keep_count(density, mask.size), path


@masked_method
def test_pruned_weights_are_zero_in_the_subnetwork(method):
    task, state, *_ = run(method)
    masks = by_path(task.mask_fn(state.subnet.scores, None))
    for path, param in by_path(sm.subnetwork(task.forward, state.subnet)).items():
        assert np.all(np.asarray(param)[np.asarray(masks[path]) == 0] == 0)


@each_method
def test_masks_depend_on_the_key_exactly_where_a_method_says_that_it_draws_them(method):
    task, state, *_ = run(method)
    a, b, none = (by_path(task.mask_fn(state.subnet.scores, key)) for key in (*jax.random.split(KEY), None))
    assert task.sampled == any(not np.array_equal(a[path], b[path]) for path in a)
    assert task.sampled == any(not np.array_equal(a[path], none[path]) for path in a)


@pytest.mark.parametrize("rescale", [False, True])
def test_bernoulli_steps_have_the_gradient_of_the_closed_form(rescale):
    """One SGD step from the logits 0: p (1 - p) is a quarter, and rescaling doubles a mask of which half is kept."""
    task, state, step = start("bernoulli", rescale=rescale)
    mask_key, loss_key = jax.random.split(jax.random.fold_in(state.key, 0))
    settings = config("bernoulli")
    loss_fn = recipe.make_loss(recipe.build_model(settings, classes=10), 0.5, 0.25)
    masks = task.mask_fn(state.subnet.scores, mask_key)
    scaled = jax.tree.map(lambda m: m * (m.size / m.sum()), masks) if rescale else masks
    params = sm.subnetwork(sm.identity, state.subnet._replace(scores=scaled))
    outer = by_path(jax.grad(lambda p: loss_fn(p, None, batch(), loss_key)[0])(params))
    after, _ = step(state, batch())
    for path, score in by_path(after.subnet.scores).items():
        w, m, g = (np.asarray(by_path(tree)[path], np.float64) for tree in (state.subnet.weights, masks, outer))
        factor = m.size / m.sum() if rescale else 1.0
        flow = factor * w * g - rescale * factor / m.sum() * (m * w * g).sum()
        expected = -settings.learning_rate * flow / 4
        np.testing.assert_allclose(score, expected, rtol=0, atol=1e-5 * np.abs(expected).max(), err_msg=path)


def test_the_command_line_names_every_initializer():
    assert set(Config.__dataclass_fields__["init"].type.__args__) == set(recipe.INITIALIZERS)


def test_signed_deviation_takes_signs_and_size_from_glorot_normal():
    task, *_ = start("bernoulli", init="signed-deviation")
    drawn, *_ = start("bernoulli", init="glorot-normal")
    for path, weight in by_path(drawn.subnet.weights).items():
        signed = np.asarray(by_path(task.subnet.weights)[path])
        np.testing.assert_allclose(signed, np.sign(weight) * np.std(np.asarray(weight, np.float64)), rtol=1e-6)


@each_method
def test_same_seed_same_bits_other_seed_other_bits(method):
    again = run.__wrapped__  # not from the cache
    (_, a, *_), (_, b, *_), (_, c, *_) = run(method), again(method), run(method, seed=1)
    jax.tree.map(np.testing.assert_array_equal, a.subnet, b.subnet)
    pairs = zip(jax.tree.leaves(a.subnet.weights), jax.tree.leaves(c.subnet.weights), strict=True)
    assert all(not np.array_equal(x, y) for x, y in pairs)


@each_method
def test_resumed_in_the_middle_it_ends_the_same(method):
    _, whole, step, _ = run(method)
    _, state, _ = start(method)
    for _ in range(STEPS // 2):
        state, _ = step(state, batch())
    state = jax.tree.unflatten(jax.tree.structure(state), [jnp.copy(leaf) for leaf in jax.tree.leaves(state)])
    for _ in range(STEPS - STEPS // 2):
        state, _ = step(state, batch())
    jax.tree.map(np.testing.assert_array_equal, state.subnet, whole.subnet)


@each_method
def test_a_second_step_compiles_nothing(method):
    _, _, step, _ = run(method)
    assert step._cache_size() == 1


@each_method
def test_images_of_weight_zero_change_nothing(method):
    _, state, step = start(method)
    padded = {**batch(), "weight": jnp.ones(16).at[12:].set(0)}
    garbage = {**padded, "image": padded["image"].at[12:].set(255), "label": padded["label"].at[12:].set(3)}
    (a, metrics), (b, _) = step(state, padded), step(state, garbage)
    jax.tree.map(np.testing.assert_array_equal, a.subnet, b.subnet)
    assert metrics["count"] == 12
