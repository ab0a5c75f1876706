"""How a network is evaluated, against slow arithmetic; the noise and the sizes that figures are made from."""

import math
from statistics import NormalDist

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import supermask_jax as sm
from experiments.data.load import load
from experiments.data.source import Arrays, Dataset
from experiments.training.evaluation import Evaluator, Split, make_flow, noise_like
from experiments.training.loss import make_loss
from experiments.training.network import Network
from experiments.training.summary import count_flips, sizes
from supermask_jax import metrics, models
from supermask_jax.methods import bernoulli, dense, edge_popup

KEY = jax.random.key(0)
MEAN, STD = 0.1307, 0.3081  # of mnist-5k


class Linear:
    """The smallest network: logits are pixels times a matrix."""

    def logits(self, params, state, images):
        return images.reshape(len(images), -1) @ params["w"]


def dataset_of(images, labels, mean=(0.4,), std=(0.25,)):
    examples = Arrays(images, labels)
    return Dataset("made up", examples, examples, 10, images.shape[1:], mean, std, "00000000", "made up")


def pictures(examples, seed, channels=1):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (examples, 4, 3, channels)).astype(np.uint8)


def mlp():
    """A network of images [4, 3, 1]."""
    module = models.MLP(10, use_bias=False, hidden=(5,))
    return Network(module, "Dense_0/kernel", "Dense_1/kernel", (4, 3, 1))


def softmax(logits):
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def normalised(images, mean=0.4, std=0.25):
    return ((images.astype(np.float64) / 255 - mean) / std).reshape(len(images), -1)


@pytest.fixture(scope="module")
def assessed():
    """(the evaluator, the network, 301 images: a batch, and one that is mostly padding; their labels)."""
    rng = np.random.default_rng(1)
    w = rng.normal(0, 0.5, (12, 10)).astype(np.float32)
    images = pictures(301, seed=2)
    logits = normalised(images) @ w + rng.gumbel(size=(301, 10))  # so that the network is right about as often as sure
    labels = logits.argmax(axis=1).astype(np.int32)
    evaluator = Evaluator(dense({"w": jnp.asarray(w)}), Linear(), dataset_of(images, labels))
    return evaluator, w, images, labels


def assess(assessed, others=None):
    evaluator, w, images, labels = assessed
    others = {name: Arrays(part, np.zeros(len(part))) for name, part in (others or {}).items()}
    return evaluator.assess({"w": jnp.asarray(w)}, None, Split("test", Arrays(images, labels)), others)


# What is measured beside accuracy.


def test_calibration_and_brier_score_are_those_of_all_examples(assessed):
    _, w, images, labels = assessed
    got, p = assess(assessed), softmax(normalised(images) @ w)
    confidence, right = p.max(axis=1), p.argmax(axis=1) == labels
    np.testing.assert_allclose(got["brier"], np.mean(((p - np.eye(10)[labels]) ** 2).sum(axis=1)), rtol=1e-4)
    bins, error = np.ceil(confidence * 15).astype(int) - 1, 0.0
    for i in range(15):
        inside = bins == i
        assert got["reliability"]["count"][i] == inside.sum()
        if inside.any():
            np.testing.assert_allclose(got["reliability"]["confidence"][i], confidence[inside].mean(), rtol=1e-4)
            np.testing.assert_allclose(got["reliability"]["accuracy"][i], right[inside].mean(), rtol=1e-6)
            error += inside.sum() * abs(right[inside].mean() - confidence[inside].mean()) / 301
    np.testing.assert_allclose(got["ece"], error, rtol=1e-3)
    assert error > 0.01 and sum(got["reliability"]["count"]) == 301


def test_adversarial_accuracy_is_that_of_the_closed_form_gradient(assessed):
    """The loss's gradient by a pixel is (p - onehot) w^T / std; each pixel moves 8/255 along its sign, in [0, 1]."""
    _, w, images, labels = assessed
    slope = (softmax(normalised(images) @ w) - np.eye(10)[labels]) @ w.T.astype(np.float64)
    moved = np.clip(images.reshape(301, -1) / 255 + 8 / 255 * np.sign(slope), 0, 1)
    hits = ((moved - 0.4) / 0.25 @ w).argmax(axis=1) == labels
    got = assess(assessed)["fgsm_accuracy"]
    assert got == pytest.approx(hits.mean(), abs=1e-9)
    assert 0.1 < got < np.mean((normalised(images) @ w).argmax(axis=1) == labels) - 0.1


def test_out_of_distribution_images_are_told_by_the_highest_probability_of_every_image(assessed):
    _, w, images, _ = assessed
    others = {"many": pictures(260, seed=3) // 3, "few": pictures(7, seed=4), "itself": images}
    got = assess(assessed, others)["ood_auroc"]
    inside = softmax(normalised(images) @ w).max(axis=1)
    for name, other in others.items():
        outside = softmax(normalised(other) @ w).max(axis=1)
        above = (inside[:, None] > outside[None, :]).mean() + 0.5 * (inside[:, None] == outside[None, :]).mean()
        assert got[name] == pytest.approx(above, abs=2e-4), name
    assert set(got) == set(others) and got["itself"] == 0.5 and abs(got["many"] - 0.5) > 0.05


@pytest.mark.parametrize("examples", [1, 250, 301])
def test_logits_are_those_of_every_image_in_order(assessed, examples):
    evaluator, w, images, _ = assessed
    source = Arrays(images[:examples], np.zeros(examples))
    got = evaluator._all_logits({"w": jnp.asarray(w)}, None, source)[0]
    np.testing.assert_allclose(got, normalised(images[:examples]) @ w, rtol=1e-4, atol=1e-4)


def test_the_figures_are_those_of_the_metrics_of_all_logits(assessed):
    _, w, images, labels = assessed
    logits = jnp.asarray(normalised(images) @ w, jnp.float32)
    got = assess(assessed)
    assert got["ece"] == pytest.approx(float(metrics.expected_calibration_error(logits, labels)), rel=1e-4)
    assert got["brier"] == pytest.approx(float(metrics.brier(logits, labels)), rel=1e-4)
    assert set(got) == {"ece", "brier", "reliability", "fgsm_accuracy", "ood_auroc"} and got["ood_auroc"] == {}


# Noise.


def test_noise_is_drawn_from_the_pixels_mean_and_deviation_by_the_seed_alone():
    dataset = dataset_of(pictures(5, seed=0), np.zeros(5, np.int32), mean=(0.5,), std=(0.1,))
    noise = noise_like(dataset, 3).images
    assert noise.dtype == np.uint8 and noise.shape == (2000, 4, 3, 1)
    np.testing.assert_allclose([noise.mean() / 255, noise.std() / 255], [0.5, 0.1], rtol=0.02)
    np.testing.assert_array_equal(noise, noise_like(dataset, 3).images)
    others = dataset_of(pictures(8, seed=1), np.ones(8, np.int32), mean=(0.5,), std=(0.1,))
    np.testing.assert_array_equal(noise, noise_like(others, 3).images)  # the images themselves do not matter
    assert np.mean(noise != noise_like(dataset, 4).images) > 0.9
    assert noise_like(dataset, 3, examples=7).images.shape == (7, 4, 3, 1)


def test_noise_has_the_mean_and_deviation_of_each_channel():
    mean, std = (0.3, 0.5, 0.6), (0.05, 0.1, 0.08)
    noise = noise_like(dataset_of(pictures(5, 0, channels=3), np.zeros(5, np.int32), mean, std), 3).images / 255
    np.testing.assert_allclose(noise.mean(axis=(0, 1, 2)), mean, rtol=0.02)
    np.testing.assert_allclose(noise.std(axis=(0, 1, 2)), std, rtol=0.02)


def test_noise_is_cut_off_at_black_and_white():
    """Of a dark set, as digits are: what would be below 0 becomes 0, and nothing wraps round to white."""
    dataset = dataset_of(pictures(5, seed=0), np.zeros(5, np.int32), mean=(MEAN,), std=(STD,))
    noise = noise_like(dataset, 0).images / 255
    bell = NormalDist(MEAN, STD)
    assert np.mean(noise == 0) == pytest.approx(bell.cdf(0.5 / 255), abs=0.01)
    assert np.mean(noise == 1) == pytest.approx(1 - bell.cdf(254.5 / 255), abs=0.003)
    assert np.mean(noise < 0.3) == pytest.approx(bell.cdf(0.3), abs=0.01)


# Gradient flow.


def curved(params, model_state, batch, key):
    """A loss whose slope by each parameter is its factor of the batch times the parameter."""
    loss = sum(jnp.sum(batch[name] * params[name] ** 2) / 2 for name in params)
    return loss, (model_state, {})


def test_gradient_flow_is_the_norm_over_the_kept_weights():
    params = {"a": jnp.array([[1.0, 2.0, 3.0]]), "b": jnp.array([4.0])}
    flow = make_flow(curved, {"a": jnp.array([[3.0, 2.0, 1.0]]), "b": jnp.array([3.0])})
    masks = {"a": jnp.array([[1.0, 1.0, 0.0]]), "b": None}
    assert flow(params, None, masks) == pytest.approx(5)  # the slopes are 3, 4, 3 and, of what has no mask, 12
    assert flow(params, None, {"a": jnp.array([[0.0, 1.0, 1.0]]), "b": jnp.array([1.0])}) == pytest.approx(13)
    assert flow({"a": 2 * params["a"], "b": params["b"]}, None, masks) == pytest.approx(10)
    assert flow(params, None, {"a": jnp.zeros((1, 3)), "b": None}) == 0
    assert flow(params, None, {"a": None, "b": None}) == pytest.approx(math.sqrt(9 + 16 + 9 + 144))  # dense: all
    assert isinstance(flow(params, None, masks), float)


def test_gradient_flow_of_a_network_is_that_of_its_training_loss():
    net = mlp()
    weights, _ = net.init(KEY)
    masks = sm.jit(lambda key: sm.random_masks(key, weights, 0.3))(jax.random.key(1))
    params = jax.tree.map(jnp.multiply, weights, masks)
    batch = {"image": jnp.asarray(pictures(20, seed=5)), "label": jnp.arange(20) % 10, "weight": jnp.ones(20)}

    def loss(params):
        logits = net.module.apply({"params": params}, jnp.asarray(normalised(pictures(20, seed=5)), jnp.float32))
        return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(20), jnp.arange(20) % 10])

    slopes = jax.tree.map(
        lambda slope, mask: np.asarray(slope)[np.asarray(mask) == 1], sm.jit(jax.grad(loss))(params), masks
    )
    expected = np.linalg.norm(np.concatenate(jax.tree.leaves(slopes)))
    flow = make_flow(make_loss(net, (0.4,), (0.25,)), batch)
    assert flow(params, None, masks) == pytest.approx(expected, rel=1e-4)
    assert flow(params, None, sm.lottery.full_masks(weights)) > 1.2 * expected


# Loss and accuracy.


@pytest.fixture(scope="module")
def digits():
    return load("mnist-5k")


@pytest.fixture(scope="module")
def popup(digits):
    """(the evaluator, the method) of edge-popup on the digits."""
    net = Network(models.LeNet300100(10, use_bias=False), "Dense_0/kernel", "Dense_2/kernel", (28, 28, 1))
    method = edge_popup(jax.random.key(1), net.init(KEY)[0], 0.3)
    return Evaluator(method, net, digits), method, net


def log_probabilities(net, params, images):
    logits = net.module.apply({"params": params}, (images / np.float32(255) - MEAN) / np.float32(STD))
    return np.asarray(jax.nn.log_softmax(logits), np.float64)


@pytest.mark.parametrize("examples", [1, 249, 250, 1000])
def test_evaluation_counts_every_example_once(digits, popup, examples):
    _, method, net = popup
    evaluator = Evaluator(method, net, digits)  # it keeps what it has been given under a split's name
    source = digits.test.take(np.arange(examples))
    masks, params = evaluator.masked(method.subnet)
    jax.tree.map(np.testing.assert_array_equal, masks, method.mask_fn(method.subnet.scores, None))
    jax.tree.map(np.testing.assert_array_equal, params, sm.subnetwork(method.mask_fn, method.subnet))
    got = evaluator.figures(params, None, Split("test", source))
    log_p = log_probabilities(net, params, source.images)
    np.testing.assert_allclose(got["test_loss"], -log_p[np.arange(examples), source.labels].mean(), rtol=1e-4)
    np.testing.assert_allclose(got["test_accuracy"], np.mean(log_p.argmax(-1) == source.labels), atol=1e-9)


class Unloaded:
    """A source that must be read in parts, as one on disk."""

    def __init__(self, arrays):
        self._arrays, self.labels = arrays, arrays.labels

    def __len__(self):
        return len(self.labels)

    def read(self, indices, key=None):
        assert len(indices) <= 250
        return self._arrays.read(indices)


def test_a_source_that_is_read_in_parts_gives_the_figures_of_one_in_memory(digits, popup):
    evaluator, method, _ = popup
    _, params = evaluator.masked(method.subnet)
    source, others = digits.test.take(np.arange(301)), {"few": digits.test.take(np.arange(7))}
    whole, parts = Split("some", source), Split("some", Unloaded(source))
    streamed = evaluator.figures(params, None, parts)
    assert streamed == pytest.approx(evaluator.figures(params, None, whole), rel=1e-6)
    others_in_parts = {"few": Unloaded(others["few"])}
    assert evaluator.assess(params, None, parts, others_in_parts) == evaluator.assess(params, None, whole, others)


@pytest.mark.slow
def test_evaluation_of_sampled_masks_is_the_mean_over_the_keys(digits, popup):
    *_, net = popup
    method = bernoulli(net.init(KEY)[0], rescale=True)
    source = digits.test.take(np.arange(300))
    split, keys = Split("validation", source), jax.random.split(jax.random.key(5), 3)
    evaluator = Evaluator(method, net, digits)
    got = evaluator.sampled_figures(method.subnet, None, split, keys)
    losses, accuracies = [], []
    for key in keys:
        log_p = log_probabilities(net, method.product(method.subnet, key), source.images)
        losses.append(-log_p[np.arange(300), source.labels].mean())
        accuracies.append(np.mean(log_p.argmax(-1) == source.labels))
    assert len(set(losses)) == 3
    np.testing.assert_allclose(got["validation_sampled_loss"], np.mean(losses), rtol=1e-4)
    np.testing.assert_allclose(got["validation_sampled_accuracy"], np.mean(accuracies), atol=1e-9)
    masks, params = evaluator.masked(method.subnet)
    assert not any(np.any(mask) for mask in jax.tree.leaves(masks))  # logits of 0 keep nothing
    np.testing.assert_allclose(evaluator.figures(params, None, split)["validation_loss"], np.log(10), rtol=1e-6)
    assert evaluator.sampled_figures(method.subnet, None, split, keys) == got
    assert evaluator.sampled_figures(method.subnet, None, split, ()) == {}


def test_what_is_evaluated_does_not_share_memory_with_the_state(popup):
    """Masks that are the scores themselves are given away with the state at the next step."""
    _, method, net = popup
    fixed = sm.methods.fixed(method.subnet.weights, method.mask_fn(method.subnet.scores, None))
    masks, params = Evaluator(fixed, net, dataset_of(pictures(3, 0), np.zeros(3))).masked(fixed.subnet)
    given = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(fixed.subnet)}
    assert not given & {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves((masks, params))}


# Flips and sizes.


def test_flips_are_counted_per_layer():
    before = {"a": jnp.array([0.0, 1, 1]), "b": None, "c": jnp.array([1.0, 1])}
    after = {"a": jnp.array([1.0, 1, 0]), "b": None, "c": jnp.array([1.0, 1])}
    assert count_flips(before, after) == {"a": 2, "c": 0}


@pytest.mark.parametrize("use_bias", [False, True])
def test_sizes_count_what_the_masks_keep(use_bias):
    net = Network(models.MLP(2, use_bias=use_bias, hidden=(3,)), "Dense_0/kernel", "Dense_1/kernel", (2, 2, 1))
    weights = net.module.init(KEY, jnp.zeros((1, 2, 2, 1)))["params"]
    masks = jax.tree.map(lambda _: None, weights)
    masks["Dense_0"]["kernel"] = jnp.array([[1.0, 0, 0], [0, 0, 1], [1, 0, 0], [1, 0, 0]])
    masks["Dense_1"]["kernel"] = jnp.array([[1.0, 1], [0, 0], [0, 1]])
    biases = 5 if use_bias else 0
    got = sizes(net, weights, None, masks)
    assert got["layers"] == {
        "Dense_0/kernel": {"size": 12, "kept": 4, "density": 4 / 12},
        "Dense_1/kernel": {"size": 6, "kept": 3, "density": 0.5},
    }
    assert (got["parameters"], got["flops"], got["density"]) == (7 + biases, 2 * 7, 7 / 18)
    assert got["emptied"] == []
    masks["Dense_0"]["kernel"] *= 0
    assert sizes(net, weights, None, masks)["emptied"] == ["Dense_0/kernel"]
    dense = sizes(net, weights, None, jax.tree.map(lambda _: None, weights))
    assert {path: layer["kept"] for path, layer in dense["layers"].items()} == {
        "Dense_0/kernel": 12,
        "Dense_1/kernel": 6,
    }
    assert (dense["parameters"], dense["flops"]) == (18 + biases, 2 * 18)
