"""The selection against a stable sort in NumPy, whatever the scores, their shapes and the counts."""

import os
import subprocess
import sys
import textwrap
from fractions import Fraction
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

import supermask_jax as sm
from supermask_jax.selection import keep_highest_of_all, straight_through
from supermask_jax.threshold import ROW, SAMPLE, SMALL
from supermask_jax.units import unit_masks, unit_scores

pytestmark = pytest.mark.usefixtures("strict_dtypes")

DENSITIES = (0.0, 0.001, 0.3, 0.7, 1.0)
SHAPES = ((0,), (1,), (7,), (3, 0, 2), (13, 11), (3, 3, 2, 5), (512, 200), (70_001,))
SUBNORMAL = np.float32(1e-45)  # the smallest
DISTRIBUTIONS = {
    "uniform": lambda rng, n: rng.uniform(-1, 1, n),
    "normal": lambda rng, n: rng.normal(size=n),
    "lognormal": lambda rng, n: np.exp(4 * rng.normal(size=n)),
    "negative": lambda rng, n: -np.abs(rng.normal(size=n)),
    "ascending": lambda rng, n: np.sort(rng.normal(size=n)),
    "descending": lambda rng, n: np.sort(rng.normal(size=n))[::-1],
    "huge_range": lambda rng, n: rng.choice([-1, 1], n) * 10 ** rng.uniform(-44, 38, n),
    "heavy_ties": lambda rng, n: rng.integers(-2, 3, n),
    "all_equal": lambda rng, n: np.full(n, 0.25),
    "zeros_of_both_signs": lambda rng, n: rng.choice([0.0, -0.0], n),
    "subnormal": lambda rng, n: rng.integers(-9, 10, n) * SUBNORMAL,
    "infinities": lambda rng, n: rng.choice([-np.inf, -1, 0, 1, np.inf], n),
    "neighbouring_floats": lambda rng, n: np.float32(1) + rng.integers(0, 9, n) * np.finfo(np.float32).eps,
    "one_outlier": lambda rng, n: np.where(np.arange(n) == n // 2, 1e30, 1e-30),
}

keep_highest = jax.jit(lambda scores, counts, within=None: sm.keep_highest(scores, counts, within))


def draw(distribution, shape, seed=0):
    rng = np.random.default_rng([seed, *shape])
    return DISTRIBUTIONS[distribution](rng, int(np.prod(shape))).astype(np.float32).reshape(shape)


def traced(counts):
    return {name: np.int32(count) for name, count in counts.items()}


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_count_highest_are_kept_and_of_equal_scores_the_lowest_flat_index_loses(shape, distribution):
    scores = {"layer": draw(distribution, shape)}
    size = scores["layer"].size
    for count in {min(1, size), max(size - 1, 0), *(sm.keep_count(density, size) for density in DENSITIES)}:
        masks = keep_highest(scores, traced({"layer": count}))
        chex.assert_trees_all_equal_shapes_and_dtypes(masks, scores)
        chex.assert_trees_all_equal(masks, oracles.highest_in_each(scores, {"layer": count}))


def test_some_shapes_are_sampled_whole_and_some_thinly():
    sizes = [int(np.prod(shape)) for shape in SHAPES]
    assert min(sizes) < SAMPLE and max(sizes) > 100 * SAMPLE


LAYERS = {
    "a": ("all_equal", (13, 11)),
    "b": ("normal", (3, 3, 2, 5)),
    "c": ("uniform", (0,)),
    "d": ("heavy_ties", (512, 100)),
    "e": ("huge_range", (7,)),
    "f": ("lognormal", (5, 5, 40, 70)),
    "g": ("infinities", (1,)),
    "h": ("normal", (700, 500)),  # not packed with the others: it is large
    "i": ("lognormal", (ROW,)),
    "j": ("heavy_ties", (ROW + 1,)),
}


@pytest.mark.parametrize("turn", range(5))
def test_layers_searched_together_get_the_masks_they_get_alone(turn):
    """Layers that close early, late, tied, clean or empty share each pass; densities go round the layers."""
    scores = {name: draw(*layer, seed=turn) for name, layer in LAYERS.items()}
    assert scores["d"].size <= SMALL < scores["h"].size
    counts = {name: sm.keep_count(DENSITIES[(turn + i) % 5], scores[name].size) for i, name in enumerate(scores)}
    masks = keep_highest({**scores, "not prunable": None}, traced(counts))
    assert masks.pop("not prunable") is None
    chex.assert_trees_all_equal(masks, oracles.highest_in_each(scores, counts))


def test_many_layers_of_one_shape_get_the_masks_they_get_alone():
    kinds = list(DISTRIBUTIONS)
    scores = {f"{shape}{i}": draw(kind, shape, seed=i) for i, kind in enumerate(kinds) for shape in ((13, 11), (7,))}
    counts = {name: sm.keep_count(DENSITIES[i % 5], scores[name].size) for i, name in enumerate(scores)}
    chex.assert_trees_all_equal(keep_highest(scores, traced(counts)), oracles.highest_in_each(scores, counts))


def test_the_masks_are_the_same_where_jax_makes_64_bits_by_default():
    scores = {f"{kind}{shape}": draw(kind, shape) for kind in DISTRIBUTIONS for shape in ((SAMPLE, SAMPLE), (13, 11))}
    counts = {name: sm.keep_count(0.3, of.size) for name, of in scores.items()}
    with jax.enable_x64(True):
        masks = keep_highest(scores, counts)
    chex.assert_trees_all_equal(masks, oracles.highest_in_each(scores, counts))


def test_the_program_counts_small_layers_together_whatever_their_number_and_shapes():
    def searches(layers):
        scores = {str(i): jnp.ones((13, 11 + i), jnp.float32) for i in range(layers)}
        program = str(jax.make_jaxpr(lambda s: sm.layerwise_masks(s, 0.3))(scores))
        return program.count("dot_general")  # which counts the keys of an array

    assert 0 < searches(2) == searches(20)


@pytest.mark.parametrize("distribution", ("normal", "heavy_ties", "all_equal", "zeros_of_both_signs"))
def test_within_masks_only_what_they_keep_is_chosen_from(distribution):
    shapes = {"a": (13, 11), "b": (3, 3, 2, 5), "c": (512, 200)}
    scores = {name: draw(distribution, shape) for name, shape in shapes.items()}
    rng = np.random.default_rng(1)
    for already in (0.3, 0.7):
        within = {name: (rng.random(shape) < already).astype(np.float32) for name, shape in shapes.items()}
        for density in DENSITIES:
            counts = {name: sm.keep_count(density, int(mask.sum())) for name, mask in within.items()}
            masks = keep_highest(scores, traced(counts), within)
            chex.assert_trees_all_equal(masks, oracles.highest_in_each(scores, counts, within))


def test_layerwise_masks_keep_the_same_share_of_every_layer():
    scores = {name: draw(*LAYERS[name]) for name in "abe"}
    masks = jax.jit(lambda s: sm.layerwise_masks(s, 0.3))(scores)
    counts = {name: sm.keep_count(0.3, s.size) for name, s in scores.items()}
    chex.assert_trees_all_equal(masks, oracles.highest_in_each(scores, counts))


def test_layerwise_masks_take_a_density_for_each_path():
    scores = {"first": {"kernel": draw("normal", (13, 11))}, "last": {"kernel": draw("normal", (7,))}}
    masks = jax.jit(lambda s: sm.layerwise_masks(s, {"first/kernel": 0.7, "last/kernel": 0.3}))(scores)
    chex.assert_trees_all_equal(masks["first"]["kernel"], oracles.highest(scores["first"]["kernel"], 101))
    chex.assert_trees_all_equal(masks["last"]["kernel"], oracles.highest(scores["last"]["kernel"], 3))


@pytest.mark.parametrize("density", DENSITIES)
def test_global_masks_rank_all_layers_as_one_array(density):
    sets = [
        {name: draw(distribution, shape) for name, shape in (("a", (13, 11)), ("b", (0,)), ("c", (30, 5)))}
        for distribution in ("normal", "huge_range", "heavy_ties", "all_equal", "zeros_of_both_signs", "subnormal")
    ]
    masks_of = jax.jit(lambda s: sm.global_masks(s, density))
    for scores in sets:
        count = sm.keep_count(density, sum(s.size for s in scores.values()))
        chex.assert_trees_all_equal(masks_of(scores), oracles.highest_of_all(scores, count))


def test_global_masks_of_a_large_and_a_small_layer_with_ties_across_them():
    masks_of = jax.jit(lambda s: sm.global_masks(s, 0.3))
    for distribution in ("normal", "heavy_ties", "all_equal"):
        scores = {"large": draw(distribution, (300, 300)), "small": draw(distribution, (4, 5))}
        chex.assert_trees_all_equal(masks_of(scores), oracles.highest_of_all(scores, sm.keep_count(0.3, 90_020)))


@pytest.mark.parametrize("dtype", (jnp.bfloat16, jnp.float16))
def test_every_half_precision_number_is_ranked_and_the_masks_keep_the_dtype(dtype):
    patterns = np.random.default_rng(0).permutation(2**16).astype(np.uint16).view(dtype)
    scores = {"all": patterns[~np.isnan(patterns.astype(np.float32))]}
    for density in (0.3, 0.5, 0.7):  # at a half the cut lies among the zeros and the subnormals
        counts = {"all": sm.keep_count(density, scores["all"].size)}
        masks = keep_highest(scores, traced(counts))
        assert masks["all"].dtype == dtype
        chex.assert_trees_all_equal(masks["all"].astype(jnp.float32), oracles.highest(scores["all"], counts["all"]))


def test_counts_stay_exact_above_the_integers_of_float32():
    """More than 2**24 scores, of which an odd number is kept: a float32 would round that."""
    shape, size = (4097, 4097), 4097**2
    ascending = np.arange(size, dtype=np.int32).view(np.float32)  # every score another, by its bits
    for scores, removed in ((ascending, 2), (ascending, size // 2 + 1), (np.ones(size, np.float32), 1236)):
        mask = keep_highest({"": scores.reshape(shape)}, {"": np.int32(size - removed)})[""]
        mask = np.asarray(mask).ravel()
        assert not mask[:removed].any() and mask[removed:].all()


def test_a_ranking_is_refused_exactly_when_its_flat_index_does_not_fit_in_32_bits():
    def ranked(*sizes):
        scores = {str(i): jax.ShapeDtypeStruct((size,), jnp.float32) for i, size in enumerate(sizes)}
        return jax.eval_shape(lambda s: sm.global_masks(s, 0.3), scores)  # traced, nothing is allocated

    assert ranked(2**31 - 2)["0"].shape == (2**31 - 2,)
    for sizes in ((2**31 - 1,), (2**30, 2**30)):
        with pytest.raises(ValueError, match=r"more than 2\*\*31 - 2 scores in one ranking.*'stack in out'"):
            ranked(*sizes)


def test_a_leaf_of_more_than_2_to_the_31_scores_is_ranked_layer_by_layer_as_the_error_advises():
    leaf = jax.ShapeDtypeStruct((48, 8192, 8192), jnp.float32)  # 3.2 thousand million
    layout = sm.describe(None, {"w": leaf}, axes={"w": "stack in out"})
    masks = jax.eval_shape(lambda s: sm.edge_popup(0.5, layout)(s, None), {"w": leaf})
    assert leaf.size > 2**31 and masks["w"].shape == leaf.shape
    with pytest.raises(ValueError, match=r"more than 2\*\*31 - 2 scores in one ranking"):
        jax.eval_shape(lambda s: sm.edge_popup(0.5)(s, None), {"w": leaf})


def test_global_masks_within_masks_choose_from_them_and_count_out_of_all():
    scores = {name: draw("heavy_ties", shape) for name, shape in (("a", (13, 11)), ("b", (30, 5)), ("c", (0,)))}
    rng = np.random.default_rng(1)
    within = {name: (rng.random(s.shape) < 0.7).astype(np.float32) for name, s in scores.items()}
    masks = jax.jit(lambda s, w: sm.global_masks(s, 0.3, w))(scores, within)
    lowest = {name: np.where(within[name], s, -9.0) for name, s in scores.items()}
    chex.assert_trees_all_equal(masks, oracles.highest_of_all(lowest, sm.keep_count(0.3, 13 * 11 + 30 * 5)))


def test_a_fraction_gives_global_masks_an_exact_count():
    scores = {"a": draw("normal", (13, 11)), "b": draw("normal", (30, 5))}
    for count in (100, 293):
        masks = sm.global_masks(scores, Fraction(count, 293))
        assert sum(int(mask.sum()) for mask in masks.values()) == count


@pytest.mark.float32
def test_global_masks_refuse_to_keep_more_than_the_masks_within_or_masks_that_do_not_fit():
    scores, within = {"a": jnp.ones(5), "b": jnp.ones(5)}, {"a": jnp.array([0.0, 1, 0, 1, 0]), "b": jnp.zeros(5)}
    with pytest.raises(ValueError, match="cannot keep 3 of the 2 weights"):
        sm.global_masks(scores, 0.3, within)
    with pytest.raises(ValueError, match="leaves out b"):
        sm.global_masks(scores, 0.3, {"a": within["a"]})
    for count in (-1, 11):
        with pytest.raises(ValueError, match=f"cannot keep {count} of the 10 weights"):
            keep_highest_of_all(scores, count)


N_OF_M = ((0, 4), (2, 4), (4, 4), (1, 2), (3, 8))


class CompiledAndNot(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_n_m_masks_keep_the_n_highest_of_every_m(self):
        scores = {"a": draw("heavy_ties", (16, 3)), "b": None, "c": draw("normal", (2, 3, 8, 5))}
        for n, m in N_OF_M:
            masks = self.variant(lambda s, n=n, m=m: sm.n_m_masks(s, n, m, -2))(scores)
            assert masks["b"] is None
            for name in "ac":
                rows = np.moveaxis(scores[name], -2, -1)
                expected = np.stack([oracles.highest(row, n) for row in rows.reshape(-1, m)]).reshape(rows.shape)
                chex.assert_trees_all_equal(masks[name], np.moveaxis(expected, -1, -2))

    @chex.variants(with_jit=True, without_jit=True)
    def test_masks_do_not_depend_on_compilation(self):
        scores = {"a": draw("heavy_ties", (13, 11)), "b": None, "c": draw("normal", (7,))}
        masks = self.variant(lambda s: sm.keep_highest(s, {"a": 43, "c": 5}))(scores)
        chex.assert_trees_all_equal(masks["a"], oracles.highest(scores["a"], 43))
        chex.assert_trees_all_equal(masks["c"], oracles.highest(scores["c"], 5))

    @chex.variants(with_jit=True, without_jit=True)
    def test_the_gradient_of_top_k_mask_is_the_cotangent_itself(self):
        scores, cotangent = draw("heavy_ties", (13, 11)), draw("huge_range", (13, 11))

        def pulled_back(scores, cotangent):
            mask, pull = jax.vjp(lambda s: sm.top_k_mask(s, 0.3), scores)
            return mask, pull(cotangent)[0]

        mask, gradient = self.variant(pulled_back)(scores, cotangent)
        chex.assert_trees_all_equal(mask, oracles.highest(scores, sm.keep_count(0.3, scores.size)))
        chex.assert_trees_all_equal(gradient, cotangent)


def test_two_of_four_by_hand_and_of_equal_scores_the_lowest_index_loses():
    rows = np.array([[3, -1, 2, 0, 5, 5, 5, 5], [-3, -1, -2, -4, 0, 1, -0.0, 0]], np.float32)
    expected = np.array([[1, 0, 1, 0, 0, 0, 1, 1], [0, 1, 1, 0, 0, 1, 0, 1]], np.float32)
    for axis in (1, -1):
        chex.assert_trees_all_equal(sm.n_m_masks({"": rows}, 2, 4, axis)[""], expected)
    chex.assert_trees_all_equal(sm.n_m_masks({"": rows.T}, 2, 4, 0)[""], expected.T)


@pytest.mark.float32
def test_n_m_masks_take_an_axis_for_each_path_and_keep_the_dtype():
    scores = {"a": jnp.arange(8, dtype=jnp.bfloat16).reshape(2, 4), "b": jnp.arange(8.0).reshape(2, 4)}
    masks = sm.n_m_masks(scores, 1, 2, {"a": 0, "b": 1})
    assert masks["a"].dtype == jnp.bfloat16
    assert masks["a"].tolist() == [[0, 0, 0, 0], [1, 1, 1, 1]]
    assert masks["b"].tolist() == [[0, 1, 0, 1], [0, 1, 0, 1]]


@pytest.mark.parametrize("n_m", ((-1, 4), (5, 4), (0, 0)))
def test_n_of_m_out_of_range_is_refused(n_m):
    with pytest.raises(ValueError, match="0 <= n <= m"):
        sm.n_m_masks({"layer": jnp.ones(8)}, *n_m, 0)


@pytest.mark.float32
@pytest.mark.parametrize("axis", (0, 2, -3))
def test_an_axis_that_is_not_there_or_that_m_does_not_divide_is_refused(axis):
    with pytest.raises(ValueError, match=rf"'layer' \(6, 4\) has no axis {axis} whose size 4 divides"):
        sm.n_m_masks({"layer": jnp.ones((6, 4))}, 2, 4, axis)


def test_unit_scores_are_the_mean_over_what_is_kept_of_each_output_unit():
    scores = {"dense": np.array([[1, 2, 3], [3, 6, 5]], np.float32), "conv": np.arange(8.0, dtype=np.float32)}
    scores["conv"] = scores["conv"].reshape(2, 1, 2, 2)
    within = {"dense": np.array([[1, 1, 0], [1, 0, 0]], np.float32), "conv": np.ones((2, 1, 2, 2), np.float32)}
    means = unit_scores(scores)
    assert means["dense"].tolist() == [[2, 4, 4]] and means["conv"].tolist() == [[[[3, 4]]]]
    assert unit_scores(scores, within)["dense"].tolist() == [[2, 2, 0]]
    assert unit_masks(within)["dense"].tolist() == [[1, 1, 0]]


def test_random_masks_keep_exactly_their_counts_in_the_weights_dtypes():
    weights = {"a": jnp.ones((70, 30), jnp.bfloat16), "c": jnp.ones((7, 3)), "bias": jnp.ones(3)}
    masks = sm.random_masks(jax.random.key(0), weights, {"a": 0.3, "c": 0.7})
    assert masks["bias"] is None and masks["a"].dtype == jnp.bfloat16
    assert int(masks["a"].astype(jnp.float32).sum()) == 630 and int(masks["c"].sum()) == 15
    chex.assert_trees_all_equal(sm.random_masks(jax.random.key(0), weights, {"a": 0.3, "c": 0.7}), masks)


def test_layers_of_equal_shape_get_different_random_masks_and_a_further_layer_changes_none():
    draw_masks = jax.jit(lambda key, weights: sm.random_masks(key, weights, 0.3))
    two = draw_masks(jax.random.key(0), {"c": jnp.ones((40, 30)), "d": jnp.ones((40, 30))})
    three = draw_masks(jax.random.key(0), {"a": jnp.ones((5, 4)), "c": jnp.ones((40, 30)), "d": jnp.ones((40, 30))})
    other = draw_masks(jax.random.key(1), {"c": jnp.ones((40, 30)), "d": jnp.ones((40, 30))})
    chex.assert_trees_all_equal({name: three[name] for name in "cd"}, two)
    for one, another in ((two["c"], two["d"]), (two["c"], other["c"])):
        assert abs(float((one * another).mean()) - 0.3**2) < 0.03  # as often both as chance has it


def test_random_masks_refuse_densities_that_do_not_fit():
    weights = {"a": jnp.ones((4, 3)), "c": jnp.ones((4, 3))}
    with pytest.raises(ValueError, match="leaves out c"):
        sm.random_masks(jax.random.key(0), weights, {"a": 0.3})
    with pytest.raises(ValueError, match=r"density must be a number in \[0, 1\]"):
        sm.random_masks(jax.random.key(0), weights, 1.1)
    with pytest.raises(ValueError, match="matches no leaf"):
        sm.random_masks(jax.random.key(0), {"bias": jnp.ones(3)}, 0.3)


def test_a_minimum_works_under_jit_and_with_bool_masks_within():
    scores = {name: draw("normal", shape, seed=i) for i, (name, shape) in enumerate({"a": (20, 30), "b": (7,)}.items())}
    expected = sm.global_masks(scores, 0.1, minimum=5)
    assert expected["b"].sum() >= 5
    chex.assert_trees_all_equal(jax.jit(lambda s: sm.global_masks(s, 0.1, minimum=5))(scores), expected)
    by_count = jax.jit(lambda s, count: keep_highest_of_all(s, count, minimum=5))
    chex.assert_trees_all_equal(by_count(scores, sm.keep_count(0.1, 607)), expected)
    within = {name: np.arange(score.size).reshape(score.shape) % 3 > 0 for name, score in scores.items()}
    numbers = {name: mask.astype(np.float32) for name, mask in within.items()}
    of_numbers = keep_highest_of_all(scores, 60, numbers, minimum=3)
    chex.assert_trees_all_equal(keep_highest_of_all(scores, 60, within, minimum=3), of_numbers)
    chex.assert_trees_all_equal(jax.jit(lambda s: keep_highest_of_all(s, 60, within, minimum=3))(scores), of_numbers)
    with pytest.raises(ValueError, match="outside of jit"):
        jax.jit(lambda s, w: keep_highest_of_all(s, 60, w, minimum=3))(scores, within)


def test_top_k_mask_ranks_signed_scores_not_their_magnitudes():
    mask = jax.jit(lambda s: sm.top_k_mask(s, 0.7))(np.array([-9.0, 0.5, 2.0, -0.1, 1.0], np.float32))
    chex.assert_trees_all_equal(mask, np.array([0, 1, 1, 1, 1], np.float32))


def test_the_straight_through_mask_is_exactly_the_mask_where_m_plus_s_minus_s_would_round():
    scores = jnp.array([0.1, 0.3, 0.7], jnp.float32)
    mask = jax.jit(lambda s: straight_through(s, lambda s: sm.keep_highest(s, {"": 2})))(scores)
    chex.assert_trees_all_equal(mask, np.array([0, 1, 1], np.float32))
    rounded = np.float32(1) + np.asarray(scores) - np.asarray(scores)
    assert (rounded != 1).any()  # so the values above can tell one from the other


def test_vmap_over_networks_gives_each_its_own_mask():
    scores = draw("heavy_ties", (4, 30))
    masks = jax.jit(jax.vmap(lambda s: sm.top_k_mask(s, 0.3)))(scores)
    chex.assert_trees_all_equal(masks, np.stack([oracles.highest(row, 9) for row in scores]))


def test_vmap_over_networks_of_small_and_large_layers_with_ties():
    shapes = {"small": (30,), "also small": (ROW + 1,), "large": (300, 240)}
    scores = {name: draw("heavy_ties", (3, *shape)) for name, shape in shapes.items()}
    assert scores["large"][0].size > SMALL
    masks = jax.jit(jax.vmap(lambda s: sm.layerwise_masks(s, 0.3)))(scores)
    for network in range(3):
        own = {name: layer[network] for name, layer in scores.items()}
        counts = {name: sm.keep_count(0.3, layer.size) for name, layer in own.items()}
        got = {name: layer[network] for name, layer in masks.items()}
        chex.assert_trees_all_equal(got, oracles.highest_in_each(own, counts))


@pytest.mark.parametrize("nans", (10, 4))
@pytest.mark.parametrize("bits", (0x7FFFFFFF, 0x7FC00000, 0x7F800001))
def test_under_jit_nan_ranks_above_all_numbers_and_a_negative_one_below_whatever_its_bits(bits, nans):
    """A GPU makes NaN of other bits than a CPU, and the search must end: no key is the highest int32."""
    numbers = np.arange(10 - nans, dtype=np.float32)
    for sign, expected in ((0, nans), (1 << 31, 0)):
        some = np.full(nans, bits | sign, np.uint32).view(np.float32)
        layer = np.concatenate([numbers, some])
        for names in (("alone",), ("in", "a pack")):
            masks = keep_highest(dict.fromkeys(names, layer), traced(dict.fromkeys(names, 5)))
            for mask in masks.values():
                assert mask.sum() == 5 and mask[-nans:].sum() == max(min(expected, 5), 5 - len(numbers))


def test_other_scores_and_other_counts_compile_nothing_new():
    step = jax.jit(chex.assert_max_traces(lambda s, counts: sm.keep_highest(s, counts), n=1))
    for distribution, count in (("normal", 3), ("all_equal", 0), ("infinities", 90), ("subnormal", 17)):
        scores = {"layer": draw(distribution, (10, 9))}
        masks = step(scores, {"layer": np.int32(count)})
        chex.assert_trees_all_equal(masks, oracles.highest_in_each(scores, {"layer": count}))
    assert step._cache_size() == 1


@pytest.mark.float32
@pytest.mark.parametrize("select", (sm.keep_highest, sm.layerwise_masks, sm.global_masks))
def test_nan_scores_are_refused_and_the_layer_is_named(select):
    scores = {"good": jnp.zeros(3), "bad": jnp.array([0.0, jnp.nan])}
    with pytest.raises(ValueError, match=r"'bad'.*NaN"):
        select(scores, {"good": 1, "bad": 1} if select is sm.keep_highest else 0.3)


@pytest.mark.parametrize("dtype", (np.int32, np.float64, bool))
@pytest.mark.parametrize("select", (sm.keep_highest, sm.layerwise_masks, sm.global_masks))
def test_scores_that_are_not_floats_of_at_most_32_bits_are_refused(select, dtype):
    with pytest.raises(TypeError, match=f"'layer' has {np.dtype(dtype).name}"):
        select({"layer": np.ones(5, dtype)}, {"layer": 1} if select is sm.keep_highest else 0.3)


@pytest.mark.float32
@pytest.mark.parametrize("count", (-1, 6))
def test_a_count_out_of_range_is_refused(count):
    with pytest.raises(ValueError, match=f"cannot keep {count} of the 5 weights .* 'layer'"):
        sm.keep_highest({"layer": jnp.ones(5)}, {"layer": count})


@pytest.mark.float32
def test_more_than_the_masks_within_keep_is_refused():
    with pytest.raises(ValueError, match="cannot keep 3 of the 2 weights"):
        sm.keep_highest({"layer": jnp.ones(5)}, {"layer": 3}, {"layer": jnp.array([0.0, 1, 0, 1, 0])})


@pytest.mark.parametrize(
    "within", ({"a": np.ones(5, np.float32)}, {"a": np.ones(5, np.float32), "B": np.ones(5, np.float32)})
)
def test_within_must_name_every_leaf_and_nothing_else(within):
    scores = {"a": np.ones(5, np.float32), "b": np.ones(5, np.float32)}
    with pytest.raises(ValueError, match=r"[bB]"):
        sm.keep_highest(scores, {"a": 3, "b": 3}, within)


def test_within_must_have_the_shape_of_its_scores():
    with pytest.raises(ValueError, match="layer"):
        sm.keep_highest({"layer": np.ones(5, np.float32)}, {"layer": 1}, {"layer": np.ones((), np.float32)})


@pytest.mark.float32
def test_counts_must_name_every_leaf_and_nothing_else():
    scores = {"Dense_0": {"kernel": jnp.ones(5)}, "Dense_1": {"kernel": jnp.ones(5)}}
    with pytest.raises(ValueError, match=r"'Dense_0/kernl'.*did you mean 'Dense_0/kernel'"):
        sm.keep_highest(scores, {"Dense_0/kernl": 3, "Dense_1/kernel": 3})
    with pytest.raises(ValueError, match=r"leaves out Dense_1/kernel"):
        sm.keep_highest(scores, {"Dense_0/kernel": 3})


@pytest.mark.parametrize("density", (-0.1, 1.1, float("nan"), "most"))
@pytest.mark.parametrize("select", (sm.layerwise_masks, sm.global_masks))
def test_a_density_outside_0_to_1_is_refused(select, density):
    with pytest.raises(ValueError, match=r"density must be a number in \[0, 1\]"):
        select({"layer": jnp.ones(5)}, density)


ON_EIGHT_DEVICES = """
    import math, re
    import jax, numpy as np, oracles
    import supermask_jax as sm
    from supermask_jax.threshold import SAMPLE
    from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

    assert jax.device_count() == 8
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rng = np.random.default_rng(0)
    scores = {
        "sampled": rng.normal(size=(1024, 72)).astype(np.float32),
        "tied": rng.integers(-2, 3, (64, 6, 5)).astype(np.float32),
        "plain": rng.normal(size=(64, 6)).astype(np.float32),
    }
    stacks = {name: rng.normal(size=(8, 96, 16)).astype(np.float32) for name in ("Dense_0/kernel", "Dense_1/kernel")}
    split = {"Dense_0/kernel": P("data"), "Dense_1/kernel": P(None, "data")}
    counts = {name: sm.keep_count(0.3, s.size) for name, s in scores.items()}
    total = sum(s.size for s in scores.values())
    of_each_layer = {
        name: np.stack([oracles.highest(layer, sm.keep_count(0.3, layer.size)) for layer in s])
        for name, s in stacks.items()
    }
    of_each = oracles.highest_in_each(scores, counts)
    of_all = oracles.highest_of_all(scores, sm.keep_count(0.7, total))
    for name, f, scores, layers, split, expected in (
        ("layerwise", lambda s: sm.layerwise_masks(s, 0.3), scores, 1, P("data"), of_each),
        ("global", lambda s: sm.global_masks(s, 0.7), scores, 1, P("data"), of_all),
        ("stacks", lambda s: sm.layerwise_masks(s, 0.3), stacks, 8, split, of_each_layer),
    ):
        sharded = jax.device_put(scores, jax.tree.map(lambda spec: NamedSharding(mesh, spec), split))
        compiled = jax.jit(f).lower(sharded).compile()
        program = compiled.as_text()
        assert "all-reduce" in program, f"{name}: not sharded at all"
        gathered = re.findall(r"= \\w+\\[([\\d,]*)\\]\\S* all-gather", program)
        sizes = [math.prod(int(n) for n in shape.split(",") if n) for shape in gathered]
        assert max(sizes, default=0) <= 2 * SAMPLE * layers, f"{name}: gathers more than a sample: {gathered}"
        masks = compiled(sharded)
        for leaf in scores:
            assert len(masks[leaf].sharding.device_set) == 8
            np.testing.assert_array_equal(np.asarray(masks[leaf]), expected[leaf], err_msg=f"{name} {leaf}")
    print("all equal")
"""


@pytest.mark.usefixtures("quick_processes")
def test_scores_sharded_over_devices_give_the_same_masks_and_are_never_gathered():
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count=8 {os.environ['XLA_FLAGS']}",
        "PJRT_NPROC": "32",  # with a thread per core, eight devices on few cores can wait for each other forever
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)]),
    }
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(ON_EIGHT_DEVICES)],
        env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0 and "all equal" in done.stdout, done.stderr[-3000:]
