"""Leaves that stack layers: each layer has its own ranking, count, density, fan-in and report, as if it were alone."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest

import supermask_jax as sm
from supermask_jax import densities, dynamic, initializers, lottery, saliency, selection, units
from supermask_jax.trees import layer_counts

rng = np.random.default_rng(0)
KEY = jax.random.key(0)
DENSE = "Dense_0/kernel"  # whose name tells that it stacks layers


def layout(**axes):
    """Of leaves (4, 5, 6) whose axes do what the words say."""
    weights = {path: jnp.zeros((4, 5, 6)) for path in axes}
    return sm.describe(None, weights, axes=axes)


def each_highest(scores, count, axis=0):
    """The mask of every layer by itself."""
    masks = [oracles.highest(layer, count) for layer in np.moveaxis(scores, axis, 0)]
    return np.moveaxis(np.stack(masks), 0, axis)


@pytest.mark.parametrize(("ties", "density"), ((False, 0.7), (True, 0.3)))
@pytest.mark.parametrize("axis", (0, 1, 2))
def test_each_layer_is_ranked_by_itself(axis, ties, density):
    words = ["in", "out"]
    words.insert(axis, "stack")
    scores = rng.integers(-2, 3, (4, 5, 6)) if ties else rng.normal(size=(4, 5, 6))
    scores = {"w": scores.astype(np.float32)}
    count = sm.keep_count(density, 120 // (4, 5, 6)[axis])
    for select in (sm.layerwise_masks, jax.jit(sm.layerwise_masks, static_argnames=("density", "layout"))):
        masks = select(scores, density=density, layout=layout(w=" ".join(words)))
        np.testing.assert_array_equal(masks["w"], each_highest(scores["w"], count, axis))


def test_a_stack_is_ranked_beside_leaves_of_one_layer_and_two_axes_may_count_layers():
    scores = {
        "plain": rng.normal(size=(30, 40)).astype(np.float32),
        "experts": rng.normal(size=(3, 2, 50, 20)).astype(np.float32),
        "last": rng.normal(size=(40, 4)).astype(np.float32),
    }
    told = sm.describe(None, scores, axes={"experts": "stack stack in out"})
    masks = sm.edge_popup({"plain": 0.3, "experts": 0.7, "last": 1.0}, told)(scores)
    ranked = {path: np.abs(score) for path, score in scores.items()}
    np.testing.assert_array_equal(masks["plain"], oracles.highest(ranked["plain"], 360))
    joined = each_highest(ranked["experts"].reshape(6, 50, 20), 700).reshape(3, 2, 50, 20)
    np.testing.assert_array_equal(masks["experts"], joined)
    assert (np.asarray(masks["last"]) == 1).all()


def test_layers_of_a_stack_take_densities_of_their_own_and_are_reported_by_themselves():
    scores = {DENSE: rng.normal(size=(3, 10, 10)).astype(np.float32)}
    given = {f"{DENSE}[0]": 0.1, f"{DENSE}[1]": 0.5, f"{DENSE}[2]": 0.9}
    masks = sm.layerwise_masks(scores, given)
    assert sm.layer_densities(masks) == pytest.approx(given) and sm.density(masks) == pytest.approx(0.5)
    assert layer_counts(masks) == {f"{DENSE}[0]": (10, 100), f"{DENSE}[1]": (50, 100), f"{DENSE}[2]": (90, 100)}
    with pytest.raises(ValueError, match=r"leaves out Dense_0/kernel\[2\]"):
        sm.layerwise_masks(scores, {name: given[name] for name in (f"{DENSE}[0]", f"{DENSE}[1]")})
    with pytest.raises(ValueError, match=r"no prunable leaf has the path 'Dense_0/kernel\[3\]'"):
        sm.layerwise_masks(scores, given | {f"{DENSE}[3]": 0.1})
    with pytest.raises(ValueError, match=r"cannot keep 101 of the 100 weights to choose from in 'Dense_0/kernel\[1\]'"):
        sm.keep_highest(scores, {f"{DENSE}[0]": 1, f"{DENSE}[1]": 101, f"{DENSE}[2]": 1})


def test_within_counts_each_layers_own_room():
    scores = {DENSE: rng.normal(size=(2, 4, 5)).astype(np.float32)}
    within = {DENSE: np.stack([np.ones((4, 5)), np.eye(4, 5)]).astype(np.float32)}
    masks = sm.keep_highest(scores, {DENSE: 3}, within)[DENSE]
    np.testing.assert_array_equal(masks[1], oracles.highest(scores[DENSE][1], 3, within[DENSE][1]))
    with pytest.raises(ValueError, match=r"cannot keep 5 of the 4 weights to choose from in 'Dense_0/kernel\[1\]'"):
        sm.keep_highest(scores, {DENSE: 5}, within)


def test_a_taller_stack_makes_no_longer_program():
    def operations(layers):
        scores = {DENSE: jnp.zeros((layers, 40, 50))}
        return str(jax.make_jaxpr(lambda s: sm.layerwise_masks(s, 0.3))(scores)).count(" = ")

    assert operations(3) == operations(48)


def test_random_masks_of_a_stack_keep_the_count_of_each_layer():
    weights = {DENSE: jnp.ones((3, 20, 10)), "head": jnp.ones((10, 4))}
    masks = sm.random_masks(KEY, weights, sm.densities.erk({DENSE: (3, 20, 10), "head": (10, 4)}, 0.3))
    kept = [ones for ones, _ in layer_counts(masks).values()]
    assert len(kept) == 4 and kept[0] == kept[1] == kept[2] and len(np.unique(np.asarray(masks[DENSE]), axis=0)) == 3
    again = lottery.random_like(jax.random.key(1), masks)
    assert layer_counts(again) == layer_counts(masks) and (np.asarray(again[DENSE]) != masks[DENSE]).any()


@pytest.mark.parametrize("share", (densities.er, densities.erk))
def test_a_stack_has_the_densities_of_its_layers_alone(share):
    alone = {"a": (32, 128), "b": (32, 128), "c": (32, 128), "head": (32, 10)}
    expected = share(alone, 0.2)
    stacked = {DENSE: (3, 32, 128), "head": (32, 10)}
    for shapes in (stacked, sm.describe(None, {path: jnp.zeros(shape) for path, shape in stacked.items()})):
        got = share(shapes, 0.2)
        assert got == pytest.approx({DENSE: expected["a"], "head": expected["head"]})
        assert densities.overall(shapes, got) == pytest.approx(0.2)


def test_attention_and_equinox_have_the_densities_of_the_product_that_they_are():
    flax = {"attn/query/kernel": (32, 4, 8), "attn/out/kernel": (4, 8, 32), "Conv_0/kernel": (3, 3, 16, 32)}
    same = {"attn/query/kernel": (32, 32), "attn/out/kernel": (32, 32), "Conv_0/kernel": (3, 3, 16, 32)}
    equinox = {"query/weight": (32, 32), "out/weight": (32, 32), "conv/weight": (32, 16, 3, 3)}
    layout = sm.describe(None, {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in equinox.items()})
    for share in (densities.er, densities.erk):
        expected = share(same, 0.1)
        assert share(flax, 0.1) == pytest.approx(expected)
        got = share(layout, 0.1)
        assert sorted(got.values()) == pytest.approx(sorted(expected.values()))
        assert got["conv/weight"] == pytest.approx(expected["Conv_0/kernel"])


def test_weights_and_scores_of_a_stack_are_drawn_for_the_fan_in_of_a_layer():
    weights = {DENSE: jnp.zeros((12, 32, 64))}
    drawn = initializers.signed_constant(KEY, weights, 0.25)
    np.testing.assert_allclose(np.abs(drawn[DENSE]), np.sqrt(2 / 32 / 0.25), rtol=1e-6)
    assert 0.99 < np.abs(sm.init_scores(KEY, weights)[DENSE]).max() * np.sqrt(32) <= 1
    by_layer = {f"{DENSE}[{i}]": 0.25 for i in range(12)}
    np.testing.assert_array_equal(initializers.signed_constant(KEY, weights, by_layer)[DENSE], drawn[DENSE])
    with pytest.raises(ValueError, match="the layers of 'Dense_0/kernel' are scaled as one and have several densities"):
        initializers.signed_constant(KEY, weights, by_layer | {f"{DENSE}[3]": 0.5})


def test_units_lie_along_the_out_axes_in_each_layer():
    scores = {"w": rng.normal(size=(4, 5, 6)).astype(np.float32)}
    means = units.unit_scores(scores, layout=layout(w="stack out in"))["w"]
    np.testing.assert_allclose(means, scores["w"].mean(axis=2, keepdims=True), rtol=1e-5)
    assert units.unit_masks(scores, layout=layout(w="stack in out"))["w"].shape == (4, 1, 6)
    assert units.unit_scores({"layers/0/weight": scores["w"][0]})["layers/0/weight"].shape == (5, 1)
    assert units.unit_scores({"layers/0/kernel": scores["w"][0]})["layers/0/kernel"].shape == (1, 6)


@pytest.mark.parametrize("unit", ("weight", "neuron"))
def test_pruning_by_layer_prunes_each_layer_of_a_stack(unit):
    weights = {DENSE: jnp.asarray(rng.normal(size=(3, 10, 20)), jnp.float32)}
    masks = lottery.full_masks(weights)
    first = lottery.prune(weights, masks, {f"{DENSE}[0]": 0.2, f"{DENSE}[1]": 0.5, f"{DENSE}[2]": 0.0}, "layer", unit)
    assert list(sm.layer_densities(first).values()) == pytest.approx([0.8, 0.5, 1.0])
    left = np.asarray(first[DENSE]).max(axis=1).sum(axis=1)
    assert left.tolist() == ([16, 10, 20] if unit == "neuron" else [20, 20, 20])
    second = lottery.prune(weights, first, 0.5, "layer", unit)
    assert list(sm.layer_densities(second).values()) == pytest.approx([0.4, 0.25, 0.5])


def test_an_equinox_tree_is_pruned_by_the_neurons_that_it_has():
    weights = {"first": {"weight": jnp.asarray(rng.normal(size=(8, 5)), jnp.float32)}}
    masks = lottery.prune(weights, lottery.full_masks(weights), 0.5, unit="neuron")["first"]["weight"]
    rows = np.asarray(masks).mean(axis=1)
    assert sorted(rows.tolist()) == [0] * 4 + [1] * 4
    strongest = np.argsort(np.abs(weights["first"]["weight"]).mean(axis=1))[4:]
    assert (rows[strongest] == 1).all()


def test_masks_that_change_keep_the_count_of_each_layer():
    weights = {DENSE: jnp.asarray(rng.normal(size=(3, 10, 20)), jnp.float32)}
    given = {f"{DENSE}[{i}]": d for i, d in enumerate((0.1, 0.3, 0.7))}
    masks = sm.random_masks(KEY, weights, given)
    growth = selection.random_scores(jax.random.key(1), weights)
    grown = dynamic.drop_and_grow(weights, masks, growth, 0.5)
    assert layer_counts(grown) == layer_counts(masks) and (np.asarray(grown[DENSE]) != masks[DENSE]).any()
    halved = dynamic.magnitude_masks(weights, masks, {name: d / 2 for name, d in given.items()})
    assert sm.layer_densities(halved) == pytest.approx({name: d / 2 for name, d in given.items()})


def by_name_and_by_layout(seed=0):
    """(weights whose name tells that they stack layers, the same where nothing but a layout does, the layout)."""
    stack = jnp.asarray(np.random.default_rng(seed).normal(size=(3, 10, 20)), jnp.float32)
    return {DENSE: stack}, {"w": stack}, sm.describe(None, {"w": stack}, axes={"w": "stack in out"})


def told(layout, tree):
    """The tree of the name, and the counts of its layers, from that of the layout."""
    counts = {name.replace("w", DENSE): count for name, count in layer_counts(tree, layout).items()}
    return {DENSE: tree["w"]}, counts


RANKING = {
    "magnitude_masks": lambda w, m, s, layout: dynamic.magnitude_masks(w, m, 0.2, layout=layout),
    "drop_and_grow": lambda w, m, s, layout: dynamic.drop_and_grow(w, m, s, 0.3, layout=layout),
    "prune": lambda w, m, s, layout: lottery.prune(w, m, 0.3, "layer", layout=layout),
    "prune neurons": lambda w, m, s, layout: lottery.prune(w, m, 0.3, "layer", "neuron", layout=layout),
    "prune_by": lambda w, m, s, layout: lottery.prune_by(s, m, 0.3, "layer", layout=layout),
    "prune with a minimum": lambda w, m, s, layout: lottery.prune(w, m, 0.9, minimum=9, layout=layout),
    "keep_highest": lambda w, m, s, layout: sm.keep_highest(s, dict.fromkeys(s, 5), m, layout=layout),
    "global_masks with a minimum": lambda w, m, s, layout: sm.global_masks(s, 0.1, m, minimum=9, layout=layout),
    "prune_in_rounds": lambda w, m, s, layout: saliency.prune_in_rounds(lambda _: s, 0.1, 3, 9, layout=layout),
}


@pytest.mark.parametrize("rank", RANKING.values(), ids=RANKING)
def test_a_layout_tells_of_a_stack_what_a_name_would(rank):
    named, unnamed, layout = by_name_and_by_layout()
    scores, masks = by_name_and_by_layout(1)[0], {DENSE: (jnp.abs(named[DENSE]) > 0.4).astype(jnp.float32)}
    expected = rank(named, masks, scores, None)
    got, counts = told(layout, rank(unnamed, {"w": masks[DENSE]}, {"w": scores[DENSE]}, layout))
    np.testing.assert_array_equal(got[DENSE], expected[DENSE])
    assert counts == layer_counts(expected) and len(counts) == 3


@pytest.mark.parametrize("name", ("gradual", "set", "rigl"))
def test_methods_whose_masks_change_follow_a_layout(name):
    def loss_fn(params, model_state, batch, key):
        (leaf,) = params.values()
        return jnp.sum(leaf * jnp.sin(jnp.arange(600.0)).reshape(leaf.shape)), (model_state, {})

    named, unnamed, layout = by_name_and_by_layout()
    masks = {path: (jnp.abs(leaf) > 0.4).astype(jnp.float32) for path, leaf in (named | unnamed).items()}
    tx, counts = optax.sgd(0.1), []
    for weights, told_by in ((named, None), (unnamed, layout)):
        own = {path: masks[path] for path in weights}
        if name == "gradual":
            where = sm.is_kernel if told_by is None else told_by
            method = sm.methods.gradual(weights, tx, 0.1, steps=10, every=2, scope="layer", where=where)
        elif name == "set":
            method = sm.methods.set(KEY, weights, own, tx, steps=10, every=2, layout=told_by)
        else:
            method = sm.methods.rigl(KEY, weights, own, tx, loss_fn, steps=10, every=2, layout=told_by)
        state = sm.init_state(method.subnet, tx, KEY, learns=method.learns)
        after = method.update(2, state, None).subnet.scores
        assert any((np.asarray(after[path]) != np.asarray(state.subnet.scores[path])).any() for path in after)
        counts.append(list(layer_counts(after, told_by).values()))
    assert counts[0] == counts[1] and len(counts[0]) == 3


def test_rescaling_is_by_what_each_layer_keeps():
    masks = {DENSE: jnp.stack([jnp.ones((4, 4)), jnp.eye(4), jnp.zeros((4, 4))])}
    scaled = np.asarray(sm.rescaled(sm.identity)(masks, None)[DENSE])
    assert [layer.max() for layer in scaled] == [1, 4, 0]


def test_n_of_m_lies_along_the_summed_axis_that_the_layout_tells():
    scores = {"w": rng.normal(size=(4, 8, 6)).astype(np.float32)}
    told = sm.describe(None, scores, axes={"w": "stack in out"})
    np.testing.assert_array_equal(sm.n_m_masks(scores, 2, 4, layout=told)["w"], sm.n_m_masks(scores, 2, 4, 1)["w"])
    named = sm.n_m_masks({"a": {"weight": scores["w"][0]}}, 1, 2)["a"]["weight"]
    np.testing.assert_array_equal(named, sm.n_m_masks({"a": scores["w"][0]}, 1, 2, 1)["a"])


def test_n_of_m_asks_where_no_axis_is_summed():
    scores = {"w": np.ones((3, 4), np.float32)}
    with pytest.raises(ValueError, match="tells what the axes of 'w'"):
        sm.n_m_masks(scores, 1, 2, layout=sm.describe(None, scores, axes={"w": "window out"}))


def test_a_minimum_is_of_each_layer_and_an_emptied_one_is_named():
    scores = {DENSE: np.concatenate([np.ones((1, 4, 5)), np.zeros((1, 4, 5))]).astype(np.float32)}
    with pytest.warns(UserWarning, match=r"no weight is kept in Dense_0/kernel\[1\]; minimum=1"):
        sm.global_masks(scores, 0.5)
    masks = sm.global_masks(scores, 0.5, minimum=2)
    assert layer_counts(masks) == {f"{DENSE}[0]": (18, 20), f"{DENSE}[1]": (2, 20)}
    assert layer_counts(saliency.prune_in_rounds(lambda masks: scores, 0.5, 3, minimum=2)) == layer_counts(masks)
    with pytest.raises(ValueError, match="20 weights are too few for 11 in every layer"):
        sm.global_masks(scores, 0.5, minimum=11)
    with pytest.raises(ValueError, match="minimum must be a whole number >= 0, got -1"):
        sm.global_masks(scores, 0.5, minimum=-1)


def test_edge_popup_of_units_has_a_score_for_each_unit_of_each_layer():
    weights = {DENSE: jnp.ones((3, 4, 6))}
    method = sm.methods.edge_popup(KEY, weights, 0.5, unit="neuron")
    assert method.subnet.scores[DENSE].shape == (3, 1, 6)
    masks = np.asarray(method.mask_fn(method.subnet.scores, None)[DENSE])
    assert masks.shape == (3, 4, 6) and (masks.min(axis=1).sum(axis=1) == 3).all()
