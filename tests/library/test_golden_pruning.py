"""Pruning by published code on the same weights; the `meta` in each golden file says which code."""

import json
from fractions import Fraction
from pathlib import Path

import chex
import jax
import numpy as np
import pytest

import supermask_jax as sm
from supermask_jax import lottery, saliency
from supermask_jax.trees import apply_masks

GOLDEN = Path(__file__).parents[1] / "golden"


def load(name):
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        loaded = dict(arrays)
    return loaded, json.loads(str(loaded.pop("meta")))


LOTTERY, LOTTERY_META = load("f_lth_magnitude")
ZHOU, ZHOU_META = load("g_criteria")
HIDDEN, SECOND, OUTPUT = LOTTERY_META["layers"]
KERNELS = ("0", "2", "4")


def lottery_masks(tag, layers=(HIDDEN, SECOND, OUTPUT)):
    return {layer: LOTTERY[f"{tag}/{layer}"].astype(np.float32) for layer in layers}


def lottery_weights(number):
    return {layer: LOTTERY[f"W{number}/{layer}"] for layer in LOTTERY_META["layers"]}


def ones(masks):
    return {path: int(mask.sum()) for path, mask in masks.items()}


def removed(before, after):
    """Their own fractions: with these our counts are theirs."""
    left, kept = ones(before), ones(after)
    return {path: Fraction(left[path] - kept[path], left[path]) for path in left}


def rounds_of(tag, layers=(HIDDEN, SECOND, OUTPUT)):
    """(weights, masks before, masks after) of every round."""
    before = {layer: np.ones_like(LOTTERY[f"W1/{layer}"]) for layer in layers}
    for number in (1, 2, 3):
        after = lottery_masks(f"{tag}/round{number}", layers)
        yield {layer: LOTTERY[f"W{number}/{layer}"] for layer in layers}, before, after
        before = after


@pytest.mark.parametrize(
    ("tag", "layers"),
    [("global_0.2", (HIDDEN, SECOND, OUTPUT)), ("global_0.2_ignore_fc.weight", (HIDDEN, SECOND))],
    ids=("all", "but_the_output"),
)
def test_global_magnitude_pruning_removes_what_open_lth_removes(tag, layers):
    for weights, before, after in rounds_of(tag, layers):
        left, kept = sum(ones(before).values()), sum(ones(after).values())
        masks = lottery.prune(weights, before, Fraction(left - kept, left), scope="global")
        chex.assert_trees_all_equal(jax.device_get(masks), after)


def test_layerwise_magnitude_pruning_removes_what_the_lottery_ticket_code_removes():
    for weights, before, after in rounds_of("layerwise_0.2_0.1"):
        masks = lottery.prune(weights, before, removed(before, after), scope="layer")
        chex.assert_trees_all_equal(jax.device_get(masks), after)


@pytest.mark.parametrize("density", ("0.1", "0.5", "0.8"))
def test_global_magnitude_masks_equal_random_prunings(density):
    weights, theirs = lottery_weights(1), lottery_masks(f"globalmag_{density}")
    scores = saliency.magnitude(weights)
    size = sum(score.size for score in scores.values())
    masks = sm.global_masks(scores, Fraction(sum(ones(theirs).values()), size))
    chex.assert_trees_all_equal(jax.device_get(masks), theirs)


def zhou_masks(method, number):
    if number == 0:
        return {path: np.ones_like(ZHOU[f"init/{path}"]) for path in KERNELS}
    return {path: ZHOU[f"mask/{method}/r{number}/{path}"].astype(np.float32) for path in KERNELS}


def zhou_weights(when):
    return {path: ZHOU[f"{when}/{path}"] for path in KERNELS}


@pytest.mark.parametrize("case", ZHOU_META["cases"], ids=lambda case: f"{case['method']}-{case['round']}")
def test_each_mask_criterion_removes_what_the_released_code_removes(case):
    """Exactly, but among scores tied at the cut, where the original draws lots: there only their number."""
    method, number = case["method"], case["round"]
    before, theirs = zhou_masks(method, number - 1), zhou_masks(method, number)
    scores = saliency.criterion(method, zhou_weights("init"), zhou_weights("final"), masks=before)
    masks = lottery.prune_by(scores, before, removed(before, theirs), scope="layer")
    assert list(ones(before).values()) == case["kept_before"]
    for i, path in enumerate(KERNELS):
        ambiguous = ZHOU.get(f"ambiguous/{method}/r{number}/{path}", np.zeros(before[path].shape)).astype(bool)
        mask = np.asarray(masks[path])
        assert ambiguous.sum() == case["ambiguous"][i]
        assert mask.sum() == case["ones"][i]
        assert mask[ambiguous].sum() == case["ambiguous_ones"][i]
        np.testing.assert_array_equal(mask[~ambiguous], theirs[path][~ambiguous])


def test_the_golden_criteria_are_all_that_there_are_but_the_random_one():
    assert {case["method"] for case in ZHOU_META["cases"]} == {*saliency.CRITERIA, *saliency.RANKED}
    assert any(np.any(ZHOU[f"final/{path}"] * ZHOU[f"init/{path}"] < 0) for path in KERNELS)


def test_rewinding_is_the_initial_weights_under_the_masks():
    rewound = apply_masks(zhou_weights("init"), zhou_masks("large_final", 1))
    for path in KERNELS:
        np.testing.assert_array_equal(rewound[path], ZHOU[f"rewound/{path}"])


# Where our own count differs: (theirs, weights left, fraction removed, ours, theirs), and why.
COUNTS = [
    # open_lth rounds the number to prune up, as we do the number kept, and removes the threshold itself as well.
    ("global_0.2", 4784, 0.2, 3828, 3826),
    ("global_0.2", 3826, 0.2, 3061, 3059),
    ("global_0.2", 3059, 0.2, 2448, 2446),
    # It takes the number to prune from all weights, also those of the layer that it ignores; we, from those it prunes.
    ("global_0.2_ignore_fc.weight", 4734, 0.2, 3788, 3776),
    ("global_0.2_ignore_fc.weight", 3776, 0.2, 3021, 3009),
    ("global_0.2_ignore_fc.weight", 3009, 0.2, 2408, 2396),
    # The lottery ticket code rounds the number to prune to the nearest, and removes the threshold as well.
    ("layerwise_0.2_0.1", 4704, 0.2, 3764, 3762),
    ("layerwise_0.2_0.1", 30, 0.2, 24, 23),
    ("layerwise_0.2_0.1", 50, 0.1, 45, 44),
    ("layerwise_0.2_0.1", 3762, 0.2, 3010, 3009),
    ("layerwise_0.2_0.1", 23, 0.2, 19, 17),
    ("layerwise_0.2_0.1", 44, 0.1, 40, 39),
    ("layerwise_0.2_0.1", 3009, 0.2, 2408, 2406),
    ("layerwise_0.2_0.1", 17, 0.2, 14, 13),
    ("layerwise_0.2_0.1", 39, 0.1, 36, 34),
    # Random_Pruning rounds the number kept down. (A density of a half leaves nothing to round.)
    ("globalmag_0.1", 4784, 0.9, 479, 478),
    ("globalmag_0.5", 4784, 0.5, 2392, 2392),
    ("globalmag_0.8", 4784, 0.2, 3828, 3827),
    # Zhou et al. round the number to prune down, and in floating point 1 - 0.8 falls short of 0.2.
    ("large_final", 480, 0.2, 384, 385),
    ("large_final", 300, 0.2, 240, 241),
    ("large_final", 150, 0.1, 135, 136),
    ("large_final", 385, 0.2, 308, 309),
    ("large_final", 241, 0.2, 193, 193),
    ("large_final", 136, 0.1, 123, 123),
    # They search one percentile for both magnitudes; what is below it in either is only about the fraction.
    ("large_init_large_final", 480, 0.2, 384, 387),
    ("large_init_large_final", 300, 0.2, 240, 242),
    ("large_init_large_final", 150, 0.1, 135, 137),
    ("large_init_large_final", 387, 0.2, 310, 311),
    ("large_init_large_final", 242, 0.2, 194, 196),
    ("large_init_large_final", 137, 0.1, 124, 125),
    ("small_init_small_final", 480, 0.2, 384, 386),
    ("small_init_small_final", 300, 0.2, 240, 243),
    ("small_init_small_final", 150, 0.1, 135, 138),
    ("small_init_small_final", 386, 0.2, 309, 310),
    ("small_init_small_final", 243, 0.2, 195, 196),
    ("small_init_small_final", 138, 0.1, 125, 127),
]


def golden_counts():
    """(theirs, weights left, weights kept) of all the golden masks."""
    for tag, layers in (("global_0.2", LOTTERY_META["layers"]), ("global_0.2_ignore_fc.weight", (HIDDEN, SECOND))):
        for _, before, after in rounds_of(tag, layers):
            yield tag, sum(ones(before).values()), sum(ones(after).values())
    for _, before, after in rounds_of("layerwise_0.2_0.1"):
        yield from (("layerwise_0.2_0.1", ones(before)[path], ones(after)[path]) for path in before)
    for density in ("0.1", "0.5", "0.8"):
        tag, size = f"globalmag_{density}", sum(mask.size for mask in lottery_weights(1).values())
        yield tag, size, sum(ones(lottery_masks(tag)).values())
    for case in ZHOU_META["cases"]:
        # The criteria that score each weight alone count alike.
        method = case["method"] if case["method"] in saliency.RANKED else "large_final"
        yield from ((method, left, kept) for left, kept in zip(case["kept_before"], case["ones"], strict=True))


def test_where_our_counts_differ_from_theirs():
    assert {(tag, left, theirs) for tag, left, _, _, theirs in COUNTS} == set(golden_counts())
    for _, left, fraction, ours, _ in COUNTS:
        weights = np.arange(5000, dtype=np.float32)
        masks = lottery.prune({"": weights}, {"": (weights < left).astype(np.float32)}, fraction)
        assert ones(masks) == {"": ours}
