"""Conv2 to Conv8, VGG, wide and small ResNets: published numbers of weights, and their functions written out."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from supermask_jax import models
from supermask_jax.models import zoo
from supermask_jax.trees import by_path

jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # compiling takes the time


def shapes_of(model, size=32):
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, size, size, 3)))["params"]


def weights_of(model):
    return sum(leaf.size for path, leaf in by_path(shapes_of(model)).items() if path.endswith("kernel"))


@pytest.mark.parametrize(
    ("model", "weights"),
    (
        (models.ConvN(depth=2), 4_300_992),
        (models.ConvN(depth=4), 2_425_024),
        (models.ConvN(depth=6), 2_261_184),
        (models.ConvN(depth=8), 5_275_840),
        (models.VGG(depth=11), 9_222_848),
        (models.VGG(depth=16), 14_715_584),
        (models.VGG(depth=19), 20_024_000),
        (models.WideCifarResNet(depth=22, widen=2), 1_076_912),
        (models.WideCifarResNet(depth=28, widen=10), 36_461_232),
        (models.ResNet18(10, small=True), 11_164_352),
    ),
    ids=lambda value: type(value).__name__ if not isinstance(value, int) else None,
)
def test_networks_have_the_published_numbers_of_weights(model, weights):
    """ResNet-18, WRN-28-10 and VGG-16 are published as 11.2, 36.5 and 14.7 million, biases and BatchNorm included."""
    assert weights_of(model) == weights


@pytest.mark.parametrize(("widen", "first", "hidden"), ((0.5, 32, 128), (1.5, 96, 384), (0.001, 1, 1)))
def test_widths_are_scaled_but_for_the_classes(widen, first, hidden):
    shapes = by_path(shapes_of(models.ConvN(depth=2, widen=widen)))
    assert shapes["Conv_0/kernel"].shape == (3, 3, 3, first)
    assert shapes["Dense_1/kernel"].shape == (hidden, hidden) and shapes["Dense_2/kernel"].shape == (hidden, 10)
    block = by_path(shapes_of(models.WideCifarResNet(depth=10, widen=4)))
    assert block["conv/kernel"].shape == (3, 3, 3, 16)
    assert block["stage_2_block_0/conv_0/kernel"].shape == (3, 3, 128, 256)


def drawn(model, size):
    x = jax.random.normal(jax.random.key(1), (3, size, size, 3))
    return jit(model.init)(jax.random.key(0), x), x


def conv(x, kernel, stride=1):
    edge = ((kernel.shape[0] // 2,) * 2,) * 2
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (stride, stride), edge, dimension_numbers=numbers)


def relu(x):
    return jnp.maximum(x, 0)


def normed(x):
    """As at the start: running means of 0, variances of 1."""
    return x / np.sqrt(1 + 1e-5)


def pool(x):
    n, h, w, c = x.shape
    return x[:, : h // 2 * 2, : w // 2 * 2].reshape(n, h // 2, 2, w // 2, 2, c).max((2, 4))


def test_conv4_is_its_function():
    model = models.ConvN(5, depth=4, widen=1 / 16)
    variables, x = drawn(model, 9)
    k = by_path(variables["params"])
    y = x
    for i in range(4):
        y = relu(conv(y, k[f"Conv_{i}/kernel"]))
        y = pool(y) if i % 2 else y
    y = y.reshape(3, -1)
    for i in range(3):
        y = y @ k[f"Dense_{i}/kernel"]
        y = relu(y) if i < 2 else y
    np.testing.assert_allclose(jit(model.apply)(variables, x), y, rtol=1e-4, atol=1e-6)


def test_vgg_11_is_its_function():
    model = models.VGG(5, depth=11, widen=1 / 16)
    variables, x = drawn(model, 32)
    k, y = by_path(variables["params"]), x
    for stage, layers in enumerate((1, 1, 2, 2, 2)):
        for i in range(layers):
            y = relu(normed(conv(y, k[f"stage_{stage}_conv_{i}/kernel"])))
        y = pool(y)
    assert y.shape == (3, 1, 1, 32)
    y = y.mean((1, 2)) @ k["dense/kernel"]
    np.testing.assert_allclose(jit(model.apply)(variables, x), y, rtol=1e-4, atol=1e-6)


def test_a_wide_resnet_is_its_function():
    model = models.WideCifarResNet(5, depth=10, widen=0.5)
    variables, x = drawn(model, 8)
    k = by_path(variables["params"])
    y = conv(x, k["conv/kernel"])
    for stage in range(3):
        name, stride = f"stage_{stage}_block_0", 2 if stage else 1
        z = relu(normed(y))
        y = conv(z, k[f"{name}/shortcut/kernel"], stride)  # the width or the size changes in each
        z = relu(normed(conv(z, k[f"{name}/conv_0/kernel"], stride)))
        y = y + conv(z, k[f"{name}/conv_1/kernel"])
    y = relu(normed(y)).mean((1, 2)) @ k["dense/kernel"]
    np.testing.assert_allclose(jit(model.apply)(variables, x), y, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("model", "says"),
    (
        (models.ConvN(depth=3), "depth must be 2, 4, 6 or 8, got 3"),
        (models.ConvN(depth=10), "depth must be 2, 4, 6 or 8, got 10"),
        (models.VGG(depth=13), "depth must be one of 11, 16, 19, got 13"),
        (models.WideCifarResNet(depth=20), r"depth must be 6 n \+ 4 .*got 20"),
    ),
)
def test_depths_that_are_not_there_are_refused(model, says):
    with pytest.raises(ValueError, match=says):
        shapes_of(model)


@pytest.mark.parametrize(("model", "size"), ((models.VGG(), 28), (models.ConvN(depth=8), 15)))
def test_images_that_are_pooled_away_are_refused(model, size):
    with pytest.raises(ValueError, match="an image of 1 x 1 pixels has no window of 2 x 2: it is too small"):
        shapes_of(model, size)


@pytest.mark.parametrize("make", (zoo.conv_n, zoo.vgg, zoo.wide_resnet, zoo.small_resnet_18))
def test_the_first_and_the_last_kernel_are_where_the_zoo_says(make):
    made = make(7)
    shapes = by_path(shapes_of(made.module))
    assert shapes[made.first].shape[2] == 3 and shapes[made.last].shape[-1] == 7
