"""Models of other people's kinds, small: what a library of masks must read right without knowing any of them.

Each is (weights or their shapes, apply_fn(weights, inputs) -> outputs, inputs,
{path: (layers, fan-in, fan-out)} by hand).
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

BATCH = 6


class Animal(NamedTuple):
    weights: Any
    apply_fn: Callable
    inputs: Any
    kernels: Mapping[str, tuple[int, float, float]]  # {path: (layers, fan-in, fan-out)}; no other leaf is a kernel


def linen(module, inputs, kernels, shapes, **variables):
    """The module's parameters, or their shapes; other collections are made once and closed over."""
    init = functools.partial(module.init, jax.random.key(0))
    made = jax.eval_shape(init, inputs) if shapes else jax.jit(init)(inputs)
    rest = {name: value for name, value in made.items() if name != "params"}

    def apply_fn(params, x):
        state = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), rest)
        out = module.apply({"params": params, **state}, x, mutable=list(rest))[0]
        return out

    return Animal(made["params"], apply_fn, inputs, kernels)


def normal(*shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(9), (BATCH, *shape), dtype)


def tokens(length, number):
    return jax.random.randint(jax.random.key(9), (BATCH, length), 0, number)


class Block(nn.Module):
    """A transformer's block, as `nn.scan` wants it."""

    width: int = 16
    dtype: Any = None

    @nn.compact
    def __call__(self, x, _):
        y = nn.LayerNorm(dtype=self.dtype)(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=self.width, dtype=self.dtype)(y, y)
        y = nn.Dense(2 * self.width, dtype=self.dtype)(nn.LayerNorm(dtype=self.dtype)(x))
        return x + nn.Dense(self.width, dtype=self.dtype)(nn.gelu(y)), None


class VisionTransformer(nn.Module):
    """Patches, position embedding, class token, scanned blocks, and a probe that pools."""

    remat: bool = False

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(16, (4, 4), strides=(4, 4), name="embedding")(x)
        x = x.reshape(len(x), -1, 16)
        x = x + self.param("pos_embedding", nn.initializers.normal(0.02), (1, x.shape[1], 16))
        cls = self.param("cls", nn.initializers.zeros, (1, 1, 16))
        x = jnp.concatenate([jnp.tile(cls, (len(x), 1, 1)), x], axis=1)
        block = nn.remat(Block) if self.remat else Block
        scanned = nn.scan(block, {"params": 0}, split_rngs={"params": True}, in_axes=nn.broadcast, length=3)
        x, _ = scanned(name="blocks")(x, None)
        probe = self.param("probe", nn.initializers.xavier_uniform(), (1, 1, 16))
        pooled = nn.MultiHeadDotProductAttention(num_heads=2, name="pool")(jnp.tile(probe, (len(x), 1, 1)), x)
        return nn.Dense(4, name="head")(pooled[:, 0])


def vision_transformer(shapes, remat=False):
    attention = {f"{name}/kernel": (1, 16, 16) for name in ("query", "key", "value", "out")}
    kernels = {
        "embedding/kernel": (1, 48, 256),
        **{f"blocks/MultiHeadDotProductAttention_0/{path}": (3, *fans[1:]) for path, fans in attention.items()},
        "blocks/Dense_0/kernel": (3, 16, 32),
        "blocks/Dense_1/kernel": (3, 32, 16),
        **{f"pool/{path}": fans for path, fans in attention.items()},
        "head/kernel": (1, 16, 4),
    }
    return linen(VisionTransformer(remat), normal(8, 8, 3), kernels, shapes)


class Einsum(nn.Module):
    """Attention, a gated layer and a head in einsums with kernels of three and four axes."""

    @nn.compact
    def __call__(self, x):
        draw = nn.initializers.normal(0.3)
        q, k, v = jnp.einsum("btd,sndh->sbtnh", x, self.param("qkv", draw, (3, 2, 8, 4)))
        attended = nn.softmax(jnp.einsum("btnh,bsnh->bnts", q, k))
        mixed = jnp.einsum("bnts,bsnh->btnh", attended, v)
        x = x + jnp.einsum("btnh,nhd->btd", mixed, self.param("merge", draw, (2, 4, 8)))
        gating = self.param("gating", draw, (2, 8, 12))
        x = nn.gelu(x @ gating[0]) * (x @ gating[1])
        return nn.DenseGeneral((2, 3), name="general")(x.mean(1)).reshape(len(x), -1)


def einsum(shapes):
    kernels = {
        "qkv": (1, 8, 24),  # three and two and four outputs of each input
        "merge": (1, 8, 8),
        "gating": (2, 8, 12),
        "general/kernel": (1, 12, 6),
    }
    return linen(Einsum(), normal(5, 8), kernels, shapes)


class Experts(nn.Module):
    """A router, experts by a product over all of them, and experts that are picked."""

    @nn.compact
    def __call__(self, x):
        draw = nn.initializers.normal(0.3)
        logits = nn.Dense(3, name="router")(x)
        each = nn.relu(jnp.einsum("bd,edf->ebf", x, self.param("up", draw, (3, 8, 12))))
        each = jnp.einsum("ebf,efd->ebd", each, self.param("down", draw, (3, 12, 8)))
        x = jnp.einsum("be,ebd->bd", nn.softmax(logits), each)
        return jnp.einsum("bd,bdf->bf", x, self.param("picked", draw, (3, 8, 4))[jnp.argmax(logits, -1)])


def experts(shapes):
    kernels = {
        "router/kernel": (1, 8, 3),
        "up": (1, 8, 36),  # one input meets all experts' units: one layer of 36
        "down": (3, 12, 8),
        "picked": (3, 8, 4),
    }
    return linen(Experts(), normal(8), kernels, shapes)


class Convolutions(nn.Module):
    """Plain, depthwise, grouped, dilated, and both of Flax's transposed convolutions, with BatchNorm between."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.BatchNorm(use_running_average=False)(nn.Conv(8, (3, 3))(x)))
        x = nn.relu(nn.Conv(8, (3, 3), feature_group_count=8, name="depthwise")(x))
        x = nn.relu(nn.Conv(16, (1, 1), feature_group_count=4, name="grouped")(x))
        x = nn.relu(nn.ConvTranspose(6, (4, 4), strides=(2, 2), name="transposed")(x))
        x = nn.relu(nn.ConvTranspose(5, (3, 3), transpose_kernel=True, name="swapped")(x))
        x = nn.relu(nn.Conv(4, (3, 1), kernel_dilation=2, name="dilated")(x))
        return nn.Dense(4, name="head")(x.mean((1, 2)))


def convolutions(shapes):
    kernels = {
        "Conv_0/kernel": (1, 27, 72),
        "depthwise/kernel": (1, 9, 9),
        "grouped/kernel": (1, 2, 4),
        "transposed/kernel": (1, 64, 96),  # of a window of 16, each output meets 4 that are not spacing
        "swapped/kernel": (1, 54, 45),
        "dilated/kernel": (1, 15, 12),
        "head/kernel": (1, 4, 4),
    }
    return linen(Convolutions(), normal(6, 6, 3), kernels, shapes)


class Recurrent(nn.Module):
    """An embedding table, LSTM and GRU, and the table again, tied to the logits."""

    @nn.compact
    def __call__(self, x):
        table = nn.Embed(11, 8)
        x = nn.RNN(nn.LSTMCell(10))(table(x))
        x = nn.RNN(nn.GRUCell(8))(x)
        return table.attend(x[:, -1])


def recurrent(shapes):
    kernels = {
        **{f"LSTMCell_0/i{gate}/kernel": (1, 8, 10) for gate in "fgio"},
        **{f"LSTMCell_0/h{gate}/kernel": (1, 10, 10) for gate in "fgio"},
        **{f"GRUCell_0/i{gate}/kernel": (1, 10, 8) for gate in "nrz"},
        **{f"GRUCell_0/h{gate}/kernel": (1, 8, 8) for gate in "nrz"},
    }
    return linen(Recurrent(), tokens(5, 11), kernels, shapes)


class Adapted(nn.Module):
    """A dense layer with a low-rank adapter beside it, and a layer scale."""

    @nn.compact
    def __call__(self, x):
        down = self.param("down", nn.initializers.normal(0.3), (8, 2))
        up = self.param("b", nn.initializers.normal(0.3), (2, 8))
        gamma = self.param("gamma", nn.initializers.constant(0.5), (8,))
        x = x + gamma[None] * nn.relu(nn.Dense(8)(x) + x @ down @ up)
        return nn.Dense(4, name="head")(x)


def adapted(shapes):
    kernels = {"Dense_0/kernel": (1, 8, 8), "down": (1, 8, 2), "b": (1, 2, 8), "head/kernel": (1, 8, 4)}
    return linen(Adapted(), normal(8), kernels, shapes)


class Half(nn.Module):
    """Everything in bfloat16, the parameters too."""

    @nn.compact
    def __call__(self, x):
        half = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
        return nn.Dense(4, name="last", **half)(nn.relu(nn.Dense(32, name="first", **half)(x)))


def half(shapes):
    kernels = {"first/kernel": (1, 8, 32), "last/kernel": (1, 32, 4)}
    return linen(Half(), normal(8), kernels, shapes)


def ensemble(shapes):
    """Several networks of NNX under `nnx.vmap`, each with images of its own."""

    class Member(nnx.Module):
        def __init__(self, key):
            rngs = nnx.Rngs(key)
            self.conv = nnx.Conv(2, 8, (3,), rngs=rngs)
            self.norm = nnx.LayerNorm(8, rngs=rngs)
            self.out = nnx.Linear(8, 4, rngs=rngs)

        def __call__(self, x):
            return self.out(nnx.relu(self.norm(self.conv(x))).mean(-2))

    members = nnx.vmap(Member)(jax.random.split(jax.random.key(0), 3))
    graph, weights = nnx.split(members)

    def apply_fn(weights, x):
        outs = nnx.vmap(lambda member, x: member(x))(nnx.merge(graph, weights), x)
        return outs.reshape(-1, 4)

    return Animal(weights, apply_fn, normal(2, 7, 2)[:3], {"conv/kernel": (3, 6, 24), "out/kernel": (3, 8, 4)})


class Mixer(eqx.Module):
    """Equinox: an embedding, convolutions, attention, a normalisation and a recurrent cell."""

    table: eqx.nn.Embedding
    conv: eqx.nn.Conv1d
    spread: eqx.nn.ConvTranspose1d
    norm: eqx.nn.LayerNorm
    attention: eqx.nn.MultiheadAttention
    cell: eqx.nn.GRUCell
    out: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key, 7)
        self.table = eqx.nn.Embedding(9, 8, key=keys[0])
        self.conv = eqx.nn.Conv1d(8, 12, 3, padding=1, key=keys[1])
        self.spread = eqx.nn.ConvTranspose1d(12, 6, 2, stride=2, key=keys[2])
        self.norm = eqx.nn.LayerNorm(6)
        self.attention = eqx.nn.MultiheadAttention(2, 6, key=keys[3])
        self.cell = eqx.nn.GRUCell(6, 10, key=keys[4])
        self.out = eqx.nn.Linear(10, 4, key=keys[5])

    def __call__(self, x):
        x = jax.nn.relu(self.conv(jax.vmap(self.table)(x).T))
        x = jax.vmap(self.norm)(self.spread(x).T)
        x = x + self.attention(x, x, x)
        last, _ = jax.lax.scan(lambda h, row: (self.cell(row, h), None), jnp.zeros(10), x)
        return self.out(last)


def mixer(shapes):
    weights, static = eqx.partition(Mixer(jax.random.key(0)), eqx.is_inexact_array)
    kernels = {
        "conv/weight": (1, 24, 36),
        "spread/weight": (1, 12, 12),
        **{f"attention/{name}_proj/weight": (1, 6, 6) for name in ("query", "key", "value", "output")},
        "cell/weight_ih": (1, 6, 30),
        "cell/weight_hh": (1, 10, 30),
        "out/weight": (1, 10, 4),
    }
    return Animal(weights, lambda w, x: jax.vmap(eqx.combine(w, static))(x), tokens(5, 9), kernels)


def scanned_equinox(shapes):
    """Equinox layers stacked by `filter_vmap` and scanned; the head's table is a dictionary of arrays."""
    layers = eqx.filter_vmap(lambda key: eqx.nn.Linear(8, 8, key=key))(jax.random.split(jax.random.key(0), 3))
    stack, static = eqx.partition(layers, eqx.is_inexact_array)
    weights = {"blocks": stack, "head": {"w": jax.random.normal(jax.random.key(1), (8, 4)), "b": jnp.zeros(4)}}

    def apply_fn(weights, x):
        def layer(x, own):
            return x + jax.nn.relu(jax.vmap(eqx.combine(own, static))(x)), None

        x, _ = jax.lax.scan(layer, x, weights["blocks"])
        return x @ weights["head"]["w"] + weights["head"]["b"][None]

    return Animal(weights, apply_fn, normal(8), {"blocks/weight": (3, 8, 8), "head/w": (1, 8, 4)})


def haiku_net(shapes):
    """Haiku: a convolution, its transpose (whose kernel is [.., out, in]), a normalisation and a dense layer."""
    import haiku as hk

    def forward(x):
        x = jax.nn.relu(hk.Conv2D(8, 3)(x))
        x = jax.nn.relu(hk.Conv2DTranspose(6, 3)(x))
        x = hk.LayerNorm(-1, create_scale=True, create_offset=True)(x)
        return hk.Linear(4)(x.mean((1, 2)))

    net = hk.without_apply_rng(hk.transform(forward))
    x = normal(6, 6, 3)
    weights = jax.jit(net.init)(jax.random.key(0), x)
    kernels = {"conv2_d/w": (1, 27, 72), "conv2_d_transpose/w": (1, 72, 54), "linear/w": (1, 6, 4)}
    return Animal(weights, net.apply, x, kernels)


ZOO: Mapping[str, Callable[[bool], Animal]] = {
    "vision transformer, scanned": vision_transformer,
    "vision transformer, remat": functools.partial(vision_transformer, remat=True),
    "einsum": einsum,
    "experts": experts,
    "convolutions": convolutions,
    "recurrent": recurrent,
    "adapter and layer scale": adapted,
    "bfloat16": half,
    "nnx ensemble": ensemble,
    "equinox": mixer,
    "equinox, scanned": scanned_equinox,
    "haiku": haiku_net,
}
NEEDS = {"haiku": "haiku"}  # packages that the tests do not ask for
