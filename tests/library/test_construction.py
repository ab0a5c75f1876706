"""Networks rebuilt inside random ones by masks: by hand, against all subsets there are, and run as a model."""

from itertools import pairwise

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import supermask_jax as sm
from supermask_jax import construction, models
from supermask_jax.trees import apply_masks, by_path

SHAPES = ((40, 12), (12, 5))


def drawn_target(*shapes, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def rebuilt(target, width, form, seed=0):
    """(weights, masks, the error of each weight: effective minus target, flat)."""
    weights = construction.random_network(jax.random.key(seed), target, width)
    masks = construction.subset_masks(weights, target, form)
    errors = [np.asarray(k) - t for k, t in zip(construction.effective_kernels(weights, masks), target, strict=True)]
    return weights, masks, np.concatenate([error.ravel() for error in errors])


def all_sums(values):
    """The sum of every subset, the slow way."""
    return [sum(v for t, v in enumerate(values) if subset >> t & 1) for subset in range(2 ** len(values))]


def candidates(weights, width, i, j):
    """The products of the weight from i to j, from the first pair's raw kernels."""
    first, second = (np.asarray(weights[name]["kernel"], np.float64) for name in ("Dense_0", "Dense_1"))
    return [max(first[i, n], 0) * second[n, j] for n in range(i * width, (i + 1) * width)]


def test_one_neuron_by_hand():
    """Candidates 0.5 * 0.8, none as u < 0, and 1 * -0.3: the sum 0.1 is nearest to 0.12, but 0 before either alone."""
    weights = {
        "Dense_0": {"kernel": jnp.array([[0.5, -1.0, 1.0]])},
        "Dense_1": {"kernel": jnp.array([[0.8], [9.0], [-0.3]])},
    }
    for target, form, kept, computed in (
        (0.12, "subset-sum", [1, 0, 1], 0.1),
        (0.12, "product", [0, 0, 0], 0.0),
        (0.27, "subset-sum", [1, 0, 0], 0.4),
        (-9.0, "subset-sum", [0, 0, 1], -0.3),
        (-9.0, "product", [0, 0, 1], -0.3),
        (0.0, "subset-sum", [0, 0, 0], 0.0),
    ):
        masks = construction.subset_masks(weights, [jnp.array([[target]])], form)
        assert masks["Dense_0"]["kernel"].tolist() == [[1, 1, 1]]
        assert masks["Dense_1"]["kernel"].ravel().tolist() == kept
        (kernel,) = construction.effective_kernels(weights, masks)
        np.testing.assert_allclose(kernel, [[computed]], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("size", range(9))
def test_the_subset_found_is_the_best_of_all(size):
    rng = np.random.default_rng(size)
    values, sums = rng.normal(size=(30, size)), 2 * rng.normal(size=30)
    chosen = construction.nearest_subsets(values, sums)
    assert chosen.shape == (30, size) and chosen.dtype == bool
    for row, goal, subset in zip(values, sums, chosen, strict=True):
        best = np.argmin(np.abs(np.array(all_sums(row)) - goal))
        assert [int(best) >> t & 1 for t in range(size)] == subset.tolist()


def test_many_rows_of_many_values_find_the_subset_that_was_hidden_in_each():
    """More rows than are searched at a time; the subset hidden is the only one that fits to 12 digits."""
    rng = np.random.default_rng(0)
    values, hidden = rng.integers(-(2**50), 2**50, size=(600, 19)) / 2.0**50, rng.random((600, 19)) < 0.3
    np.testing.assert_array_equal(construction.nearest_subsets(values, (values * hidden).sum(axis=1)), hidden)


def test_the_widest_that_is_searched_and_no_wider():
    size = construction.WIDEST
    values = np.random.default_rng(0).normal(size=(1, size))
    hidden = np.arange(size) % 3 == 0
    found = construction.nearest_subsets(values, values @ hidden)
    np.testing.assert_allclose((values * found).sum(), values @ hidden, atol=1e-12)
    with pytest.raises(ValueError, match="at most 32 values, got 33"):
        construction.nearest_subsets(np.ones((1, size + 1)), np.ones(1))


@pytest.mark.slow
@pytest.mark.parametrize("width", range(1, 9))
def test_each_weight_is_as_near_as_the_best_candidate_or_sum_of_candidates(width):
    target = drawn_target((3, 2), seed=width)
    for form in construction.FORMS:
        weights, masks, errors = rebuilt(target, width, form, seed=width)
        kept = np.asarray(masks["Dense_1"]["kernel"])
        for (i, j), goal in np.ndenumerate(target[0].astype(np.float64)):
            products = candidates(weights, width, i, j)
            reachable = [0.0, *products] if form == "product" else all_sums(products)
            least = min(abs(value - goal) for value in reachable)
            mine = kept[i * width : (i + 1) * width, j]
            assert abs(np.dot(mine, products) - goal) == pytest.approx(least, abs=1e-12)
            assert abs(errors.reshape(3, 2)[i, j]) == pytest.approx(least, abs=1e-6)
            assert form == "subset-sum" or mine.sum() <= 1


@pytest.mark.slow
@pytest.mark.parametrize(("sizes", "form"), [((7, 4, 3), "subset-sum"), ((3, 5, 2, 4, 3, 5, 4), "product")])
def test_the_model_under_the_masks_computes_what_the_effective_kernels_do(sizes, form):
    """Six layers as well: then Dense_10 and Dense_11 sort before Dense_2."""
    target, width = [np.abs(kernel) for kernel in drawn_target(*pairwise(sizes))], 6  # so that no layer is silent
    weights, masks, _ = rebuilt(target, width, form)
    hidden = [features for size, out in pairwise(sizes) for features in (size * width, out)][:-1]
    model = models.LeNet300100(classes=sizes[-1], use_bias=False, hidden=tuple(hidden))
    x = jax.random.uniform(jax.random.key(1), (20, sizes[0]))
    chex.assert_trees_all_equal_shapes(weights, jax.eval_shape(model.init, jax.random.key(0), x)["params"])
    logits = jax.jit(model.apply)({"params": apply_masks(weights, masks)}, x)

    *kernels, last = construction.effective_kernels(weights, masks)
    activations = np.asarray(x)
    for kernel in kernels:
        activations = np.maximum(activations @ np.asarray(kernel), 0)
    assert np.abs(logits).max() > 0.1
    np.testing.assert_allclose(logits, activations @ np.asarray(last), rtol=1e-5, atol=1e-5)


def test_a_wide_network_under_the_masks_computes_what_the_target_does():
    target, width = drawn_target((3, 4), (4, 2)), 30
    weights, masks, _ = rebuilt(target, width, "subset-sum", seed=1)  # one that puts every weight within reach
    model = models.LeNet300100(classes=2, use_bias=False, hidden=(3 * width, 4, 4 * width))
    x = jax.random.uniform(jax.random.key(1), (20, 3))
    logits = jax.jit(model.apply)({"params": apply_masks(weights, masks)}, x)
    np.testing.assert_allclose(logits, np.maximum(np.asarray(x) @ target[0], 0) @ target[1], atol=1e-2)


def test_the_error_falls_with_the_width_and_far_faster_for_sums():
    target = drawn_target((40, 12))
    errors = {
        form: [np.abs(rebuilt(target, width, form)[2]).mean() for width in (4, 12, 24)] for form in construction.FORMS
    }
    (few, some, many), (few_sums, some_sums, many_sums) = errors["product"], errors["subset-sum"]
    assert few_sums > 2 * some_sums > 10 * many_sums and few_sums > 20 * many_sums
    assert few > some > many > few / 10


def test_a_weight_whose_candidates_are_all_nothing_or_of_the_other_sign_stays_0():
    target, width = drawn_target((40, 12)), 4
    for form in construction.FORMS:
        weights, masks, _ = rebuilt(target, width, form)
        (kernel,) = construction.effective_kernels(weights, masks)
        stuck = np.zeros(kernel.shape, bool)
        for (i, j), goal in np.ndenumerate(target[0]):
            stuck[i, j] = not any(value * goal > 0 for value in candidates(weights, width, i, j))
        assert stuck.mean() == pytest.approx(0.75**width, abs=0.1)
        np.testing.assert_array_equal(kernel[stuck], 0)


@pytest.mark.parametrize("form", construction.FORMS)
def test_masks_are_binary_and_each_neuron_between_reads_its_one_input(form):
    target, width = drawn_target(*SHAPES), 6
    target[1][3] = 0
    weights, masks, _ = rebuilt(target, width, form)
    chex.assert_trees_all_equal_shapes_and_dtypes(weights, masks)
    assert 0 < sm.density(masks) < 1  # raises on anything but 0 and 1
    for first, second, kernel in (("Dense_0", "Dense_1", target[0]), ("Dense_2", "Dense_3", target[1])):
        reads, kept = np.asarray(masks[first]["kernel"]), np.asarray(masks[second]["kernel"])
        np.testing.assert_array_equal(reads.argmax(axis=0), np.arange(len(kernel) * width) // width)
        assert np.all(reads.sum(axis=0) == 1)
        useless = (np.asarray(weights[first]["kernel"]) * reads).sum(axis=0) < 0
        assert useless.any() and not kept[useless].any()
        assert not kept.reshape(len(kernel), width, -1).swapaxes(1, 2)[kernel == 0].any()


def test_weights_are_the_same_for_the_same_key_and_uniform_to_the_scale_of_their_layer():
    target = drawn_target(*SHAPES)
    weights, again = (by_path(construction.random_network(jax.random.key(3), target, 6)) for _ in range(2))
    chex.assert_trees_all_equal(weights, again)
    other = by_path(construction.random_network(jax.random.key(4), target, 6))
    assert all(not np.any(weights[path] == other[path]) for path in weights)
    scales = (1, np.abs(target[0]).max(), 1, np.abs(target[1]).max())
    for (path, weight), scale in zip(sorted(weights.items()), scales, strict=True):
        assert 0.97 * scale < np.abs(weight).max() <= scale, path
        assert np.std(weight) == pytest.approx(scale / np.sqrt(3), rel=0.1), path
        assert abs(np.mean(weight)) < 0.1 * scale
    same_shapes = construction.random_network(jax.random.key(3), [np.ones((4, 4)), np.ones((4, 4))], 1)
    assert len({np.asarray(weight).tobytes() for weight in by_path(same_shapes).values()}) == 4
    longer = construction.random_network(jax.random.key(3), [2 * target[0], *target[1:], np.ones((5, 2))], 6)
    chex.assert_trees_all_equal(longer["Dense_0"]["kernel"], weights["Dense_0/kernel"])
    np.testing.assert_allclose(longer["Dense_1"]["kernel"], 2 * weights["Dense_1/kernel"], rtol=1e-6)
    chex.assert_trees_all_equal(longer["Dense_3"]["kernel"], weights["Dense_3/kernel"])


def test_a_layer_of_zeros_is_rebuilt_exactly():
    for form in construction.FORMS:
        weights, masks, errors = rebuilt([np.zeros((3, 2))], 4, form)
        assert np.all(weights["Dense_1"]["kernel"] != 0)
        assert not errors.any() and not masks["Dense_1"]["kernel"].any()


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ([], r"\[in, out\] each.* got none"),
        ([np.ones((2, 3)), np.ones(3)], r"no biases, got \[2, 3\], \[3\]"),
        ([np.ones((2, 0))], r"\[2, 0\]"),
        ([np.ones((2, 3)), np.ones((2, 3))], r"puts out, got \[2, 3\], \[2, 3\]"),
        ([np.ones((2, 1)), np.array([[1, np.nan]])], "must be finite"),
        ([np.array([[1, np.inf]])], "must be finite"),
        ({"Dense_0": {"kernel": np.ones((2, 3))}}, "a sequence in the order of the data"),
    ],
    ids=("none", "bias", "empty", "chain", "nan", "inf", "tree"),
)
def test_a_target_that_is_no_chain_of_finite_kernels_is_refused(target, message):
    for call in (
        lambda: construction.random_network(jax.random.key(0), target, 2),
        lambda: construction.subset_masks({}, target, "product"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_widths_forms_and_weights_that_do_not_fit_are_refused():
    target = [np.ones((1, 2), np.float32)]
    for width in (0, -1, 1.5, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="width must be a whole number >= 1"):
            construction.random_network(jax.random.key(0), target, width)
    weights = construction.random_network(jax.random.key(0), target, 33)
    construction.subset_masks(weights, target, "product")
    with pytest.raises(ValueError, match="width must be at most 32 for 'subset-sum', got 33"):
        construction.subset_masks(weights, target, "subset-sum")
    with pytest.raises(ValueError, match="form must be one of product, subset-sum, got 'sum'"):
        construction.subset_masks(weights, target, "sum")
    with pytest.raises(ValueError, match=r"do not fit the target \[1, 3\]: they are \[1, 33\], \[33, 2\]"):
        construction.subset_masks(weights, [np.ones((1, 3))], "product")
    with pytest.raises(ValueError, match="an even number, got Dense_0/kernel"):
        construction.subset_masks({"Dense_0": weights["Dense_0"]}, target, "product")
    odd = {"Dense_0": {"kernel": np.ones((2, 3))}, "Dense_1": {"kernel": np.ones((3, 1))}}
    with pytest.raises(ValueError, match=r"\[in, in \* width\], got \[2, 3\], \[3, 1\]"):
        construction.subset_masks(odd, [np.ones((2, 1))], "product")


def test_masks_of_another_kind_have_no_effective_kernels():
    target = drawn_target((3, 2), (2, 3))
    weights, masks, _ = rebuilt(target, 2, "product")
    two_inputs = masks | {"Dense_2": {"kernel": masks["Dense_2"]["kernel"].at[1, 0].set(1)}}
    wider = construction.subset_masks(construction.random_network(jax.random.key(0), target, 3), target, "product")
    for wrong in (two_inputs, wider):
        with pytest.raises(ValueError, match="not what subset_masks makes"):
            construction.effective_kernels(weights, wrong)
    halves = jax.tree.map(lambda mask: mask / 2, masks)
    with pytest.raises(ValueError, match="other than 0 and 1"):
        construction.effective_kernels(weights, halves)
