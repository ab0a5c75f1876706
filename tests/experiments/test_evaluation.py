"""How a network is judged, against slow arithmetic; the sample, the noise and the sizes that figures are made from."""

import math
from statistics import NormalDist

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import supermask_jax as sm
from experiments.data import load as data
from experiments.training import evaluation, recipe
from experiments.training import fit as runner
from experiments.training.evaluation import Evaluator, Held, make_flow, noise_like
from supermask_jax import metrics, models

KEY = jax.random.key(0)


class Linear:
    """The smallest network: logits are pixels times a matrix."""

    def apply(self, variables, images):
        return images.reshape(len(images), -1) @ variables["params"]["w"]


def dataset_of(images, labels, mean=0.4, std=0.25):
    return data.Dataset("made up", images, labels, images, labels, mean, std, source="made up")


def pictures(examples, seed):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (examples, 4, 3, 1)).astype(np.uint8)


def softmax(logits):
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def normalised(images, mean=0.4, std=0.25):
    return ((images.astype(np.float64) / 255 - mean) / std).reshape(len(images), -1)


@pytest.fixture(scope="module")
def judged():
    """(the evaluator, the network, 301 images: a batch, and one that is mostly padding; their labels)."""
    rng = np.random.default_rng(1)
    w = rng.normal(0, 0.5, (12, 10)).astype(np.float32)
    images = pictures(301, seed=2)
    logits = normalised(images) @ w + rng.gumbel(size=(301, 10))  # so that the network is right about as often as sure
    labels = logits.argmax(axis=1).astype(np.int32)
    evaluator = Evaluator(sm.identity, sm.identity, Linear(), dataset_of(images, labels))
    return evaluator, w, images, labels


def judge(judged, others=None):
    evaluator, w, images, labels = judged
    return evaluator.judge({"w": jnp.asarray(w)}, Held("test", images, labels), others or {})


# What a network is judged by.


def test_calibration_and_brier_score_are_those_of_all_examples(judged):
    _, w, images, labels = judged
    got, p = judge(judged), softmax(normalised(images) @ w)
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


def test_adversarial_accuracy_is_that_of_the_closed_form_gradient(judged):
    """The loss's gradient by a pixel is (p - onehot) w^T / std; each pixel moves 8/255 along its sign, in [0, 1]."""
    _, w, images, labels = judged
    slope = (softmax(normalised(images) @ w) - np.eye(10)[labels]) @ w.T.astype(np.float64)
    moved = np.clip(images.reshape(301, -1) / 255 + 8 / 255 * np.sign(slope), 0, 1)
    hits = ((moved - 0.4) / 0.25 @ w).argmax(axis=1) == labels
    got = judge(judged)["fgsm_accuracy"]
    assert got == pytest.approx(hits.mean(), abs=1e-9)
    assert 0.1 < got < np.mean((normalised(images) @ w).argmax(axis=1) == labels) - 0.1


def test_strangers_are_told_by_the_highest_probability_of_every_image(judged):
    _, w, images, _ = judged
    others = {"many": pictures(260, seed=3) // 3, "few": pictures(7, seed=4), "itself": images}
    got = judge(judged, others)["ood_auroc"]
    inside = softmax(normalised(images) @ w).max(axis=1)
    for name, strange in others.items():
        outside = softmax(normalised(strange) @ w).max(axis=1)
        above = (inside[:, None] > outside[None, :]).mean() + 0.5 * (inside[:, None] == outside[None, :]).mean()
        assert got[name] == pytest.approx(above, abs=2e-4), name
    assert set(got) == set(others) and got["itself"] == 0.5 and abs(got["many"] - 0.5) > 0.05


@pytest.mark.parametrize("examples", [1, 250, 301])
def test_logits_are_those_of_every_image_in_order(judged, examples):
    evaluator, w, images, _ = judged
    got = evaluator._all_logits({"w": jnp.asarray(w)}, images[:examples])[0]
    np.testing.assert_allclose(got, normalised(images[:examples]) @ w, rtol=1e-4, atol=1e-4)


def test_the_figures_are_those_of_the_metrics_of_all_logits(judged):
    _, w, images, labels = judged
    logits = jnp.asarray(normalised(images) @ w, jnp.float32)
    got = judge(judged)
    assert got["ece"] == pytest.approx(float(metrics.expected_calibration_error(logits, labels)), rel=1e-4)
    assert got["brier"] == pytest.approx(float(metrics.brier(logits, labels)), rel=1e-4)
    assert set(got) == {"ece", "brier", "reliability", "fgsm_accuracy", "ood_auroc"} and got["ood_auroc"] == {}


# Noise.


def test_noise_is_drawn_from_the_pixels_mean_and_deviation_by_the_seed_alone():
    dataset = dataset_of(pictures(5, seed=0), np.zeros(5, np.int32), mean=0.5, std=0.1)
    noise = noise_like(dataset, 3)
    assert noise.dtype == np.uint8 and noise.shape == (2000, 4, 3, 1)
    np.testing.assert_allclose([noise.mean() / 255, noise.std() / 255], [0.5, 0.1], rtol=0.02)
    np.testing.assert_array_equal(noise, noise_like(dataset, 3))
    others = dataset_of(pictures(8, seed=1), np.ones(8, np.int32), mean=0.5, std=0.1)
    np.testing.assert_array_equal(noise, noise_like(others, 3))  # the images themselves do not matter
    assert np.mean(noise != noise_like(dataset, 4)) > 0.9
    assert noise_like(dataset, 3, examples=7).shape == (7, 4, 3, 1)


def test_noise_is_cut_off_at_black_and_white():
    """Of a dark set, as digits are: what would be below 0 becomes 0, and nothing wraps round to white."""
    noise = noise_like(dataset_of(pictures(5, seed=0), np.zeros(5, np.int32), mean=0.1307, std=0.3081), 0) / 255
    bell = NormalDist(0.1307, 0.3081)
    assert np.mean(noise == 0) == pytest.approx(bell.cdf(0.5 / 255), abs=0.01)
    assert np.mean(noise == 1) == pytest.approx(1 - bell.cdf(254.5 / 255), abs=0.003)
    assert np.mean(noise < 0.3) == pytest.approx(bell.cdf(0.3), abs=0.01)


# Gradient flow.


def curved(params, model_state, batch, key):
    """A loss whose slope by each parameter is its factor of the batch times the parameter."""
    loss = sum(jnp.sum(batch[name] * params[name] ** 2) / 2 for name in params)
    return loss, (model_state, {})


def test_gradient_flow_is_the_norm_over_the_active_weights():
    params = {"a": jnp.array([[1.0, 2.0, 3.0]]), "b": jnp.array([4.0])}
    flow = make_flow(curved, {"a": jnp.array([[3.0, 2.0, 1.0]]), "b": jnp.array([3.0])})
    masks = {"a": jnp.array([[1.0, 1.0, 0.0]]), "b": None}
    assert flow(params, masks) == pytest.approx(5)  # the slopes are 3, 4, 3 and, of what has no mask, 12
    assert flow(params, {"a": jnp.array([[0.0, 1.0, 1.0]]), "b": jnp.array([1.0])}) == pytest.approx(13)
    assert flow({"a": 2 * params["a"], "b": params["b"]}, masks) == pytest.approx(10)
    assert flow(params, {"a": jnp.zeros((1, 3)), "b": None}) == 0
    assert flow(params, {"a": None, "b": None}) == pytest.approx(math.sqrt(9 + 16 + 9 + 144))  # dense: all
    assert isinstance(flow(params, masks), float)


def test_gradient_flow_of_a_network_is_that_of_its_training_loss():
    model = models.MLP(10, use_bias=False, hidden=(5,))
    weights = model.init(KEY, jnp.zeros((1, 4, 3, 1)))["params"]
    masks = sm.random_masks(jax.random.key(1), weights, 0.3)
    params = jax.tree.map(jnp.multiply, weights, masks)
    batch = {"image": jnp.asarray(pictures(20, seed=5)), "label": jnp.arange(20) % 10, "weight": jnp.ones(20)}

    def loss(params):
        logits = model.apply({"params": params}, jnp.asarray(normalised(pictures(20, seed=5)), jnp.float32))
        return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(20), jnp.arange(20) % 10])

    slopes = jax.tree.map(lambda slope, mask: np.asarray(slope)[np.asarray(mask) == 1], jax.grad(loss)(params), masks)
    expected = np.linalg.norm(np.concatenate(jax.tree.leaves(slopes)))
    flow = make_flow(recipe.make_loss(model, 0.4, 0.25), batch)
    assert flow(params, masks) == pytest.approx(expected, rel=1e-4)
    assert flow(params, sm.lottery.full_masks(weights)) > 1.2 * expected


# The sample of the training images that saliencies and gradient flow see.


def uneven(classes):
    """A training set with so many images of each class, in which the pixels of each image say which it is."""
    labels = np.repeat(np.arange(10, dtype=np.int32), classes)
    labels = np.random.default_rng(0).permutation(labels)
    images = np.arange(len(labels), dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 1), np.uint8)
    return dataset_of(images, labels)


def test_a_sample_holds_so_many_of_each_class_in_the_order_of_the_classes():
    dataset = uneven([20, 9, 3, 20, 20, 20, 20, 20, 20, 0])
    batch = runner.class_sample(dataset, KEY, 9)
    counts = [9, 9, 3, 9, 9, 9, 9, 9, 9, 0]  # all there are, where they are fewer
    np.testing.assert_array_equal(batch["label"], np.repeat(np.arange(10), counts))
    which = np.asarray(batch["image"])[:, 0, 0, 0]
    assert batch["image"].dtype == jnp.uint8 and batch["image"].shape == (sum(counts), 2, 2, 1)
    np.testing.assert_array_equal(dataset.train_labels[which], batch["label"])  # each image with its own label
    assert len(set(which.tolist())) == len(which)  # and none twice
    np.testing.assert_array_equal(batch["weight"], np.ones(sum(counts)))


def test_the_key_decides_which_images_are_in_a_sample():
    dataset = uneven([20] * 10)
    one, again, other = (
        np.asarray(runner.class_sample(dataset, jax.random.key(seed), 5)["image"])[:, 0, 0, 0] for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(one, again)
    assert set(one.tolist()) != set(other.tolist())
    wider = np.asarray(runner.class_sample(dataset, jax.random.key(1), 8)["image"])[:, 0, 0, 0]
    assert set(one.tolist()) < set(wider.tolist())


# Sizes.


@pytest.mark.parametrize("use_bias", [False, True])
def test_sizes_count_what_the_masks_keep(use_bias):
    model = models.MLP(2, use_bias=use_bias, hidden=(3,))
    weights = model.init(KEY, jnp.zeros((1, 2, 2, 1)))["params"]
    masks = jax.tree.map(lambda _: None, weights)
    masks["Dense_0"]["kernel"] = jnp.array([[1.0, 0, 0], [0, 0, 1], [1, 0, 0], [1, 0, 0]])
    masks["Dense_1"]["kernel"] = jnp.array([[1.0, 1], [0, 0], [0, 1]])
    biases = 5 if use_bias else 0
    got = runner.sizes(model, weights, masks, (2, 2, 1))
    assert got["layers"] == {
        "Dense_0/kernel": {"size": 12, "kept": 4, "density": 4 / 12},
        "Dense_1/kernel": {"size": 6, "kept": 3, "density": 0.5},
    }
    assert (got["parameters"], got["flops"]) == (7 + biases, 2 * 7)
    dense = runner.sizes(model, weights, jax.tree.map(lambda _: None, weights), (2, 2, 1))
    assert {path: layer["kept"] for path, layer in dense["layers"].items()} == {
        "Dense_0/kernel": 12,
        "Dense_1/kernel": 6,
    }
    assert (dense["parameters"], dense["flops"]) == (18 + biases, 2 * 18)


def test_padding_fills_the_last_batch_and_nothing_else():
    part = np.arange(1, 302, dtype=np.int32)
    batches = evaluation.in_batches(part, 250)
    assert batches.shape == (2, 250)
    np.testing.assert_array_equal(batches.ravel(), [*part, *[0] * 199])
    np.testing.assert_array_equal(evaluation.in_batches(part[:250], 250), part[None, :250])
