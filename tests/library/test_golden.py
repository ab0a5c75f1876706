"""What published code computed on the same inputs; tests/golden/README.md says which code."""

import functools
import itertools
import json
import math
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest

import supermask_jax as sm
from supermask_jax.models import max_pool

pytestmark = pytest.mark.usefixtures("full_precision")

GOLDEN = Path(__file__).parents[1] / "golden"


@functools.cache
def load(name):
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        loaded = dict(arrays)
    return loaded, json.loads(str(loaded.pop("meta", "null")))


keep_highest = jax.jit(lambda scores, counts: sm.keep_highest(scores, counts))


@pytest.mark.parametrize(
    "case",
    load("a_getsubnet")[1]["cases"],
    ids=lambda case: f"{case['id']}-{case['kind']}-{'x'.join(map(str, case['shape']))}-{case['k']}",
)
def test_masks_equal_hidden_networks_for_its_own_number_of_ones(case):
    """Exactly, but among scores tied at the cut: the original's order there is its sort's, ours a stable sort's."""
    arrays, _ = load("a_getsubnet")
    scores = arrays[f"{case['id']}_scores"]
    mask = keep_highest({"": np.abs(scores) if case["abs"] else scores}, {"": np.int32(case["ones"])})[""]
    mask, theirs = np.asarray(mask), arrays[f"{case['id']}_mask"]
    stable = arrays.get(f"{case['id']}_mask_stable_sort", theirs)
    ambiguous = arrays.get(f"{case['id']}_ambiguous", np.zeros(scores.shape)).astype(bool)
    assert mask.sum() == case["ones"] and ambiguous.sum() == case["ambiguous"]
    np.testing.assert_array_equal(mask[~ambiguous], theirs[~ambiguous])
    np.testing.assert_array_equal(mask, stable)


def test_the_golden_masks_hold_ties_signs_and_densities_other_than_a_half():
    arrays, meta = load("a_getsubnet")
    cases = meta["cases"]
    assert {0.0, 0.3, 0.5, 0.7, 1.0} <= {case["k"] for case in cases}
    assert {case["abs"] for case in cases} == {True, False}
    assert sum(case["ambiguous"] > 0 for case in cases) > 20
    assert sum(f"{case['id']}_mask_stable_sort" in arrays for case in cases) > 20


def test_the_straight_through_gradient_equals_hidden_networks():
    arrays, _ = load("a_getsubnet")
    mask_fn = sm.edge_popup(0.5)
    gradient = jax.jit(jax.grad(lambda s: jnp.vdot(arrays["ste_A"], mask_fn({"": s}, None)[""])))(arrays["ste_scores"])
    np.testing.assert_array_equal(gradient, arrays["ste_grad"])
    assert gradient[arrays["ste_scores"] == 0].tolist() == [0.0]  # sign(0) is 0


class GoldenNet(nn.Module):
    """The published MNIST net without its dropout, and narrower: no ReLU after the second convolution, no biases."""

    widths: tuple[int, int, int]

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(self.widths[0], (3, 3), padding="VALID", use_bias=False, name="conv1")(x))
        x = max_pool(nn.Conv(self.widths[1], (3, 3), padding="VALID", use_bias=False, name="conv2")(x))
        x = nn.relu(nn.Dense(self.widths[2], use_bias=False, name="fc1")(x.reshape(len(x), -1)))
        return nn.Dense(10, use_bias=False, name="fc2")(x)


LAYERS = ("conv1", "conv2", "fc1", "fc2")


def to_flax(arrays):
    """{layer: {"kernel": ...}} from PyTorch's layout, in which fc1 reads the channels of a picture first."""

    def kernel(layer, array):
        if array.ndim == 4:
            return array.transpose(2, 3, 1, 0)
        if layer == "fc1":
            channels, side = 16, 12
            array = array.reshape(-1, channels, side, side).transpose(0, 2, 3, 1).reshape(len(array), -1)
        return array.T

    return {layer: {"kernel": jnp.asarray(kernel(layer, arrays[layer]))} for layer in LAYERS}


def thin(layer, array):
    return array[:, ::8] if layer == "fc1" else array  # the rows that b_runs.npz holds; they are columns in Flax


def golden_layers(arrays, prefix):
    """{layer: kernel}, of fc1 only what `thin` leaves."""
    return {layer: tree["kernel"] for layer, tree in to_flax({n: arrays[prefix + n] for n in LAYERS}).items()}


def golden_masks(arrays, prefix):
    shapes = {layer: load("b_weights")[0][layer].shape for layer in LAYERS}
    masks = {n: np.unpackbits(arrays[prefix + n])[: math.prod(shapes[n])].reshape(shapes[n]) for n in LAYERS}
    return to_flax(masks)


def normalised(images):
    return jnp.asarray(((images / np.float32(255) - np.float32(0.1307)) / np.float32(0.3081))[..., None], jnp.float32)


def cross_entropy(model):
    def loss_fn(params, model_state, batch, key):
        logits = model.apply({"params": params}, batch[0])
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()
        return loss, (model_state, {})

    return loss_fn


def sgd(run):
    """torch's: the decay is added to the gradient, before the momentum. Its rates are state: one compile for all."""
    steps = optax.inject_hyperparams(optax.sgd)(learning_rate=run["lr"], momentum=run["momentum"])
    return optax.chain(optax.add_decayed_weights(run["wd"]), steps)


@functools.cache
def compiled(density, decay):
    """(step, evaluate) of the golden net, compiled once for all runs at this density."""
    model, mask_fn = GoldenNet(tuple(load("b_runs")[1]["widths"])), sm.edge_popup(density)
    tx = sgd({"wd": decay, "lr": 0.0, "momentum": 0.0})  # the state brings the rates of its run

    def evaluate(subnet, images):
        masks = mask_fn(subnet.scores, None)
        return masks, model.apply({"params": sm.subnetwork(sm.identity, subnet._replace(scores=masks))}, images)

    return jax.jit(sm.make_train_step(mask_fn, cross_entropy(model), tx, learns="scores")), jax.jit(evaluate)


def start():
    """The network before the first step."""
    return sm.Subnet(weights=to_flax(load("b_weights")[0]), scores=to_flax(load("b_scores")[0]))


def batch(t, size):
    images = load("b_images")[0]
    rows = slice(t * size, (t + 1) * size)
    return normalised(images["x_train_u8"][rows]), jnp.asarray(images["y_train"][rows], jnp.int32)


def test_first_masks_and_gradients_equal_hidden_networks():
    runs, meta = load("b_runs")
    run, subnet = meta["runs"][0], start()
    mask_fn, loss_fn = sm.edge_popup(run["k"]), cross_entropy(GoldenNet(tuple(meta["widths"])))

    @jax.jit
    def first(scores, batch):
        def loss_of(scores):
            return loss_fn(sm.subnetwork(mask_fn, subnet._replace(scores=scores)), None, batch, None)[0]

        return mask_fn(scores, None), jax.grad(loss_of)(scores)

    masks, gradients = first(subnet.scores, batch(0, run["bs"]))
    jax.tree.map(np.testing.assert_array_equal, masks, golden_masks(runs, "mask0_"))
    for layer, golden in golden_layers(runs, "grad0_").items():
        ours = np.asarray(thin(layer, gradients[layer]["kernel"]))
        np.testing.assert_allclose(ours, golden, rtol=0, atol=2e-5 * np.abs(golden).max(), err_msg=layer)


@pytest.mark.parametrize("run", load("b_runs")[1]["runs"], ids=lambda run: f"lr={run['lr']}")
def test_twenty_steps_of_edge_popup_follow_hidden_networks(run):
    """Losses, scores, masks, the number of masks flipped in each step, and the test logits at the end."""
    runs, meta = load("b_runs")
    prefix = f"run{meta['runs'].index(run)}_"
    golden = {name.removeprefix(prefix): array for name, array in runs.items() if name.startswith(prefix)}
    subnet, (step, evaluate) = start(), compiled(run["k"], run["wd"])
    test_images = normalised(load("b_images")[0]["x_test_u8"])
    for kernel in jax.tree.leaves(subnet.weights):  # our count and the published one agree here, so edge_popup's own
        assert sm.keep_count(run["k"], kernel.size) == kernel.size - int((1 - run["k"]) * kernel.size)
    state = sm.init_state(subnet, sgd(run), jax.random.key(0), learns="scores")
    before, _ = evaluate(subnet, test_images)
    for t in range(run["steps"]):
        state, metrics = step(state, batch(t, run["bs"]))
        assert float(metrics["loss"]) == pytest.approx(golden["loss"][t], abs=1e-5), f"step {t}"
        after, logits = evaluate(state.subnet, test_images)
        for i, layer in enumerate(LAYERS):
            flips = np.sum(np.asarray(after[layer]["kernel"]) != np.asarray(before[layer]["kernel"]))
            assert flips == golden["mask_flips"][t, i], f"step {t}, {layer}"
            total = np.abs(np.asarray(state.subnet.scores[layer]["kernel"], np.float64)).sum()
            assert total == pytest.approx(golden["score_l1"][t, i], rel=1e-5), f"step {t}, {layer}"
        before = after
    jax.tree.map(np.testing.assert_array_equal, after, golden_masks(golden, "maskT_"))
    jax.tree.map(np.testing.assert_array_equal, state.subnet.weights, subnet.weights)
    for layer, expected in golden_layers(golden, "sT_").items():
        ours = thin(layer, state.subnet.scores[layer]["kernel"])
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-4, err_msg=layer)
    np.testing.assert_allclose(logits, golden["logits_test"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("density", (0.3, 0.7))
def test_the_steps_follow_the_rule_at_densities_other_than_a_half(density):
    """The golden runs are at a half, where kept and removed cannot be told apart: here the rule is worked by hand."""
    rng = np.random.default_rng(3)
    sizes = (12, 20, 5)
    pairs = list(itertools.pairwise(sizes))
    weights = [rng.normal(0, math.sqrt(2 / n), (n, m)).astype(np.float32) for n, m in pairs]
    scores = [rng.uniform(-1, 1, (n, m)).astype(np.float32) / math.sqrt(n) for n, m in pairs]
    x, labels = rng.normal(size=(40, 12)).astype(np.float32), rng.integers(0, 5, 40).astype(np.int32)
    run = {"lr": 0.3, "momentum": 0.9, "wd": 5e-4, "steps": 10}
    counts = [sm.keep_count(density, w.size) for w in weights]
    losses, final = oracles.edge_popup_mlp(
        weights, scores, x, labels, counts, run["lr"], run["momentum"], run["wd"], run["steps"]
    )

    def loss_fn(params, model_state, batch, key):
        hidden = batch[0]
        for layer in params[:-1]:
            hidden = jax.nn.relu(hidden @ layer)
        logits = hidden @ params[-1]
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()
        return loss, (model_state, {"params": params})

    subnet = sm.Subnet([jnp.asarray(w) for w in weights], [jnp.asarray(s, jnp.float32) for s in scores])
    tx = sgd(run)
    step = jax.jit(sm.make_train_step(sm.edge_popup(density), loss_fn, tx, learns="scores"))
    state = sm.init_state(subnet, tx, jax.random.key(0), learns="scores")
    for t in range(run["steps"]):
        state, metrics = step(state, (x, labels))
        assert float(metrics["loss"]) == pytest.approx(losses[t], abs=1e-5), f"step {t}"
        assert [np.count_nonzero(p) for p in metrics["params"]] == counts, f"step {t}"
    assert losses[-1] < losses[0]
    for ours, expected, used, first, count in zip(
        state.subnet.scores, final, metrics["params"], scores, counts, strict=True
    ):
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5)
        assert ((np.asarray(used) != 0) != oracles.highest(np.abs(first), count)).any()  # masks have changed
