"""Compaction: the same outputs from fewer units, whatever the network; what goes and what stays, counted by hand."""

import math
from functools import partial

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from supermask_jax import lottery, models
from supermask_jax.compaction import compact
from supermask_jax.models.resnet import Block
from supermask_jax.trees import apply_masks, by_path, map_with_name


def same(apply_fn, params, small, images):
    """The smaller network's outputs for the batch, and for a batch of one, are the network's; returns them."""
    expected = jax.tree.map(np.asarray, jax.jit(apply_fn)(params, images))
    run = jax.jit(small.apply_fn)
    for count in (len(images), 1):
        found = run(small.params, images[:count])
        assert jax.tree.structure(found) == jax.tree.structure(expected)
        for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            assert ours.shape == (count, *theirs.shape[1:]) and ours.dtype == theirs.dtype
            np.testing.assert_allclose(ours, theirs[:count], rtol=0, atol=1e-6 * np.abs(theirs).max())
    assert small.after == {name: leaf.shape for name, leaf in small.params.items()}
    return expected


def total(shapes):
    return sum(map(math.prod, shapes.values()))


class Drawn:
    """Random weights, masks and images, the same ones in each test.

    Args:
      density: of the masks of kernels, at random positions.
      units: the fraction of the output units of each kernel that is not masked whole; the last layer, "dense", is not.
    """

    def __init__(self, density, units=1.0):
        self.density, self.units, self.rng = density, units, np.random.default_rng(0)

    def normal(self, shape, scale=1.0):
        return self.rng.normal(0, scale, shape).astype(np.float32)

    def weight(self, path, leaf):
        """Kernels under whose masks units vary as in a dense network; statistics and biases that are not 0."""
        if path.endswith(("var", "scale")):
            return self.rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
        if not is_kernel(path):
            return self.normal(leaf.shape, 0.3)
        fan_in = math.prod(leaf.shape) / max(leaf.shape[0 if path.endswith("weight") else -1], 1)
        return self.normal(leaf.shape, math.sqrt(2 / fan_in / self.density / self.units))

    def mask(self, path, leaf):
        if not is_kernel(path):
            return None
        left = self.rng.random(leaf.shape[-1]) < (1 if "dense" in path else self.units)
        return ((self.rng.random(leaf.shape) < self.density) * left).astype(np.float32)

    def network(self, apply_fn, shapes, image):
        """(apply_fn, weights, masks, images)."""
        weights = map_with_name(self.weight, shapes)
        return apply_fn, weights, map_with_name(self.mask, weights), self.normal((5, *image))

    def linen(self, module, image):
        """All collections are weights."""
        shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, *image)))
        return self.network(module.apply, shapes, image)


def is_kernel(path):
    return path.endswith(("kernel", "weight"))


def closed_over(network):
    """The same network, whose batch statistics are closed over."""
    apply_fn, weights, masks, images = network
    rest = {"batch_stats": weights["batch_stats"]}
    compiled = jax.jit(lambda params, x: apply_fn({"params": params, **rest}, x))
    return compiled, weights["params"], masks["params"], images


class EquinoxConvNet(eqx.Module):
    conv: eqx.nn.Conv2d
    dense: eqx.nn.MLP

    def __init__(self, key):
        self.conv = eqx.nn.Conv2d(1, 8, 3, padding=1, key=key)
        self.dense = eqx.nn.MLP(8 * 36, 3, 16, 1, key=key)

    def __call__(self, x):
        return self.dense(jax.nn.relu(self.conv(x.transpose(2, 0, 1))).reshape(-1))


def equinox():
    shapes, static = eqx.partition(
        eqx.filter_eval_shape(EquinoxConvNet, jax.random.key(0)), lambda leaf: hasattr(leaf, "shape")
    )
    return Drawn(0.1).network(lambda params, x: jax.vmap(eqx.combine(params, static))(x), shapes, (6, 6, 1))


class NnxBatchNorm(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(1, 8, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(8, use_running_average=True, rngs=rngs)
        self.out = nnx.Linear(6 * 6 * 8, 3, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.conv(x)))
        return self.out(x.reshape(len(x), -1))


def nnx_batch_norm():
    graph, shapes, statistics = nnx.split(nnx.eval_shape(lambda: NnxBatchNorm(nnx.Rngs(0))), nnx.Param, nnx.BatchStat)
    drawn = Drawn(0.1)
    statistics = map_with_name(drawn.weight, statistics)
    return drawn.network(lambda params, x: nnx.merge(graph, params, statistics, copy=True)(x), shapes, (6, 6, 1))


def dictionary():
    def apply_fn(params, x):
        x = x.reshape(len(x), -1)
        for name in ("a", "b"):
            x = jnp.tanh(jnp.dot(x, params[name]["kernel"]) + params[name]["bias"][None])
        return {"logits": x @ params["dense"]["kernel"], "features": x[:, ::2]}

    sizes = {"a": (36, 24), "b": (24, 16), "dense": (16, 3)}
    shapes = {name: {"kernel": np.empty(shape), "bias": np.empty(shape[1])} for name, shape in sizes.items()}
    return Drawn(0.05).network(apply_fn, shapes, (6, 6, 1))


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(12)(x[..., 0]))
        x = nn.LayerNorm()(x + nn.MultiHeadDotProductAttention(num_heads=2)(x, x))
        return nn.Dense(3)(x.mean(axis=1))


class Branches(nn.Module):
    """Concatenation, pooling with padding, strides, a grouped, a depthwise and a transposed convolution."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3))(x))
        left = nn.max_pool(nn.Conv(6, (3, 3), (2, 2))(x), (3, 3), (1, 1), "SAME")
        right = nn.avg_pool(nn.relu(nn.Conv(8, (2, 2), feature_group_count=4)(x)), (2, 2), (2, 2))
        x = nn.sigmoid(jnp.concatenate([left, right], axis=-1))
        x = nn.relu(nn.Conv(14, (3, 3), feature_group_count=14)(x))
        x = nn.relu(nn.ConvTranspose(6, (3, 3), (2, 2))(x))
        x = nn.softmax(jnp.where(x > 0.5, x, -x))
        return nn.Dense(3)(x.reshape(len(x), -1)).clip(-2, 2)


slow = partial(pytest.param, marks=pytest.mark.slow)
CASES = {  # {network: (its maker, at most which part of the parameters is left)}
    "mlp with biases": (lambda: Drawn(0.07).linen(models.MLP(hidden=(30, 20)), (6, 6, 1)), 0.5),
    "mnist convnet": (lambda: Drawn(0.05).linen(models.MnistConvNet(features=(8, 10, 20)), (10, 10, 1)), 0.3),
    "cnn": (lambda: Drawn(0.1).linen(models.ConvNet(channels=(8, 10)), (8, 8, 1)), 0.7),
    "resnet-8": (lambda: closed_over(Drawn(0.3, 0.4).linen(models.CifarResNet(depth=8, width=8), (8, 8, 3))), 0.6),
    "affine resnet-8": (lambda: Drawn(0.3, 0.4).linen(models.CifarResNet(depth=8, affine=True), (8, 8, 3)), 0.6),
    "resnet-20": (lambda: closed_over(Drawn(0.3, 0.4).linen(models.CifarResNet(width=8), (8, 8, 3))), 0.6),
    "affine resnet-20": (lambda: Drawn(0.3, 0.4).linen(models.CifarResNet(width=8, affine=True), (8, 8, 3)), 0.6),
    "block with a projection": (lambda: Drawn(0.3, 0.4).linen(Block(12, stride=2, affine=True), (6, 6, 8)), 0.6),
    "bottleneck": (lambda: Drawn(0.1).linen(Block(8, inner=6), (6, 6, 8)), 0.6),
    "equinox": (equinox, 0.6),
    "nnx": (nnx_batch_norm, 0.8),
    "dictionary": (dictionary, 0.6),
    "attention": (lambda: Drawn(0.1).linen(Attention(), (5, 6, 1)), 0.8),
    "branches": (lambda: Drawn(0.2).linen(Branches(), (6, 6, 2)), 0.9),
}
SLOW = ("affine resnet-8", "branches", "resnet-8", "resnet-20", "affine resnet-20", "bottleneck", "attention", "nnx")


@pytest.mark.parametrize("name", [slow(name) if name in SLOW else name for name in CASES])
def test_a_smaller_network_computes_the_same(name):
    make, left = CASES[name]
    apply_fn, weights, masks, images = make()
    small = compact(apply_fn, weights, masks, images)
    outputs = same(apply_fn, apply_masks(weights, masks), small, images)
    assert all(np.ptp(leaf, axis=0).max() > 1e-3 for leaf in jax.tree.leaves(outputs)), "they depend on the input"
    assert small.before == {path: leaf.shape for path, leaf in by_path(weights).items()}
    assert total(small.after) < left * total(small.before)


# What goes and what stays, by hand.

IMAGES = np.random.default_rng(1).normal(size=(5, 4, 4, 2)).astype(np.float32)
VECTORS = np.random.default_rng(1).normal(size=(5, 3)).astype(np.float32)


def mlp(params, x):
    for i, layer in enumerate(params):
        x = jnp.dot(x, layer["w"]) + layer["b"][None]
        x = jax.nn.relu(x) if i + 1 < len(params) else x
    return x


def layer(w, b):
    return {"w": np.array(w, np.float32), "b": np.array(b, np.float32)}


def as_lists(params):
    return {name: np.asarray(leaf).tolist() for name, leaf in params.items()}


def test_a_tiny_network_by_hand():
    """Unit 0 has no way in and adds relu(2) * 5 to output 0, unit 1 no way out; unit 2 reads input 1; output 1 is 7."""
    weights = [layer([[1, 1, 1], [1, 1, 3]], [2, 1, -1]), layer([[5, 1], [1, 1], [4, 1]], [6, 7])]
    masks = [
        {"w": jnp.array(mask, jnp.float32), "b": None} for mask in ([[0, 1, 0], [0, 0, 1]], [[1, 0], [0, 0], [1, 0]])
    ]
    small = compact(mlp, weights, masks, VECTORS[:, :2])
    assert small.before == {"0/b": (3,), "0/w": (2, 3), "1/b": (2,), "1/w": (3, 2)}
    assert as_lists(small.params) == {
        **{"0/w": [[3]], "0/b": [[-1]], "1/w": [[4]], "1/b": [[6]]},
        **{"1/w folded": [[10]], "constants": [[0, 7]]},
    }
    same(mlp, apply_masks(weights, masks), small, VECTORS[:, :2])


def test_weights_that_are_masked_already_need_no_masks():
    weights = [layer([[0, 1], [0, 2], [0, 3]], [0, 0]), layer([[1], [1]], [0])]
    small = compact(mlp, weights, None, VECTORS)
    assert small.after["0/w"] == (3, 1) and small.after["1/w"] == (1, 1)


@pytest.mark.parametrize("width", (1, 3))
def test_units_that_only_dead_units_read_or_feed_go_to_a_fixed_point(width):
    """A chain of units through all layers is dead at its end, another at its start; `width` others are alive."""
    live = np.ones((width, width))

    def block(*entries):
        """Dead at its end, dead at its start, alive."""
        return np.block([[np.diag(entries), np.zeros((2, width))], [np.zeros((width, 2)), live]])

    first, last = np.hstack([np.ones((3, 1)), np.zeros((3, 1)), np.ones((3, width))]), np.ones((2 + width, 1))
    last[0] = 0
    weights = [layer(w, np.zeros(w.shape[1])) for w in (first, block(1, 1), block(1, 1), block(1, 1), last)]
    small = compact(mlp, weights, None, VECTORS)
    assert small.after["0/w"] == (3, width) and small.after["4/w"] == (width, 1)
    assert [small.after[f"{i}/w"] for i in (1, 2, 3)] == [(width, width)] * 3
    assert total(small.after) == 3 * width + 3 * width**2 + width + 5
    same(mlp, weights, small, VECTORS)


@pytest.mark.slow
def test_a_chain_shrinks_to_the_sizes_of_lottery_shrink():
    model, drawn = models.LeNet300100(hidden=(30, 12)), Drawn(0.3, 0.4)
    _, variables, masks, images = drawn.linen(model, (5, 5, 1))
    weights, masks, layers = variables["params"], masks["params"], [f"Dense_{i}/kernel" for i in range(3)]
    masks["Dense_2"]["kernel"][:] = 1  # every unit that something leads to is read
    for name in ("Dense_0", "Dense_1"):
        masks[name]["kernel"][0, masks[name]["kernel"].any(0)] = 1
        weights[name]["bias"] *= masks[name]["kernel"].any(0)  # shrink refuses biases of pruned units
    masks["Dense_1"]["kernel"][:, masks["Dense_1"]["kernel"].any(0)] = 1
    shrunk = {path: leaf.shape for path, leaf in by_path(lottery.shrink(weights, masks, layers)).items()}
    small = compact(lambda params, x: model.apply({"params": params}, x), weights, masks, images)
    assert [small.after[path] for path in layers] == [shrunk[path] for path in layers]
    assert shrunk["Dense_1/kernel"][0] < 24 and total(small.after) == total(shrunk)


def conv(x, kernel, padding, **options):
    return lax.conv_general_dilated(x, kernel, (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"), **options)


def conv_net(params, x, padding):
    hidden = jax.nn.relu(conv(x, params["first"], "SAME") + params["bias"][None, None, None])
    return conv(hidden, params["last"], padding)


@pytest.mark.slow
@pytest.mark.parametrize("padding", ("VALID", "SAME"))
@pytest.mark.parametrize("dead", (1, 2, 3))
def test_constant_channels_before_a_convolution(padding, dead):
    """They become a bias; where padding is read, a convolution of ones, if they are half of the channels or more."""
    drawn = Drawn(1.0)
    weights = {
        "first": drawn.normal((3, 3, 2, 4)),
        "bias": np.float32([1, 2, 3, 4]),
        "last": drawn.normal((3, 3, 4, 5)),
    }
    weights["first"][..., :dead] = 0
    apply_fn = partial(conv_net, padding=padding)
    small = compact(apply_fn, weights, None, IMAGES)
    stays = padding == "SAME" and dead < 2
    assert small.after["first"] == (3, 3, 2, 4 if stays else 4 - dead)
    folded = {"VALID": (1, 1, 1, 5), "SAME": None if stays else (3, 3, 1, 5)}[padding]
    assert small.after.get("last folded") == folded
    same(apply_fn, weights, small, IMAGES)


def test_channels_of_zeros_before_a_padded_convolution_just_go():
    drawn = Drawn(1.0)
    weights = {
        "first": drawn.normal((3, 3, 2, 4)),
        "bias": np.float32([-1, 0, 3, 4]),
        "last": drawn.normal((3, 3, 4, 5)),
    }
    weights["first"][..., :2] = 0
    small = compact(partial(conv_net, padding="SAME"), weights, None, IMAGES)
    assert small.after == {"first": (3, 3, 2, 2), "bias": (1, 1, 1, 2), "last": (3, 3, 2, 5)}


def test_channels_that_read_only_constant_channels_go_too():
    drawn = Drawn(1.0)
    weights = {name: drawn.normal((3, 3, inputs, 4)) for name, inputs in (("a", 2), ("b", 4), ("c", 4))}
    weights["a"][..., 0] = 0
    weights["b"][:, :, 1:, 0] = 0

    def apply_fn(params, x):
        return conv(jax.nn.relu(conv(conv(x, params["a"], "SAME"), params["b"], "SAME")), params["c"], "SAME")

    small = compact(apply_fn, weights, None, IMAGES)
    assert small.after == {"a": (3, 3, 2, 3), "b": (3, 3, 3, 3), "c": (3, 3, 3, 4)}
    same(apply_fn, weights, small, IMAGES)


def residual(params, x):
    stem = conv(x, params["stem"], "SAME")
    branch = conv(jax.nn.relu(stem), params["branch"], "SAME") + params["bias"][None, None, None]
    return conv(jax.nn.relu(stem + branch), params["last"], "VALID")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stem", "branch", "widths"),
    [
        ([0, 1], [0, 2], (3, 3)),  # channel 0 goes from the sum; one that is dead in one branch stays
        ([0], [], (4, 4)),
        ([], [0], (4, 4)),
        ([], [0, 1], (4, 2)),  # half of a branch goes, and its constants are filled in
        ([2, 3], [0, 2, 3], (2, 1)),
        ([0, 1, 2, 3], [], None),  # all that is left is constant
        ([], [0, 1, 2, 3], (4, None)),
    ],
)
def test_channels_of_a_residual_sum(stem, branch, widths):
    drawn = Drawn(1.0)
    weights = {
        "stem": drawn.normal((3, 3, 2, 4)),
        "branch": drawn.normal((3, 3, 4, 4)),
        "last": drawn.normal((1, 1, 4, 3)),
    }
    weights = {**weights, "bias": np.float32([0.5, 0.2, -0.3, 0.4])}
    weights["stem"][..., np.array(stem, int)] = 0
    weights["branch"][..., np.array(branch, int)] = 0
    small = compact(residual, weights, None, IMAGES)
    found = tuple(small.after[name][-1] if name in small.after else None for name in ("stem", "branch"))
    assert found == (widths or (None, None))
    same(residual, weights, small, IMAGES)


def test_constants_that_differ_between_pixels_are_computed_and_not_stored_as_images():
    """Near the border a padded convolution of constants is another constant; it is half of a sum's branch."""
    drawn = Drawn(1.0)
    weights = {
        "first": drawn.normal((3, 3, 2, 4)),
        "second": drawn.normal((3, 3, 4, 4)),
        "last": drawn.normal((1, 1, 4, 3)),
    }
    weights["first"][..., :2] = 0
    weights["second"][:, :, 2:, :2] = 0
    bias = np.float32([1, 2, 0.1, 0.2])

    def apply_fn(params, x):
        first = jax.nn.relu(conv(x, params["first"], "SAME") + bias[None, None, None])
        branch = conv(first, params["second"], "SAME")
        return conv(branch + jnp.tile(x, 2), params["last"], "VALID")

    small = compact(apply_fn, weights, None, IMAGES)
    assert max(map(math.prod, small.after.values())) <= 3 * 3 * 2 * 4
    assert small.after["first"] == (3, 3, 2, 2) and small.after["second folded"] == (3, 3, 1, 4)
    same(apply_fn, weights, small, IMAGES)


@pytest.mark.parametrize("gate", (lambda x, on: x * on, lambda x, on: jnp.where(on > 0, x, 0.3)))
def test_what_a_constant_switches_off_is_constant(gate):
    weights = {
        "first": np.ones((3, 4), np.float32),
        "on": np.float32([[1, 0, 0, 1]]),
        "last": np.ones((4, 2), np.float32),
    }

    def apply_fn(params, x):
        return jnp.dot(gate(jnp.dot(x, params["first"]), params["on"]), params["last"])

    small = compact(apply_fn, weights, None, VECTORS)
    assert small.after["first"] == (3, 2) and small.after["last"] == (2, 2)
    same(apply_fn, weights, small, VECTORS)


def test_an_unknown_operation_gets_all_of_its_operand_and_all_that_it_makes_counts_as_needed():
    weights = [np.float32([[0, 1, 2], [0, 3, 4], [0, 5, 6]]), np.float32([[1], [1], [0]])]

    def apply_fn(params, x, between):
        return jnp.dot(between(jnp.dot(x, params[0])), params[1])

    known = compact(partial(apply_fn, between=jnp.tanh), weights, None, VECTORS)
    assert known.after == {"0": (3, 1), "1": (1, 1)}  # unit 0 is constant, nothing reads unit 2
    for between in (partial(jnp.sort, axis=-1), partial(jnp.cumsum, axis=-1), looped, squared):
        function = partial(apply_fn, between=between)
        small = compact(function, weights, None, VECTORS)
        assert small.after["1"] == (2, 1)  # of what it makes, what is read
        assert small.after["0"] == (3, 3)
        same(function, weights, small, VECTORS)


def squared(x):
    return jnp.einsum("ni,nj->nij", x, x).sum(axis=-1)


def looped(x):
    return lax.scan(lambda carry, _: (jnp.roll(carry, 1, axis=-1) * 0.5, None), x, length=2)[0]


@pytest.mark.parametrize("name", ("mlp with biases", "affine resnet-8"))
def test_a_network_that_is_pruned_until_its_output_is_constant_is_that_output(name):
    apply_fn, weights, masks, images = CASES[name][0]()
    first = min(path for path in by_path(masks) if "0" in path or path.endswith("conv/kernel"))
    masks = map_with_name(lambda path, mask: mask * (path != first), masks)
    small = compact(apply_fn, weights, masks, images)
    assert list(small.after.values()) == [(1, 10)]
    same(apply_fn, apply_masks(weights, masks), small, images)


def test_an_array_that_is_closed_over_is_a_parameter_also_inside_a_compiled_function():
    table = np.float32([[1, 2], [3, 4], [5, 6]])
    small = compact(jax.jit(lambda params, x: jnp.dot(x * params, table)), np.float32([[1, 0, 2]]), None, VECTORS)
    assert small.after == {"weights": (1, 2), "closed over 0": (2, 2)}


def test_the_values_between_are_smaller_too():
    weights = [layer(np.eye(3, 8), np.zeros(8)), layer(np.eye(8, 3), np.zeros(3))]
    small = compact(mlp, weights, None, VECTORS)
    shapes = {v.aval.shape for eqn in jax.make_jaxpr(small.apply_fn)(small.params, VECTORS).eqns for v in eqn.outvars}
    assert (5, 1, 3) in shapes and not any(8 in shape for shape in shapes)


@pytest.mark.slow
def test_a_gradient_through_the_smaller_network_is_that_of_the_network():
    weights = [layer(np.eye(3, 8), np.ones(8)), layer(np.ones((8, 2)), np.zeros(2))]
    small = compact(mlp, weights, None, VECTORS)
    ours = jax.grad(lambda x: small.apply_fn(small.params, x).sum())(VECTORS)
    np.testing.assert_allclose(ours, jax.grad(lambda x: mlp(weights, x).sum())(VECTORS), rtol=1e-6)


def test_inputs_may_be_a_tree_and_whole_numbers():
    weights = {"table": jnp.arange(12.0).reshape(4, 3), "w": jnp.array([[1.0], [0], [2]]), "unused": jnp.ones(3)}
    inputs = {"token": jnp.array([0, 3, 1, 2, 2]), "scale": jnp.arange(1.0, 6)}

    def apply_fn(params, x):
        return jnp.dot(params["table"][x["token"]], params["w"]) * x["scale"][:, None]

    small = compact(apply_fn, weights, None, inputs)
    assert small.after == {"table": (4, 3), "w": (2, 1)}
    np.testing.assert_allclose(small.apply_fn(small.params, inputs), apply_fn(weights, inputs), rtol=1e-6)


# What is refused.


def test_a_network_that_mixes_examples_is_refused():
    model = nn.BatchNorm(use_running_average=False)
    variables = model.init(jax.random.key(0), VECTORS)

    def train(params, x):
        return model.apply({**variables, "params": params}, x, mutable=["batch_stats"])[0]

    with pytest.raises(ValueError, match=r"depend on the other examples .* BatchNorm in training mode"):
        compact(train, variables["params"], None, jnp.zeros((2, 3)))


def test_what_is_no_batch_is_refused():
    weights = [layer(np.ones((3, 2)), np.zeros(2))]
    with pytest.raises(ValueError, match="the mask of '0/w' has shape"):
        compact(mlp, weights, [{"w": jnp.ones((2, 2)), "b": None}], VECTORS)
    with pytest.raises(ValueError, match=r"outputs must have a batch axis: one example gives \(\), two give \(\)"):
        compact(lambda params, x: mlp(params, x).sum(), weights, None, VECTORS)
    for inputs in (jnp.ones(()), jnp.ones((0, 3)), [jnp.ones((2, 3)), jnp.ones((3, 3))], []):
        with pytest.raises(ValueError, match=r"inputs must be arrays \[n, ...\] with the same n >= 1"):
            compact(mlp, weights, None, inputs)
    small = compact(mlp, weights, None, VECTORS)
    with pytest.raises(ValueError, match=r"compacted for examples .*float32 \[3\].* got .*float32 \[4\]"):
        small.apply_fn(small.params, jnp.ones((5, 4)))


def test_a_network_that_draws_is_refused():
    key = jax.random.key(0)
    with pytest.raises(ValueError, match="random key"):
        compact(lambda params, x: x * params * jax.random.normal(key, x.shape), jnp.ones((1, 3)), None, VECTORS)
