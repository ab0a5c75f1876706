"""A density becomes a count in one place, exactly, on the decimal that was written."""

import json
import math
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import supermask_jax as sm

COUNTS = json.loads((Path(__file__).parent / "golden" / "a_getsubnet_counts.json").read_text())


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
