import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from supermask_jax import models
from supermask_jax.models import zoo
from supermask_jax.trees import by_path


def init(model, shape=(2, 28, 28, 1)):
    x = jax.random.normal(jax.random.key(1), shape)
    return model.init(jax.random.key(0), x)["params"], x


def test_convnet_has_the_published_kernels_and_no_biases():
    params, _ = init(models.MnistConvNet())
    assert {path: leaf.shape for path, leaf in by_path(params).items()} == {
        "Conv_0/kernel": (3, 3, 1, 32),
        "Conv_1/kernel": (3, 3, 32, 64),
        "Dense_0/kernel": (9216, 128),
        "Dense_1/kernel": (128, 10),
    }


def test_convnet_is_the_published_function_without_a_relu_after_the_second_convolution():
    model = models.MnistConvNet()
    params, x = init(model)
    kernels = by_path(params)

    def conv(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    y = jnp.maximum(conv(x, kernels["Conv_0/kernel"]), 0)
    y = conv(y, kernels["Conv_1/kernel"])
    y = jax.lax.reduce_window(y, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    assert y.min() < 0
    y = jnp.maximum(y.reshape(2, -1) @ kernels["Dense_0/kernel"], 0) @ kernels["Dense_1/kernel"]
    np.testing.assert_allclose(model.apply({"params": params}, x), y, rtol=1e-4, atol=1e-5)


def test_channel_dropout_drops_whole_feature_maps_and_dropout_single_units():
    model = models.MnistConvNet(channel_dropout=0.25, dropout=0.5)
    params, x = init(model)
    rngs = {"dropout": jax.random.key(5)}
    _, seen = model.apply({"params": params}, x, train=True, rngs=rngs, capture_intermediates=True)
    channels, units = (seen["intermediates"][f"Dropout_{i}"]["__call__"][0] for i in range(2))
    dropped = np.all(np.asarray(channels) == 0, axis=(1, 2))
    assert 0 < dropped.mean() < 0.6
    assert np.all(np.asarray(channels).transpose(0, 3, 1, 2)[~dropped] != 0)
    assert np.mean(np.asarray(units) == 0) > 0.3
    assert not np.array_equal(
        model.apply({"params": params}, x), model.apply({"params": params}, x, train=True, rngs=rngs)
    )


@pytest.mark.parametrize(("use_bias", "size"), [(True, 266_610), (False, 266_200)])
def test_lenet_has_the_published_number_of_weights(use_bias, size):
    params, _ = init(models.LeNet300100(use_bias=use_bias))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == size


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "shapes"),
    [
        (models.LeNet300100(hidden=(30, 7), use_bias=False), [(784, 30), (30, 7), (7, 10)]),
        (models.LeNet300100(hidden=(5,), use_bias=False), [(784, 5), (5, 10)]),
        (models.MnistConvNet(features=(3, 5, 7)), [(3, 3, 1, 3), (3, 3, 3, 5), (720, 7), (7, 10)]),
    ],
    ids=("lenet", "one_hidden_layer", "convnet"),
)
def test_widths_are_fields_and_the_names_stay(model, shapes):
    params, x = init(model)
    assert [leaf.shape for leaf in by_path(params).values()] == shapes
    assert set(by_path(params)) <= set(by_path(init(models.MnistConvNet())[0])) | {"Dense_2/kernel"}
    assert model.apply({"params": params}, x).shape == (2, 10)


@pytest.mark.parametrize("shape", [(2, 24, 24, 3), (1, 5, 7, 2)])
def test_max_pool_is_reduce_window_and_drops_what_fills_no_window(shape):
    x = jax.random.normal(jax.random.key(0), shape)
    expected = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    chex.assert_trees_all_equal(models.max_pool(x), expected)


@pytest.mark.parametrize("window", [2, 3])
def test_of_inputs_that_tie_for_the_maximum_the_first_gets_the_gradient(window):
    x = jax.random.randint(jax.random.key(0), (2, 6, 7, 3), 0, 3).astype(jnp.float32)  # many ties
    weight = jax.random.normal(jax.random.key(1), (2, 6 // window, 7 // window, 3))
    ours, flax = (
        jax.jit(jax.grad(lambda x, pool=pool: jnp.vdot(weight, pool(x))))(x)
        for pool in (lambda x: models.max_pool(x, window), lambda x: nn.max_pool(x, (window,) * 2, (window,) * 2))
    )
    chex.assert_trees_all_equal(ours, flax)


# The networks by name.

BUILDERS = {
    "mnist_convnet": (28, 28, 1),
    "lenet_300_100": (28, 28, 1),
    "mlp": (28, 28, 1),
    "cnn": (28, 28, 1),
    **dict.fromkeys(("cifar_resnet", "conv_n", "vgg", "wide_resnet", "small_resnet_18"), (32, 32, 3)),
    **dict.fromkeys(("resnet_18", "resnet_34", "resnet_50", "resnet_101", "wide_resnet_50"), (64, 64, 3)),
}


def shapes(architecture, image_shape):
    variables = jax.eval_shape(architecture.module.init, jax.random.key(0), jnp.zeros((1, *image_shape)))
    return {path: leaf.shape for path, leaf in by_path(variables["params"]).items()}


def test_every_builder_is_listed():
    own = {name: value for name, value in vars(zoo).items() if getattr(value, "__module__", "") == zoo.__name__}
    assert set(BUILDERS) == {name for name in own if not name.startswith("_")} - {"Architecture"}


@pytest.mark.parametrize("name", BUILDERS)
def test_the_named_ends_read_the_image_and_make_the_logits(name):
    architecture = getattr(zoo, name)(7)
    of = shapes(architecture, BUILDERS[name])
    inputs = {BUILDERS[name][-1], int(np.prod(BUILDERS[name]))}
    assert of[architecture.first][-2] in inputs and of[architecture.last][-1] == 7
    assert list(of).count(architecture.first) == 1 and architecture.first != architecture.last
    others = [path for path, shape in of.items() if shape[-1] == 7 and path != architecture.last]
    assert others == []


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize(("build", "kind"), [(zoo.mlp, "Dense"), (zoo.cnn, "Conv")])
def test_width_and_depth_make_the_hidden_layers(build, kind, depth):
    architecture = build(5, width=11, depth=depth)
    of = shapes(architecture, (28, 28, 1))
    assert sum(shape[-1] == 11 for shape in of.values()) == depth and len(of) == depth + 1
    assert of[architecture.last][-1] == 5 and of[architecture.first][-1] == 11
    with pytest.raises(ValueError, match="width and depth must be at least 1"):
        build(5, depth=0)


@pytest.mark.parametrize("name", ["cifar_resnet", "resnet_18", "vgg"])
def test_only_an_affine_resnet_learns_scales_and_biases(name):
    plain, affine = (shapes(getattr(zoo, name)(10, affine=a), BUILDERS[name]) for a in (False, True))
    assert {path.rsplit("/", 1)[1] for path in plain} == {"kernel"}
    norms = {path.rsplit("/", 1)[0] for path in affine if path.endswith("scale")}
    added = {f"{norm}/{leaf}" for norm in norms for leaf in ("scale", "bias")}
    assert affine.keys() == plain.keys() | added and len(norms) == len(plain) - 1  # one after each convolution


def test_switches_are_fields_of_the_published_values():
    convnet = zoo.mnist_convnet(10, dropout=True).module
    assert (convnet.channel_dropout, convnet.dropout) == (0.25, 0.5)
    assert zoo.mnist_convnet(10).module == models.MnistConvNet(10)
    lenet = zoo.lenet_300_100(10, biases=True, dropout=True)
    assert (lenet.module.use_bias, lenet.module.dropout) == (True, 0.5)
    assert lenet.last in shapes(lenet, (28, 28, 1)) and "Dense_2/bias" in shapes(lenet, (28, 28, 1))
    assert zoo.lenet_300_100(10).module == models.LeNet300100(10, use_bias=False)
