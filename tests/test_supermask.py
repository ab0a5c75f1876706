import jax
import jax.numpy as jnp
import numpy as np
import pytest

import supermask_jax as sm

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


def test_scores_take_the_weights_dtype():
    scores = sm.init_scores(jax.random.key(1), {"kernel": jnp.ones((4, 4), jnp.bfloat16)})
    assert scores["kernel"].dtype == jnp.bfloat16


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
