from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import supermask_jax as sm
from supermask_jax.supermask import bernoulli_mask

pytestmark = pytest.mark.usefixtures("strict_dtypes")


def weights():
    k = jax.random.key(0)
    return {
        "Conv_0": {"kernel": jax.random.normal(k, (3, 3, 2, 4)), "bias": jnp.ones(4)},
        "Dense_0": {"kernel": jax.random.normal(k, (20, 5))},
        "Dense_1": {"kernel": jax.random.normal(k, (20, 5))},
    }


def test_scores_are_none_exactly_where_weights_are_not_prunable():
    scores = sm.init_scores(jax.random.key(1), weights())
    assert scores["Conv_0"]["bias"] is None
    assert scores["Conv_0"]["kernel"].shape == (3, 3, 2, 4)


def test_equal_shaped_layers_get_different_scores():
    scores = sm.init_scores(jax.random.key(1), weights())
    assert np.mean(np.asarray(scores["Dense_0"]["kernel"]) == np.asarray(scores["Dense_1"]["kernel"])) < 0.01


def test_adding_a_layer_changes_no_other_scores():
    more = {"A_new": {"kernel": jnp.ones((7, 7))}, **weights()}
    before, after = sm.init_scores(jax.random.key(1), weights()), sm.init_scores(jax.random.key(1), more)
    for name in weights():
        np.testing.assert_array_equal(before[name]["kernel"], after[name]["kernel"])


def test_scores_are_float32_and_the_product_has_the_weights_dtype():
    weights = {"kernel": jnp.ones((4, 4), jnp.bfloat16)}
    scores = sm.init_scores(jax.random.key(1), weights)
    assert scores["kernel"].dtype == jnp.float32
    assert sm.subnetwork(sm.edge_popup(0.3), sm.Subnet(weights, scores))["kernel"].dtype == jnp.bfloat16


def test_a_predicate_that_matches_nothing_raises_with_the_paths():
    with pytest.raises(ValueError, match="Conv_0/kernel, Dense_0/kernel"):
        sm.init_scores(jax.random.key(1), weights(), where=lambda path, leaf: False)


@pytest.mark.parametrize("density", [0.3, 0.7])
def test_edge_popup_keeps_the_largest_magnitudes_of_each_layer(density):
    scores = sm.init_scores(jax.random.key(1), weights())
    masks = sm.edge_popup(density)(scores, None)
    for layer, score in scores.items():
        mask, size = np.asarray(masks[layer]["kernel"]), np.abs(np.asarray(score["kernel"]))
        assert set(np.unique(mask)) == {0, 1}
        assert mask.sum() == sm.keep_count(density, size.size)
        assert size[mask == 1].min() >= size[mask == 0].max()


def test_edge_popup_takes_a_density_per_path():
    densities = {"Conv_0/kernel": 0.3, "Dense_0/kernel": 0.7, "Dense_1/kernel": 1.0}
    masks = sm.edge_popup(densities)(sm.init_scores(jax.random.key(1), weights()), None)
    assert sm.layer_densities(masks) == {"Conv_0/kernel": 22 / 72, "Dense_0/kernel": 0.7, "Dense_1/kernel": 1.0}


def test_a_density_for_a_path_that_is_not_there_raises_with_the_nearest():
    scores = sm.init_scores(jax.random.key(1), weights())
    with pytest.raises(ValueError, match="did you mean 'Dense_0/kernel'"):
        sm.edge_popup({"Dense_0/kernl": 0.3})(scores, None)


@pytest.mark.parametrize("density", [-0.1, 1.1, float("nan"), {"a": 2}])
def test_edge_popup_refuses_a_density_out_of_range_at_once(density):
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        sm.edge_popup(density)


@pytest.mark.parametrize("density", [0.3, 0.7])
def test_score_gradient_is_the_closed_form_for_kept_and_pruned_weights_alike(density):
    """dL/ds = w * dL/d(w * m) * sign(s)."""
    subnet = sm.Subnet(weights(), sm.init_scores(jax.random.key(1), weights()))
    outer = jax.tree.map(lambda w: jnp.cos(jnp.arange(w.size, dtype=w.dtype)).reshape(w.shape), subnet.weights)

    def loss(scores):
        params = sm.subnetwork(sm.edge_popup(density), subnet._replace(scores=scores))
        return sum(jnp.sum(a * b) for a, b in zip(jax.tree.leaves(outer), jax.tree.leaves(params), strict=True))

    gradient = jax.grad(loss)(subnet.scores)
    for layer in subnet.scores:
        w, s, g = (np.asarray(tree[layer]["kernel"]) for tree in (subnet.weights, subnet.scores, outer))
        np.testing.assert_allclose(gradient[layer]["kernel"], w * g * np.sign(s), rtol=1e-6)
        assert np.all(np.asarray(gradient[layer]["kernel"]) != 0)


@pytest.mark.float32
def test_subnetwork_is_weights_times_masks_and_leaves_the_rest():
    subnet = sm.Subnet(weights(), sm.init_scores(jax.random.key(1), weights()))
    params = sm.subnetwork(sm.edge_popup(0.3), subnet)
    masks = sm.edge_popup(0.3)(subnet.scores, None)
    np.testing.assert_array_equal(params["Conv_0"]["bias"], subnet.weights["Conv_0"]["bias"])
    np.testing.assert_array_equal(
        params["Dense_0"]["kernel"], subnet.weights["Dense_0"]["kernel"] * masks["Dense_0"]["kernel"]
    )


def test_identity_with_no_scores_is_the_dense_network():
    none = jax.tree.map(lambda _: None, weights())
    params = sm.subnetwork(sm.identity, sm.Subnet(weights(), none))
    jax.tree.map(np.testing.assert_array_equal, params, weights())


# Bernoulli masks.


def logits():
    """Probabilities of being kept from 0.12 to 0.88, two layers of one shape among them."""
    return jax.tree.map(lambda w: 2 * jnp.cos(jnp.arange(w.size, dtype=w.dtype)).reshape(w.shape), zeroed())


def zeroed():
    return sm.zero_scores(weights())


def kernels(tree):
    return {layer: np.asarray(leaves["kernel"]) for layer, leaves in tree.items()}


def test_zero_scores_are_zero_at_the_prunable_leaves_and_none_elsewhere():
    scores = sm.zero_scores({**weights(), "half": jnp.ones((2, 3), jnp.bfloat16)})
    assert scores["Conv_0"]["bias"] is None and scores["half"].dtype == jnp.float32
    assert all(not leaf.any() for leaf in kernels({"a": {"kernel": scores["half"]}, "b": scores["Dense_0"]}).values())
    only = sm.zero_scores(weights(), where=lambda path, leaf: path == "Dense_0/kernel")
    assert len(jax.tree.leaves(only)) == 1
    with pytest.raises(ValueError, match="Conv_0/kernel, Dense_0/kernel"):
        sm.zero_scores(weights(), where=lambda path, leaf: False)
    with pytest.raises(TypeError, match="'kernel' has int32"):
        sm.zero_scores({"kernel": jnp.ones((2, 2), jnp.int32)})


def test_a_mask_is_one_exactly_where_the_uniform_is_below_the_probability():
    score = jnp.array([0.0, 0.0, np.log(3), np.log(3), -np.log(3), -200, 200], jnp.float32)
    uniform = jnp.array([0.5, np.nextafter(np.float32(0.5), 0), 0.74, 0.76, 0.26, 0, 1 - 2**-24], jnp.float32)
    assert bernoulli_mask(score, uniform).tolist() == [0, 1, 1, 0, 0, 0, 1]


@pytest.mark.filterwarnings("ignore:no weight is kept")  # scores of 0 keep nothing
def test_without_a_key_the_likelier_value_is_taken_however_small_the_score():
    tiny = np.finfo(np.float32).tiny
    masks = sm.bernoulli()({"kernel": jnp.array([0.0, -0.0, 1e-30, tiny, -1e-30, 5, -5], jnp.float32)}, None)
    assert masks["kernel"].tolist() == [0, 0, 1, 1, 0, 1, 0]
    assert all(not mask.any() for mask in kernels(sm.bernoulli()(zeroed())).values())


def test_masks_are_kept_as_often_as_their_probability_says():
    """Each weight by itself, within 5 standard deviations of a mean of 4000 draws; vmap over keys as well."""
    keys = jax.random.split(jax.random.key(3), 4000)
    drawn = jax.jit(jax.vmap(lambda key: sm.bernoulli()(logits(), key)))(keys)
    for (layer, masks), score in zip(kernels(drawn).items(), kernels(logits()).values(), strict=True):
        p = 1 / (1 + np.exp(-score.astype(np.float64)))
        assert set(np.unique(masks)) == {0, 1}, layer
        assert np.all(np.abs(masks.mean(axis=0) - p) < 5 * np.sqrt(p * (1 - p) / len(keys))), layer
    one = sm.bernoulli()(logits(), keys[7])
    for batched, single in zip(kernels(drawn).values(), kernels(one).values(), strict=True):
        np.testing.assert_array_equal(batched[7], single)


def test_layers_draw_independently_and_adding_one_changes_no_other():
    scores, key = zeroed(), jax.random.key(1)
    masks = kernels(sm.bernoulli()(scores, key))
    assert 0.3 < np.mean(masks["Dense_0"] == masks["Dense_1"]) < 0.7
    more = kernels(sm.bernoulli()({"A_new": {"kernel": jnp.zeros((7, 7))}, **scores}, key))
    other = kernels(sm.bernoulli()(scores, jax.random.key(2)))
    for layer, mask in masks.items():
        np.testing.assert_array_equal(mask, more[layer])
        assert not np.array_equal(mask, other[layer])


@pytest.mark.parametrize("key", [None, 1])
def test_bernoulli_gradient_is_the_closed_form_for_kept_and_pruned_weights_alike(key):
    """dL/ds = w * dL/d(w * m) * p * (1 - p)."""
    key = None if key is None else jax.random.key(key)
    subnet = sm.Subnet(weights(), logits())
    outer = jax.tree.map(lambda w: jnp.sin(1 + jnp.arange(w.size, dtype=w.dtype)).reshape(w.shape), subnet.weights)

    def loss(scores):
        params = sm.subnetwork(sm.bernoulli(), subnet._replace(scores=scores), key)
        return sum(jnp.vdot(a, b) for a, b in zip(jax.tree.leaves(outer), jax.tree.leaves(params), strict=True))

    gradient = kernels(jax.jit(jax.grad(loss))(subnet.scores))
    for layer, got in gradient.items():
        w, s, g = (np.asarray(tree[layer]["kernel"], np.float64) for tree in (subnet.weights, subnet.scores, outer))
        p = 1 / (1 + np.exp(-s))
        np.testing.assert_allclose(got, w * g * p * (1 - p), rtol=1e-5, err_msg=layer)
        assert np.all(got != 0)


def test_a_score_that_is_almost_certain_still_gets_a_gradient():
    """p (1 - p) is even in the score; computed as p - p * p it would be 0 from 17 on."""
    gradient = jax.grad(lambda s: bernoulli_mask(s, jnp.full_like(s, 0.5)).sum())(jnp.array([20.0, -20.0], jnp.float32))
    np.testing.assert_allclose(gradient, np.exp(-20.0), rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_masks_and_gradients_keep_the_dtype_of_the_scores(dtype):
    scores = {"kernel": jnp.linspace(-3, 3, 50).astype(dtype).reshape(5, 10)}
    for mask_fn in (sm.bernoulli(), sm.rescaled(sm.bernoulli())):
        for key in (None, jax.random.key(0)):
            mask, pull = jax.vjp(lambda s, f=mask_fn, k=key: f(s, k)["kernel"], scores)
            assert mask.dtype == dtype and pull(jnp.ones_like(mask))[0]["kernel"].dtype == dtype
    wide = sm.bernoulli()(jax.tree.map(lambda s: s.astype(jnp.float32), scores), jax.random.key(0))
    masks = sm.bernoulli()(scores, jax.random.key(0))
    np.testing.assert_array_equal(masks["kernel"].astype(jnp.float32), wide["kernel"])


@pytest.mark.parametrize("key", [None, 1])
def test_bernoulli_masks_are_the_same_under_jit(key):
    key = None if key is None else jax.random.key(key)
    for mask_fn in (sm.bernoulli(), sm.rescaled(sm.bernoulli())):
        eager, jitted = mask_fn(logits(), key), jax.jit(mask_fn)(logits(), key)
        jax.tree.map(np.testing.assert_array_equal, eager, jitted)


def test_scores_that_are_not_a_number_are_an_error_that_names_the_layer():
    with pytest.raises(ValueError, match="the scores of 'Dense_0/kernel' hold NaN"):
        sm.bernoulli()({"Dense_0": {"kernel": jnp.array([0.0, np.nan], jnp.float32)}}, jax.random.key(0))


def test_under_jit_nan_ranks_highest_by_edge_popup_and_is_pruned_by_bernoulli_with_a_gradient_that_shows_it():
    scores = {"kernel": jnp.array([[1.0, np.nan, 5.0]], jnp.float32)}
    with pytest.raises(ValueError, match="the scores of 'kernel' hold NaN"):
        sm.edge_popup(Fraction(1, 3))(scores, None)
    assert jax.jit(lambda s: sm.edge_popup(Fraction(1, 3))(s, None))(scores)["kernel"].tolist() == [[0, 1, 0]]
    mask_fn, key = sm.bernoulli(), jax.random.key(0)
    assert jax.jit(lambda s: mask_fn(s, key))(scores)["kernel"][0, 1] == 0
    gradient = jax.jit(jax.grad(lambda s: jnp.sum(mask_fn(s, key)["kernel"])))(scores)["kernel"]
    assert np.isnan(gradient).tolist() == [[False, True, False]]


def test_rescaled_masks_are_their_size_over_their_ones():
    masks = {"a": jnp.array([1.0, 0, 0, 1, 0], jnp.float32), "b": None, "c": jnp.array([0.0, 1, 0, 0], jnp.float32)}
    scaled = sm.rescaled(sm.identity)(masks)
    assert scaled["a"].tolist() == [2.5, 0, 0, 2.5, 0] and scaled["b"] is None and scaled["c"].tolist() == [0, 4, 0, 0]
    nothing = sm.rescaled(sm.identity)({"a": jnp.zeros(3), "empty": jnp.zeros((0, 3))})
    assert nothing["a"].tolist() == [0, 0, 0]


def test_many_ones_in_half_precision_are_counted_exactly():
    mask = jnp.ones(100_000, jnp.float16).at[:30_000].set(0)  # beyond the largest float16, 65504
    assert sm.rescaled(sm.identity)({"a": mask})["a"].max() == np.float16(1 / 0.7)


@pytest.mark.parametrize("mask", [[1.0, 0, 1, 1, 0], [0.0, 0, 1, 0, 0]])
def test_rescaling_lets_the_gradient_flow_through_its_factor(mask):
    """d/dm of sum(a * m * n / sum(m)) = n * a / sum(m) - n * sum(a * m) / sum(m)**2; where one is kept as well."""
    mask, a = jnp.array(mask, jnp.float32), jnp.array([0.3, -2, 1.5, 0.7, 4], jnp.float32)
    gradient = jax.grad(lambda m: jnp.vdot(a, sm.rescaled(sm.identity)({"a": m})["a"]))(mask)
    np.testing.assert_allclose(gradient, jax.grad(lambda m: jnp.vdot(a, m * (5 / m.sum())))(mask), rtol=1e-6)
    ones, total = float(mask.sum()), float(a @ mask)
    np.testing.assert_allclose(gradient, 5 * np.asarray(a) / ones - 5 * total / ones**2, rtol=1e-5)
    nothing = jax.grad(lambda m: jnp.vdot(a, sm.rescaled(sm.identity)({"a": m})["a"]))(jnp.zeros(5, jnp.float32))
    np.testing.assert_allclose(nothing, 5 * a)


def test_bernoulli_steps_train_the_scores_alone_and_compile_once():
    subnet = sm.Subnet(weights(), zeroed())
    tx = optax.sgd(1.0)

    def loss_fn(params, model_state, batch, key):
        return jnp.mean(jnp.square(batch @ params["Dense_0"]["kernel"] - 1)), (model_state, {})

    step = jax.jit(sm.make_train_step(sm.rescaled(sm.bernoulli()), loss_fn, tx, learns="scores"))
    state = sm.init_state(subnet, tx, jax.random.key(0), learns="scores")
    for _ in range(3):
        state, metrics = step(state, jnp.ones((4, 20)))
    assert step._cache_size() == 1 and np.isfinite(metrics["loss"])
    jax.tree.map(np.testing.assert_array_equal, state.subnet.weights, subnet.weights)
    assert np.all(kernels(state.subnet.scores)["Dense_0"] != 0)
