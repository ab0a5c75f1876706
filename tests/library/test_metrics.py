"""Metrics: golden figures, answers by hand, the definitions written out; FLOPs and parameters of masked networks."""

import json
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import supermask_jax as sm
from supermask_jax import flops, metrics
from supermask_jax.trees import by_path, map_with_name

with np.load(Path(__file__).parents[1] / "golden" / "h_metrics.npz") as arrays:
    GOLDEN = dict(arrays)
INFO = json.loads(str(GOLDEN.pop("meta")))["info"]

# Confidences 0.9, 0.8, 0.6, 0.6; the second is wrong, the third and fourth are right and wrong.
PROBABILITIES = np.array([[0.9, 0.1], [0.8, 0.2], [0.4, 0.6], [0.6, 0.4]], np.float32)
LOGITS, LABELS = np.log(PROBABILITIES), np.array([0, 1, 1, 1])


# Calibration


def test_calibration_is_the_golden_one():
    logits, labels, info = GOLDEN["logits"], GOLDEN["labels"], INFO["calibration"]
    close = {"rtol": 0, "atol": 1e-5}
    np.testing.assert_allclose(metrics.accuracy(logits, labels), info["accuracy"], **close)
    np.testing.assert_allclose(metrics.negative_log_likelihood(logits, labels), info["nll"], **close)
    np.testing.assert_allclose(metrics.brier(logits, labels), info["brier_sum_over_classes"], **close)
    np.testing.assert_allclose(metrics.expected_calibration_error(logits, labels), info["ece15"], **close)
    np.testing.assert_allclose(metrics.max_softmax(logits).mean(), info["mean_confidence"], **close)
    bins = metrics.reliability(logits, labels)
    count = np.array(info["bin_count"])
    np.testing.assert_array_equal(bins.count, count)
    np.testing.assert_allclose(bins.confidence, info["bin_conf_sum"] / np.maximum(count, 1), **close)
    np.testing.assert_allclose(bins.accuracy, info["bin_acc_sum"] / np.maximum(count, 1), **close)
    np.testing.assert_allclose(np.abs(bins.accuracy - bins.confidence).max(), info["mce15"], **close)


def test_calibration_of_a_confident_network_is_the_golden_one():
    logits, labels, info = GOLDEN["logits_sharp"], GOLDEN["labels_sharp"], INFO["calibration_sharp"]
    np.testing.assert_array_equal(metrics.reliability(logits, labels).count, info["bin_count"])
    assert metrics.expected_calibration_error(logits, labels) == pytest.approx(info["ece15"], abs=1e-5)
    assert metrics.negative_log_likelihood(logits, labels) == pytest.approx(info["nll"], abs=1e-5)
    assert metrics.accuracy(logits, labels) == pytest.approx(info["accuracy"], abs=1e-6)


def test_four_examples_by_hand():
    bins = metrics.reliability(LOGITS, LABELS, bins=4)
    np.testing.assert_array_equal(bins.count, [0, 0, 2, 2])
    np.testing.assert_allclose(bins.confidence, [0, 0, 0.6, 0.85], rtol=1e-6)
    np.testing.assert_allclose(bins.accuracy, [0, 0, 0.5, 0.5])
    # (2 * |0.5 - 0.6| + 2 * |0.5 - 0.85|) / 4
    assert metrics.expected_calibration_error(LOGITS, LABELS, bins=4) == pytest.approx(0.225)
    # One bin: |0.5 - 0.725|. A bin for each confidence: (|1 - 0.9| + |0 - 0.8| + 2 * |0.5 - 0.6|) / 4
    assert metrics.expected_calibration_error(LOGITS, LABELS, bins=1) == pytest.approx(0.225)
    assert metrics.expected_calibration_error(LOGITS, LABELS, bins=15) == pytest.approx(0.275)
    assert metrics.accuracy(LOGITS, LABELS) == 0.5
    assert metrics.negative_log_likelihood(LOGITS, LABELS) == pytest.approx(-np.log(0.9 * 0.2 * 0.6 * 0.4) / 4)
    assert metrics.brier(LOGITS, LABELS) == pytest.approx(2 * (0.1**2 + 0.8**2 + 0.4**2 + 0.6**2) / 4)


def test_a_confidence_on_the_edge_belongs_to_the_lower_bin_and_certainty_to_the_last():
    logits = np.array([[0, 0], [200, 0], [0, 0]], np.float32)  # confidences 1/2, 1, 1/2
    np.testing.assert_array_equal(metrics.reliability(logits, np.array([0, 1, 0]), bins=2).count, [2, 1])
    np.testing.assert_array_equal(metrics.reliability(logits, np.array([0, 1, 0]), bins=4).count, [0, 2, 0, 1])


def test_many_like_confidences_are_summed_without_drift():
    confidence = np.float64(np.float32(0.999))
    logits = np.tile(np.log(np.array([[confidence, 1 - confidence]])).astype(np.float32), (50_000, 1))
    error = metrics.expected_calibration_error(logits, np.zeros(50_000, np.int32))
    assert error == pytest.approx(1 - confidence, rel=1e-3)


def test_they_run_under_jit_with_the_same_answers():
    for name in ("expected_calibration_error", "negative_log_likelihood", "brier", "accuracy"):
        measure = getattr(metrics, name)
        np.testing.assert_allclose(jax.jit(measure)(LOGITS, LABELS), measure(LOGITS, LABELS), rtol=1e-6)


def test_half_precision_logits_are_widened_first():
    logits = jnp.asarray(GOLDEN["logits"], jnp.bfloat16)
    wide = np.asarray(logits, np.float32)
    for measure in (metrics.expected_calibration_error, metrics.brier):
        assert measure(logits, GOLDEN["labels"]) == measure(wide, GOLDEN["labels"])


def test_a_measure_is_float32_where_jax_makes_64_bits_by_default():
    with jax.enable_x64(True):
        for name in ("expected_calibration_error", "negative_log_likelihood", "brier", "accuracy"):
            assert getattr(metrics, name)(LOGITS, LABELS).dtype == np.float32, name


NAN = np.array([[np.nan, 0], [0, 1], [0, 1], [0, 1]], np.float32)


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (LOGITS[0], LABELS, r"logits must be \[n, classes\]"),
        (LOGITS[:0], LABELS[:0], "not empty"),
        (LABELS[:, None], LABELS, "floats"),
        (NAN, LABELS, "must not be NaN"),
        (np.full((4, 2), -np.inf, np.float32), LABELS, "must be finite"),
        (LOGITS, LABELS[:3], r"labels must be \[4\] integers"),
        (LOGITS, LABELS.astype(np.float32), "integers"),
        (LOGITS, LABELS + 1, "classes from 0 to 1"),
        (LOGITS, LABELS - 1, "classes from 0 to 1"),
    ],
)
def test_logits_and_labels_that_do_not_fit_are_refused(logits, labels, message):
    for name in ("accuracy", "negative_log_likelihood", "brier", "expected_calibration_error"):
        with pytest.raises(ValueError, match=message):
            getattr(metrics, name)(logits, labels)


@pytest.mark.parametrize("bins", (0, -3, 2.5))
def test_bins_that_are_no_number_of_bins_are_refused(bins):
    with pytest.raises(ValueError, match="number of bins"):
        metrics.expected_calibration_error(LOGITS, LABELS, bins)


# Out-of-distribution detection


@pytest.mark.parametrize(
    ("inside", "outside", "tag"),
    [("logits", "logits_ood", "ood"), ("logits_id_ties", "logits_ood_ties", "ood_ties")],
    ids=("distinct", "tied"),
)
def test_auroc_of_the_maximum_softmax_is_scikit_learns(inside, outside, tag):
    scores = [metrics.max_softmax(GOLDEN[name]) for name in (inside, outside)]
    assert metrics.auroc(*scores) == pytest.approx(INFO[tag]["auroc_id_positive"], abs=1e-5)


def test_auroc_of_perfect_reversed_and_tied_scores():
    assert metrics.auroc([2, 3.5], [1, 0, -np.inf]) == 1
    assert metrics.auroc([-1, 0], [1, 2, 3]) == 0
    assert metrics.auroc([1, 1, 1], [1, 1]) == 0.5
    assert metrics.auroc([1, 2], [1]) == 0.75


@pytest.mark.parametrize("values", (3, 20, 10**6))
def test_auroc_is_the_fraction_of_pairs_in_order_with_half_of_the_ties(values):
    rng = np.random.default_rng(values)
    inside, outside = rng.integers(values, size=70) + values // 5, rng.integers(values, size=30)
    above = (inside[:, None] > outside[None, :]).sum() + 0.5 * (inside[:, None] == outside[None, :]).sum()
    assert metrics.auroc(inside.astype(np.float32), outside.astype(np.float32)) == above / (70 * 30)


@pytest.mark.parametrize("wrong", ([], [[1.0, 2.0]], [1.0, np.nan], 1.0))
def test_scores_that_cannot_be_ranked_are_refused(wrong):
    with pytest.raises(ValueError, match="scores_in must be"):
        metrics.auroc(wrong, [1.0])
    with pytest.raises(ValueError, match="scores_out must be"):
        metrics.auroc([1.0], wrong)


# Adversarial images


def golden_loss(images, labels):
    """The golden net on [n, h, w, c] images in [0, 1]: normalise, conv, tanh, conv, tanh, dense."""
    params = {name.removeprefix("fgsm/param/"): p for name, p in GOLDEN.items() if name.startswith("fgsm/param/")}
    mean, std = (np.reshape(np.float32(INFO["fgsm"][name]), (1, 1, 1, 3)) for name in ("mean", "std"))
    x = (images - mean) / std
    for layer in ("conv1", "conv2"):
        kernel, bias = params[f"{layer}.weight"].transpose(2, 3, 1, 0), params[f"{layer}.bias"].reshape(1, 1, 1, -1)
        dims = ("NHWC", "HWIO", "NHWC")
        x = jnp.tanh(jax.lax.conv_general_dilated(x, kernel, (2, 2), ((1, 1), (1, 1)), dimension_numbers=dims) + bias)
    x = x.transpose(0, 3, 1, 2).reshape(len(x), -1)
    logits = x @ params["fc.weight"].T + params["fc.bias"].reshape(1, -1)
    return metrics.negative_log_likelihood(logits, labels)


def golden_images(name):
    return GOLDEN[f"fgsm/{name}_NCHW"].transpose(0, 2, 3, 1)


def test_fgsm_images_are_the_golden_ones():
    images, labels, info = golden_images("x"), GOLDEN["fgsm/y"], INFO["fgsm"]
    theirs, clear = golden_images("grad_x"), ~golden_images("ambiguous").astype(bool)
    gradient = jax.grad(golden_loss)(jnp.asarray(images), labels)
    np.testing.assert_allclose(gradient, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())
    adversarial = np.asarray(jax.jit(metrics.fgsm, static_argnums=0)(golden_loss, images, labels, info["eps"]))
    np.testing.assert_allclose(adversarial[clear], golden_images("x_adv")[clear], rtol=0, atol=1e-6)
    assert (~clear).sum() == info["ambiguous"]
    assert golden_loss(images, labels) == pytest.approx(info["loss_clean"], abs=1e-5)
    assert golden_loss(adversarial, labels) == pytest.approx(info["loss_adv"], abs=1e-4)


def test_fgsm_goes_up_the_loss_stays_within_the_range_and_leaves_what_has_no_gradient():
    images = np.array([[0.5, 0.5, 0.5, 0.95, 0.05]], np.float32)
    slopes = np.array([[1e-6, -3, 0, 2, -2]], np.float32)
    adversarial = metrics.fgsm(lambda x, labels: jnp.vdot(slopes, x) / len(labels), images, np.array([0]), 0.1)
    np.testing.assert_allclose(adversarial, [[0.6, 0.4, 0.5, 1, 0]], rtol=1e-6)
    np.testing.assert_array_equal(metrics.fgsm(lambda x, labels: x.sum(), images, None, 0), images)


@pytest.mark.parametrize(
    ("images", "epsilon", "loss", "message"),
    [
        (np.array([1.5], np.float32), 0.1, jnp.sum, r"floats in \[0, 1\], before normalisation"),
        (np.array([np.nan], np.float32), 0.1, jnp.sum, r"floats in \[0, 1\]"),
        (np.array([1], np.uint8), 0.1, jnp.sum, r"floats in \[0, 1\]"),
        (np.array([0.5], np.float32), -0.1, jnp.sum, "epsilon must not be negative"),
        (np.array([0.5], np.float32), np.nan, jnp.sum, "epsilon must not be negative"),
        (np.array([0.0], np.float32), 0.1, lambda x: jnp.sum(jnp.sqrt(x) * 0), "gradient that is NaN"),
    ],
)
def test_what_fgsm_cannot_attack_is_refused(images, epsilon, loss, message):
    with pytest.raises(ValueError, match=message):
        metrics.fgsm(lambda x, labels: loss(x), images, None, epsilon)


# Gradient flow


def test_gradient_flow_is_the_norm_over_the_weights_that_are_kept():
    gradient = {"a": jnp.array([[3.0, np.nan], [50.0, 4.0]]), "b": {"kernel": jnp.array([[12.0]]), "bias": jnp.ones(7)}}
    masks = {"a": jnp.array([[1.0, 0], [0, 1]]), "b": {"kernel": jnp.ones((1, 1)), "bias": None}}
    assert metrics.gradient_flow(gradient, masks) == 13
    assert jax.jit(metrics.gradient_flow)(gradient, masks) == 13
    units = {"a": jnp.array([[0.0, 0]]), "b": {"kernel": jnp.ones((1, 1)), "bias": None}}
    assert metrics.gradient_flow(gradient, units) == 12


@pytest.mark.parametrize("masks", (None, {"kernel": None, "bias": None}), ids=("none", "of_nones"))
def test_the_gradient_flow_of_a_dense_network_is_that_of_all_parameters(masks):
    assert metrics.gradient_flow({"kernel": jnp.full((2, 2), 2.0), "bias": jnp.array([3.0])}, masks) == 5


def test_gradient_flow_refuses_masks_that_are_none():
    with pytest.raises(ValueError, match="values other than 0 and 1"):
        metrics.gradient_flow({"a": jnp.ones(2)}, {"a": jnp.array([0.3, 1])})
    with pytest.raises(ValueError):
        metrics.gradient_flow({"a": jnp.ones(2)}, {"b": jnp.ones(2)})


# Parameters and FLOPs


def network(model, shape, dtype=jnp.float32):
    """(apply_fn, shapes of the parameters): nothing is computed."""
    weights = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, *shape), dtype))["params"]
    return lambda params, x: model.apply({"params": params}, x), weights


def masks_with(weights, ones):
    """Masks whose first `ones[path]` entries are kept; None at the other leaves."""

    def mask(path, leaf):
        return (np.arange(leaf.size) < ones[path]).reshape(leaf.shape).astype(np.float32) if path in ones else None

    return map_with_name(mask, weights)


def test_lenet_multiplies_each_weight_once():
    apply_fn, weights = network(sm.models.LeNet300100(), (28, 28, 1))
    layers = {"Dense_0/kernel": 784 * 300, "Dense_1/kernel": 300 * 100, "Dense_2/kernel": 100 * 10}
    assert metrics.layer_flops(apply_fn, weights, None, (28, 28, 1)) == {p: 2 * n for p, n in layers.items()}
    assert metrics.flops(apply_fn, weights, None, (28, 28, 1)) == 2 * 266_200
    assert metrics.parameter_count(weights, None) == 266_610
    masks = masks_with(weights, {"Dense_0/kernel": 70_560, "Dense_1/kernel": 9_001})  # the last layer is dense
    assert metrics.flops(apply_fn, weights, masks, (28, 28, 1)) == 2 * (70_560 + 9_001 + 1_000)
    assert metrics.parameter_count(weights, masks) == 70_560 + 9_001 + 1_000 + 410


def test_the_convnet_multiplies_a_kernel_at_every_position():
    apply_fn, weights = network(sm.models.MnistConvNet(), (28, 28, 1))
    positions = {"Conv_0/kernel": 26 * 26, "Conv_1/kernel": 24 * 24, "Dense_0/kernel": 1, "Dense_1/kernel": 1}
    sizes = {path: leaf.size for path, leaf in by_path(weights).items()}
    dense = metrics.layer_flops(apply_fn, weights, None, (28, 28, 1))
    assert dense == {path: 2 * sizes[path] * positions[path] for path in sizes}
    ones = {"Conv_0/kernel": 86, "Conv_1/kernel": 12_903, "Dense_0/kernel": 0, "Dense_1/kernel": 384}
    masked = metrics.layer_flops(apply_fn, weights, masks_with(weights, ones), (28, 28, 1))
    assert masked == {path: 2 * ones[path] * positions[path] for path in ones}
    assert all(type(number) is int for number in masked.values())


@pytest.mark.parametrize(
    ("layer", "shape", "size", "positions"),
    [
        (nn.Conv(5, (3, 3), strides=2, padding="SAME"), (7, 9, 4), 3 * 3 * 4 * 5, 4 * 5),
        (nn.Conv(6, (3,), feature_group_count=2), (8, 4), 3 * 2 * 6, 8),
        (nn.Conv(6, (2,), kernel_dilation=3, padding="VALID"), (8, 4), 2 * 4 * 6, 5),
        (nn.ConvTranspose(3, (2,), strides=(2,), transpose_kernel=True, padding="VALID"), (4, 5), 2 * 3 * 5, 8),
        (nn.Dense(3), (6, 4), 4 * 3, 6),
        (nn.Dense(3, dtype=jnp.bfloat16), (4,), 4 * 3, 1),
        (nn.remat(nn.Dense)(3), (4,), 4 * 3, 1),
        (nn.DenseGeneral((2, 3), axis=(-2, -1)), (5, 4, 6), 4 * 6 * 2 * 3, 5),
    ],
    ids=("same_stride", "grouped", "dilated", "transposed", "dense_over_positions", "cast", "remat", "general"),
)
def test_one_layer_by_hand(layer, shape, size, positions):
    apply_fn, weights = network(layer, shape)
    assert weights["kernel"].size == size
    assert metrics.layer_flops(apply_fn, weights, None, shape) == {"kernel": 2 * size * positions}
    masks = masks_with(weights, {"kernel": 7})
    assert metrics.flops(apply_fn, weights, masks, shape) == 2 * 7 * positions


def test_attention_kernels_are_used_at_each_position_and_its_products_of_data_are_not_counted():
    apply_fn, weights = network(nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=6), (5, 4))
    assert weights["query"]["kernel"].shape == (4, 2, 3)
    ones = {"query/kernel": 7, "key/kernel": 3, "value/kernel": 24, "out/kernel": 20}
    masks = masks_with(weights, ones)
    assert metrics.layer_flops(apply_fn, weights, masks, (5, 4)) == {path: 2 * n * 5 for path, n in ones.items()}
    assert metrics.parameter_count(weights, masks) == 54 + 3 * 6 + 4


SQUARE = {"kernel": jnp.zeros((4, 4)), "other": jnp.zeros((4, 4))}


def reused(params, x):
    x = jnp.tanh(x @ params["kernel"])
    return x @ params["other"] @ jax.jit(lambda w: w.T.reshape(4, 2, 2))(params["kernel"]).reshape(4, 4)


def scanned(params, x):
    x, _ = jax.lax.scan(lambda x, _: (x @ params["kernel"], None), x, length=2)
    return x @ params["other"]


def carried(params, x):
    _, x = jax.lax.fori_loop(0, 2, lambda i, carry: (carry[0], carry[1] @ carry[0]), (params["kernel"], x))
    return x @ params["other"]


def placed(params, x):
    kernel = jax.lax.with_sharding_constraint(params["kernel"], jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    return x @ kernel @ jax.lax.stop_gradient(kernel.copy()) @ params["other"]


def per_example(params, x):
    return jax.vmap(lambda x: params["kernel"] @ (params["other"] @ (params["kernel"] @ x)))(x)


@jax.custom_vjp
def product(x, kernel):
    return x @ kernel


product.defvjp(lambda x, kernel: (x @ kernel, None), lambda residuals, cotangent: (cotangent, cotangent))


def with_custom_derivative(params, x):
    return product(product(x, params["kernel"]), params["kernel"]) @ params["other"]


def rescaled(params, x):
    """Twice a kernel of which 0 stays 0: divided by its norm, and squashed."""
    kernel = params["kernel"] / jnp.linalg.norm(params["kernel"], axis=0, keepdims=True)
    return jnp.tanh(x @ kernel) @ jnp.tanh(params["kernel"]) @ (params["other"] * 0.5)


EACH = (reused, scanned, carried, placed, per_example, with_custom_derivative, rescaled)


@pytest.mark.parametrize("apply_fn", EACH)
def test_a_kernel_used_twice_counts_twice(apply_fn):
    masks = {"kernel": np.eye(4), "other": np.triu(np.ones((4, 4)))}
    assert metrics.layer_flops(apply_fn, SQUARE, masks, (4,)) == {"kernel": 2 * 2 * 4, "other": 2 * 10}


def test_a_recurrent_network_uses_its_kernels_at_each_step_though_its_first_state_is_constant():
    apply_fn, weights = network(nn.RNN(nn.SimpleCell(3)), (5, 4))
    flops = metrics.layer_flops(apply_fn, weights, None, (5, 4))
    assert flops == {"cell/i/kernel": 2 * 4 * 3 * 5, "cell/h/kernel": 2 * 3 * 3 * 5}


def test_stacked_layers_under_scan_are_each_used_once():
    weights = {"stack": jnp.zeros((3, 4, 4))}
    masks = {"stack": np.stack([np.eye(4), np.zeros((4, 4)), np.ones((4, 4))])}

    def apply_fn(params, x):
        return jax.lax.scan(lambda x, kernel: (x @ kernel, None), x, params["stack"])[0]

    assert metrics.flops(apply_fn, weights, masks, (4,)) == 2 * (4 + 0 + 16)


def either_way(params, x):
    kernel = params["kernel"]
    return x @ jax.lax.cond(params["other"][0, 0] > 0, lambda: kernel, lambda: kernel.T)


def turned(params, x):
    def one(carry, _):
        kernel, x = carry
        return (kernel.T, x @ kernel), None

    return jax.lax.scan(one, (params["kernel"], x), None, length=3)[0][1]


def by_group(params, x):
    sizes = jnp.array([1, 0], jnp.int32)
    return jax.lax.ragged_dot(x, params["kernel"].reshape(2, 4, 2), sizes) @ params["other"][:2]


def in_cond(params, x):
    return jax.lax.cond(x[0, 0] > 0, lambda: x @ params["kernel"], lambda: x) @ params["other"]


def in_while(params, x):
    return jax.lax.while_loop(lambda x: x[0, 0] > 0, lambda x: x @ params["kernel"], x) @ params["other"]


@pytest.mark.parametrize(
    ("apply_fn", "message"),
    [
        (lambda params, x: x @ params["other"], "with none of the weights of kernel"),
        (lambda params, x: x @ SQUARE["kernel"] @ params["other"], "with none of the weights of kernel"),
        (lambda params, x: x * params["kernel"][:1] @ params["other"], "with none of the weights of kernel"),
        (lambda params, x: x @ params["other"] + jnp.ones((1, 4)) @ params["kernel"], "none of the weights of kernel"),
        (lambda params, x: x @ (params["kernel"] - 1) @ params["other"], "'kernel' goes through 'sub' before"),
        (lambda params, x: x @ (params["kernel"] @ params["other"]), "'kernel' is multiplied with another leaf"),
        (lambda params, x: x @ params["kernel"][:, :2], "'kernel' goes through 'slice' before"),
        (lambda params, x: x @ jnp.concatenate([params["kernel"], params["other"]], 1), "goes through 'concatenate'"),
        (lambda params, x: x @ (params["kernel"] * params["other"]), "goes through 'mul' before"),
        (lambda params, x: x @ (params["kernel"] * params["kernel"].T), "goes through 'mul' before"),
        (either_way, "'kernel' goes through 'cond' before"),
        (turned, "'kernel' goes through 'scan' before"),
        (by_group, "multiplied with data inside 'ragged_dot"),
        (in_cond, "'kernel' is multiplied with data inside 'cond'"),
        (in_while, "'kernel' is multiplied with data inside 'while'"),
    ],
    ids=(
        *("unused", "closed_over", "elementwise", "with_constants", "shifted", "merged", "sliced", "beside", "both"),
        *("transposed_too", "either_way", "turned", "groups", "cond", "while"),
    ),
)
def test_a_masked_kernel_whose_products_cannot_be_counted_is_named(apply_fn, message):
    masks = {"kernel": np.eye(4), "other": None}
    with pytest.raises(ValueError, match=message):
        metrics.flops(apply_fn, SQUARE, masks, (4,))


def test_leaves_that_only_add_or_scale_count_nothing():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            place = self.param("place", nn.initializers.zeros, (1, 5, 4))
            return nn.Dense(3)(nn.LayerNorm()(x + place))

    apply_fn, weights = network(Net(), (5, 4))
    assert metrics.layer_flops(apply_fn, weights, None, (5, 4)) == {"Dense_0/kernel": 2 * 12 * 5}
    with pytest.raises(ValueError, match="with none of the weights of place"):
        metrics.flops(apply_fn, weights, masks_with(weights, {"place": 3, "Dense_0/kernel": 3}), (5, 4))


def test_one_mask_for_each_unit_counts_as_the_masks_that_it_stands_for():
    weights = {"kernel": jnp.ones((3, 3, 2, 5)), "bias": jnp.ones(5)}
    masks = {"kernel": np.array([1.0, 0, 1, 1, 0]).reshape(1, 1, 1, 5), "bias": None}

    def apply_fn(params, x):
        return jax.lax.conv_general_dilated(
            x, params["kernel"], (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    full = jax.tree.map(lambda w, m: None if m is None else np.broadcast_to(m, w.shape), weights, masks)
    assert metrics.parameter_count(weights, masks) == metrics.parameter_count(weights, full) == 18 * 3 + 5
    flops = [metrics.flops(apply_fn, weights, each, (6, 7, 2)) for each in (masks, full)]
    assert flops == [2 * 18 * 3 * 4 * 5] * 2


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({"krnel": np.ones((4, 4))}, "mask of 'krnel' but no weight; there are: kernel, other"),
        ({"kernel": np.ones((4, 3))}, r"mask of 'kernel' has shape \(4, 3\), its weight \(4, 4\)"),
        ({"kernel": np.ones(4)}, r"has shape \(4,\)"),
        ({"kernel": np.full((4, 4), 0.3)}, "the mask of 'kernel' holds values other than 0 and 1"),
    ],
)
def test_masks_that_do_not_fit_the_weights_are_refused(masks, message):
    with pytest.raises(ValueError, match=message):
        metrics.parameter_count(SQUARE, masks)
    with pytest.raises(ValueError, match=message):
        metrics.flops(reused, SQUARE, masks, (4,))


def test_costs_are_measures_too():
    names = ("flops", "layer_flops", "parameter_count")
    assert all(getattr(metrics, name) is getattr(flops, name) for name in names)
