"""Masks of the scores above a threshold: closed forms, what published code computed, and the whole method."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import supermask_jax as sm

GOLDEN = Path(__file__).parents[1] / "golden" / "i_threshold.npz"
TOLERANCE = 1e-6  # of the largest gradient

pytestmark = pytest.mark.usefixtures("strict_dtypes")


@functools.cache
def golden():
    with np.load(GOLDEN) as arrays:
        loaded = dict(arrays)
    return loaded, json.loads(str(loaded.pop("meta")))


def weights():
    kernel = jax.random.normal(jax.random.key(0), (12, 5))
    return {"Dense_0": {"kernel": kernel, "bias": jnp.ones(5)}, "Dense_1": {"kernel": kernel[:5]}}


def mask_of(scores, t=0.0):
    return sm.threshold(t)({"s": jnp.asarray(scores)}, None)["s"]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_masks_are_exactly_one_above_the_threshold_and_zero_elsewhere_in_the_dtype_of_the_scores(dtype):
    scores = jnp.array([-2.0, -0.0, 0.0, 0.25, 0.5, 0.75], dtype)
    for t, kept in ((0.0, [0, 0, 0, 1, 1, 1]), (0.5, [0, 0, 0, 0, 0, 1]), (-2.0, [0, 1, 1, 1, 1, 1])):
        mask = mask_of(scores, t)
        assert mask.dtype == dtype and mask.tolist() == kept


def test_leaves_that_are_not_prunable_stay_none():
    masks = sm.threshold()(sm.init_scores(jax.random.key(1), weights()), None)
    assert masks["Dense_0"]["bias"] is None and masks["Dense_1"]["kernel"].shape == (5, 5)


@pytest.mark.float32
def test_a_score_is_compared_with_the_threshold_alone_and_not_with_other_scores():
    """Edge-popup ranks: a weight's mask depends on all scores of its layer. Here it does not."""
    scores = jax.random.normal(jax.random.key(2), (40,))
    changed = scores.at[1:].multiply(-3.0)
    assert mask_of(scores)[0] == mask_of(changed)[0]
    assert mask_of(scores, 0.3).tolist() == [float(s > np.float32(0.3)) for s in scores]


@pytest.mark.float32
@pytest.mark.parametrize("t", [0.0, 0.3])
def test_score_gradient_is_the_closed_form_for_kept_and_pruned_weights_alike(t):
    """dL/ds = w * dL/d(w * m), without a sign(s); jitted and not."""
    subnet = sm.Subnet(weights(), sm.init_scores(jax.random.key(1), weights()))
    outer = jax.tree.map(lambda w: jnp.cos(jnp.arange(w.size, dtype=w.dtype)).reshape(w.shape), subnet.weights)

    def loss(scores):
        params = sm.subnetwork(sm.threshold(t), subnet._replace(scores=scores))
        return sum(jnp.sum(a * b) for a, b in zip(jax.tree.leaves(outer), jax.tree.leaves(params), strict=True))

    for gradient in (jax.grad(loss)(subnet.scores), jax.jit(jax.grad(loss))(subnet.scores)):
        for layer in ("Dense_0", "Dense_1"):
            expected = outer[layer]["kernel"] * subnet.weights[layer]["kernel"]
            np.testing.assert_array_equal(gradient[layer]["kernel"], expected)


@pytest.mark.parametrize("t", [float("nan"), float("inf"), -float("inf")])
def test_a_threshold_that_is_not_finite_is_refused_at_once(t):
    with pytest.raises(ValueError, match="finite"):
        sm.threshold(t)
    with pytest.raises(ValueError, match="finite"):
        sm.methods.threshold(jax.random.key(0), weights(), t)


def test_nan_scores_raise_with_the_path_and_under_jit_are_pruned():
    scores = {"Dense_0": {"kernel": jnp.array([jnp.nan, 1.0])}}
    with pytest.raises(ValueError, match="'Dense_0/kernel' hold NaN"):
        sm.threshold()(scores, None)
    assert jax.jit(lambda s: sm.threshold()(s, None))(scores)["Dense_0"]["kernel"].tolist() == [0.0, 1.0]


def test_masks_and_gradients_equal_piggyback_at_its_threshold():
    """The threshold is compared as float32; a score that equals it is pruned."""
    arrays, meta = golden()
    t, scores = meta["pb_threshold"], arrays["pb_s"]
    assert (scores == np.float32(t)).any() and t != 0
    np.testing.assert_array_equal(mask_of(scores, t), arrays["pb_mask"])
    assert_gradient(t, "pb")


def test_masks_and_gradients_equal_supsup_except_at_a_score_of_zero_which_it_keeps():
    arrays, _ = golden()
    scores = arrays["fast_s"]
    mask, zero = np.asarray(mask_of(scores)), scores == 0
    assert zero.sum() >= 2 and np.signbit(scores[zero]).any()  # 0.0 and -0.0
    np.testing.assert_array_equal(mask[~zero], arrays["fast_mask"][~zero])
    assert not mask[zero].any() and arrays["fast_mask"][zero].all()
    assert_gradient(0.0, "fast")


def assert_gradient(t, case):
    arrays, _ = golden()
    cotangent, kernel = jnp.asarray(arrays[f"{case}_A"]), jnp.asarray(arrays[f"{case}_w"])

    def loss(score):
        params = sm.subnetwork(sm.threshold(t), sm.Subnet({"kernel": kernel}, {"kernel": score}))
        return jnp.vdot(cotangent, params["kernel"])

    expected = arrays[f"{case}_grad_s"]
    gradient = jax.grad(loss)(jnp.asarray(arrays[f"{case}_s"]))
    np.testing.assert_allclose(gradient, expected, rtol=0, atol=TOLERANCE * np.abs(expected).max())


def test_the_method_learns_scores_on_frozen_weights_and_its_density_is_an_outcome():
    start, tx = weights(), optax.sgd(0.5, momentum=0.9)
    method = sm.methods.threshold(jax.random.key(3), start)
    assert (method.learns, method.product, method.sampled, method.update) == ("scores", None, False, None)
    x = jax.random.normal(jax.random.key(4), (64, 12))
    labels = jnp.argmax(x[:, :5], axis=1)

    def loss_fn(params, model_state, batch, key):
        hidden = jax.nn.relu(batch[0] @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"][None])
        logits = hidden @ params["Dense_1"]["kernel"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean(), (model_state, {})

    state = sm.init_state(method.subnet, tx, jax.random.key(5), learns=method.learns)
    step = jax.jit(sm.make_train_step(method.mask_fn, loss_fn, tx, learns=method.learns))
    losses = []
    for _ in range(30):
        state, metrics = step(state, (x, labels))
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] and step._cache_size() == 1
    jax.tree.map(np.testing.assert_array_equal, state.subnet.weights, start)
    before, after = (sm.density(method.mask_fn(scores, None)) for scores in (method.subnet.scores, state.subnet.scores))
    assert 0.3 < before < 0.7 and after != before


def test_the_method_starts_from_the_scores_of_edge_popup():
    """So that the two differ in nothing but the rule."""
    key = jax.random.key(6)
    ours, theirs = (m(key, weights(), 0.3).subnet for m in (sm.methods.threshold, sm.methods.edge_popup))
    jax.tree.map(np.testing.assert_array_equal, ours.scores, theirs.scores)
