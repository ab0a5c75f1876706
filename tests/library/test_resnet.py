"""The residual networks: their weights layer by layer, shapes, batch statistics, and a train step of a tiny one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import supermask_jax as sm
from supermask_jax import models
from supermask_jax.trees import by_path, prunable

TINY = models.ResNet(5, blocks=(1,), bottleneck=True, width=4)
# Barely optimized: compiling is what takes the time here.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def shapes_of(model, size=224):
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((2, size, size, 3)))
    return variables["params"], variables["batch_stats"]


# From the published tables (He et al. 2016, table 1): the first convolution; stages of blocks of (size, in, out)
# convolutions; the shortcut of each stage's first block; the last layer.
BASIC = [
    7 * 7 * 3 * 64,
    4 * (9 * 64 * 64),
    9 * 64 * 128 + 3 * (9 * 128 * 128) + 64 * 128,
    9 * 128 * 256 + 3 * (9 * 256 * 256) + 128 * 256,
    9 * 256 * 512 + 3 * (9 * 512 * 512) + 256 * 512,
    512 * 1000,
]


def bottlenecks(widen):
    stages, inputs = [], 64
    for blocks, width in ((3, 64), (4, 128), (6, 256), (3, 512)):
        inner, out = width * widen, 4 * width
        first = inputs * inner + 9 * inner * inner + inner * out + inputs * out
        others = out * inner + 9 * inner * inner + inner * out
        stages.append(first + (blocks - 1) * others)
        inputs = out
    return [7 * 7 * 3 * 64, *stages, 2048 * 1000]


@pytest.mark.parametrize(
    ("model", "by_table", "total", "layers"),
    [
        (models.ResNet18(), BASIC, 11_678_912, 21),
        (models.ResNet50(), bottlenecks(1), 25_502_912, 54),
        (models.WideResNet50(), bottlenecks(2), 68_814_016, 54),
    ],
    ids=("resnet-18", "resnet-50", "wide-resnet-50"),
)
def test_the_weights_are_those_of_the_published_tables_and_all_are_kernels(model, by_table, total, layers):
    params, statistics = shapes_of(model)
    sizes = {path: leaf.size for path, leaf in by_path(params).items()}
    stages = [sum(n for path, n in sizes.items() if path.startswith(f"stage_{i}")) for i in range(4)]
    assert [sizes["conv/kernel"], *stages, sizes["dense/kernel"]] == by_table
    assert sum(sizes.values()) == total and len(sizes) == layers
    assert prunable(params).keys() == sizes.keys()
    assert {path.rsplit("/", 1)[1] for path in by_path(statistics)} == {"mean", "var"}


@pytest.mark.parametrize(
    ("model", "published"),
    [
        (models.ResNet18, 11_689_512),
        (models.ResNet34, 21_797_672),
        (models.ResNet50, 25_557_032),
        pytest.param(models.ResNet101, 44_549_160, marks=pytest.mark.slow),
        pytest.param(models.WideResNet50, 68_883_240, marks=pytest.mark.slow),
    ],
)
def test_with_learned_normalisation_and_a_bias_there_are_as_many_parameters_as_torchvision_publishes(model, published):
    params, _ = shapes_of(model(affine=True, bias=True), 64)
    assert sum(leaf.size for leaf in by_path(params).values()) == published
    assert by_path(params)["dense/bias"].shape == (1000,)


@pytest.mark.parametrize("model", [models.ResNet18(), models.ResNet50(10), models.WideResNet50()])
def test_images_of_224_end_at_7_by_7_and_give_logits(model):
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((2, 224, 224, 3)))
    logits, seen = jax.eval_shape(
        lambda v, x: model.apply(v, x, capture_intermediates=True), variables, jnp.zeros((2, 224, 224, 3))
    )
    assert logits.shape == (2, model.classes)
    out = 2048 if model.bottleneck else 512
    blocks = {name: of["__call__"][0].shape for name, of in seen["intermediates"].items() if "block" in name}
    assert len(blocks) == sum(model.blocks)
    assert blocks["stage_0_block_0"][1:3] == (56, 56)
    assert blocks[f"stage_3_block_{model.blocks[3] - 1}"] == (2, 7, 7, out)


def test_the_stride_of_a_bottleneck_is_in_its_3x3_convolution():
    model = models.ResNet50()
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 224, 224, 3)))
    _, seen = jax.eval_shape(
        lambda v, x: model.apply(v, x, capture_intermediates=True), variables, jnp.zeros((1, 224, 224, 3))
    )
    block = seen["intermediates"]["stage_1_block_0"]
    assert [block[f"conv_{i}"]["__call__"][0].shape[1] for i in range(3)] == [56, 28, 28]


def test_a_basic_block_is_the_published_function():
    """On weights of our own: relu(n(conv(relu(n(conv(x))))) + n(shortcut)), n without scale and bias, padded alike."""
    model = models.ResNet(3, blocks=(1, 1), width=4)
    x = jax.random.normal(jax.random.key(1), (2, 32, 32, 3))
    variables = jit(model.init)(jax.random.key(0), x)
    kernels = by_path(variables["params"])

    def conv(x, path, stride, pad):
        dims = ("NHWC", "HWIO", "NHWC")
        kernel = kernels[f"{path}/kernel"]
        return jax.lax.conv_general_dilated(x, kernel, (stride,) * 2, [(pad, pad)] * 2, dimension_numbers=dims)

    def n(x):
        return (x - x.mean((0, 1, 2), keepdims=True)) / jnp.sqrt(x.var((0, 1, 2), keepdims=True) + 1e-5)

    def relu(x):
        return jnp.maximum(x, 0)

    @jit
    def published(x):
        y = relu(n(conv(x, "conv", 2, 3)))
        y = jnp.pad(y, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-np.inf)
        y = jnp.max(jnp.stack([y[:, i : i + 15 : 2, j : j + 15 : 2] for i in range(3) for j in range(3)]), axis=0)
        for stage, stride in ((0, 1), (1, 2)):
            block = f"stage_{stage}_block_0"
            short = n(conv(y, f"{block}/shortcut", stride, 0)) if stage else y
            inner = relu(n(conv(y, f"{block}/conv_0", stride, 1)))
            y = relu(n(conv(inner, f"{block}/conv_1", 1, 1)) + short)
        return y.mean((1, 2)) @ kernels["dense/kernel"]

    logits, _ = jit(lambda v, x: model.apply(v, x, train=True, mutable=["batch_stats"]))(variables, x)
    np.testing.assert_allclose(logits, published(x), rtol=1e-3, atol=1e-4)


@functools.cache
def trained(steps=6):
    """(the state before, after some steps of edge-popup, the losses, the batch)."""

    def loss_fn(params, model_state, batch, key):
        variables = {"params": params, "batch_stats": model_state}
        logits, new = TINY.apply(variables, batch["image"], train=True, mutable=["batch_stats"])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        return losses.mean(), (new["batch_stats"], {})

    batch = {
        "image": jax.random.normal(jax.random.key(1), (6, 32, 32, 3)),
        "label": jnp.arange(6, dtype=jnp.int32) % 5,
    }
    variables = jit(TINY.init)(jax.random.key(0), batch["image"])
    weights = sm.initializers.signed_constant(jax.random.key(2), variables["params"])
    tx = optax.sgd(0.1, 0.9)
    subnet = sm.Subnet(weights, sm.init_scores(jax.random.key(3), weights))
    start = state = sm.init_state(subnet, tx, jax.random.key(4), variables["batch_stats"], learns="scores")
    step, losses = jit(sm.make_train_step(sm.edge_popup(0.3), loss_fn, tx, learns="scores")), []
    for _ in range(steps):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    return start, state, losses, batch


@jit
def evaluated(variables, images):
    return TINY.apply(variables, images)


@jit
def in_training(variables, images):
    return TINY.apply(variables, images, train=True, mutable=["batch_stats"])


@pytest.mark.slow
def test_a_train_step_moves_scores_and_batch_statistics_and_no_weight():
    start, end, losses, _ = trained()
    assert losses[-1] < losses[0]
    jax.tree.map(np.testing.assert_array_equal, end.subnet.weights, start.subnet.weights)
    for before, after in ((start.subnet.scores, end.subnet.scores), (start.model_state, end.model_state)):
        changed = jax.tree.map(lambda a, b: bool(np.any(np.asarray(a) != np.asarray(b))), before, after)
        assert all(jax.tree.leaves(changed)), changed


def test_evaluation_normalises_by_running_statistics_and_training_by_the_batch():
    _, state, _, batch = trained()
    variables = {"params": state.subnet.weights, "batch_stats": state.model_state}
    together = evaluated(variables, batch["image"])
    np.testing.assert_allclose(evaluated(variables, batch["image"][:2]), together[:2], rtol=1e-4, atol=1e-5)
    others = variables | {"batch_stats": jax.tree.map(jnp.ones_like, state.model_state)}
    assert not np.allclose(evaluated(others, batch["image"]), together)
    of_batch, _ = in_training(variables, batch["image"])
    np.testing.assert_array_equal(of_batch, in_training(others, batch["image"])[0])


def test_with_the_axis_name_parts_are_normalised_as_one_batch_and_evaluation_needs_no_axis():
    _, state, _, batch = trained()
    variables = {"params": state.subnet.weights, "batch_stats": state.model_state}
    model = TINY.clone(axis_name="parts")

    def part(images):
        return model.apply(variables, images, train=True, mutable=["batch_stats"])

    logits, new = jit(jax.vmap(part, axis_name="parts"))(batch["image"].reshape(2, 3, 32, 32, 3))
    expected, whole = in_training(variables, batch["image"])
    np.testing.assert_allclose(logits.reshape(6, 5), expected, rtol=1e-3, atol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[0], b, rtol=1e-4, atol=1e-5), new, whole)
    alone = jax.eval_shape(model.apply, variables, batch["image"])
    assert alone.shape == (6, 5)
