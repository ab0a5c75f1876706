import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import supermask_jax as sm

WEIGHTS = {"kernel": jnp.arange(-6.0, 6.0).reshape(4, 3) / 10, "bias": jnp.ones(3)}


def loss_fn(params, model_state, batch, key):
    prediction = batch["x"] @ params["kernel"] + params["bias"][None]
    noise = jax.random.normal(key)
    return jnp.mean((prediction - batch["y"]) ** 2), (model_state, {"noise": noise})


def batch():
    x = jax.random.normal(jax.random.key(3), (8, 4))
    return {"x": x, "y": x @ jnp.ones((4, 3))}


def subnet():
    return sm.Subnet(WEIGHTS, sm.init_scores(jax.random.key(1), WEIGHTS))


def no_scores():
    return sm.Subnet(WEIGHTS, jax.tree.map(lambda _: None, WEIGHTS))


def trained(mask_fn, start, tx, learns, steps=5):
    state = sm.init_state(start, tx, jax.random.key(2), learns=learns)
    step = jax.jit(sm.make_train_step(mask_fn, loss_fn, tx, learns=learns))
    seen = []
    for _ in range(steps):
        state, metrics = step(state, batch())
        seen.append(metrics)
    return state, seen, step


def test_frozen_weights_stay_bit_identical_under_momentum_and_decay():
    tx = optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.1, 0.9))
    state, metrics, _ = trained(sm.edge_popup(0.3), subnet(), tx, "scores", steps=20)
    jax.tree.map(np.testing.assert_array_equal, state.subnet.weights, WEIGHTS)
    assert not np.array_equal(state.subnet.scores["kernel"], subnet().scores["kernel"])
    assert metrics[-1]["loss"] < metrics[0]["loss"]


def test_the_optimizer_sees_only_the_tree_that_learns():
    state = sm.init_state(subnet(), optax.adam(1e-3), jax.random.key(0), learns="scores")
    assert [leaf.shape for leaf in jax.tree.leaves(state.opt_state[0].mu)] == [(4, 3)]


def test_dense_training_learns_the_weights():
    state, metrics, _ = trained(sm.identity, no_scores(), optax.sgd(0.1), "weights")
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    assert not np.array_equal(state.subnet.weights["bias"], WEIGHTS["bias"])


def test_fixed_masks_keep_pruned_weights_out_of_the_network():
    masks = {"kernel": jnp.zeros((4, 3)).at[0].set(1), "bias": None}
    state, _, _ = trained(sm.identity, sm.Subnet(WEIGHTS, masks), optax.sgd(0.1, 0.9), "weights")
    params = sm.subnetwork(sm.identity, state.subnet)
    assert np.all(np.asarray(params["kernel"][1:]) == 0) and np.all(np.asarray(params["kernel"][0]) != 0)
    np.testing.assert_array_equal(state.subnet.scores["kernel"], masks["kernel"])


def test_one_step_is_the_closed_form():
    tx = optax.sgd(0.5)
    state, _, _ = trained(sm.edge_popup(0.7), subnet(), tx, "scores", steps=1)
    start = subnet()
    mask = sm.edge_popup(0.7)(start.scores, None)["kernel"]
    b = batch()
    error = b["x"] @ (WEIGHTS["kernel"] * mask) + WEIGHTS["bias"][None] - b["y"]
    by_params = b["x"].T @ error * 2 / error.size
    expected = start.scores["kernel"] - 0.5 * WEIGHTS["kernel"] * by_params * jnp.sign(start.scores["kernel"])
    np.testing.assert_allclose(state.subnet.scores["kernel"], expected, atol=1e-6)


def test_step_t_draws_from_the_key_and_t_alone():
    _, whole, step = trained(sm.edge_popup(0.3), subnet(), optax.sgd(0.1), "scores")
    state = sm.init_state(subnet(), optax.sgd(0.1), jax.random.key(2), learns="scores")
    _, resumed = step(state._replace(step=jnp.int32(3)), batch())
    noises = [float(m["noise"]) for m in whole]
    assert len(set(noises)) == len(noises)
    assert float(resumed["noise"]) == noises[3]


def test_a_second_step_compiles_nothing():
    _, _, step = trained(sm.edge_popup(0.3), subnet(), optax.sgd(0.1), "scores")
    assert step._cache_size() == 1


def test_pmap_replicas_keep_identical_scores_and_draw_different_noise():
    """On one device: the axis exists, gradients are averaged over it, and the loss key is folded with its index."""
    tx = optax.sgd(0.1)
    state = sm.init_state(subnet(), tx, jax.random.key(2), learns="scores")
    step = sm.make_train_step(sm.edge_popup(0.3), loss_fn, tx, learns="scores", axis_name="data")
    halves = jax.tree.map(lambda x: x.reshape(2, 4, *x.shape[1:]), batch())
    over = jax.vmap(step, in_axes=(None, 0), axis_name="data")
    states, metrics = over(state, halves)
    single = sm.make_train_step(sm.edge_popup(0.3), loss_fn, tx, learns="scores")
    alone, _ = single(state, batch())
    for replica in range(2):
        np.testing.assert_allclose(states.subnet.scores["kernel"][replica], alone.subnet.scores["kernel"], atol=1e-6)
    drawn = [jax.random.normal(k) for k in _loss_keys(state)]
    np.testing.assert_allclose(metrics["noise"][0], np.mean(drawn), rtol=1e-6)
    assert drawn[0] != drawn[1]


def _loss_keys(state):
    _, loss_key = jax.random.split(jax.random.fold_in(state.key, state.step))
    return [jax.random.fold_in(loss_key, i) for i in range(2)]


def test_a_product_replaces_weights_times_masks_and_sees_the_learning_tree():
    """With a gain of 3 on the masked kernel, the loss and the scores' gradient are those of the scaled network."""
    mask_fn, tx, start = sm.edge_popup(0.3), optax.sgd(0.5), subnet()

    def product(subnet, key):
        params = sm.subnetwork(mask_fn, subnet, key)
        return {**params, "kernel": 3 * params["kernel"]}

    state = sm.init_state(start, tx, jax.random.key(2), learns="scores")
    after, metrics = sm.make_train_step(mask_fn, loss_fn, tx, learns="scores", product=product)(state, batch())
    b, mask = batch(), mask_fn(start.scores, None)["kernel"]
    error = b["x"] @ (3 * WEIGHTS["kernel"] * mask) + WEIGHTS["bias"][None] - b["y"]
    np.testing.assert_allclose(metrics["loss"], np.mean(error**2), rtol=1e-5)
    by_params = b["x"].T @ error * 2 / error.size
    expected = start.scores["kernel"] - 0.5 * 3 * WEIGHTS["kernel"] * by_params * jnp.sign(start.scores["kernel"])
    np.testing.assert_allclose(after.subnet.scores["kernel"], expected, atol=1e-6)


def test_the_product_of_none_is_the_subnetwork_bit_for_bit():
    mask_fn, tx = sm.bernoulli(), optax.sgd(0.1)
    state = sm.init_state(subnet(), tx, jax.random.key(2), learns="scores")
    plain = sm.make_train_step(mask_fn, loss_fn, tx, learns="scores")(state, batch())
    said = sm.make_train_step(
        mask_fn, loss_fn, tx, learns="scores", product=lambda subnet, key: sm.subnetwork(mask_fn, subnet, key)
    )(state, batch())
    jax.tree.map(np.testing.assert_array_equal, plain[0].subnet, said[0].subnet)
    jax.tree.map(np.testing.assert_array_equal, plain[1], said[1])


def test_pmap_step_passes_the_product_on():
    mask_fn, tx = sm.edge_popup(0.3), optax.sgd(0.1)
    product = lambda subnet, key: jax.tree.map(lambda leaf: 3 * leaf, subnet.weights)  # noqa: E731
    state = sm.init_state(subnet(), tx, jax.random.key(2), learns="weights")
    step = sm.parallel.pmap_step(mask_fn, loss_fn, tx, learns="weights", devices=1, product=product)
    expected, _ = loss_fn(product(state.subnet, None), None, batch(), jax.random.key(0))
    np.testing.assert_allclose(step(state, batch())[1]["loss"], expected, rtol=1e-5)


# The silent failures: each would train nothing, or the wrong thing.


def test_a_learning_tree_without_leaves_raises():
    with pytest.raises(ValueError, match="no leaves"):
        sm.init_state(no_scores(), optax.sgd(0.1), jax.random.key(0), learns="scores")


def test_identity_scores_cannot_learn():
    with pytest.raises(ValueError, match="cannot learn"):
        sm.make_train_step(sm.identity, loss_fn, optax.sgd(0.1), learns="scores")


def test_an_optimizer_state_of_the_other_tree_raises():
    tx = optax.sgd(0.1, 0.9)
    state = sm.init_state(subnet(), tx, jax.random.key(0), learns="weights")
    with pytest.raises(ValueError, match="does not fit the scores tree"):
        sm.make_train_step(sm.edge_popup(0.3), loss_fn, tx, learns="scores")(state, batch())


@pytest.mark.parametrize("learns", ["Scores", "both", None])
def test_learns_has_two_values_and_no_default(learns):
    with pytest.raises(ValueError, match="'scores' or 'weights'"):
        sm.make_train_step(sm.edge_popup(0.3), loss_fn, optax.sgd(0.1), learns=learns)
    with pytest.raises(TypeError, match="learns"):
        sm.make_train_step(sm.edge_popup(0.3), loss_fn, optax.sgd(0.1))


@pytest.mark.parametrize("aux", [{}, (None, {}, {}), (None, {"loss": 1.0}), ("a", "b")])
def test_a_loss_fn_that_returns_something_else_is_told_what_it_must(aux):
    state = sm.init_state(subnet(), optax.sgd(0.1), jax.random.key(0), learns="scores")
    step = sm.make_train_step(sm.edge_popup(0.3), lambda *_: (jnp.float32(0), aux), optax.sgd(0.1), learns="scores")
    with pytest.raises(ValueError, match="loss_fn must return"):
        step(state, batch())


def test_a_loss_fn_that_returns_only_the_loss_is_told_what_it_must():
    tx = optax.sgd(0.1)
    state = sm.init_state(subnet(), tx, jax.random.key(2), learns="scores")
    step = sm.make_train_step(sm.edge_popup(0.3), lambda *arguments: jnp.float32(1), tx, learns="scores")
    with pytest.raises(ValueError, match=r"loss_fn must return \(loss, \(model_state, metrics\)\)"):
        step(state, batch())


@pytest.mark.parametrize(
    "tx",
    (
        optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau(patience=1)),
        optax.polyak_sgd(),
        optax.lbfgs(),
    ),
    ids=("reduce_on_plateau", "polyak_sgd", "lbfgs"),
)
@pytest.mark.parametrize("beside", (False, pytest.param(True, marks=pytest.mark.slow)))
def test_optimizers_are_given_the_value_the_gradient_and_the_function(tx, beside):
    learns = ("scores", lambda path, leaf: path == "bias") if beside else "scores"
    state = sm.init_state(subnet(), tx, jax.random.key(2), learns=learns)
    step = jax.jit(sm.make_train_step(sm.edge_popup(0.7), loss_fn, tx, learns=learns))
    losses = []
    for _ in range(5):
        state, metrics = step(state, batch())
        losses.append(float(metrics["loss"]))
    assert np.isfinite(losses).all() and min(losses[1:]) <= losses[0]  # scores may move without changing a mask
    assert (np.asarray(state.subnet.scores["kernel"]) != subnet().scores["kernel"]).any()


# Weights that learn beside the scores.


GATED = {
    "Dense_0": {"kernel": jnp.arange(-6.0, 6.0).reshape(4, 3) / 10, "bias": jnp.full(3, 0.1)},
    "BatchNorm_0": {"scale": jnp.zeros(3)},
    "Dense_1": {"kernel": jnp.arange(1.0, 7.0).reshape(3, 2) / 10},
}


def gated_loss(params, model_state, batch, key):
    hidden = jnp.tanh(batch["x"] @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"][None])
    out = hidden * params["BatchNorm_0"]["scale"][None] @ params["Dense_1"]["kernel"]
    return jnp.mean((out - batch["y"][:, :2]) ** 2), (model_state, {})


def gated(learns, tx, weights=GATED, steps=20):
    start = sm.Subnet(weights, sm.init_scores(jax.random.key(1), weights))
    state = sm.init_state(start, tx, jax.random.key(2), learns=learns)
    step = jax.jit(sm.make_train_step(sm.edge_popup(0.7), gated_loss, tx, learns=learns))
    losses = []
    for _ in range(steps):
        state, metrics = step(state, batch())
        losses.append(float(metrics["loss"]))
    assert step._cache_size() == 1
    return start, state, losses


def moved(before, after):
    return {
        path: bool((np.asarray(leaf) != np.asarray(sm.trees.by_path(before)[path])).any())
        for path, leaf in sm.trees.by_path(after).items()
    }


def test_a_frozen_scale_of_0_is_named_and_opened_or_learns():
    with pytest.warns(UserWarning, match=r"'BatchNorm_0/scale' is frozen at 0.*open_gates.*learns=\('scores', where\)"):
        start, state, losses = gated("scores", optax.sgd(0.5))
    assert not any(moved(start.scores, state.subnet.scores).values()) and losses[0] == losses[-1]
    opened = sm.initializers.open_gates(GATED)
    assert moved(GATED, opened) == {path: path == "BatchNorm_0/scale" for path in sm.trees.by_path(GATED)}
    np.testing.assert_array_equal(opened["BatchNorm_0"]["scale"], np.ones(3))
    start, state, losses = gated("scores", optax.sgd(0.5), opened)
    assert all(moved(start.scores, state.subnet.scores).values()) and losses[-1] < losses[0]


def test_chosen_weights_learn_beside_the_scores_and_all_others_stay():
    learns = ("scores", lambda path, leaf: path.endswith("scale"))
    start, state, losses = gated(learns, optax.adam(0.05))
    assert losses[-1] < 0.97 * losses[0]
    assert moved(start.weights, state.subnet.weights) == {
        path: path == "BatchNorm_0/scale" for path in sm.trees.by_path(GATED)
    }
    assert all(moved(start.scores, state.subnet.scores).values())


def test_scores_and_weights_may_have_an_optimizer_each():
    learns = ("scores", lambda path, leaf: path.endswith(("scale", "bias")))
    start, state, _ = gated(learns, (optax.sgd(0.0), optax.adam(0.1)))
    assert not any(moved(start.scores, state.subnet.scores).values())
    changed = moved(start.weights, state.subnet.weights)
    assert {path for path, it in changed.items() if it} == {"BatchNorm_0/scale", "Dense_0/bias"}
    scores_state, weights_state = state.opt_state
    assert sm.trees.by_path(weights_state[0].mu).keys() == {"BatchNorm_0/scale", "Dense_0/bias"}
    assert not jax.tree.leaves(scores_state)


@pytest.mark.parametrize(
    "learns, tx, says",
    (
        (
            ("scores", lambda path, leaf: "kernel" in path),
            None,
            "'Dense_0/kernel' has scores, so its weights are frozen",
        ),
        (
            ("scores", lambda path, leaf: False),
            None,
            "no weights are chosen.*there are: BatchNorm_0/scale, Dense_0/bias",
        ),
        (("weights", lambda path, leaf: True), None, r"learns must be 'scores' or 'weights', or \('scores', where\)"),
        ("scores", (optax.sgd(0.1), optax.sgd(0.1)), r"or a pair of them with learns=\('scores', where\)"),
        (("scores", lambda path, leaf: "bias" in path), (optax.sgd(0.1),), "tx must be an optax transformation"),
    ),
)
def test_learners_that_cannot_be_are_refused(learns, tx, says):
    start = sm.Subnet(GATED, sm.init_scores(jax.random.key(1), GATED))
    with pytest.raises(ValueError, match=says), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the scale of 0
        sm.init_state(start, tx or optax.sgd(0.1), jax.random.key(2), learns=learns)


def test_only_floats_learn_beside_the_scores():
    weights = GATED | {"steps": jnp.zeros(3, jnp.int32)}
    start = sm.Subnet(weights, sm.init_scores(jax.random.key(1), weights))
    with pytest.raises(TypeError, match="only floats can learn; 'steps' has int32"):
        sm.init_state(start, optax.sgd(0.1), jax.random.key(2), learns=("scores", lambda path, leaf: path == "steps"))


@pytest.mark.parametrize(
    "path, zeros",
    (
        ("blocks/LayerNorm_0/scale", np.stack([np.ones(4), np.zeros(4)])),
        ("ls/gamma", np.zeros(4)),
        ("norm1/weight", np.zeros(4)),
        ("rezero/alpha", np.zeros(())),
        ("head/kernel", np.zeros((4, 4))),
    ),
)
def test_frozen_zeros_that_stop_what_comes_after_are_named(path, zeros):
    weights = {path: jnp.asarray(zeros, jnp.float32), "bias": jnp.zeros(4), "first/kernel": jnp.ones((4, 4))}
    start = sm.Subnet(weights, sm.init_scores(jax.random.key(1), weights))
    with pytest.warns(UserWarning, match=f"'{path}' is frozen at 0"):
        sm.init_state(start, optax.sgd(0.1), jax.random.key(2), learns="scores")
    sm.init_state(start, optax.sgd(0.1), jax.random.key(2), learns="weights")  # there it can learn
    opened = sm.initializers.open_gates(weights | {"temperature/scale": 0.0})
    assert opened["temperature/scale"] == 1
    if path != "head/kernel":
        assert np.asarray(opened[path]).all()
        np.testing.assert_array_equal(np.asarray(opened[path])[zeros != 0], 1)


# Several devices.


def test_under_pmap_floats_of_the_model_state_are_averaged_and_the_rest_is_carried():
    state_of = {
        "mean": jnp.float32(2),
        "count": jnp.int32(3),
        "done": jnp.bool_(True),
        "key": jax.random.key(7),
    }

    def counting(params, model_state, batch, key):
        loss, (_, metrics) = loss_fn(params, model_state, batch, key)
        following = jax.random.split(model_state["key"])[0]
        return loss, (model_state | {"count": model_state["count"] + 1, "key": following}, metrics)

    tx = optax.sgd(0.1)
    state = sm.init_state(subnet(), tx, jax.random.key(2), state_of, learns="scores")
    step = sm.parallel.pmap_step(sm.edge_popup(0.3), counting, tx, learns="scores")
    after = step(state, batch())[0].model_state
    assert {name: leaf.dtype for name, leaf in after.items()} == {name: leaf.dtype for name, leaf in state_of.items()}
    assert (float(after["mean"]), int(after["count"]), bool(after["done"])) == (2, 4, True)
    assert after["key"] == jax.random.split(state_of["key"])[0]


def test_masks_and_scores_that_would_broadcast_are_refused():
    masks = {"kernel": jnp.ones((1, 3), jnp.float32), "bias": None}
    with pytest.raises(ValueError, match=r"the mask of 'kernel' has shape \(1, 3\), its weights \(4, 3\)"):
        sm.subnetwork(sm.identity, sm.Subnet(WEIGHTS, masks))
    with pytest.raises(ValueError, match=r"the mask of 'kernel' has shape \(1, 3\), its weights \(4, 3\)"):
        sm.subnetwork(sm.edge_popup(0.5), sm.Subnet(WEIGHTS, masks))
