"""The user's own model, unchanged: Linen, NNX and Equinox modules and a plain dictionary, none of which knows of masks.

Each trains the scores of a network with frozen weights on a tiny problem, layers in turn at densities 0.3 and 0.7.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
from flax import nnx

import supermask_jax as sm
from supermask_jax.trees import by_path

STEPS = 40
CLASSES = 3


def images():
    """[48, 6, 6, 1] of three noisy patterns, and which one each is."""
    rng = np.random.default_rng(0)
    labels = np.arange(48, dtype=np.int32) % CLASSES
    patterns = rng.normal(size=(CLASSES, 6, 6, 1))
    return (patterns[labels] + 0.3 * rng.normal(size=(48, 6, 6, 1))).astype(np.float32), labels


class Task(NamedTuple):
    """A model as the core sees it."""

    weights: Any
    model_state: Any
    logits: Callable  # (params, model_state, x) -> (logits, model_state)
    fan_ins: dict[str, int]  # by hand, of the leaves that must have scores
    fan_in: Callable = sm.flax_fan_in


class LinenBatchNorm(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(8, (3, 3))(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        return nn.Dense(CLASSES)(x.reshape(len(x), -1))


def linen_with_batch_norm():
    model = LinenBatchNorm()
    variables = jax.jit(functools.partial(model.init, train=False))(jax.random.key(0), images()[0])

    def logits(params, model_state, x):
        out, updated = model.apply({"params": params, **model_state}, x, train=True, mutable=["batch_stats"])
        return out, updated

    model_state = {"batch_stats": variables["batch_stats"]}
    return Task(variables["params"], model_state, logits, {"Conv_0/kernel": 9, "Dense_0/kernel": 6 * 6 * 8})


class LinenAttention(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = x[..., 0]  # each row of the picture is a token
        x = nn.LayerNorm()(x + nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=8)(x, x))
        return nn.Dense(CLASSES)(x.reshape(len(x), -1))


def linen_attention():
    model = LinenAttention()
    weights = jax.jit(model.init)(jax.random.key(0), images()[0])["params"]
    attention = "MultiHeadDotProductAttention_0"
    assert weights[attention]["query"]["kernel"].shape == (6, 2, 4)  # (in, heads, size)
    assert weights[attention]["out"]["kernel"].shape == (2, 4, 6)  # (heads, size, out)
    fan_ins = {
        **{f"{attention}/{name}/kernel": 6 for name in ("query", "key", "value")},
        f"{attention}/out/kernel": 2 * 4,
        "Dense_0/kernel": 6 * 6,
    }
    return Task(weights, None, lambda params, state, x: (model.apply({"params": params}, x), state), fan_ins)


class NnxBatchNorm(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(1, 8, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(8, momentum=0.9, rngs=rngs)
        self.out = nnx.Linear(6 * 6 * 8, CLASSES, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.conv(x)))
        return self.out(x.reshape(len(x), -1))


def nnx_with_batch_norm():
    graph, weights, statistics = nnx.split(NnxBatchNorm(nnx.Rngs(0)), nnx.Param, nnx.BatchStat)

    def logits(params, model_state, x):
        model = nnx.merge(graph, params, model_state, copy=True)  # or the model would write to the step's own arrays
        return model(x), nnx.state(model, nnx.BatchStat)

    return Task(weights, statistics, logits, {"conv/kernel": 9, "out/kernel": 6 * 6 * 8})


class EquinoxConvNet(eqx.Module):
    conv: eqx.nn.Conv2d
    out: eqx.nn.Linear

    def __init__(self, key):
        conv_key, out_key = jax.random.split(key)
        self.conv = eqx.nn.Conv2d(1, 8, 3, key=conv_key)
        self.out = eqx.nn.Linear(8 * 4 * 4, CLASSES, key=out_key)

    def __call__(self, x):
        x = jax.nn.relu(self.conv(x.transpose(2, 0, 1)))
        return self.out(x.reshape(-1))


def equinox_convnet_with_biases():
    weights, static = eqx.partition(EquinoxConvNet(jax.random.key(0)), eqx.is_array)
    assert weights.conv.bias.shape == (8, 1, 1)  # three axes, and still no kernel
    weights = sm.initializers.signed_constant(jax.random.key(3), weights, fan_in=sm.equinox_fan_in)

    def logits(params, model_state, x):
        return jax.vmap(eqx.combine(params, static))(x), model_state

    return Task(weights, None, logits, {"conv/weight": 9, "out/weight": 8 * 4 * 4}, sm.equinox_fan_in)


def dictionary_of_arrays():
    rng = np.random.default_rng(1)

    def layer(inputs, outputs):
        w = rng.normal(0, math.sqrt(2 / inputs), (inputs, outputs))
        return {"w": jnp.asarray(w, jnp.float32), "b": jnp.zeros(outputs, jnp.float32)}

    def logits(params, model_state, x):
        hidden = x.reshape(len(x), -1) @ params["hidden"]["w"] + params["hidden"]["b"][None]
        return jax.nn.relu(hidden) @ params["out"]["w"] + params["out"]["b"][None], model_state

    return Task({"hidden": layer(36, 24), "out": layer(24, CLASSES)}, None, logits, {"hidden/w": 36, "out/w": 24})


TASKS = {
    task.__name__: functools.cache(task)
    for task in (
        linen_with_batch_norm,
        linen_attention,
        nnx_with_batch_norm,
        equinox_convnet_with_biases,
        dictionary_of_arrays,
    )
}


class Step(NamedTuple):
    """On the host: a subnet, and the parameters and the loss that the step from there computed with."""

    subnet: sm.Subnet
    params: Any
    loss: float


class Run(NamedTuple):
    densities: dict[str, float]
    steps: list[Step]
    model_states: tuple[Any, Any]  # before and after
    last: sm.TrainState


@functools.cache
def trained(name):
    """Training of that model's scores; once, for all tests of it."""
    task = TASKS[name]()
    scores = jax.jit(lambda key: sm.init_scores(key, task.weights, fan_in=task.fan_in))(jax.random.key(1))
    densities = {path: (0.3, 0.7)[i % 2] for i, path in enumerate(by_path(scores))}
    batch, tx = images(), optax.sgd(0.1, momentum=0.9)

    def loss_fn(params, model_state, batch, key):
        logits, model_state = task.logits(params, model_state, batch[0])
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()
        return loss, (model_state, {"params": params})

    state = sm.init_state(sm.Subnet(task.weights, scores), tx, jax.random.key(2), task.model_state, learns="scores")
    first_model_state = jax.tree.map(np.array, state.model_state)
    step = jax.jit(sm.make_train_step(sm.edge_popup(densities), loss_fn, tx, learns="scores"))
    steps = []
    for _ in range(STEPS):
        subnet = jax.tree.map(np.array, state.subnet)
        state, metrics = step(state, batch)
        steps.append(Step(subnet, jax.tree.map(np.array, metrics["params"]), float(metrics["loss"])))
    assert step._cache_size() == 1
    return Run(densities, steps, (first_model_state, jax.tree.map(np.array, state.model_state)), state)


@pytest.mark.parametrize("name", TASKS)
def test_kernels_and_nothing_else_have_scores_within_their_fan_in(name):
    task, first = TASKS[name](), trained(name).steps[0]
    scores = by_path(first.subnet.scores)
    assert set(scores) == set(task.fan_ins)
    assert len(by_path(task.weights)) > len(scores)  # there were biases to leave out
    for path, fan_in in task.fan_ins.items():
        largest = np.abs(scores[path]).max() * math.sqrt(fan_in)
        assert 0.8 < largest <= 1 + 1e-6, path


@pytest.mark.parametrize("name", TASKS)
def test_training_the_scores_lowers_the_loss(name):
    losses = [step.loss for step in trained(name).steps]
    assert np.isfinite(losses).all()
    assert np.mean(losses[-5:]) < 0.5 * losses[0]


@pytest.mark.parametrize("name", TASKS)
def test_the_scores_of_every_kernel_move_and_every_weight_stays_bit_identical(name):
    run = trained(name)
    first, last = run.steps[0].subnet, run.last.subnet
    chex.assert_trees_all_equal(last.weights, first.weights)
    before, after = by_path(first.scores), by_path(last.scores)
    for path, scores in before.items():
        assert (np.asarray(after[path]) != scores).any(), path


@pytest.mark.parametrize("name", TASKS)
def test_each_step_uses_exactly_the_weights_of_largest_score_and_all_other_leaves_untouched(name):
    run = trained(name)
    for step in (run.steps[0], run.steps[-1]):
        params, weights, scores = by_path(step.params), by_path(step.subnet.weights), by_path(step.subnet.scores)
        assert set(params) == set(weights)
        for path, weight in weights.items():
            if path not in run.densities:
                np.testing.assert_array_equal(params[path], weight, err_msg=path)
                continue
            assert (weight != 0).all()  # so a kept weight can be told from a pruned one
            count = sm.keep_count(run.densities[path], weight.size)
            assert np.count_nonzero(params[path]) == count, path
            mask = oracles.highest(np.abs(scores[path]), count)
            np.testing.assert_array_equal(params[path], weight * mask, err_msg=path)


@pytest.mark.parametrize("name", ("linen_with_batch_norm", "nnx_with_batch_norm"))
def test_batch_statistics_are_carried_beside_the_subnetwork_and_follow_the_data(name):
    run = trained(name)
    before, after = (by_path(model_state) for model_state in run.model_states)
    assert set(before) == set(after) and len(before) == 2
    for path, statistic in before.items():
        assert (after[path] != statistic).any(), path
    assert not set(before) & set(by_path(run.last.subnet.weights))


def test_the_optimizer_sees_the_scores_and_no_other_leaf():
    run = trained("linen_attention")
    momentum = by_path(run.last.opt_state)
    assert len(momentum) == len(run.densities)
    assert all(np.abs(trace).max() > 0 for trace in momentum.values())
