"""The table: every method keeps every invariant. A new method is a new row."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import supermask_jax as sm
from experiments.mnist import FREE_DENSITY, RECIPES, Config
from experiments.training import methods, recipe
from supermask_jax.trees import by_path, leaf_key

STEPS = 6
KEY = jax.random.key(4)
LEARNS = {"edge-popup": "scores", "bernoulli": "scores", "dense": "weights"}
LEARNS |= dict.fromkeys(("random", "magnitude", "snip", "grasp", "synflow", "gradual", "set", "rigl"), "weights")
RATES = {"edge-popup": 0.05, "bernoulli": 20.0}  # else 0.05
FIXED = ("random", "magnitude", "snip", "grasp", "synflow")
CHANGED = ("gradual", "set", "rigl")  # masks change while weights learn


def config(method, density=0.3, **more):
    rates = {"learning_rate": RATES.get(method, 0.05), "weight_decay": 1e-3, "momentum": 0.9}
    more = {"model": "lenet-300-100", **rates, **more}
    return dataclasses.replace(Config(), method=method, density=density, **more)


def batch():
    images = jax.random.randint(jax.random.key(9), (16, 8, 8, 1), 0, 256).astype(jnp.uint8)
    return {"image": images, "label": jnp.arange(16) % 10, "weight": jnp.ones(16)}


def start(method, density=0.3, seed=0, **more):
    settings = config(method, density, **more)
    model = recipe.build_model(settings, classes=10)
    key = jax.random.key(seed)
    weights = recipe.draw_weights(settings, model, (8, 8, 1), leaf_key(key, "weights"))
    tx = recipe.make_optimizer(settings, optax.constant_schedule(settings.learning_rate))
    make_loss = functools.partial(recipe.make_loss, model, 0.5, 0.25)
    begin = methods.Start(settings, weights, leaf_key(key, "scores"), tx, model, make_loss, lambda n: batch(), STEPS)
    task = methods.METHODS[method](begin)
    state = sm.init_state(task.subnet, tx, leaf_key(key, "train"), learns=task.learns)
    step = jax.jit(sm.make_train_step(task.forward, make_loss(), tx, learns=task.learns))
    return task, state, step


def advance(task, state, step, steps):
    """Steps, and between them the changes of the masks."""
    metrics = None
    for _ in range(steps):
        state, metrics = step(state, batch())
        if task.update and int(state.step) % task.update_every == 0:
            state = task.update(int(state.step), state, batch())
    return state, metrics


@functools.cache
def run(method, density=0.3, seed=0):
    task, state, step = start(method, density, seed)
    first = step(state, batch())[1]["loss"]
    state, metrics = advance(task, state, step, STEPS)
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
    if method not in CHANGED:
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
    for subnet in (task.subnet, state.subnet)[method == "gradual" :]:  # which keeps everything at first
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


@pytest.mark.parametrize("method", CHANGED)
def test_masks_that_are_to_change_do_and_gradual_only_ever_loses(method):
    task, state, *_ = run(method)
    before, after = by_path(task.subnet.scores), by_path(state.subnet.scores)
    assert all(not np.array_equal(before[path], after[path]) for path in before)
    came_back = [np.any(np.asarray(after[path]) > np.asarray(before[path])) for path in before]
    assert not any(came_back) if method == "gradual" else all(came_back)


@pytest.mark.parametrize(
    ("steps", "asked", "every", "end"), [(6, 100, 1, 4), (126, 100, 18, 90), (9380, 100, 100, 7000)]
)
def test_masks_may_change_five_times_at_least_and_settle_at_three_quarters(steps, asked, every, end):
    settings = config("set", update_every=asked)
    assert methods._updates(methods.Start(settings, None, None, None, None, steps=steps)) == (every, end)


@pytest.mark.parametrize("method", CHANGED)
def test_masks_settle_before_the_end(method):
    _, state, _ = start(method)
    task, _, _, _ = run(method)
    late = task.update(STEPS, state, batch())
    jax.tree.map(np.testing.assert_array_equal, late.subnet, state.subnet)


@pytest.mark.parametrize("method", ["edge-popup", "random", "set"])
def test_layers_of_one_shape_are_drawn_independently(method):
    task, *_ = start(method, model="mlp", width=40, depth=3)
    masks = by_path(task.mask_fn(task.subnet.scores, None))
    same = np.mean(np.asarray(masks["Dense_1/kernel"]) == np.asarray(masks["Dense_2/kernel"]))
    assert abs(same - (0.3**2 + 0.7**2)) < 0.06


@pytest.mark.parametrize("distribution", Config.__dataclass_fields__["distribution"].type.__args__)
@pytest.mark.parametrize("method", ["random", "gradual"])
def test_every_distribution_keeps_the_density_of_all_weights(method, distribution):
    task, state, step = start(method, distribution=distribution)
    state, _ = advance(task, state, step, STEPS)
    counts = {path: (int(mask.sum()), mask.size) for path, mask in by_path(state.subnet.scores).items()}
    ones, total = (sum(numbers) for numbers in zip(*counts.values(), strict=True))
    if distribution == "uniform+":  # as published: the first layer, here most of the weights, is left dense
        assert counts["Dense_0/kernel"][0] == counts["Dense_0/kernel"][1]
        assert all(
            ones == sm.keep_count(0.3, size) for path, (ones, size) in counts.items() if path != "Dense_0/kernel"
        )
    else:
        assert abs(ones - 0.3 * total) <= len(counts)  # a layer's count is rounded up
    one_density = len({round(ones / size, 2) for ones, size in counts.values()}) == 1
    assert one_density == (distribution == "uniform")


def test_ratios_of_a_saliency_are_its_counts_at_other_positions():
    snip, *_ = start("snip", distribution="global")
    drawn, *_ = start("random", distribution="snip")
    a, b = by_path(snip.subnet.scores), by_path(drawn.subnet.scores)
    assert {path: int(m.sum()) for path, m in a.items()} == {path: int(m.sum()) for path, m in b.items()}
    assert all(not np.array_equal(a[path], b[path]) for path in a)


def test_neurons_are_kept_whole_and_the_classes_all():
    task, state, step = start("edge-popup", unit="neuron")
    state, _ = advance(task, state, step, STEPS)
    masks = task.mask_fn(state.subnet.scores, None)
    assert masks["Dense_2"]["kernel"] is None
    for name, units in (("Dense_0", 300), ("Dense_1", 100)):
        columns = np.asarray(masks[name]["kernel"])
        assert columns.shape[-1] == units
        np.testing.assert_array_equal(columns, np.broadcast_to(columns[:1], columns.shape))
        assert columns[0].sum() == sm.keep_count(0.3, units)


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
    whole_task, whole, step, _ = run(method)
    _, state, _ = start(method)
    state, _ = advance(whole_task, state, step, STEPS // 2)
    state = jax.tree.unflatten(jax.tree.structure(state), [jnp.copy(leaf) for leaf in jax.tree.leaves(state)])
    state, _ = advance(whole_task, state, step, STEPS - STEPS // 2)
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
