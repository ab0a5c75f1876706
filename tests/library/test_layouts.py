"""One description of a leaf: what its axes do is read from the traced network, from its name, or as the user says."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from zoo import NEEDS, ZOO

import supermask_jax as sm
from supermask_jax import initializers, layouts, names
from supermask_jax.trees import by_path


def described(animal):
    return sm.describe(animal.apply_fn, animal.weights, animal.inputs)


@pytest.mark.float32
@pytest.mark.parametrize("name", ZOO)
def test_the_traced_network_tells_which_leaves_are_kernels_their_layers_and_their_fans(name):
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    animal = ZOO[name](True)
    layout = described(animal)
    assert {path: (leaf.size("stack"), leaf.fan_in, leaf.fan_out) for path, leaf in layout.items()} == animal.kernels
    assert set(layout.leaves) == set(by_path(animal.weights))


def test_axes_are_told_by_word():
    layout = described(ZOO["vision transformer, scanned"](True))
    attention = "blocks/MultiHeadDotProductAttention_0"
    assert layout[f"{attention}/query/kernel"].axes == ("stack", "in", "out", "out")
    assert layout[f"{attention}/out/kernel"].axes == ("stack", "in", "in", "out")
    assert layout["embedding/kernel"].axes == ("window", "window", "in", "out")
    swapped = described(ZOO["convolutions"](True))["swapped/kernel"]
    assert swapped.axes == ("window", "window", "out", "in") and swapped.layer_shape == (3, 3, 6, 5)


# Names.


@pytest.mark.parametrize(
    ("path", "shape", "axes"),
    (
        ("Dense_0/kernel", (8, 4), "in out"),
        ("blocks/Dense_3/kernel", (12, 8, 4), "stack in out"),
        ("a/b/linear_1/w", (12, 8, 4), "stack in out"),
        ("attention/query/kernel", (8, 2, 4), "in out out"),
        ("attention/value/kernel", (12, 8, 2, 4), "stack in out out"),
        ("attention/out/kernel", (2, 4, 8), "in in out"),
        ("blocks/SelfAttention_0/out/kernel", (4, 4, 4, 16), "stack in in out"),
        ("out/kernel", (3, 3, 8, 16), "window window in out"),
        ("Conv_0/kernel", (5, 8, 4), "window in out"),
        ("conv/kernel", (1, 7, 8, 4), "window window in out"),
        ("patches/kernel", (16, 16, 3, 8), "window window in out"),
        ("conv2_d_transpose/w", (3, 3, 8, 4), "window window out in"),
        ("Conv_0/kernel", (12, 3, 3, 8, 4), None),  # a stack, or a window of three axes
        ("Conv_0/kernel", (12, 5, 8, 4), None),
        ("blocks/mlp/w1", (12, 8, 4), None),
        ("DenseGeneral_0/kernel", (8, 2, 4), None),
        ("attn/qkv_einsum/w", (3, 3, 8, 4), None),
        ("query/kernel", (4, 8, 16), None),  # a dense layer of that name under `nn.scan`, or attention's
        ("block/out/kernel", (3, 8, 8), None),
        ("stage/pwconv1/kernel", (3, 8, 32), None),
        ("moe/w1", (8, 8, 8, 16), None),
        ("layers/c2", (16, 16, 3, 3), None),
    ),
)
def test_names_and_shapes_tell_the_axes_or_nothing(path, shape, axes):
    assert names.flax_axes(path, shape) == (axes and tuple(axes.split()))


@pytest.mark.parametrize(
    ("path", "shape", "axes"),
    (
        ("layers/0/weight", (4, 8), "out in"),
        ("layers/0/weight", (4, 8, 3, 3), "out in window window"),
        ("conv/weight", (4, 8, 5), "out in window"),
        ("layers/0/weight", (12, 4, 8), None),
        ("cell/weight_ih", (48, 8), "out in"),
        ("attention/in_proj_weight", (24, 8), "out in"),
    ),
)
def test_a_leaf_called_weight_is_laid_out_as_in_equinox(path, shape, axes):
    assert names.equinox_axes(path, shape) == (axes and tuple(axes.split()))


def test_what_neither_name_nor_shape_tells_is_an_error_that_asks():
    weights = {"mlp": {"w1": jnp.zeros((12, 8, 4))}}
    says = r"'mlp/w1'.*sm.describe\(apply_fn, weights, example\).*axes=\{'mlp/w1': '...'\}.* for each of its 3 axes"
    for ask in (
        lambda: sm.init_scores(jax.random.key(0), weights),
        lambda: initializers.kaiming_normal(jax.random.key(0), weights),
        lambda: sm.describe(None, weights),
        lambda: sm.n_m_masks(weights, 2, 4),
    ):
        with pytest.raises(ValueError, match=says):
            ask()
    layout = sm.describe(None, weights, axes={"mlp/w1": "stack in out"})
    scores = sm.init_scores(jax.random.key(0), weights, layout)
    assert 0.9 / np.sqrt(8) < np.abs(scores["mlp"]["w1"]).max() <= 1 / np.sqrt(8)


@pytest.mark.parametrize(
    "path, shape",
    (
        ("pos_embedding", (1, 16, 64)),
        ("encoder/pos_embed", (16, 64)),
        ("cls", (1, 1, 64)),
        ("vit/class_token", (1, 64)),
        ("MAPHead_0/probe", (1, 1, 64)),
        ("embed/embeddings", (100, 64)),
        ("tok_embed/weight", (100, 64)),
        ("blocks/LayerNorm_0/scale", (12, 64)),
        ("layer_norm/offset", (12, 64)),
        ("blocks/norm1/weight", (12, 64)),
        ("blocks/ls1/gamma", (12, 64)),
        ("conv/bias", (8, 1, 1)),
        ("attention/query/bias", (12, 4, 16)),
        ("state", (1, 1, 64)),
        ("wte", (100, 64)),
        ("blocks/b1", (12, 64)),
        ("blocks/ln1/g", (12, 64)),
        ("tok_emb.weight", (100, 64)),
        ("ssm/A_log", (64, 16)),
    ),
)
def test_tables_tokens_scales_and_offsets_are_no_kernels_by_default(path, shape):
    leaf = jax.ShapeDtypeStruct(shape, jnp.float32)
    assert not sm.is_kernel(path, leaf) and names.no_kernel(path, shape)


@pytest.mark.parametrize(
    "path, shape",
    (
        ("embedding/kernel", (16, 16, 3, 64)),
        ("patch_embed/weight", (64, 48)),
        ("Dense_0/kernel", (1, 64)),
        ("mlp/gate_proj", (64, 128)),
        ("w1", (8, 4)),
        ("normal_head/kernel", (8, 4)),
        ("upscale_1", (8, 4)),
        ("w_again", (8, 4)),
        ("mlp.fc1.weight", (8, 4)),
        ("a", (1, 3)),
    ),
)
def test_kernels_with_such_names_stay_kernels(path, shape):
    assert sm.is_kernel(path, jax.ShapeDtypeStruct(shape, jnp.float32))


# What the user says.


def test_a_pattern_overrules_names_and_network_and_none_excludes():
    weights = {"a": {"w": jnp.zeros((3, 8, 4))}, "head": {"w": jnp.zeros((8, 4))}}
    with pytest.raises(ValueError, match=r"'\*/w': 'in out' does not fit 'a/w' \(3, 8, 4\)"):
        sm.describe(None, weights, axes={"*/w": "in out", "a/*": "stack in out"})
    layout = sm.describe(None, weights, axes={"a/*": "stack out in", "head/*": None})
    assert set(layout) == {"a/w"} and layout["a/w"].fan_in == 4 and layout.leaves["head/w"].why == "as you say"
    assert layout("a/w", weights["a"]["w"]) and not layout("head/w", weights["head"]["w"])


@pytest.mark.parametrize(
    "axes, says",
    (
        ({"b/*": "in out"}, r"no leaf matches 'b/\*'; there are: a/w"),
        ({"a/w": "in"}, "'in' does not fit 'a/w'"),
        ({"a/w": "in on"}, "'in on' does not fit 'a/w'.*stack, window, in, out"),
        ({"a/w": "stack window"}, "neither an axis 'in' nor one 'out'"),
        ({"a/w": None}, "no leaf is a kernel; the leaves are: a/w"),
    ),
)
def test_what_the_user_says_is_checked(axes, says):
    with pytest.raises(ValueError, match=says):
        sm.describe(None, {"a": {"w": jnp.zeros((8, 4))}}, axes=axes)


def test_a_layout_of_another_network_is_refused():
    layout = sm.describe(None, {"a": {"w": jnp.zeros((8, 4))}})
    with pytest.raises(ValueError, match=r"'a/w' has the shape \(8, 5\), and \(8, 4\) in the layout"):
        sm.init_scores(jax.random.key(0), {"a": {"w": jnp.zeros((8, 5))}}, layout)
    with pytest.raises(ValueError, match="the layout has no leaf 'b/w'; there are: a/w"):
        sm.init_scores(jax.random.key(0), {"b": {"w": jnp.zeros((8, 4))}}, layout)


# The table.


def test_inspect_shows_every_leaf_and_warns_of_what_would_go_wrong_silently():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            self.param("unused", nn.initializers.ones, (40, 40))
            x = nn.BatchNorm(use_running_average=True, scale_init=nn.initializers.zeros)(nn.Dense(64)(x))
            table = self.param("tied", nn.initializers.ones, (64, 64))
            return nn.Dense(64, kernel_init=nn.initializers.zeros)(x @ table + x @ table.T)

    x = jnp.ones((2, 64))
    made = Net().init(jax.random.key(0), x)

    def apply_fn(params, x):
        return Net().apply({"params": params, "batch_stats": made["batch_stats"]}, x)

    found = sm.inspect(made["params"], apply_fn, x, density=0.3)
    rows = {row.path: row for row in found.rows}
    assert set(rows) == set(by_path(made["params"]))
    dense = rows["Dense_0/kernel"]
    assert (dense.fan_in, dense.fan_out, dense.kept, dense.layers) == (64, 64, 1229, 1)
    assert rows["BatchNorm_0/scale"].kept is None and rows["BatchNorm_0/scale"].axes == ""
    text = str(found)
    assert all(path in text for path in rows) and "kept at 0.3" in text and "read from the network" in text
    said = "\n".join(found.warnings)
    assert "BatchNorm_0/scale is 0: frozen" in said and "Dense_1/kernel is 0: frozen" in said
    assert "unused is not used" in said and "tied is multiplied in several ways" in said
    assert len(found.warnings) == 4
    few = sm.inspect(made["params"], apply_fn, x, density=0.01).warnings
    assert any("fewer weights than they have inputs or outputs: Dense_0/kernel" in line for line in few)


def test_leaves_without_entries_are_inspected():
    weights = {"kernel": jnp.ones((8, 6)), "norm": {"scale": jnp.ones((0, 3))}, "empty": {"bias": jnp.ones((0,))}}

    def apply_fn(params, x):
        return x @ params["kernel"] + jnp.sum(params["norm"]["scale"].reshape(3, 0)) + jnp.sum(params["empty"]["bias"])

    assert {row.path for row in sm.inspect(weights, apply_fn, jnp.ones((2, 8))).rows} == set(by_path(weights))
    assert not names.is_closed(jnp.ones((0, 3)), (0,)) and names.is_closed(jnp.zeros((2, 3)), (0,))


def test_equal_layouts_have_one_hash_and_one_without_kernels_is_still_a_layout():
    weights = {"a": jnp.ones((4, 8)), "b": jnp.ones((8, 4))}
    layout = sm.describe(None, weights)
    turned = sm.Layout(dict(reversed(layout.leaves.items())))
    assert layout == turned and hash(layout) == hash(turned)
    bare = sm.Layout({"bias": sm.describe(None, {"a": jnp.ones((4, 8)), "bias": jnp.ones(4)}).leaves["bias"]})
    assert len(bare) == 0 and sm.trees.fan_in_of(None, bare) == bare.fan_in


def test_inspect_takes_shapes_and_names_alone():
    weights = {"conv": {"w": jax.ShapeDtypeStruct((4, 8, 6), jnp.float32)}}
    found = sm.inspect(weights)
    assert found.rows[0].fan_in == 32 and "is it a stack?" in "\n".join(found.warnings)
    assert sm.inspect({"w": jnp.ones((80, 60))}).warnings == [] and "nothing to warn of" in str(
        sm.inspect({"w": jnp.ones((80, 60))})
    )


# What networks do to their leaves on the way.


X = jnp.ones((2, 5, 8))


def shapes_of(**shapes):
    return {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in shapes.items()}


def wide(scale):
    return scale[None, None]


def heads(p, x):
    """Grouped queries: two heads of keys serve four of queries."""
    k = jnp.einsum("btd,dhk->bthk", x, jnp.take(p["wk"], jnp.array([0, 0, 1, 1]), axis=1))
    return jnp.einsum("bthk,hkd->btd", k, p["wo"])


def fused(p, x):
    """Queries of six heads, one key and one value in one kernel, sliced."""
    parts = [jnp.einsum("btd,dhk->bthk", x, p["w"][:, start:stop]) for start, stop in ((6, 7), (7, 8), (0, 6))]
    return jnp.concatenate(parts, axis=2)


def gated_mlp(p, x):
    up, gate = jnp.split(p["w"], 2, axis=1)
    return (x @ up) * nn.sigmoid(x @ gate)


def standardised(p, x):
    w = p["w"]
    return x @ ((w - w.mean(0, keepdims=True)) / w.std(0, keepdims=True))


def weight_normalised(p, x):
    return x @ (p["g"] * p["v"] / jnp.linalg.norm(p["v"], axis=0, keepdims=True))


def picked_by_loop(p, x):
    return jax.lax.fori_loop(0, 3, lambda i, x: jnp.tanh(x @ p["w"][i]), x)


def ragged(p, x):
    return jax.lax.ragged_dot(x.reshape(-1, 8), p["w"], jnp.array([3, 7, 0]))


CASES = {  # {name: (shapes, what the network does, {path: axes of a kernel}, {path of a gate})}
    "a kernel with the name of a table": (
        {"unembed": (8, 4), "embed/w": (8, 8), "patch_embed": (8, 8)},
        lambda p, x: x @ p["embed/w"] @ p["patch_embed"] @ p["unembed"],
        {"unembed": "in out", "embed/w": "in out", "patch_embed": "in out"},
        (),
    ),
    "a kernel with the name of a scale": (
        {"to_shift": (8, 8), "scale_proj": (8, 8), "norm_proj/kernel": (8, 4)},
        lambda p, x: x @ p["to_shift"] @ p["scale_proj"] @ p["norm_proj/kernel"],
        {"to_shift": "in out", "scale_proj": "in out", "norm_proj/kernel": "in out"},
        (),
    ),
    "scales around 1, sigmoids and exponentials are no gates": (
        {"scale": (8,), "gate": (8,), "logit_scale": (), "w": (8, 4)},
        lambda p, x: (x * wide(1 + p["scale"]) * wide(nn.sigmoid(p["gate"])) * jnp.exp(p["logit_scale"])) @ p["w"],
        {"w": "in out"},
        (),
    ),
    "scales, gates behind tanh, and in einsums": (
        {"a": (8,), "gate": (8,), "each": (8,), "heads": (2, 4), "w": (8, 4)},
        lambda p, x: (
            jnp.einsum(
                "bthd,hd->bthd",
                jnp.einsum("btd,d->btd", x * wide(p["a"]) * wide(jnp.tanh(p["gate"])), p["each"]).reshape(2, 5, 2, 4),
                p["heads"],
            ).reshape(2, 5, 8)
            @ p["w"]
        ),
        {"w": "in out"},
        ("a", "gate", "each", "heads"),
    ),
    "what rescales a kernel is none": (
        {"g": (1, 4), "v": (8, 4), "s": ()},
        lambda p, x: weight_normalised(p, x) * p["s"],
        {"v": "in out"},
        ("g", "s"),
    ),
    "a scalar times a kernel": (
        {"s": (), "w": (8, 8), "v": (4, 8)},
        lambda p, x: x @ (p["s"] * p["w"]) @ (p["s"] * p["v"]).T,
        {"w": "in out", "v": "out in"},
        ("s",),
    ),
    "a permutation": (
        {"w": (8, 8)},
        lambda p, x: x @ p["w"][:, np.arange(8)[::-1]] + x @ jnp.roll(p["w"], 1, 1),
        {"w": "in out"},
        (),
    ),
    "heads that are taken several times": (
        {"wk": (8, 2, 4), "wo": (4, 4, 8)},
        heads,
        {"wk": "in out out", "wo": "in in out"},
        (),
    ),
    "heads that are repeated": (
        {"wk": (8, 2, 4)},
        lambda p, x: jnp.einsum("btd,dhk->bthk", x, jnp.repeat(p["wk"], 2, axis=1)),
        {"wk": "in out out"},
        (),
    ),
    "a fused kernel, sliced": ({"w": (8, 8, 4)}, fused, {"w": "in out out"}, ()),
    "a fused kernel, split": ({"w": (8, 12)}, gated_mlp, {"w": "in out"}, ()),
    "the last column apart": (
        {"w": (8, 17)},
        lambda p, x: jnp.concatenate([x @ p["w"][:, -1:], x @ p["w"][:, :-1]], -1),
        {"w": "in out"},
        (),
    ),
    "one entry after the other": ({"w": (3, 8, 8)}, picked_by_loop, {"w": "stack in out"}, ()),
    "layers by index": (
        {"w": (3, 8, 8)},
        lambda p, x: x @ p["w"][0] @ p["w"][1] @ p["w"][2],
        {"w": "stack in out"},
        (),
    ),
    "a row of its own for each group": ({"w": (3, 8, 16)}, ragged, {"w": "stack in out"}, ()),
    "a kernel that is padded": (
        {"w": (8, 3)},
        lambda p, x: x @ jnp.pad(p["w"], ((0, 0), (0, 1))),
        {"w": "in out"},
        (),
    ),
    "a depthwise einsum": (
        {"k": (3, 8)},
        lambda p, x: jnp.einsum("bkc,kc->bc", x[:, :3], p["k"]),
        {"k": "in out"},
        (),
    ),
    "a low-rank addition": (
        {"w": (8, 4), "a": (8, 2), "b": (2, 4)},
        lambda p, x: x @ (p["w"] + p["a"] @ p["b"]),
        {"w": "in out", "a": "in out", "b": "in out"},
        (),
    ),
    "a constant that a kernel reads": (
        {"w": (6, 8)},
        lambda p, x: x + (np.ones((5, 6), np.float32) @ p["w"])[None],
        {"w": "in out"},
        (),
    ),
    "a convolution whose kernel the data modulates": (
        {"conv/w": (3, 3, 8, 4)},
        lambda p, x: jax.lax.conv_general_dilated(
            jnp.ones((1, 6, 6, 8)),
            p["conv/w"] * x[0, 0][None, None, :, None],
            (1, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        ),
        {"conv/w": "window window in out"},
        (),
    ),
    "a learned query": (
        {"queries": (6, 8), "wq": (8, 8)},
        lambda p, x: jnp.einsum("qd,btd->bqt", p["queries"] @ p["wq"], x),
        {"wq": "in out"},
        (),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_leaves_are_followed_through_what_the_network_does_to_them(name):
    shapes, network, kernels, gates = CASES[name]
    layout = sm.describe(network, shapes_of(**shapes), X)
    assert {path: " ".join(leaf.axes) for path, leaf in layout.items()} == kernels
    assert {path for path, leaf in layout.leaves.items() if leaf.gate} == set(gates)
    assert not any("several ways" in leaf.why for leaf in layout.values())


@pytest.mark.parametrize(
    "network, shapes, says",
    (
        (standardised, {"w": (8, 4)}, "w does not stay sparse"),
        (
            lambda p, x: x @ (p["w"] + p["a"] @ p["b"]),
            {"w": (8, 4), "a": (8, 2), "b": (2, 4)},
            "w does not stay sparse",
        ),
        (lambda p, x: x @ p["w"] @ p["w"].T, {"w": (8, 4)}, "w is multiplied in several ways"),
        (lambda p, x: x @ jax.lax.sort(p["w"]), {"w": (8, 4)}, "w could not be followed to a product"),
        (lambda p, x: x, {"w": (8, 4)}, "w is not used"),
        (lambda p, x: x * p["filter"][None], {"filter": (5, 8), "w": (8, 4)}, "filter (5, 8) is multiplied with data"),
    ),
)
def test_what_a_trace_shows_to_be_doubtful_is_a_warning_of_inspect(network, shapes, says):
    assert any(line.startswith(says) for line in sm.inspect(shapes_of(**shapes), network, X).warnings)


def test_what_not_even_a_trace_tells_is_an_error_that_does_not_ask_for_one():
    with pytest.raises(
        ValueError, match=r"neither the network nor its name tells.*'w' \(2, 8, 4\).*or None if it is no"
    ):
        sm.describe(lambda p, x: x @ jax.lax.sort(p["w"])[0], shapes_of(w=(2, 8, 4)), X)


def test_a_layout_says_what_may_learn_beside_the_scores():
    weights = {"w": jnp.ones((8, 4)), "bias": jnp.ones(4), "half": jnp.ones(4, jnp.bfloat16)}
    weights |= {"steps": jnp.zeros(4, jnp.int32)}
    layout = sm.describe(None, weights)
    assert [path for path, leaf in by_path(weights).items() if layout.others(path, leaf)] == ["bias", "half"]


# The variance that a draw means, under the layout.


def linen(module):
    def make(x):
        weights = jax.jit(module.init)(jax.random.key(0), x)["params"]
        return weights, lambda weights, x: module.apply({"params": weights}, x)

    return make


def equinox(layer):
    def make(x):
        weights, static = eqx.partition(layer, eqx.is_inexact_array)
        return weights, lambda weights, x: jax.vmap(eqx.combine(weights, static))(x)

    return make


def haiku(layer):
    def make(x):
        hk = pytest.importorskip("haiku")
        net = hk.without_apply_rng(hk.transform(lambda x: getattr(hk, layer[0])(*layer[1:], with_bias=False)(x)))
        return jax.jit(net.init)(jax.random.key(0), x), net.apply

    return make


class Looped(nn.Module):
    @nn.compact
    def __call__(self, x):
        kernels = self.param("kernels", nn.initializers.normal(), (3, 24, 24))
        return jax.lax.fori_loop(0, 1, lambda i, x: x @ kernels[i], x)


KEY = jax.random.key(5)
LAYERS = {  # {name: (its maker, the shape of the inputs, how much of the border is left out)}
    "dense": (linen(nn.Dense(32, use_bias=False)), (24,), 0),
    "general": (linen(nn.DenseGeneral((4, 8), axis=(-2, -1), use_bias=False)), (4, 6), 0),
    "convolution": (linen(nn.Conv(16, (3, 3), use_bias=False)), (12, 12, 6), 1),
    "depthwise": (linen(nn.Conv(32, (3, 3), feature_group_count=16, use_bias=False)), (12, 12, 16), 1),
    "grouped": (linen(nn.Conv(16, (3,), feature_group_count=4, use_bias=False)), (20, 8), 1),
    "transposed": (linen(nn.ConvTranspose(16, (4, 4), strides=(2, 2), use_bias=False)), (8, 8, 6), 4),
    "transposed by 3": (linen(nn.ConvTranspose(16, (3,), strides=(3,), use_bias=False)), (20, 8), 3),
    "transposed, swapped": (linen(nn.ConvTranspose(16, (3, 3), transpose_kernel=True, use_bias=False)), (9, 9, 6), 2),
    "in a loop": (linen(Looped()), (24,), 0),
    "equinox linear": (equinox(eqx.nn.Linear(24, 32, use_bias=False, key=KEY)), (24,), 0),
    "equinox convolution": (equinox(eqx.nn.Conv1d(8, 16, 3, groups=2, use_bias=False, key=KEY)), (8, 20), 0),
    "equinox transposed": (equinox(eqx.nn.ConvTranspose1d(8, 16, 4, stride=2, use_bias=False, key=KEY)), (8, 20), 0),
    "haiku convolution": (haiku(("Conv2D", 16, 3)), (12, 12, 6), 1),
    "haiku transposed": (haiku(("Conv2DTranspose", 16, 4, 2)), (8, 8, 6), 4),
    "haiku depthwise": (haiku(("DepthwiseConv2D", 2, 3)), (12, 12, 16), 1),
}


@pytest.mark.parametrize("name", LAYERS)
def test_the_outputs_of_a_drawn_layer_have_the_variance_that_the_initializer_means(name):
    make, shape, border = LAYERS[name]
    x = jax.random.normal(jax.random.key(1), (400, *shape))
    weights, apply_fn = make(x)
    layout = sm.describe(apply_fn, weights, x)
    squares = []
    for seed in range(6):
        drawn = initializers.kaiming_normal(jax.random.key(seed), weights, where=layout)
        out = np.asarray(jax.jit(apply_fn)(drawn, x))
        if border:  # near it, padding takes the place of inputs
            axes = out.ndim - 2
            out = out[(slice(None), *[slice(border, -border)] * axes)]
        squares.append(np.mean(out**2))
    assert np.mean(squares) == pytest.approx(2, rel=0.12)  # 2 / fan_in for each of fan_in inputs of variance 1


def test_layouts_is_the_room_of_describe():
    assert sm.describe is layouts.describe and sm.inspect is layouts.inspect
