"""Layers that masks empty are warned of on every path that makes masks."""

import warnings

import jax
import jax.numpy as jnp
import pytest

import supermask_jax as sm
from supermask_jax import dynamic, lottery

SCORES = {"first": jnp.arange(1.0, 31), "last": -jnp.arange(1.0, 5), "bias": None}
STACK = {"layers": {"kernel": jnp.arange(48.0).reshape(3, 4, 4)}}
LAYOUT = sm.describe(None, STACK, axes={"layers/kernel": "stack in out"})
ONES = {"first": jnp.ones(30), "last": jnp.ones(4), "bias": None}
DENSER = "a higher density or count there keeps a weight"
WAYS = {
    "counts": (lambda: sm.keep_highest(SCORES, {"first": 3, "last": 0}), DENSER),
    "density": (lambda: sm.layerwise_masks(SCORES, {"first": 0.5, "last": 0}), DENSER),
    "edge-popup": (lambda: sm.edge_popup({"first": 0.5, "last": 0.0})(SCORES, None), DENSER),
    "random": (lambda: sm.random_masks(jax.random.key(0), SCORES, {"first": 0.5, "last": 0.0}, where=every), DENSER),
    "ticket": (lambda: lottery.prune(SCORES, ONES, {"first": 0.5, "last": 1.0}, scope="layer"), DENSER),
    "gradual": (lambda: dynamic.magnitude_masks(SCORES, ONES, {"first": 0.5, "last": 0.0}), DENSER),
    "global": (lambda: sm.global_masks(SCORES, 0.1), "minimum=1 keeps a weight in every layer"),
    "threshold": (lambda: sm.threshold(0.5)(SCORES, None), "no score there is above 0.5"),
    "bernoulli": (lambda: sm.bernoulli()(SCORES, None), "the scores there are too low"),
    "rescaled": (lambda: sm.rescaled(sm.bernoulli())(SCORES, None), "the scores there are too low"),
}


def every(path, leaf):
    return True


@pytest.mark.parametrize("way", WAYS)
def test_a_layer_that_keeps_nothing_is_named(way):
    make, advice = WAYS[way]
    with pytest.warns(UserWarning, match=f"^no weight is kept in last; {advice}$"):
        masks = make()
    assert masks["first"].any()
    assert not masks["last"].any()


def test_a_layer_of_a_stack_is_named():
    with pytest.warns(UserWarning, match=r"no weight is kept in layers/kernel\[1\]; a higher"):
        sm.layerwise_masks(STACK, {f"layers/kernel[{i}]": part for i, part in enumerate((0.5, 0, 1))}, layout=LAYOUT)


def test_counts_are_known_under_jit():
    with pytest.warns(UserWarning, match="no weight is kept in last"):
        jax.jit(lambda scores: sm.edge_popup({"first": 0.5, "last": 0.0})(scores, None))(SCORES)


@pytest.mark.filterwarnings("error")
def test_nothing_is_said_of_layers_that_had_nothing_or_where_nothing_was_asked_for():
    within = {**ONES, "last": jnp.zeros(4)}
    counts = {"first": 3, "last": 0}
    sm.keep_highest(SCORES, counts, within)
    lottery.prune(SCORES, within, 0.5, scope="layer")
    lottery.random_like(jax.random.key(0), within)
    sm.keep_highest(SCORES, {"first": 0, "last": 0})
    sm.layerwise_masks({"first": jnp.ones(3), "none": jnp.ones((0, 2))}, 0.5)
    jax.jit(lambda within: sm.keep_highest(SCORES, counts, within))(within)
    jax.jit(sm.bernoulli())(SCORES, None)
    sm.bernoulli()({"bias": None}, None)
    assert warnings.filters[0][0] == "error"


@pytest.mark.filterwarnings("error")
def test_an_update_that_drops_all_of_a_layer_and_grows_it_again_says_nothing():
    masks = dynamic.drop_and_grow(SCORES, ONES, SCORES, 1.0)
    assert {path: int(mask.sum()) for path, mask in masks.items() if mask is not None} == {"first": 30, "last": 4}
