"""Small networks of every kind that a file can hold."""

import contextlib
import os
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import supermask_jax as sm
from supermask_jax import artifact, initializers
from supermask_jax.artifact import Base, Drawn, Stored

KEY = jax.random.key(7, impl="threefry2x32")
SHAPES = {
    "Conv_0": {"kernel": (3, 3, 2, 5), "bias": (5,)},
    "BatchNorm_0": {"scale": (5,), "bias": (5,)},
    "Dense_0": {"kernel": (45, 10), "bias": (10,)},
}
DRAWN = ("signed_constant", "unsigned_constant", "kaiming_normal", "glorot_normal", "kaiming_uniform")


@contextlib.contextmanager
def limited_memory(more: int = 2**32):
    """This process may take so many bytes more, where the system can say so: a fault must not take the machine's."""
    if not os.path.exists("/proc/self/statm"):
        yield
        return
    import resource

    with open("/proc/self/statm") as now:
        size = int(now.read().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size + more, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


class Network(NamedTuple):
    """What is saved, what its weights come from, and what else the file has or the reader needs."""

    saved: Any
    origin: Any
    model_state: Any = None
    about: Mapping[str, Any] = {}
    base: Any = None

    def save(self, path):
        return sm.save_subnetwork(path, self.saved, self.origin, model_state=self.model_state, about=self.about)


def shapes(dtype=jnp.float32):
    """Weights of a convolution, BatchNorm and a dense layer, all 0 but the scales."""
    leaves = jax.tree.map(lambda shape: jnp.zeros(shape, dtype), SHAPES, is_leaf=lambda leaf: isinstance(leaf, tuple))
    return leaves | {"BatchNorm_0": {"scale": jnp.ones(5, dtype), "bias": jnp.zeros(5, dtype)}}


def drawn(name, density=None, key=KEY, dtype=jnp.float32):
    if name == "signed_deviation":
        return initializers.signed_deviation(initializers.glorot_normal(key, shapes(dtype)))
    return getattr(initializers, name)(key, shapes(dtype), density)


def trained(dtype=jnp.float32, seed=0):
    """Weights that no seed gives back, of both signs and of very different sizes."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.standard_cauchy(leaf.shape), jnp.float32).astype(dtype), shapes())


def masks(weights, density=0.3, seed=1):
    """Random masks of the kernels, without a compilation."""
    rng = np.random.default_rng(seed)
    return whole_of(weights, lambda shape: rng.random(shape) < density)


def whole_of(weights, make):
    def mask(path, leaf):
        return jnp.asarray(make(leaf.shape), leaf.dtype) if sm.trees.is_kernel(path, leaf) else None

    return sm.trees.map_with_name(mask, weights)


def whole(weights, low, high, seed=2):
    """Masks of whole numbers from `low` to `high`."""
    rng = np.random.default_rng(seed)
    return whole_of(weights, lambda shape: rng.integers(low, high + 1, shape))


def redrawn(name, most, dtype=jnp.float32, seed=3):
    """(weights, redraws): some weights were drawn anew, up to `most` times."""
    weights, rng = drawn(name, dtype=dtype), np.random.default_rng(seed)
    often = jax.tree.map(lambda m: rng.integers(0, most + 1, m.shape) * rng.integers(0, 2, m.shape), masks(weights))
    recipe = initializers.recipe(name, weights)

    def again(path, leaf, times):
        if times is None:
            return leaf
        key = sm.trees.leaf_key(KEY, path)
        draws = [
            sm.draws.DRAWS[recipe[path][0]](one, leaf.shape, recipe[path][1])
            for one in map(key_of(key), range(most + 1))
        ]
        return jnp.asarray(np.choose(np.minimum(times, most), draws)).astype(leaf.dtype)

    return sm.trees.map_with_name(again, weights, often), often


def key_of(key):
    return lambda n: jax.random.fold_in(key, n) if n else key


def rescaled(dtype, seed=4):
    weights = drawn("signed_constant", dtype=dtype)
    method = sm.methods.bernoulli(weights, rescale=True)
    rng = np.random.default_rng(seed)
    scores = jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape), s.dtype), method.subnet.scores)
    return method._replace(subnet=sm.Subnet(weights, scores))


def parted(weights, parts, seed=5):
    """Masks that keep what `parts` locks, and half of what it leaves free."""
    rng = np.random.default_rng(seed)

    def mask(path, leaf):
        if path not in parts:
            return None
        _, locked, free = artifact.partition(KEY, path, leaf.size, *parts[path])
        flat = np.zeros(leaf.size, np.float32)
        flat[locked], flat[free] = 1, rng.integers(0, 2, free.size)
        return jnp.asarray(flat.reshape(leaf.shape))

    return sm.trees.map_with_name(mask, weights)


def of_drawn(name, density=None, dtype=jnp.float32):
    weights = drawn(name, density, dtype=dtype)
    return Network(sm.Subnet(weights, masks(weights, density or 0.5)), Drawn(name, KEY, density=density))


def of_seed():
    key = sm.trees.leaf_key(jax.random.key(2**32 - 1, impl="threefry2x32"), "weights")
    weights = drawn("kaiming_normal", key=key)
    return Network(sm.Subnet(weights, masks(weights)), Drawn("kaiming_normal", 2**32 - 1, "weights"))


def of_redraws(name, most, dtype=jnp.float32):
    weights, often = redrawn(name, most, dtype)
    return Network(sm.Subnet(weights, masks(weights)), Drawn(name, KEY, redraws=often))


def of_partition():
    weights, parts = drawn("signed_constant"), {"Conv_0/kernel": (31, 20), "Dense_0/kernel": (0, 449)}
    return Network(sm.Subnet(weights, parted(weights, parts)), Drawn("signed_constant", KEY, partition=parts))


def of_some_stored():
    """Leaves that are neither drawn nor equal, bit for bit: they are stored whole, also under a mask."""
    weights = drawn("signed_constant")
    weights["Dense_0"]["bias"] = jnp.arange(10.0)
    weights["BatchNorm_0"]["bias"] = jnp.array([0.0, -0.0, 0.0, 0.0, 0.0])
    ones = masks(weights) | {"BatchNorm_0": {"scale": None, "bias": jnp.array([1.0, 0, 0, 1, 0])}}
    return Network(sm.Subnet(weights, ones), Drawn("signed_constant", KEY))


def of_whole(low, high):
    weights = drawn("signed_constant")
    return Network(sm.Subnet(weights, whole(weights, low, high)), Drawn("signed_constant", KEY))


def of_names():
    weights = drawn("signed_constant")
    named = {f"task {seed}": sm.Subnet(weights, masks(weights, seed=seed)) for seed in (1, 2)}
    return Network(named | {"signs": of_whole(-1, 1).saved}, Drawn("signed_constant", KEY))


def of_method():
    weights = drawn("signed_constant")
    method = sm.methods.edge_popup(jax.random.key(8), weights, 0.3)
    state = {"batch_stats": {"BatchNorm_0": {"mean": jnp.arange(5.0), "var": jnp.full(5, 0.1)}}}
    about = {"model": "convnet", "accuracy": 0.9928, "shape": [28, 28, 1], "µ": "é \ud800", "none": None}
    return Network(method, Drawn("signed_constant", KEY), state, about)


def of_trained(dtype, own):
    weights = trained(own)
    return Network(sm.Subnet(weights, masks(weights, 0.7)), Stored(dtype))


def of_dense():
    return Network(sm.methods.dense(trained()), Stored())


def of_two_stored():
    weights = trained()
    return Network({name: sm.Subnet(weights, masks(weights, seed=seed)) for seed, name in enumerate("ab")}, Stored())


def of_base():
    """Of the weights that the dense network has."""
    weights = trained()
    return Network(sm.Subnet(weights, masks(weights)), Base("https://example.org/model, version 3"), base=weights)


def odd():
    return {
        "int8": jnp.array([[1, -2, 3]], jnp.int8),
        "uint32": jnp.array([2**32 - 1, 5], jnp.uint32),
        "bool": jnp.array([True, False]),
        "scalar": jnp.array(2.5),
        "empty": jnp.zeros((0, 3)),
        "rows of none": jnp.zeros((3, 0)),
        "kernel": jnp.asarray(np.random.default_rng(6).normal(size=(3, 7)), jnp.float16),
    }


def of_odd_leaves():
    ones = {"empty": jnp.zeros((0, 3)), "rows of none": jnp.zeros((3, 0)), "scalar": jnp.ones(())}
    state = {"counter": jnp.array(3), "half": jnp.ones(3, jnp.bfloat16), **odd()}
    return Network(sm.Subnet(odd(), dict.fromkeys(odd()) | ones), Stored("int8"), state)


def of_odd_leaves_drawn():
    kernel = initializers.kaiming_normal(KEY, {"kernel": odd()["kernel"]})
    origin = Drawn("kaiming_normal", KEY, where=lambda path, leaf: path == "kernel")
    return Network(sm.Subnet(odd() | kernel, dict.fromkeys(odd())), origin, {})


def of_one_leaf():
    return Network(sm.Subnet(trained()["Dense_0"]["kernel"], jnp.ones((45, 10))), Stored())


HALF, FULL = jnp.bfloat16, jnp.float32
KINDS: dict[str, Callable[[], Network]] = {
    **{f"{name} {density}": partial(of_drawn, name, density) for name in DRAWN for density in (None, 0.3, 0.7)},
    "signed_deviation": partial(of_drawn, "signed_deviation"),
    **{
        f"{name} {jnp.dtype(dtype).name}": partial(of_drawn, name, None, dtype)
        for dtype in (HALF, jnp.float16)
        for name in ("kaiming_normal", "kaiming_uniform", "signed_constant")
    },
    "seed": of_seed,
    "redraws 3": partial(of_redraws, "kaiming_normal", 3),
    "redraws 1": partial(of_redraws, "signed_constant", 1, HALF),
    "partition": of_partition,
    "some stored": of_some_stored,
    "signs": partial(of_whole, -1, 1),
    "levels": partial(of_whole, 0, 5),
    "255 levels": partial(of_whole, 0, 255),
    "gain float32": lambda: Network(rescaled(FULL), Drawn("signed_constant", KEY)),
    "gain bfloat16": lambda: Network(rescaled(HALF), Drawn("signed_constant", KEY)),
    "gain float16": lambda: Network(rescaled(jnp.float16), Drawn("signed_constant", KEY)),
    "names": of_names,
    "method": of_method,
    **{
        f"stored {dtype} of {jnp.dtype(own).name}": partial(of_trained, dtype, own)
        for dtype in (None, "float32", "bfloat16", "float16", "int8", "int4")
        for own in (FULL, HALF)
    },
    "dense": of_dense,
    "two stored": of_two_stored,
    "base": of_base,
    "odd leaves": of_odd_leaves,
    "odd leaves drawn": of_odd_leaves_drawn,
    "one leaf": of_one_leaf,
}


@cache
def network(kind: str) -> Network:
    return KINDS[kind]()
