"""Scores by hand: magnitudes, SNIP, GraSP and SynFlow on tiny nets; and pruning by them in rounds."""

from fractions import Fraction
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

import supermask_jax as sm
from supermask_jax import saliency
from supermask_jax.saliency import grasp, magnitude, prune_in_rounds, snip, synflow

pytestmark = pytest.mark.usefixtures("strict_dtypes")

WEIGHTS = {"Dense_0": {"kernel": jnp.array([[3.0, -1.0], [-6.0, 0.5]]), "bias": jnp.ones(2)}}


def test_magnitude_is_the_absolute_value_of_what_is_prunable():
    scores = magnitude(WEIGHTS)
    assert scores["Dense_0"]["bias"] is None
    assert scores["Dense_0"]["kernel"].tolist() == [[3, 1], [6, 0.5]]
    with pytest.raises(ValueError, match="matches no leaf; the leaves are: bias"):
        magnitude({"bias": jnp.ones(2)})


# At initialisation. The net: y = x @ first @ last + bias, and the loss the sum of (y - t)**2 over a batch (x, t).


def net(first, last, dtype=jnp.float32):
    return {"bias": jnp.zeros(1, dtype), "first": jnp.array(first, dtype), "last": jnp.array(last, dtype)}


def batch(x, t):
    return jnp.array([x], jnp.float32), jnp.array([[t]], jnp.float32)


def loss_fn(params, model_state, batch, key):
    x, t = (part.astype(params["bias"].dtype) for part in batch)
    return jnp.sum((x @ params["first"] @ params["last"] + params["bias"][None] - t) ** 2), (model_state, {})


def apply_fn(params, model_state, inputs):
    return inputs @ params["first"] @ params["last"] + params["bias"][None]


# x = (1, 4), first = (2, -1), last = 3: hidden 2 - 4 = -2, y = -6. With t = -5 the error e is -1, and
# dL/dfirst = 2 e * last * x = (-6, -24), dL/dlast = 2 e * hidden = 4.
SNIP_NET, SNIP_BATCH = net([[2], [-1]], [[3]]), batch([1, 4], -5)

# y = w1 w2 x, w1 = 2, w2 = 3. With e = y - t: dL/dw1 = 2 e w2 x, dL/dw2 = 2 e w1 x, and the second derivatives are
# 2 (w2 x)**2, 2 (w1 x)**2, and between the two 2 x (2 w1 w2 x - t).
# x = 1, t = 5: e = 1, g = (6, 4), H = (18, 14; 14, 8)
# x = 2, t = 9: e = 3, g = (36, 24), H = (72, 60; 60, 32)
GRASP_NET, GRASP_BATCHES = net([[2]], [[3]]), [batch([1], 5), batch([2], 9)]


def lists(scores):
    assert scores["bias"] is None
    return [scores["first"].ravel().tolist(), scores["last"].ravel().tolist()]


def test_snip_by_hand():
    assert lists(snip(loss_fn, SNIP_NET, SNIP_BATCH)) == [[2 * 6, 1 * 24], [3 * 4]]


def test_grasp_by_hand():
    # Hg = (18 * 6 + 14 * 4, 14 * 6 + 8 * 4) = (164, 116)
    assert lists(grasp(loss_fn, GRASP_NET, GRASP_BATCHES[:1])) == [[2 * 164], [3 * 116]]


def test_grasp_is_of_the_sum_of_all_batches():
    # g = (42, 28), H = (90, 74; 74, 40), Hg = (3780 + 2072, 3108 + 1120) = (5852, 4228)
    assert lists(grasp(loss_fn, GRASP_NET, GRASP_BATCHES)) == [[2 * 5852], [3 * 4228]]
    assert lists(grasp(loss_fn, GRASP_NET, reversed(GRASP_BATCHES))) == [[2 * 5852], [3 * 4228]]
    joined = jax.tree.map(lambda *parts: jnp.concatenate(parts), *GRASP_BATCHES)
    assert lists(grasp(loss_fn, GRASP_NET, [joined])) == [[2 * 5852], [3 * 4228]]


def test_grasp_takes_gradient_and_hessian_in_the_prunable_weights_alone():
    scores = grasp(loss_fn, GRASP_NET, GRASP_BATCHES[:1], where=lambda path, leaf: path == "last")
    assert scores["first"] is None
    assert scores["last"].tolist() == [[3 * 8 * 4]]
    biases_too = grasp(loss_fn, GRASP_NET, GRASP_BATCHES[:1], where=lambda path, leaf: True)
    assert biases_too["last"].tolist() != [[3 * 116]]


SCORES_OF = {
    "snip": lambda weights, x, masks: snip(loss_fn, weights, x, masks=masks),
    "grasp": lambda weights, x, masks: grasp(loss_fn, weights, [x, x], masks=masks),
    "synflow": lambda weights, x, masks: synflow(apply_fn, weights, x[0].shape[1:], masks=masks),
}


@pytest.mark.parametrize("method", SCORES_OF)
def test_scores_under_masks_are_those_of_the_network_without_the_pruned_weights(method):
    masks = {"bias": None, "first": jnp.array([[0.0], [1.0]]), "last": jnp.ones((1, 1))}
    (pruned, kept), last = lists(SCORES_OF[method](SNIP_NET, SNIP_BATCH, masks))
    smaller = SCORES_OF[method](net([[-1]], [[3]]), batch([4], -5), None)
    assert pruned == 0
    assert [[kept], last] == lists(smaller)
    assert lists(smaller) != [lists(SCORES_OF[method](SNIP_NET, SNIP_BATCH, None))[0][1:], last]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", (jnp.float32, jnp.bfloat16))
@pytest.mark.parametrize("method", SCORES_OF)
def test_scores_keep_dtype_and_structure_and_do_not_depend_on_compilation(method, dtype):
    weights = net([[2], [-1]], [[3]], dtype)
    masks = {"bias": None, "first": jnp.array([[0], [1]], dtype), "last": jnp.ones((1, 1), dtype)}
    scores = SCORES_OF[method](weights, SNIP_BATCH, masks)
    assert scores["bias"] is None
    assert {leaf.dtype for leaf in jax.tree.leaves(scores)} == {jnp.dtype(dtype)}
    compiled = jax.jit(SCORES_OF[method])(weights, SNIP_BATCH, masks)
    chex.assert_trees_all_close(compiled, scores, rtol=1e-6 if dtype == jnp.float32 else 0.02)


@pytest.mark.float32
def test_the_loss_is_given_the_state_and_the_key():
    def scaled(params, model_state, batch, key):
        loss, aux = loss_fn(params, model_state, batch, key)
        return loss * model_state * jax.random.uniform(key), aux

    key, given = jax.random.key(3), {"model_state": jnp.float32(2), "key": jax.random.key(3)}
    factor = 2 * float(jax.random.uniform(key))
    np.testing.assert_allclose(snip(scaled, SNIP_NET, SNIP_BATCH, **given)["last"], [[12 * factor]], rtol=1e-6)
    scores = grasp(scaled, GRASP_NET, GRASP_BATCHES, **given)  # gradient and Hessian both grow with the loss
    np.testing.assert_allclose(scores["last"], [[3 * 4228 * factor**2]], rtol=1e-6)


@pytest.mark.parametrize("method", SCORES_OF)
@pytest.mark.parametrize(
    ("weights", "masks", "message"),
    [
        ({"bias": jnp.ones(1)}, None, "matches no leaf; the leaves are: bias"),
        (SNIP_NET, {"first": jnp.ones((2, 1)), "last": None, "bias": None}, "leaves out last"),
        (SNIP_NET, {"first": jnp.ones((2, 1)), "last": None, "bias": jnp.ones(1)}, "no prunable leaf .* 'bias'"),
        (SNIP_NET, {"first": jnp.ones((1, 2)), "last": jnp.ones((1, 1)), "bias": None}, r"'first' has shape \(1, 2\)"),
        (SNIP_NET, {"first": jnp.full((2, 1), 0.3), "last": jnp.ones((1, 1)), "bias": None}, "other than 0 and 1"),
    ],
    ids=("no leaf", "a mask short", "a mask too many", "shape", "not 0 or 1"),
)
def test_weights_and_masks_that_do_not_fit_are_refused(method, weights, masks, message):
    with pytest.raises(ValueError, match=message):
        SCORES_OF[method](weights, SNIP_BATCH, masks)


def test_weights_that_are_not_floats_and_batches_that_are_none_are_refused():
    with pytest.raises(TypeError, match="only floats are prunable; 'first' has int32"):
        snip(loss_fn, SNIP_NET | {"first": jnp.ones((2, 1), jnp.int32)}, SNIP_BATCH)
    with pytest.raises(ValueError, match="there is no batch"):
        grasp(loss_fn, GRASP_NET, [])
    with pytest.raises(ValueError, match="put a single one in a list"):
        grasp(loss_fn, GRASP_NET, {"image": jnp.ones((1, 1))})


def test_synflow_by_hand_is_the_published_score_times_one_number():
    weights = net([[-1, 2], [3, -5]], [[2], [-1]])
    # magnitudes: hidden 1 + 3 and 2 + 5, R = 4 * 2 + 7 * 1 = 15; a weight's score is the flow through it
    first, last = lists(synflow(apply_fn, weights, (2,)))
    np.testing.assert_allclose(np.array(first + last) / sum(last), np.array([2, 2, 6, 5, 8, 7]) / 15, rtol=1e-6)
    # without the 3: hidden 1 and 7, R = 1 * 2 + 7 * 1 = 9
    masks = {"bias": None, "first": jnp.array([[1.0, 1], [0, 1]]), "last": jnp.ones((2, 1))}
    first, last = lists(synflow(apply_fn, weights, (2,), masks=masks))
    np.testing.assert_allclose(np.array(first + last) / sum(last), np.array([2, 2, 0, 5, 2, 7]) / 9, rtol=1e-6)


def test_synflow_sees_every_float_as_its_magnitude_and_an_input_of_ones():
    seen = {}

    def spy(params, model_state, inputs):
        seen.update(bias=params["bias"], state=model_state, inputs=inputs)
        return jnp.sum(inputs @ params["kernel"]) + params["bias"] + model_state["mean"]

    state = {"mean": jnp.array([-3.0]), "steps": jnp.array(-7)}
    scores = synflow(spy, {"kernel": -jnp.ones((4, 2)), "bias": jnp.array([-2.0])}, (3, 5, 4), model_state=state)
    chex.assert_trees_all_equal(seen["inputs"], np.ones((1, 3, 5, 4), np.float32))
    assert (seen["bias"].tolist(), seen["state"]["mean"].tolist(), seen["state"]["steps"]) == ([2], [3], -7)
    assert np.all(scores["kernel"] > 0)


def test_synflow_refuses_a_network_through_which_nothing_flows():
    masks = {"bias": None, "first": jnp.ones((2, 1)), "last": jnp.zeros((1, 1))}
    with pytest.raises(ValueError, match="every score is 0: no path from the inputs to the outputs is left"):
        synflow(apply_fn, SNIP_NET, (2,), masks=masks)
    with pytest.raises(ValueError, match="scores of 'first' are not finite"):
        synflow(apply_fn, net([[jnp.inf], [-1]], [[3]]), (2,))


def chain(widths, seed=0):
    rng = np.random.default_rng(seed)
    return [(rng.normal(size=(n, m)) * np.sqrt(2 / n)).astype(np.float32) for n, m in zip(widths, widths[1:])]  # noqa: B905, RUF007


def chain_fn(kernels, model_state, inputs):
    for kernel in kernels:
        inputs = jax.nn.relu(inputs @ kernel)
    return inputs


def published_flow(kernels):
    """The published scores of a chain, not normalised, in double precision."""
    kernels = [np.abs(kernel.astype(np.float64)) for kernel in kernels]
    forward, backward = [np.ones(kernels[0].shape[0])], [np.ones(kernels[-1].shape[1])]
    for kernel in kernels:
        forward.append(forward[-1] @ kernel)
    for kernel in reversed(kernels):
        backward.insert(0, kernel @ backward[0])
    return [kernel * np.outer(forward[i], backward[i + 1]) for i, kernel in enumerate(kernels)]


def assert_flow_in_proportion(ours, published):
    total = np.sum(published[0])  # each layer's scores sum to R
    for mine, theirs in zip(ours, published, strict=True):
        np.testing.assert_allclose(mine / np.sum(ours[0]), theirs / total, rtol=1e-4, atol=1e-12)


def test_synflow_ranks_a_chain_as_the_published_scores_do():
    kernels = chain([5, 7, 4, 6, 3])
    ours, published = jax.jit(lambda kernels: synflow(chain_fn, kernels, (5,)))(kernels), published_flow(kernels)
    assert_flow_in_proportion(ours, published)
    order = [np.argsort(np.concatenate([score.ravel() for score in scores])) for scores in (ours, published)]
    np.testing.assert_array_equal(*order)


DEEP = chain([16] * 60 + [64] * 53)


@pytest.mark.slow
def test_synflow_of_112_layers_fits_in_float32_where_the_product_of_the_layers_does_not():
    flow = np.ones(16, np.float32)
    with np.errstate(all="ignore"):
        for kernel in DEEP:
            flow = flow @ np.abs(kernel)
    assert len(DEEP) == 112
    assert not np.any(np.isfinite(flow))
    assert_flow_in_proportion(synflow(chain_fn, DEEP, (16,)), published_flow(DEEP))


def published_rounds(kernels, density, rounds):
    """The kernels left by iterative pruning with the published scores, in NumPy."""
    for number in range(1, rounds + 1):
        scores = published_flow(kernels)
        every = np.sort(np.concatenate([score.ravel() for score in scores]))
        cut = every[-int(np.ceil(density ** (number / rounds) * every.size))]
        kernels = [kernel * (score >= cut) for kernel, score in zip(kernels, scores, strict=True)]
    return kernels


@pytest.mark.slow
def test_synflow_of_112_layers_still_fits_when_one_weight_of_a_hundred_is_left():
    """Divided by a plain mean of the inflows it overflows here."""
    kept = published_rounds(DEEP, 0.01, 10)
    masks = [(kernel != 0).astype(np.float32) for kernel in kept]
    assert all(mask.any() for mask in masks)
    assert_flow_in_proportion(synflow(chain_fn, DEEP, (16,), masks=masks), published_flow(kept))


def test_synflow_in_rounds_keeps_what_the_published_scores_keep():
    kernels = chain([20, 30, 30, 10])
    masks = prune_in_rounds(jax.jit(lambda masks: synflow(chain_fn, kernels, (20,), masks=masks)), 0.03, 20)
    theirs = [(kernel != 0).astype(np.float32) for kernel in published_rounds(kernels, 0.03, 20)]
    chex.assert_trees_all_equal(jax.device_get(masks), theirs)


# Rounds. Scores are drawn anew in each: what is pruned would come back if it could.
SHAPES = {"a": (30, 20), "c": (3, 3, 2, 10), "d": (20, 10), "e": (5, 4)}
SIZE = 1000


def draws(rounds, seed=0):
    rng = np.random.default_rng(seed)
    return [{path: rng.normal(size=shape).astype(np.float32) for path, shape in SHAPES.items()} for _ in range(rounds)]


def count_of(masks):
    return sum(int(mask.sum()) for mask in masks.values())


@pytest.mark.parametrize("density", (0.3, 0.7))
def test_each_round_keeps_the_best_of_what_is_left_in_exact_number(density):
    seen, scores = [], draws(4)

    def score_fn(masks):
        seen.append(masks)
        return scores[len(seen) - 1]

    last = prune_in_rounds(score_fn, density, 4)
    assert seen[0] is None
    left = {path: np.ones(shape) for path, shape in SHAPES.items()}
    for number, masks in enumerate([*seen[1:], last], 1):
        count = int(np.ceil(SIZE * density ** (number / 4)))
        candidates = {path: np.where(left[path], scores[number - 1][path], -np.inf) for path in SHAPES}
        left = oracles.highest_of_all(candidates, count)
        chex.assert_trees_all_equal(jax.device_get(masks), left)
    assert count_of(last) == sm.keep_count(density, SIZE)


def test_one_round_is_one_shot_pruning():
    (scores,) = draws(1)
    chex.assert_trees_all_equal(prune_in_rounds(lambda masks: scores, 0.3, 1), sm.global_masks(scores, 0.3))


def test_a_density_of_zero_keeps_nothing_whatever_the_rounds():
    (scores,) = draws(1)
    for rounds in (1, 2, 5):
        assert count_of(prune_in_rounds(lambda masks: scores if masks is None else None, 0, rounds)) == 0


@pytest.mark.float32
def test_no_slip_of_floating_point_keeps_a_weight_too_many():
    counts, (scores,) = [], draws(1)
    with pytest.warns(UserWarning, match="no weight is kept"):
        prune_in_rounds(lambda masks: counts.append(masks and count_of(masks)) or scores, 0.001, 3)
    assert 0.001 ** (1 / 3) > 0.1
    assert counts == [None, 100, 10]
    assert prune_in_rounds(lambda masks: {"w": jnp.ones((1, 3))}, Fraction(2, 3), 1)["w"].sum() == 2


def test_a_layer_pruned_whole_is_named_in_a_warning_and_a_minimum_prevents_it():
    (scores,) = draws(1)
    scores |= {"c": scores["c"] - 100, "e": scores["e"] - 200}
    with pytest.warns(UserWarning, match="no weight is kept in c, e; minimum=1 keeps a weight in every layer"):
        prune_in_rounds(lambda masks: scores, 0.3, 3)
    masks = jax.device_get(prune_in_rounds(lambda masks: scores, 0.3, 3, minimum=25))
    assert count_of(masks) == 300
    assert masks["e"].all()  # it has but twenty
    chex.assert_trees_all_equal(masks["c"], oracles.highest(scores["c"], 25))
    others = oracles.highest_of_all({path: scores[path] for path in "ad"}, 300 - 25 - 20)
    chex.assert_trees_all_equal({path: masks[path] for path in "ad"}, others)


@pytest.mark.parametrize("density", (0.3, 0.7))
def test_with_a_minimum_nothing_comes_back_either_and_the_number_is_exact(density):
    seen, scores = [], iter(draws(5))
    masks = prune_in_rounds(lambda masks: seen.append(masks) or next(scores), density, 5, minimum=15)
    for number, (before, after) in enumerate(zip(seen[1:], [*seen[2:], masks], strict=True), 2):
        assert count_of(after) == np.ceil(SIZE * density ** (number / 5))
        for path in SHAPES:
            assert np.all(after[path] <= before[path])
            assert after[path].sum() >= 15


def test_the_second_and_later_rounds_compile_nothing(caplog):
    compiled, (scores,) = [], draws(1)
    with jax.log_compiles():
        prune_in_rounds(lambda masks: compiled.append(len(caplog.records)) or scores, 0.37, 4, minimum=2)
        compiled.append(len(caplog.records))
        jax.jit(lambda: jnp.zeros(3))()
    assert len(compiled) == 5
    assert len(set(compiled[1:])) == 1
    assert len(caplog.records) > compiled[-1]  # it would have been seen


def test_rounds_that_make_no_sense_are_refused():
    score_fn = partial(next, iter(draws(9)))

    def refused(message, *arguments, scores=score_fn):
        with pytest.raises(ValueError, match=message):
            prune_in_rounds(scores, *arguments)

    refused(r"density must be a number in \[0, 1\]", 1.3, 2)
    refused("rounds must be a whole number >= 1, got 0", 0.3, 0)
    refused("rounds must be a whole number >= 1, got 2.5", 0.3, 2.5)
    refused("minimum must be a whole number >= 0, got -1", 0.3, 2, -1)
    refused("density 0.01 keeps 10 weights: too few for 3 in every layer", 0.01, 2, 3, scores=lambda masks: draws(1)[0])
    refused("every score is 0: nothing to choose by in round 1", 0.3, 2, scores=lambda masks: {"w": jnp.zeros((2, 3))})
    refused("scores of 'w' are not finite", 0.3, 2, scores=lambda masks: {"w": jnp.array([[1.0, jnp.nan]])})


def test_the_former_name_is_the_same_function():
    assert saliency.iterative is prune_in_rounds


# Any network, any number of devices.


@jax.custom_vjp
def doubled(x):
    return 2 * x


doubled.defvjp(lambda x: (2 * x, None), lambda _, cotangent: (2 * cotangent,))


def test_grasp_takes_layers_that_have_no_forward_mode():
    weights = {"kernel": jnp.array([[0.5, -1.0], [2.0, 0.25]])}

    def loss(layer):
        return lambda params, state, batch, key: (jnp.sum(layer(jnp.tanh(batch @ params["kernel"])) ** 2), (state, {}))

    batch = jnp.array([[1.0, 0.5], [-0.5, 2.0]])
    plain = saliency.grasp(loss(lambda x: 2 * x), weights, [batch])
    custom = saliency.grasp(loss(doubled), weights, [batch])
    np.testing.assert_allclose(custom["kernel"], plain["kernel"], rtol=1e-6)


def test_on_several_devices_scores_are_those_of_the_whole_batch():
    weights = {"kernel": jnp.array([[0.5, -1.0], [2.0, 0.25]])}
    batch = jnp.arange(16.0).reshape(8, 2) / 8

    def loss(params, state, batch, key):
        return jnp.mean(jnp.tanh(batch @ params["kernel"]) ** 2), (state, {})

    subnet = sm.Subnet(weights, {"kernel": jnp.eye(2)})
    for score in (
        lambda batch, **name: saliency.snip(loss, weights, batch, **name),
        lambda batch, **name: saliency.grasp(loss, weights, [batch], **name),
        lambda batch, **name: sm.dynamic.dense_gradient(loss, subnet, batch, **name),
    ):
        parts = jax.vmap(partial(score, axis_name="devices"), axis_name="devices")(batch.reshape(4, 2, 2))
        for part in parts["kernel"]:
            np.testing.assert_allclose(part, score(batch)["kernel"], rtol=1e-5)
        mesh = sm.parallel.mesh()
        np.testing.assert_allclose(
            jax.jit(score)(sm.parallel.shard_batch(mesh, batch))["kernel"], score(batch)["kernel"], rtol=1e-5
        )


def test_a_leaf_whose_scores_are_all_0_is_named():
    weights = {"kernel": jnp.ones((2, 2)), "dead": jnp.ones((2, 2))}

    def loss(params, state, batch, key):
        return jnp.sum(batch @ params["kernel"] + 0 * (batch @ params["dead"])), (state, {})

    with pytest.warns(UserWarning, match="every score is 0 in dead: .*open_gates"):
        scores = saliency.snip(loss, weights, jnp.ones((3, 2)))
    compiled = jax.jit(lambda weights: saliency.snip(loss, weights, jnp.ones((3, 2))))
    with pytest.warns(UserWarning, match="every score is 0 in dead"):
        saliency.prune_in_rounds(lambda masks: compiled(weights), 0.8, 1)
    alone = {"kernel": None, "dead": jnp.zeros((2, 2))}
    saliency.snip(loss, weights, jnp.ones((3, 2)), masks=alone, where=lambda path, leaf: path == "dead")
    assert not scores["dead"].any()
