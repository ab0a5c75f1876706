"""Masks that change while weights learn: schedules by hand, exact counts, what regrown weights start from."""

import logging

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import supermask_jax as sm
from supermask_jax import dynamic, lottery
from supermask_jax.selection import random_scores
from supermask_jax.trees import apply_masks, by_path

SHAPES = {"a": (30, 20), "c": (3, 3, 2, 12)}


def drawn(seed, shapes=SHAPES):
    rng = np.random.default_rng(seed)
    weights = {path: {"kernel": rng.normal(size=shape).astype(np.float32)} for path, shape in shapes.items()}
    weights["a"]["bias"] = rng.normal(size=20).astype(np.float32)
    return jax.tree.map(jnp.asarray, weights)


def ones(masks):
    return {path: int(mask.sum()) for path, mask in by_path(masks).items()}


def test_cubic_density_by_hand():
    at = {step: dynamic.cubic_density(step, 10, 30, 0.1) for step in (0, 10, 15, 20, 29, 30, 1000)}
    # what is still ahead: 3/4, 1/2 and 1/20 of the way, cubed, of 0.9
    expected = {0: 1, 10: 1, 15: 0.1 + 0.9 * 27 / 64, 20: 0.1 + 0.9 / 8, 29: 0.1 + 0.9 / 8000, 30: 0.1, 1000: 0.1}
    assert at == pytest.approx(expected, rel=1e-12) and at[30] == 0.1
    assert dynamic.cubic_density(jnp.int32(20), 10, 30, 0.3, initial=0.7) == 0.35  # 0.3 + 0.4 / 8, without a slip
    assert [dynamic.cubic_density(step, 5, 5, 0.3) for step in (4, 5)] == [1, 0.3]


def test_cosine_fraction_by_hand():
    assert [dynamic.cosine_fraction(step, 90) for step in (0, 30, 45, 60, 90, 91)] == [0.3, 0.225, 0.15, 0.075, 0, 0]
    assert dynamic.cosine_fraction(np.int64(30), 90, initial=0.4) == 0.3
    assert dynamic.cosine_fraction(0, 0) == 0


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (lambda: dynamic.cubic_density(-1, 0, 10, 0.3), "step must be a whole number of steps >= 0, got -1"),
        (lambda: dynamic.cubic_density(1, 0.5, 10, 0.3), "begin must be a whole number"),
        (lambda: dynamic.cubic_density(1, 0, float("nan"), 0.3), "end must be a whole number"),
        (lambda: dynamic.cubic_density(1, 11, 10, 0.3), "begin = 11, end = 10"),
        (lambda: dynamic.cubic_density(1, 0, 10, 1.3), "density must be a number"),
        (lambda: dynamic.cubic_density(1, 0, 10, 0.7, initial=0.3), "0.7 is above the initial one, 0.3"),
        (lambda: dynamic.cosine_fraction(1.5, 10), "step must be a whole number"),
        (lambda: dynamic.cosine_fraction(1, 10, initial=3), r"fraction must be a number in \[0, 1\] .*dropped.*got 3"),
    ],
)
def test_schedules_refuse_what_they_cannot_follow(schedule, message):
    with pytest.raises(ValueError, match=message):
        schedule()


LAYER = {"layer": jnp.array([[5.0, -1, 0.5], [9, -3, 7]])}
KEPT = {"layer": jnp.array([[1.0, 1, 1], [0, 1, 0]])}


@pytest.mark.usefixtures("strict_dtypes")
@pytest.mark.parametrize(
    ("growth", "fraction", "expected"),
    [
        # Of four kept, of magnitudes 5, 1, 0.5 and 3, half stay: 5 and 3. The 9 and the 7 have the highest growth.
        ([[8.0, 1, 2], [6, 0, 5]], 0.5, [[1, 0, 0], [1, 1, 1]]),
        ([[8.0, 1, 2], [6, 0, 5]], 0.3, [[1, 1, 0], [1, 1, 0]]),  # 2.8 stay, rounded up: only the 0.5 is dropped
        ([[8.0, 1, 2], [6, 0, 5]], 0.7, [[1, 0, 0], [1, 1, 1]]),  # 1.2 stay, rounded up
        ([[8.0, 1, 2], [6, 0, 5]], 0.0, [[1, 1, 1], [0, 1, 0]]),
        ([[8.0, 1, 2], [6, 0, 5]], {"layer": 1.0}, [[1, 0, 1], [1, 0, 1]]),  # growth alone decides
        ([[-8.0, -1, -2], [-6, 0, -5]], 0.5, [[1, 1, 1], [0, 1, 0]]),  # any sign: the least negative, just dropped
        ([[0.0, 4, 4], [4, 0, 0]], 0.5, [[1, 0, 1], [1, 1, 0]]),  # of equals the first loses
    ],
)
def test_drop_and_grow_by_hand(growth, fraction, expected):
    masks = dynamic.drop_and_grow(LAYER, KEPT, {"layer": jnp.array(growth)}, fraction)
    assert masks["layer"].tolist() == expected


def test_a_weight_dropped_just_now_returns_where_its_growth_is_highest():
    growth = {"layer": jnp.zeros((2, 3)).at[0, 2].set(9)}  # of 0.5, the least magnitude
    assert dynamic.drop_and_grow(LAYER, KEPT, growth, 0.3)["layer"].tolist() == KEPT["layer"].tolist()
    full = {"layer": jnp.ones((2, 3))}  # where all are kept, the dropped ones are all that can be grown
    assert dynamic.drop_and_grow(LAYER, full, growth, 0.7)["layer"].tolist() == full["layer"].tolist()


@pytest.mark.slow
@pytest.mark.parametrize("density", (0.3, 0.7))
def test_each_layer_keeps_its_exact_count_through_many_updates(density):
    weights = drawn(0)
    masks = sm.random_masks(jax.random.key(0), weights, density)
    before, start = ones(masks), masks
    assert before == {f"{path}/kernel": sm.keep_count(density, int(np.prod(shape))) for path, shape in SHAPES.items()}
    for i in range(12):
        growth = random_scores(jax.random.fold_in(jax.random.key(1), i), weights)
        masks = dynamic.drop_and_grow(drawn(i), masks, growth, dynamic.cosine_fraction(i, 12))
        assert ones(masks) == before
        assert masks["a"]["bias"] is None and masks["c"]["kernel"].dtype == weights["c"]["kernel"].dtype
    moved = sum(int((m != s).sum()) for m, s in zip(jax.tree.leaves(masks), jax.tree.leaves(start), strict=True))
    assert moved > sum(before.values()) / 4


def test_other_fractions_and_densities_compile_nothing_new(caplog):
    weights = {"layer": jax.random.normal(jax.random.key(0), (11, 13))}  # a shape of its own, not compiled before
    masks = sm.random_masks(jax.random.key(1), weights, 0.9)
    growth = random_scores(jax.random.key(2), weights)

    def compilations(factor, fraction, density):
        caplog.clear()
        other = jax.tree.map(lambda weight: weight * factor, weights)
        with jax.log_compiles(), caplog.at_level(logging.WARNING):
            dynamic.drop_and_grow(other, masks, growth, fraction)
            dynamic.magnitude_masks(other, masks, density)
        return sum("Compiling" in record.getMessage() for record in caplog.records)

    assert compilations(1.0, 0.3, 0.7) > 0
    assert compilations(-2.0, 0.123, 0.456) == 0


def test_gradual_pruning_keeps_the_largest_of_what_is_left_and_nothing_returns():
    masks = lottery.full_masks(drawn(0))
    for step in range(0, 12, 2):
        density, weights = dynamic.cubic_density(step, 2, 10, 0.3), drawn(step)
        pruned = dynamic.magnitude_masks(weights, masks, density)
        for path, mask in by_path(pruned).items():
            old, magnitude = np.asarray(by_path(masks)[path]), np.abs(by_path(weights)[path])
            assert np.all(mask <= old) and mask.sum() == sm.keep_count(density, mask.size)
            if np.any(mask != old):
                assert magnitude[(mask == 0) & (old == 1)].max() <= magnitude[mask == 1].min()
        masks = pruned
    assert density == 0.3 and masks["a"]["bias"] is None


def test_densities_by_layer_and_those_above_what_is_left():
    weights = {"first": jnp.array([4.0, -3, 2, 1]), "last": jnp.array([-1.0, 2])}
    masks = {"first": jnp.array([0.0, 1, 1, 1]), "last": jnp.ones(2)}
    by_layer = dynamic.magnitude_masks(weights, masks, {"first": 0.3, "last": 1.0})
    assert jax.tree.map(lambda mask: mask.tolist(), by_layer) == {"first": [0, 1, 1, 0], "last": [1, 1]}
    with pytest.raises(ValueError, match="cannot keep 4 of the 3 weights to choose from in 'first'"):
        dynamic.magnitude_masks(weights, masks, 0.8)
    with pytest.raises(ValueError, match="leaves out last"):
        dynamic.magnitude_masks(weights, masks, {"first": 0.3})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"fraction": 1.1},
            r"fraction must be a number in \[0, 1\] \(the part of what is kept that is dropped\), got 1.1",
        ),
        ({"fraction": {"layr": 0.3}}, "did you mean 'layer'"),
        ({"masks": {"layer": LAYER["layer"]}}, "values other than 0 and 1"),
        ({"growth": {"layer": jnp.full((2, 3), jnp.nan)}}, "'layer' hold NaN"),
        ({"weights": {"layer": jnp.full((2, 3), jnp.nan)}}, "'layer' hold NaN"),
        ({"growth": {"layer": None}}, "'layer'"),
    ],
)
def test_what_cannot_be_dropped_and_grown_is_refused(changed, message):
    arguments = {"weights": LAYER, "masks": KEPT, "growth": LAYER, "fraction": 0.3}
    with pytest.raises(ValueError, match=message):
        dynamic.drop_and_grow(**(arguments | changed))


# A linear network of one output; loss (x @ (w * m) + b - y)**2, mean over the batch.
LINEAR = {"kernel": jnp.array([[2.0], [-1.0], [0.5], [3.0]]), "bias": jnp.array([0.25])}
MASKS = {"kernel": jnp.array([[1.0], [0.0], [1.0], [0.0]]), "bias": None}


def batch():
    return jax.random.normal(jax.random.key(0), (8, 4)), jax.random.normal(jax.random.key(1), (8, 1))


def loss_fn(params, model_state, batch, key):
    error = batch[0] @ params["kernel"] + params["bias"][None] - batch[1]
    return jnp.mean(error**2), (model_state, {})


def test_dense_gradient_is_the_closed_form_also_at_pruned_positions():
    subnet, (x, y) = sm.Subnet(LINEAR, MASKS), batch()
    gradient = jax.jit(lambda subnet, batch: dynamic.dense_gradient(loss_fn, subnet, batch))(subnet, (x, y))
    error = x @ (LINEAR["kernel"] * MASKS["kernel"]) + LINEAR["bias"][None] - y
    np.testing.assert_allclose(gradient["kernel"], x.T @ error * 2 / 8, rtol=1e-5)
    assert gradient["bias"] is None and np.all(np.asarray(gradient["kernel"]) != 0)
    by_weights = jax.grad(lambda w: loss_fn(apply_masks(w, MASKS), None, (x, y), None)[0])(LINEAR)
    np.testing.assert_array_equal(by_weights["kernel"], gradient["kernel"] * MASKS["kernel"])
    with pytest.raises(ValueError, match="there is no mask"):
        dynamic.dense_gradient(loss_fn, sm.Subnet(LINEAR, {"kernel": None, "bias": None}), (x, y))


def test_dense_gradient_hands_on_the_model_state_and_the_key():
    def noisy(params, model_state, batch, key):
        return jnp.sum(params["kernel"]) * model_state * jax.random.uniform(key), (model_state, {})

    key = jax.random.key(3)
    gradient = dynamic.dense_gradient(noisy, sm.Subnet(LINEAR, MASKS), None, model_state=2.0, key=key)
    np.testing.assert_allclose(gradient["kernel"], np.full((4, 1), 2 * jax.random.uniform(key)), rtol=1e-6)


SCHEDULE = optax.cosine_decay_schedule(0.1, 100)
OPTIMIZERS = {
    "sgd": optax.chain(optax.add_decayed_weights(0.01), optax.sgd(SCHEDULE, momentum=0.9)),
    "adam": optax.chain(optax.add_decayed_weights(0.01), optax.adam(SCHEDULE)),
    "partition": optax.partition(  # each part's state holds nothing of the other's leaves
        {"adam": optax.adamw(SCHEDULE, weight_decay=0.01), "sgd": optax.sgd(0.1, momentum=0.9)},
        {"kernel": "adam", "bias": "sgd"},
    ),
}
each_optimizer = pytest.mark.parametrize("tx", OPTIMIZERS.values(), ids=OPTIMIZERS)


def trained(tx, steps=3):
    state = sm.init_state(jax.tree.map(jnp.copy, sm.Subnet(LINEAR, MASKS)), tx, jax.random.key(2), learns="weights")
    step = jax.jit(sm.make_train_step(sm.identity, loss_fn, tx, learns="weights"), donate_argnums=0)
    for _ in range(steps):
        state, _ = step(state, batch())
    return state, step


@each_optimizer
def test_regrown_weights_start_at_0_without_momentum_and_all_else_stays_bit_identical(tx):
    state, _ = trained(tx)
    state = state._replace(opt_state=jax.tree.map(lambda leaf: leaf + 1, state.opt_state))  # nothing is 0
    masks = {"kernel": jnp.array([[0.0], [0.0], [1.0], [1.0]]), "bias": None}  # the first goes, the last comes
    replaced = dynamic.replace_masks(state, tx, masks)
    np.testing.assert_array_equal(replaced.subnet.scores["kernel"], masks["kernel"])
    assert jax.tree.structure(replaced) == jax.tree.structure(state)
    kernels = 0
    unmasked = [tree._replace(subnet=tree.subnet._replace(scores=None)) for tree in (state, replaced)]
    for old, new in zip(*map(jax.tree.leaves, unmasked), strict=True):
        if jnp.shape(old) == (4, 1):
            kernels += 1
            assert old[0] != 0 and old[3] != 0
            np.testing.assert_array_equal(new[:3], old[:3])
            assert new[3] == 0
        else:
            assert np.all(old == new)
    assert kernels == (2 if tx is OPTIMIZERS["sgd"] else 3)  # weights and momentum; weights and two moments


def test_a_regrown_weight_moves_by_its_own_first_gradient_alone():
    tx = optax.sgd(0.1, momentum=0.9)
    state, step = trained(tx)
    state = state._replace(opt_state=jax.tree.map(jnp.ones_like, state.opt_state))
    masks = {"kernel": jnp.array([[0.0], [0.0], [1.0], [1.0]]), "bias": None}
    state = dynamic.replace_masks(state, tx, masks)
    slope = dynamic.dense_gradient(loss_fn, state.subnet, batch())["kernel"][3]
    after, _ = step(state, batch())
    np.testing.assert_allclose(after.subnet.weights["kernel"][3], -0.1 * slope, rtol=1e-6)


@each_optimizer
def test_the_step_is_compiled_once_and_the_masks_are_not_given_away(tx):
    state, step = trained(tx, steps=0)
    given = [jax.tree.map(lambda mask, i=i: jnp.roll(mask, i, axis=0), MASKS) for i in range(5)]
    for masks in given:
        for _ in range(2):
            state, _ = step(state, batch())
        state = dynamic.replace_masks(state, tx, masks)
    state, _ = step(state, batch())
    assert step._cache_size() == 1 and state.step == 11
    chex.assert_tree_all_finite(given)


@pytest.mark.float32
def test_new_masks_take_the_dtype_of_the_old():
    state, _ = trained(OPTIMIZERS["sgd"], steps=0)
    masks = dynamic.replace_masks(state, OPTIMIZERS["sgd"], {"kernel": np.eye(4, 1, dtype=bool), "bias": None})
    assert masks.subnet.scores["kernel"].dtype == jnp.float32
    assert masks.subnet.scores["kernel"].tolist() == [[1], [0], [0], [0]]


def test_masks_and_optimizers_that_do_not_fit_are_refused():
    tx = OPTIMIZERS["adam"]
    state, _ = trained(tx, steps=0)
    for masks in ({"kernel": jnp.ones((4, 1))}, {"kernel": jnp.ones((1, 1)), "bias": None}):
        with pytest.raises(ValueError, match="must have the structure of the state's"):
            dynamic.replace_masks(state, tx, masks)
    with pytest.raises(ValueError, match=r"'kernel' holds values other than 0 and 1"):
        dynamic.replace_masks(state, tx, LINEAR | {"bias": None})
    with pytest.raises(ValueError, match="cannot read the optimizer state"):
        dynamic.replace_masks(state, OPTIMIZERS["sgd"], MASKS)
    popup = state._replace(subnet=sm.Subnet(LINEAR, LINEAR | {"bias": None}))
    with pytest.raises(ValueError, match=r"'kernel' holds values other than 0 and 1; is it a tree of scores"):
        dynamic.replace_masks(popup, tx, MASKS)
    frozen = optax.chain(optax.sgd(0.1), lottery.frozen(MASKS))
    state, _ = trained(frozen, steps=0)
    with pytest.raises(ValueError, match=r"such as lottery\.frozen"):
        dynamic.replace_masks(state, frozen, MASKS)
