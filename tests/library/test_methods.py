"""Every method x every invariant, in a user's own loop on a tiny network with batch statistics."""

import functools
import inspect
import itertools
import logging
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import supermask_jax as sm
from supermask_jax import methods
from supermask_jax.selection import random_scores
from supermask_jax.trees import by_path

SHAPES = {"first": (6, 20), "second": (20, 10)}
STEPS, EVERY = 24, 4
TX = optax.chain(optax.add_decayed_weights(1e-3), optax.sgd(0.05, 0.9))
KEY = jax.random.key(7)


def weights():
    keys = jax.random.split(jax.random.key(0), len(SHAPES))
    kernels = zip(SHAPES.items(), keys, strict=True)
    tree = {name: {"kernel": jax.random.normal(k, shape) / shape[0] ** 0.5} for (name, shape), k in kernels}
    tree["first"]["bias"] = jnp.full(20, 0.1, jnp.float32)
    return tree


def batch(seed=1):
    x = jax.random.normal(jax.random.key(seed), (32, 6))
    return {"x": x, "y": jnp.argmax(x @ jax.random.normal(jax.random.key(5), (6, 10)), axis=1)}


def loss_fn(params, model_state, batch, key):
    """Normalised by the running mean, so that the state of the model is part of its function."""
    hidden = batch["x"] @ params["first"]["kernel"] + params["first"]["bias"][None]
    mean = 0.9 * model_state["mean"] + 0.1 * hidden.mean(axis=0)
    hidden = jax.nn.relu(hidden - jax.lax.stop_gradient(mean)[None])
    losses = optax.softmax_cross_entropy_with_integer_labels(hidden @ params["second"]["kernel"], batch["y"])
    return losses.mean(), ({"mean": mean}, {})


def make(name, density=0.3):
    start = weights()
    masks = sm.random_masks(jax.random.key(3), start, density)
    at = {"steps": STEPS, "every": EVERY}
    match name:
        case "edge_popup":
            return methods.edge_popup(KEY, start, density)
        case "edge_popup of neurons":
            first = functools.partial(methods.edge_popup, KEY, start, density, unit="neuron")
            return first(where=lambda path, leaf: path == "first/kernel")
        case "bernoulli":
            return methods.bernoulli(start)
        case "bernoulli rescaled":
            return methods.bernoulli(start, rescale=True)
        case "dense":
            return methods.dense(start)
        case "fixed":
            return methods.fixed(start, masks)
        case "gradual":
            return methods.gradual(start, TX, density, **at)
        case "gradual by layer":
            return methods.gradual(start, TX, dict.fromkeys(by_path(masks), density), scope="layer", **at)
        case "set":
            return methods.set(KEY, start, masks, TX, **at)
        case "rigl":
            return methods.rigl(KEY, start, masks, TX, loss_fn, **at)


NAMES = (
    *("edge_popup", "edge_popup of neurons", "bernoulli", "bernoulli rescaled", "dense", "fixed"),
    *("gradual", "gradual by layer", "set", "rigl"),
)
CHANGED = ("gradual", "gradual by layer", "set", "rigl")  # masks change while weights learn
COUNTED = ("edge_popup", "fixed", "set", "rigl")  # each layer keeps its count all the time
each = pytest.mark.parametrize("name", NAMES)
both_densities = pytest.mark.parametrize("density", [0.3, 0.7])


@functools.cache
def run(name, density=0.3, steps=STEPS):
    method = make(name, density)
    tx = optax.sgd(50.0) if name.startswith("bernoulli") else TX
    state = sm.init_state(method.subnet, tx, jax.random.key(2), {"mean": jnp.zeros(20)}, learns=method.learns)
    step = jax.jit(sm.make_train_step(method.mask_fn, loss_fn, tx, learns=method.learns, product=method.product))
    states, losses = [state], []
    for number in range(1, steps + 1):
        state, metrics = step(state, batch(number))
        losses.append(float(metrics["loss"]))
        if method.update and number % method.update_every == 0:
            state = method.update(number, state, batch(number))
        states.append(state)
    return method, states, losses, step


def masks_of(method, state, key=None):
    return by_path(method.mask_fn(state.subnet.scores, key))


def ones(masks):
    return {path: int(mask.sum()) for path, mask in masks.items()}


@each
def test_the_loss_goes_down(name):
    *_, losses, _ = run(name)
    assert np.mean(losses[-4:]) < np.mean(losses[:4])


@each
def test_what_learns_changes_in_every_leaf_and_the_rest_is_bit_identical(name):
    method, states, *_ = run(name)
    frozen = "weights" if method.learns == "scores" else "scores"
    start, end = method.subnet, states[-1].subnet
    for path, before in by_path(getattr(start, method.learns)).items():
        assert not np.array_equal(before, by_path(getattr(end, method.learns))[path]), path
    if name not in CHANGED:
        jax.tree.map(np.testing.assert_array_equal, getattr(start, frozen), getattr(end, frozen))


@pytest.mark.filterwarnings("ignore:no weight is kept")  # scores of 0 keep nothing
@pytest.mark.float32
@each
@pytest.mark.parametrize("key", [None, 5])
def test_masks_are_exactly_0_or_1_and_as_large_as_their_weights(name, key):
    method, states, *_ = run(name)
    for state in (states[0], states[-1]):
        masks = masks_of(method, state, None if key is None else jax.random.key(key))
        assert "first/bias" not in masks and bool(masks) == (name != "dense")
        for path, mask in masks.items():
            weight = by_path(state.subnet.weights)[path]
            assert set(np.unique(mask)) <= {0.0, 1.0} and (mask.shape, mask.dtype) == (weight.shape, weight.dtype)


@pytest.mark.parametrize("name", COUNTED)
@both_densities
def test_each_layer_keeps_its_count_from_the_first_step_to_the_last(name, density):
    method, states, *_ = run(name, density)
    expected = {f"{layer}/kernel": sm.keep_count(density, int(np.prod(shape))) for layer, shape in SHAPES.items()}
    assert all(ones(masks_of(method, state)) == expected for state in states)


@both_densities
def test_gradual_pruning_ends_at_exactly_the_density_and_nothing_returns(density):
    _, states, *_ = run("gradual", density)
    total = sum(int(np.prod(shape)) for shape in SHAPES.values())
    left = [sum(ones(by_path(state.subnet.scores)).values()) for state in states]
    assert left[0] == total and left[-1] == sm.keep_count(density, total)
    assert left == sorted(left, reverse=True) and len(set(left)) > 3
    for before, after in itertools.pairwise(states):
        grown = jax.tree.map(lambda a, b: int(jnp.sum(b > a)), before.subnet.scores, after.subnet.scores)
        assert not any(jax.tree.leaves(grown))


def test_gradual_pruning_leaves_each_layer_its_minimum():
    start = weights() | {"second": {"kernel": 1e-3 * weights()["second"]["kernel"]}}  # which a global ranking empties
    for minimum, least in ((0, 0), (9, 9)):
        method = methods.gradual(start, TX, 0.1, steps=8, every=2, minimum=minimum)
        state = sm.init_state(method.subnet, TX, KEY, learns=method.learns)
        with warnings.catch_warnings(action="ignore" if not minimum else "error"):
            for step in (2, 4, 6):
                state = method.update(step, state, None)
        counts = ones(by_path(state.subnet.scores))
        assert counts["second/kernel"] == least and sum(counts.values()) == sm.keep_count(0.1, 320)


@both_densities
def test_gradual_pruning_by_layer_ends_at_each_layers_density(density):
    _, states, *_ = run("gradual by layer", density)
    counts = {f"{layer}/kernel": sm.keep_count(density, int(np.prod(shape))) for layer, shape in SHAPES.items()}
    assert ones(by_path(states[-1].subnet.scores)) == counts


def test_one_density_for_all_layers_is_the_mapping_that_says_it_of_each():
    at = {"steps": STEPS, "every": EVERY, "scope": "layer"}
    paths = [f"{layer}/kernel" for layer in SHAPES]
    state = run("gradual")[1][EVERY]
    state = state._replace(subnet=state.subnet._replace(scores=sm.lottery.full_masks(weights())))
    one, each_layer = (methods.gradual(weights(), TX, d, **at) for d in (0.3, dict.fromkeys(paths, 0.3)))
    a, b = (method.update(12, state, batch()).subnet for method in (one, each_layer))
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("name", ["set", "rigl"])
def test_masks_move_and_are_final_at_three_quarters(name):
    _, states, *_ = run(name)
    moved = [
        step
        for step in range(1, STEPS + 1)
        if any(
            not np.array_equal(a, b)
            for a, b in zip(*(jax.tree.leaves(states[i].subnet.scores) for i in (step - 1, step)), strict=True)
        )
    ]
    # 18 steps, three of every 24 / 4, and at least five updates until then: every 3 steps. The last drops nothing.
    assert moved == [3, 6, 9, 12, 15]


@pytest.mark.parametrize(
    ("steps", "asked", "until", "expected"),
    [
        (6, 100, 0.75, (1, 4)),
        (126, 100, 0.75, (18, 90)),
        (9380, 100, 0.75, (100, 7000)),
        (1000, 100, 0.3, (60, 300)),
        (1000, 100, 1, (100, 1000)),
        (1, 100, 0.75, (1, 1)),
    ],
)
def test_updates_come_five_times_at_least_and_the_last_by_until(steps, asked, until, expected):
    assert methods._updates(steps, asked, until) == expected
    assert methods.gradual(weights(), TX, 0.3, steps=steps, every=asked, until=until).update_every == expected[0]


def test_neurons_are_kept_whole():
    method, states, *_ = run("edge_popup of neurons")
    assert by_path(method.subnet.scores)["first/kernel"].shape == (1, 20)
    mask = np.asarray(masks_of(method, states[-1])["first/kernel"])
    np.testing.assert_array_equal(mask, np.broadcast_to(mask[:1], mask.shape))
    assert mask[0].sum() == sm.keep_count(0.3, 20)


def test_the_scores_of_edge_popup_are_those_of_a_compiled_draw():
    compiled = jax.jit(lambda key: sm.init_scores(key, weights()))(KEY)
    jax.tree.map(np.testing.assert_array_equal, methods.edge_popup(KEY, weights(), 0.3).subnet.scores, compiled)
    neurons = methods.edge_popup(KEY, weights(), 0.3, unit="neuron").subnet.scores
    jax.tree.map(lambda n, s: np.testing.assert_array_equal(n, s[:1]), neurons, compiled)


def test_a_rescaled_product_has_the_weight_of_the_dense_layer_and_its_masks_stay_binary():
    method = make("bernoulli rescaled")
    masks = masks_of(method, run("bernoulli")[1][0], KEY)
    params = by_path(method.product(method.subnet, KEY))
    for path, mask in masks.items():
        expected = by_path(weights())[path] * mask * (mask.size / mask.sum())
        np.testing.assert_allclose(params[path], expected, rtol=1e-6)
    assert make("bernoulli").product is None


@each
def test_masks_depend_on_the_key_exactly_where_the_method_says_that_it_draws_them(name):
    method, states, *_ = run(name)
    a, b, none = (masks_of(method, states[-1], key) for key in (*jax.random.split(KEY), None))
    for other in (b, none):
        assert method.sampled == any(not np.array_equal(a[path], other[path]) for path in a)


def growth_of_rigl(state, step, data):
    def loss(params):
        return loss_fn(params, state.model_state, data, jax.random.fold_in(KEY, step))[0]

    params = sm.subnetwork(sm.identity, state.subnet)
    return {path: np.abs(g) for path, g in by_path(jax.grad(loss)(params)).items() if path != "first/bias"}


def test_rigl_grows_by_the_gradient_at_the_states_own_statistics():
    """Zero weights grown: those of highest gradient magnitude, which other statistics would not have chosen."""
    method, states, *_ = run("rigl")
    state = states[2]
    other = state._replace(model_state={"mean": jnp.linspace(-3, 3, 20)})
    ours, theirs = (method.update(3, s, batch()).subnet.scores for s in (state, other))
    assert any(not np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True))
    for given, masks in ((state, ours), (other, theirs)):
        fraction = sm.dynamic.cosine_fraction(3, 18)
        growth = growth_of_rigl(given, 3, batch())
        for path, mask in by_path(masks).items():
            old, weight = (np.asarray(by_path(tree)[path]) for tree in (given.subnet.scores, given.subnet.weights))
            stay = sm.keep_count(1 - fraction, int(old.sum()))
            lowest = np.sort(np.where(old == 1, np.abs(weight), -1).ravel())[-stay]
            kept = (old == 1) & (np.abs(weight) >= lowest)
            cut = np.sort(np.where(kept, -1, growth[path]).ravel())[-(int(old.sum()) - stay)]
            np.testing.assert_array_equal(np.asarray(mask) == 1, kept | ((growth[path] >= cut * (1 - 1e-5)) & ~kept))


def test_set_grows_by_the_key_and_the_step_alone():
    method, states, *_ = run("set")
    a = method.update(3, states[2], batch(1)).subnet.scores
    growth = random_scores(jax.random.fold_in(KEY, 3), weights())
    expected = sm.dynamic.drop_and_grow(*states[2].subnet, growth, sm.dynamic.cosine_fraction(3, 18))
    jax.tree.map(np.testing.assert_array_equal, a, expected)
    jax.tree.map(np.testing.assert_array_equal, a, method.update(3, states[2], batch(2)).subnet.scores)


def test_set_serves_masks_at_leaves_that_are_no_kernels():
    start = {"table": {"embedding": jnp.arange(12.0).reshape(3, 4)}}
    masks = {"table": {"embedding": jnp.zeros((3, 4)).at[0].set(1)}}
    method = methods.set(KEY, start, masks, TX, steps=40)
    state = sm.init_state(method.subnet, TX, KEY, learns="weights")
    assert ones(by_path(method.update(8, state, None).subnet.scores)) == {"table/embedding": 4}


@each
def test_a_second_step_and_a_second_update_compile_nothing(name, caplog):
    method, states, _, step = run(name)
    assert step._cache_size() == 1
    if method.update:
        at = method.update_every
        method.update(at, states[at - 1], batch())
        data = batch(9)
        caplog.clear()
        with jax.log_compiles(), caplog.at_level(logging.WARNING):
            method.update(2 * at, states[2 * at - 1], data)
        assert not [record.getMessage() for record in caplog.records if "Compiling" in record.getMessage()]


def test_a_users_loop_with_rigl_is_short():
    def loop(start, batches, steps):
        masks = sm.random_masks(jax.random.key(0), start, 0.3)
        tx = optax.sgd(0.05, 0.9)
        method = sm.methods.rigl(jax.random.key(1), start, masks, tx, loss_fn, steps=steps, every=5)
        state = sm.init_state(method.subnet, tx, jax.random.key(2), {"mean": jnp.zeros(20)}, learns=method.learns)
        step = sm.jit(sm.make_train_step(method.mask_fn, loss_fn, tx, learns=method.learns))
        for number, data in enumerate(batches, start=1):
            state, metrics = step(state, data)
            if method.update and number % method.update_every == 0:
                state = method.update(number, state, data)
        return sm.subnetwork(method.mask_fn, state.subnet), metrics["loss"]

    assert len(inspect.getsource(loop).splitlines()) <= 20
    params, loss = loop(weights(), [batch(seed) for seed in range(30)], 30)
    assert np.isfinite(loss) and abs(np.mean(params["second"]["kernel"] != 0) - 0.3) < 0.01


BAD = {
    "unit": (lambda: methods.edge_popup(KEY, weights(), 0.3, unit="layer"), "'weight' or 'neuron', got 'layer'"),
    "density": (lambda: methods.edge_popup(KEY, weights(), 1.3), "density must be a number"),
    "path": (lambda: methods.edge_popup(KEY, weights(), {"first/kernels": 0.3}), "did you mean 'first/kernel'"),
    "where": (lambda: methods.bernoulli(weights(), where=lambda *_: False), "matches no leaf"),
    "scores as masks": (lambda: methods.fixed(weights(), random_scores(KEY, weights())), "other than 0 and 1"),
    "no weight": (lambda: methods.fixed(weights(), {"third": jnp.ones((2, 2))}), "mask of 'third' but no weight"),
    "shape": (lambda: methods.fixed(weights(), {"first": {"kernel": jnp.ones((2, 2))}}), r"shape \(2, 2\)"),
    "scope": (lambda: methods.gradual(weights(), TX, 0.3, steps=9, scope="all"), "'global' or 'layer', got 'all'"),
    "global mapping": (lambda: methods.gradual(weights(), TX, {"first/kernel": 0.3}, steps=9), "needs scope='layer'"),
    "final density": (lambda: methods.gradual(weights(), TX, -0.1, steps=9), "density must be a number"),
    "steps": (lambda: methods.gradual(weights(), TX, 0.3, steps=0), "steps must be a whole number >= 1, got 0"),
    "every": (lambda: methods.gradual(weights(), TX, 0.3, steps=9, every=0.5), "every must be a whole number"),
    "until": (lambda: methods.gradual(weights(), TX, 0.3, steps=9, until=1.3), r"until must be in \(0, 1\]"),
    "drop": (
        lambda: methods.set(KEY, weights(), make("fixed").subnet.scores, TX, steps=9, drop_fraction=3),
        r"fraction must be a number in \[0, 1\]",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_what_a_method_cannot_be_is_an_error_when_it_is_made(what):
    build, message = BAD[what]
    with pytest.raises(ValueError, match=message):
        build()


def test_under_fixed_masks_lars_steps_as_it_would_on_the_kept_weights_alone():
    """Its step is in proportion to the norm of the weights, and pruned ones must not count."""
    weights = {"kernel": jax.random.normal(jax.random.key(0), (40, 25))}
    masks = sm.random_masks(jax.random.key(1), weights, 0.1)
    kept = np.flatnonzero(masks["kernel"])

    def moved(subnet, loss):
        tx = optax.lars(0.1)
        state = sm.init_state(subnet, tx, jax.random.key(2), learns="weights")
        step = sm.make_train_step(sm.identity, lambda p, s, b, k: (loss(p["kernel"]), (s, {})), tx, learns="weights")
        after = np.asarray(step(state, None)[0].subnet.weights["kernel"])
        return after - np.asarray(subnet.weights["kernel"])

    method = sm.methods.fixed(weights, masks)
    sparse = moved(method.subnet, lambda kernel: jnp.sum(jnp.sin(kernel)))
    small = {"kernel": weights["kernel"].ravel()[kept]}
    dense = moved(sm.Subnet(small, {"kernel": None}), lambda kernel: jnp.sum(jnp.sin(kernel)))
    np.testing.assert_allclose(sparse.ravel()[kept], dense, rtol=1e-5)
    assert not method.subnet.weights["kernel"][masks["kernel"] == 0].any()
