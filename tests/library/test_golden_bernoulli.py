"""Bernoulli supermasks against figures from published code; the meta of g_super.npz says which code, and how."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import supermask_jax as sm
from supermask_jax import initializers
from supermask_jax.supermask import bernoulli_mask

pytestmark = pytest.mark.usefixtures("full_precision")

with np.load(Path(__file__).parents[1] / "golden" / "g_super.npz") as arrays:
    GOLDEN = dict(arrays)
META = json.loads(str(GOLDEN.pop("meta")))
LAYERS = ("0", "1")


def layers(name):
    return {layer: {"kernel": jnp.asarray(GOLDEN[f"super/{name}{layer}"])} for layer in LAYERS}


def published_draws(scores, key):
    """`sm.bernoulli()` but for where its uniforms come from: they are the golden's."""
    return jax.tree.map(bernoulli_mask, scores, layers("u"))


def assert_close(ours, golden, what):
    np.testing.assert_allclose(ours, golden, rtol=0, atol=1e-5 * np.abs(golden).max(), err_msg=what)


def test_sampled_masks_are_the_published_ones():
    masks = published_draws(layers("s"), None)
    for layer in LAYERS:
        np.testing.assert_array_equal(masks[layer]["kernel"], GOLDEN[f"super/mask{layer}"])
        assert 0 < np.mean(GOLDEN[f"super/mask{layer}"]) != 0.5


def test_the_deterministic_masks_are_the_rounded_ones():
    masks = sm.bernoulli()(layers("s"), None)
    for layer in LAYERS:
        np.testing.assert_array_equal(masks[layer]["kernel"], GOLDEN[f"super/rounded_mask{layer}"])


@pytest.mark.parametrize("case", META["super"]["cases"])
def test_logits_losses_and_gradients_are_the_published_ones(case):
    """Zhou et al.'s four variants: the weights as drawn or signed constants, with and without dynamic rescaling."""
    weights = layers("W")
    if case.startswith("signed_constant"):
        weights = initializers.signed_deviation(weights)
    mask_fn = sm.rescaled(published_draws) if case.endswith("dynamic") else published_draws

    @jax.jit
    def logits_of(scores):
        params = sm.subnetwork(mask_fn, sm.Subnet(weights, scores))
        return jax.nn.relu(GOLDEN["super/x"] @ params["0"]["kernel"]) @ params["1"]["kernel"]

    def loss_of(scores):
        return optax.softmax_cross_entropy_with_integer_labels(logits_of(scores), GOLDEN["super/y"]).mean()

    loss, gradients = jax.value_and_grad(loss_of)(layers("s"))
    assert_close(logits_of(layers("s")), GOLDEN[f"super/{case}/logits"], "logits")
    assert float(loss) == pytest.approx(META["super"]["cases"][case]["loss"], rel=1e-5)
    for layer in LAYERS:
        assert_close(gradients[layer]["kernel"], GOLDEN[f"super/{case}/grad_s{layer}"], f"layer {layer}")


@pytest.mark.parametrize("case", META["super"]["cases"])
def test_the_rescaling_factors_are_the_published_ones(case):
    masks = published_draws(layers("s"), None)
    multipliers = META["super"]["cases"][case]["multipliers"]
    assert len(multipliers) == (2 if case.endswith("dynamic") else 0)
    for layer, multiplier in zip(LAYERS, multipliers, strict=False):
        ours = sm.rescaled(sm.identity)(masks)[layer]["kernel"]
        np.testing.assert_allclose(ours, multiplier * masks[layer]["kernel"], rtol=1e-6)


def test_a_sampled_convolution_is_hidden_networks():
    golden = {name.removeprefix("sample/"): jnp.asarray(a) for name, a in GOLDEN.items() if name.startswith("sample/")}

    def run(scores):
        mask = bernoulli_mask(scores, golden["u_HWIO"])
        y = jax.lax.conv_general_dilated(
            golden["x_NHWC"],
            golden["weight_HWIO"] * mask,
            window_strides=(1, 1),
            padding="SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return jnp.vdot(golden["A_NHWC"], y), (mask, y)

    gradient, (mask, y) = jax.grad(run, has_aux=True)(golden["scores_HWIO"])
    np.testing.assert_array_equal(mask, golden["mask_HWIO"])
    assert_close(y, golden["y_NHWC"], "y")
    assert_close(gradient, golden["grad_scores_HWIO"], "gradient")


@pytest.mark.parametrize("layer", (0, 2, 4))
def test_signed_constants_are_the_published_ones(layer):
    weights = {"kernel": GOLDEN[f"action/weights/{layer}"]}
    ours = initializers.signed_deviation(weights)["kernel"]
    np.testing.assert_allclose(ours, GOLDEN[f"action/signed_constant/{layer}"], rtol=1e-6)
