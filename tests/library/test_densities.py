"""A density becomes a count in one place, exactly, on the decimal that was written; how layers share a density."""

import json
import math
from decimal import Decimal
from fractions import Fraction
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import supermask_jax as sm
from supermask_jax import densities
from supermask_jax.trees import prunable

COUNTS = json.loads((Path(__file__).parents[1] / "golden" / "a_getsubnet_counts.json").read_text())


@pytest.mark.parametrize(
    ("density", "n", "count"),
    (
        (0.0, 10, 0),
        (1.0, 10, 10),
        (0, 10, 0),
        (1, 10, 10),
        (0.3, 0, 0),
        (0.3, 1, 1),
        (0.3, 7, 3),  # 2.1 is rounded up
        (0.7, 7, 5),  # 4.9
        (1e-9, 7, 1),  # any density above 0 keeps something
        (0.999999, 7, 7),
        (0.1, 30, 3),  # the double next to 0.1 lies above it, and its product is 3.0000000000000001665
        (0.3, 10, 3),  # the double next to 0.3 lies below it
        (0.7, 10, 7),
        (0.07, 100, 7),  # 0.07 * 100 is 7.000000000000001 in floating point
        (0.55, 100, 55),  # 55.00000000000001
        (0.29, 100, 29),  # 28.999999999999996
        (0.8, 5, 4),
        (0.1, 10**15, 10**14),
        (0.3, 33_554_432, 10_066_330),  # 10066329.6
    ),
)
def test_keep_count_is_the_ceiling_of_the_decimal_product(density, n, count):
    assert sm.keep_count(density, n) == count
    assert type(sm.keep_count(density, n)) is int


@pytest.mark.parametrize(
    "tenth",
    (np.float16(0.1), np.float32(0.1), np.float64(0.1), jnp.float32(0.1), Fraction(1, 10), Decimal("0.1"), 1e-1),
    ids=lambda tenth: type(tenth).__name__,
)
def test_one_tenth_is_one_tenth_in_every_type_of_number(tenth):
    assert sm.keep_count(tenth, 30) == 3
    assert sm.keep_count(tenth, np.int64(30)) == 3


def test_a_fraction_is_taken_exactly():
    assert sm.keep_count(Fraction(1, 3), 300) == 100
    assert sm.keep_count(Fraction(1, 3), 301) == 101
    assert sm.keep_count(1 / 3, 300) == 100  # the shortest decimal of the double, 0.333..., lies below a third


@pytest.mark.parametrize("n", (1, 7, 100, 999))
def test_keep_count_rises_with_the_density_and_together_with_the_rest_makes_the_whole(n):
    counts = [sm.keep_count(Fraction(i, 100), n) for i in range(101)]
    assert counts == sorted(counts) and counts[0] == 0 and counts[-1] == n
    for i, count in enumerate(counts):
        assert count + math.floor(Fraction(100 - i, 100) * n) == n


@pytest.mark.parametrize(
    "density", (-0.1, -1e-12, 1.0000001, 30, float("nan"), float("inf"), "most", None, True, [0.3])
)
def test_what_is_not_a_number_from_0_to_1_is_refused(density):
    with pytest.raises(ValueError, match=r"density must be a number in \[0, 1\] \(the fraction kept\), got"):
        sm.keep_count(density, 10)


@pytest.mark.parametrize("n", (-1, 2.5))
def test_what_is_not_a_whole_number_of_weights_is_refused(n):
    with pytest.raises(ValueError, match=f"whole number >= 0, got {n}"):
        sm.keep_count(0.3, n)


# Where hidden-networks keeps another number of weights than we do: (density, n, theirs, ours). Its count is
# n - int((1 - k) * n) in double precision. 1 - 0.8 is 0.19999999999999996 and 1 - 0.9 is 0.09999999999999998: the
# product falls below the whole number that it stands for, int() drops to the one below, and one weight too many is
# kept. Ours is ceil(k * n) on the decimal k. Where no such slip happens the two are equal.
DIFFERENT = (
    (0.8, 5, 5, 4),
    (0.8, 10, 9, 8),
    (0.8, 15, 13, 12),
    (0.8, 20, 17, 16),
    (0.8, 25, 21, 20),
    (0.8, 30, 25, 24),
    (0.8, 35, 29, 28),
    (0.8, 40, 33, 32),
    (0.8, 100, 81, 80),
    (0.8, 250, 201, 200),
    (0.8, 1000, 801, 800),
    (0.8, 2560, 2049, 2048),
    (0.9, 10, 10, 9),
    (0.9, 20, 19, 18),
    (0.9, 30, 28, 27),
    (0.9, 40, 37, 36),
    (0.9, 100, 91, 90),
    (0.9, 250, 226, 225),
    (0.9, 1000, 901, 900),
    (0.9, 2560, 2305, 2304),
)


def test_our_count_differs_from_hidden_networks_where_double_precision_slips_and_nowhere_else():
    different = [(k, n, ones, sm.keep_count(k, n)) for n, k, ones in COUNTS["rows"] if sm.keep_count(k, n) != ones]
    assert tuple(sorted(different)) == DIFFERENT
    for k, n, theirs, ours in different:
        assert n - int((1 - k) * n) == theirs == ours + 1
        assert Fraction(str(k)) * n == ours  # the product is whole: there is nothing to round


def test_the_golden_table_holds_densities_on_both_sides_of_a_half():
    assert len(COUNTS["rows"]) == 870
    assert {0.0, 0.01, 0.3, 0.7, 1.0} <= {k for _, k, _ in COUNTS["rows"]}


# A small convolutional network: sizes 27, 432, 768 and 160; 1387 together.
SHAPES = {"conv1": (3, 3, 1, 3), "conv2": (3, 3, 3, 16), "dense": (16, 48), "out": (16, 10)}
RULES = {
    "uniform": densities.uniform,
    "uniform_plus": partial(densities.uniform_plus, first="conv1", last="out"),
    "er": densities.er,
    "erk": densities.erk,
    "erk_plus": partial(densities.erk_plus, last="out"),
}
each_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)


def test_er_and_erk_are_the_sums_of_the_axes_over_their_products():
    shapes = {"conv": (2, 2, 4, 6), "dense": (10, 12)}  # sizes 96 and 120
    er, erk = densities.er(shapes, 0.3), densities.erk(shapes, 0.3)
    assert er == pytest.approx({"conv": 64.8 * (10 / 24) / 62, "dense": 64.8 * (22 / 120) / 62})  # 96 * 10/24 + 22
    assert erk == pytest.approx({"conv": 64.8 * (14 / 96) / 36, "dense": 64.8 * (22 / 120) / 36})  # 14 + 22
    assert densities.er({"bias": (4,), **shapes}, 0.0) == {"bias": 0.0, "conv": 0.0, "dense": 0.0}


def test_a_layer_that_would_pass_1_is_dense_and_the_rest_makes_up_for_it():
    shapes = {"thin": (1, 10), "wide": (10, 10), "wider": (10, 40)}  # sums 11, 20, 50; sizes 10, 100, 400
    assert 0.7 * 510 * 11 / 81 > 10  # so thin is dense, and 347 are left for sums of 70
    assert 347 * 20 / 70 < 100
    assert densities.erk(shapes, 0.7) == pytest.approx({"thin": 1, "wide": 347 * 20 / 7000, "wider": 347 * 50 / 28000})
    at_09 = densities.erk(shapes, 0.9)  # 449 * 20 / 70 passes 100 as well
    assert at_09 == pytest.approx({"thin": 1, "wide": 1, "wider": 349 / 400})


@pytest.mark.parametrize("density", (0, 0.01, 0.3, 0.7, 0.999, 1))
@pytest.mark.parametrize("name", ("uniform", "er", "erk"))
def test_all_layers_together_keep_the_density(name, density):
    shares = RULES[name](SHAPES, density)
    assert list(shares) == list(SHAPES) and all(0 <= share <= 1 for share in shares.values())
    assert densities.overall(SHAPES, shares) == pytest.approx(density, rel=1e-12)
    if density in (0, 1):
        assert shares == dict.fromkeys(SHAPES, density)


def test_no_floating_point_slip_makes_a_layer_keep_a_weight_too_many():
    shapes = {"a": (10, 20), "b": (20, 10)}
    assert densities.er(shapes, 0.3) == {"a": 0.3, "b": 0.3}
    assert densities.uniform(shapes, np.float32(0.1)) == {"a": 0.1, "b": 0.1}


def test_uniform_plus_keeps_the_first_layer_dense_and_a_fifth_of_the_last():
    shares = densities.uniform_plus(SHAPES, 0.1, first="conv1", last="out")
    others = (138.7 - 27 - 32) / 1387
    assert shares == pytest.approx({"conv1": 1, "conv2": others, "dense": others, "out": 0.2})
    assert 0.08 < densities.overall(SHAPES, shares) < 0.1
    shares = densities.uniform_plus(SHAPES, 0.3, first="conv1", last="out")
    assert shares == {"conv1": 1, "conv2": 0.3, "dense": 0.3, "out": 0.3}
    assert densities.overall(SHAPES, shares) == pytest.approx(0.3 + 0.7 * 27 / 1387)
    assert set(densities.uniform_plus(SHAPES, 1, first="conv1", last="out").values()) == {1.0}


def test_erk_plus_is_erk_beside_the_last_layer():
    for density, last_density in ((0.3, 1.0), (0.3, 0.7), (0.7, 0.3)):
        shares = densities.erk_plus(SHAPES, density, "out", last_density)
        assert shares.pop("out") == last_density
        others = {path: SHAPES[path] for path in shares}
        assert shares == densities.erk(
            others, (Fraction(str(density)) * 1387 - Fraction(str(last_density)) * 160) / 1227
        )
        whole = densities.overall(SHAPES, {**shares, "out": last_density})
        assert whole == pytest.approx(density, rel=1e-12)
    assert densities.erk_plus({"out": (4, 5)}, 0.3, "out", 0.3) == {"out": 0.3}


@pytest.mark.parametrize(
    ("rule", "bound", "named", "infeasible"),
    [
        (RULES["erk_plus"], "least", 0.115357, 0.1),  # 160 / 1387
        (partial(RULES["erk_plus"], last_density=0.3), "most", 0.919250, 0.95),  # 1 - 0.7 * 160 / 1387
        (RULES["uniform_plus"], "least", 0.042538, 0),  # (27 + 32) / 1387
        (partial(densities.uniform_plus, first="dense", last="out"), "least", 0.2, 0.19),  # 800 / 1387 passes a fifth
    ],
    ids=("erk_plus", "erk_plus_above", "uniform_plus", "uniform_plus_big_first"),
)
def test_what_the_ends_alone_pass_is_refused_and_the_density_that_is_named_is_feasible(rule, bound, named, infeasible):
    for density in (infeasible, named - 2e-6 if bound == "least" else named + 2e-6):
        with pytest.raises(ValueError, match=f"at {bound} {named}"):
            rule(SHAPES, density)
    assert all(0 <= share <= 1 for share in rule(SHAPES, named).values())


@each_rule
def test_densities_out_of_range_and_layers_without_weights_are_refused(rule):
    for density in (-0.1, 1.1, float("nan"), True):
        with pytest.raises(ValueError, match="density must be a number"):
            rule(SHAPES, density)
    with pytest.raises(ValueError, match="there is no layer"):
        rule({}, 0.3)
    for shape in ((), (3, 0)):
        with pytest.raises(ValueError, match="'conv2' has the shape"):
            rule({**SHAPES, "conv2": shape}, 0.3)


def test_first_and_last_must_be_paths_of_layers():
    with pytest.raises(ValueError, match="last='fc' is not the path of a layer; there are: conv1, conv2, dense, out"):
        densities.erk_plus(SHAPES, 0.3, last="fc")
    with pytest.raises(ValueError, match="last='fc' is not"):
        densities.uniform_plus(SHAPES, 0.3, first="conv1", last="fc")
    with pytest.raises(ValueError, match="first='conv' is not"):
        densities.uniform_plus(SHAPES, 0.3, first="conv", last="out")
    with pytest.raises(ValueError, match="must be two layers"):
        densities.uniform_plus(SHAPES, 0.3, first="out", last="out")
    with pytest.raises(ValueError, match="must name the layers conv1, conv2, dense, out; got out"):
        densities.overall(SHAPES, {"out": 0.3})


def test_random_masks_take_layer_densities_and_keep_the_count_of_each():
    weights = {path: jnp.zeros(shape) for path, shape in SHAPES.items()}
    shares = densities.erk(prunable(weights), 0.3)
    masks = sm.random_masks(jax.random.key(0), weights, shares)
    kept = {path: sm.keep_count(share, math.prod(SHAPES[path])) for path, share in shares.items()}
    assert {path: int(mask.sum()) for path, mask in masks.items()} == kept
    assert 0 <= sm.density(masks) - densities.overall(SHAPES, shares) <= len(SHAPES) / 1387
