"""SNIP and GraSP by published code on the same weights and images; the meta of e_snip_grasp.npz says which code."""

import functools
import json
from fractions import Fraction
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import supermask_jax as sm
from supermask_jax import saliency

pytestmark = pytest.mark.usefixtures("full_precision")

with np.load(Path(__file__).parents[1] / "golden" / "e_snip_grasp.npz") as arrays:
    GOLDEN = dict(arrays)
META = json.loads(str(GOLDEN.pop("meta")))
CASES = {case["kind"]: case for case in META["cases"]}
TOLERANCE = {"snip": 2e-5, "grasp": 1e-4}  # of the largest score
TEMPERATURE = {"snip": 1, "grasp": 200}


def golden(case, prefix):
    start = f"{case['case']}{prefix}/"
    return {name.removeprefix(start): array for name, array in GOLDEN.items() if name.startswith(start)}


# The three nets on torch's own layout: weights (out, in, height, width), images NCHW, in a flat dictionary.


def conv(x, kernel, stride=1):
    edge = kernel.shape[-1] // 2
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), [(edge, edge)] * 2, dimension_numbers=("NCHW", "OIHW", "NCHW")
    )


def per_channel(vector):
    return vector[None, :, None, None]


def dense(x, params, name):
    return x @ params[f"{name}.weight"].T + params[f"{name}.bias"][None]


def mlp(params, x):
    x = x.reshape(len(x), -1)
    for i in range(2):
        x = jax.nn.relu(dense(x, params, f"fc.{i}"))
    return dense(x, params, "fc.2")


def conv_net(params, x):
    for name in ("conv1", "conv2"):
        x = jax.nn.relu(conv(x, params[f"{name}.weight"]) + per_channel(params[f"{name}.bias"]))
        n, c, h, w = x.shape
        x = x.reshape(n, c, h // 2, 2, w // 2, 2).mean((3, 5))
    return dense(x.reshape(len(x), -1), params, "fc")


def batch_norm(x, params, name):
    """In training mode: with the statistics of the batch."""
    mean, variance = x.mean((0, 2, 3), keepdims=True), x.var((0, 2, 3), keepdims=True)
    scale, bias = per_channel(params[f"{name}.weight"]), per_channel(params[f"{name}.bias"])
    return (x - mean) / jnp.sqrt(variance + 1e-5) * scale + bias


def resnet(params, x):
    x = jax.nn.relu(batch_norm(conv(x, params["conv.weight"]), params, "bn"))
    for i in range(3):
        block, stride = f"blocks.{i}", 1 if i == 0 else 2
        y = jax.nn.relu(batch_norm(conv(x, params[f"{block}.conv1.weight"], stride), params, f"{block}.bn1"))
        y = batch_norm(conv(y, params[f"{block}.conv2.weight"]), params, f"{block}.bn2")
        if stride == 2:
            x = batch_norm(conv(x, params[f"{block}.shortcut.0.weight"], 2), params, f"{block}.shortcut.1")
        x = jax.nn.relu(x + y)
    return dense(x.mean((2, 3)), params, "fc")


NETS = {"mlp": mlp, "conv": conv_net, "resnet": resnet}


def loss_fn(net, method):
    def loss(params, model_state, batch, key):
        images, labels = batch
        logits = net(params, images) / TEMPERATURE[method]
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1).mean(), (model_state, {})

    return loss


@functools.cache
def scores_of(kind):
    """{method: {layer: scores}}, compiled once for each net."""
    case, net = CASES[kind], NETS[kind]
    x, y, order = (GOLDEN[f"{case['case']}{name}"] for name in ("x_grasp", "y_grasp", "snip_perm"))

    @jax.jit
    def both(weights, batch, halves):
        return {
            "snip": saliency.snip(loss_fn(net, "snip"), weights, batch),
            "grasp": saliency.grasp(loss_fn(net, "grasp"), weights, halves),
        }

    found = both(golden(case, "param"), (x[order], y[order]), [(x[:30], y[:30]), (x[30:], y[30:])])
    kept = {method: {path: score for path, score in scores.items() if score is not None}
            for method, scores in found.items()}  # fmt: skip
    return {method: {path.removesuffix(".weight"): score for path, score in scores.items()}
            for method, scores in kept.items()}  # fmt: skip


# Compiling the ResNet takes most of the time of this room.
BY_COST = [pytest.param(kind, marks=pytest.mark.slow if kind == "resnet" else ()) for kind in CASES]


@pytest.mark.parametrize("method", ("snip", "grasp"))
@pytest.mark.parametrize("kind", BY_COST)
def test_scores_equal_the_published_codes(kind, method):
    ours, theirs = scores_of(kind)[method], golden(CASES[kind], f"{method}_raw")
    assert set(ours) == set(theirs) == set(CASES[kind]["layers"])  # no bias, and nothing of BatchNorm
    largest = max(np.abs(score).max() for score in theirs.values())
    sign = {"snip": 1, "grasp": -1}[method]  # they remove the highest of GraSP's scores; we keep the highest
    for layer, score in theirs.items():
        np.testing.assert_allclose(ours[layer], sign * score, rtol=0, atol=TOLERANCE[method] * largest, err_msg=layer)


@pytest.mark.parametrize("method", ("snip", "grasp"))
@pytest.mark.parametrize("kind", BY_COST)
def test_masks_equal_the_published_codes(kind, method):
    results = [result for result in CASES[kind]["results"] if result["method"] == method]
    assert [result["density"] for result in results] == [0.1, 0.5]
    for result in results:
        theirs = golden(CASES[kind], f"{method}_mask_{result['density']}")
        masks = sm.global_masks(scores_of(kind)[method], Fraction(result["ones"], CASES[kind]["n"]))
        chex.assert_trees_all_equal({layer: np.asarray(mask, np.uint8) for layer, mask in masks.items()}, theirs)


# Where our own count differs: they round the number kept (SNIP) or removed (GraSP) down, and GraSP's code keeps its
# threshold as well, one weight more than the number it asks for. {(net, density): (ours, theirs by SNIP, by GraSP)}
COUNTS = {
    ("mlp", 0.1): (432, 432, 433),
    ("mlp", 0.5): (2160, 2160, 2161),
    ("conv", 0.1): (188, 187, 189),
    ("conv", 0.5): (937, 937, 938),
    ("resnet", 0.1): (504, 503, 505),
    ("resnet", 0.5): (2518, 2518, 2519),
}


def test_where_our_counts_differ_from_theirs():
    for (kind, density), (ours, snip, grasp) in COUNTS.items():
        ones = {r["method"]: r["ones"] for r in CASES[kind]["results"] if r["density"] == density}
        assert ones == {"snip": snip, "grasp": grasp}
        assert sm.keep_count(density, CASES[kind]["n"]) == ours
