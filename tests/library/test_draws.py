"""Bits that will not move: what a seed draws, whatever JAX is set to, wherever it runs, and in which version."""

import contextlib
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import supermask_jax as sm
from supermask_jax import draws, initializers, trees
from supermask_jax.selection import random_scores

pytestmark = pytest.mark.usefixtures("strict_dtypes")

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "draws.json").read_text())
WEIGHTS = {
    "Conv_0": {"kernel": np.zeros((3, 3, 2, 4), np.float32), "bias": np.zeros(4, np.float32)},
    "Dense_0": {"kernel": np.zeros((70, 30), np.float32)},
}
LIMITS = (0, 2**32 - 1)


def digest(tree):
    """The SHA-256 of all leaves as little-endian float32, in the order of their paths."""
    leaves = [np.asarray(leaf, "<f4").tobytes() for _, leaf in sorted(trees.by_path(tree).items())]
    return hashlib.sha256(b"".join(leaves)).hexdigest()


def initializer(name, density=None):
    return lambda key: getattr(initializers, name)(key, WEIGHTS, density)


DRAWN = {
    f"{name} {density}" if density else name: initializer(name, density)
    for name in initializers.INITIALIZERS
    if name != "signed_deviation"
    for density in (None, 0.3)
} | {
    "signed_deviation": lambda key: initializers.signed_deviation(initializers.glorot_normal(key, WEIGHTS)),
    "init_scores": lambda key: sm.init_scores(key, WEIGHTS),
    "random_scores": lambda key: random_scores(key, WEIGHTS),
    "bernoulli": lambda key: sm.bernoulli()(sm.init_scores(jax.random.key(0, impl=draws.GENERATOR), WEIGHTS), key),
}
TRACED = ("signed_constant 0.3", "kaiming_uniform", "init_scores", "random_scores", "bernoulli")


def golden(name, seed):
    return GOLDEN["sha256"][name][GOLDEN["seeds"].index(seed)]


@pytest.mark.parametrize("name", DRAWN)
def test_ten_seeds_draw_what_they_always_drew(name):
    assert [digest(DRAWN[name](jax.random.key(seed))) for seed in GOLDEN["seeds"]] == GOLDEN["sha256"][name]


def test_the_golden_table_has_every_draw_ten_seeds_and_their_limits():
    assert GOLDEN["sha256"].keys() == DRAWN.keys()
    assert len(set(GOLDEN["seeds"])) == 10 and {*LIMITS, 2**31 - 1, 2**31} <= set(GOLDEN["seeds"])
    assert all(len(hashes) == 10 for hashes in GOLDEN["sha256"].values())
    for name, hashes in GOLDEN["sha256"].items():
        assert len(set(hashes)) == (1 if name.startswith("unsigned") else 10)


@contextlib.contextmanager
def setting(**options):
    """JAX's configuration, for a while; functions that were compiled under another one are compiled anew."""
    with contextlib.ExitStack() as stack:
        for name, value in options.items():
            stack.enter_context(getattr(jax, name)(value))
        yield


SETTINGS = {
    "not partitionable": {"threefry_partitionable": False},
    "64 bits": {"enable_x64": True},
    "rbg": {"default_prng_impl": "rbg"},
    "all": {"threefry_partitionable": False, "enable_x64": True, "default_prng_impl": "rbg"},
}


EAGER = [name for name in DRAWN if "0.3" not in name and name != "bernoulli"]  # scaled and drawn alike, and below


@pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("name", EAGER)
def test_no_setting_of_jax_changes_a_draw(name, options):
    with setting(**options):
        for seed in LIMITS:
            assert digest(DRAWN[name](jax.random.key(seed))) == golden(name, seed)


@pytest.mark.slow
@pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS)
def test_no_setting_of_jax_changes_a_draw_inside_of_two_jits(options):
    """Normals are drawn on the host, and not under jit."""
    with setting(**options):
        inner = jax.jit(lambda key: {name: DRAWN[name](key) for name in TRACED})
        drawn = jax.jit(lambda seed: inner(jax.random.key(seed)))(np.uint32(2**32 - 1))
    assert {name: digest(tree) for name, tree in drawn.items()} == {name: golden(name, 2**32 - 1) for name in TRACED}


@pytest.mark.parametrize("seed", LIMITS)
def test_keys_of_streams_and_leaves_are_the_same_for_every_generator_and_width(seed):
    """The first two words of an rbg key are those of the threefry key, through any number of names folded in."""

    def words(**options):
        with setting(**options):
            key = trees.leaf_key(trees.leaf_key(jax.random.key(seed), "weights"), "Conv_0/kernel")
            again = jax.random.fold_in(key, 255)
            return [jax.random.key_data(one)[:2].tolist() for one in (jax.random.key(seed), key, again)]

    assert words()[0] == [0, seed]
    assert words(default_prng_impl="rbg") == words(enable_x64=True) == words(threefry_partitionable=False) == words()


def test_bits_are_those_of_jax_random_where_it_is_set_to_be_partitionable():
    key = trees.leaf_key(jax.random.key(7, impl=draws.GENERATOR), "Conv_0/kernel")
    with setting(threefry_partitionable=True):
        for shape in ((), (3, 0, 2), (3, 3, 2, 4)):
            drawn = draws.bits(key, shape)
            assert drawn.dtype == jnp.uint32 and drawn.shape == shape
            np.testing.assert_array_equal(drawn, jax.random.bits(key, shape, jnp.uint32))
    np.testing.assert_array_equal(draws.bits(jax.random.key_data(key), (5,)), draws.bits(key, (5,)))


def test_an_element_can_have_a_key_of_its_own():
    """Element i is drawn with its key and the counter i, as in an array of that key alone."""
    keys = jax.random.split(jax.random.key(7, impl=draws.GENERATOR), 6)
    words = jnp.moveaxis(jax.random.key_data(keys).reshape(2, 3, 2), -1, 0)
    alone = jnp.stack([draws.bits(key, (2, 3)).ravel()[i] for i, key in enumerate(keys)])
    np.testing.assert_array_equal(draws.bits(words, (2, 3)), alone.reshape(2, 3))


def test_more_elements_than_counters_are_refused():
    with pytest.raises(ValueError, match="cannot draw 4294967296 numbers"):
        jax.eval_shape(lambda key: draws.bits(key, (2**16, 2**16)), jax.random.key(0))


def test_a_layer_more_changes_no_other_layer():
    more = {**WEIGHTS, "Aaa": {"kernel": np.zeros((5, 7), np.float32)}}
    for name in initializers.INITIALIZERS:
        if name != "signed_deviation":
            drawn = getattr(initializers, name)(jax.random.key(7), more)
            del drawn["Aaa"]
            assert digest(drawn) == golden(name, 7)


SHARDED = """
import json
import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import test_draws

mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
SPECS = {"Conv_0/kernel": P(None, None, "b", "a"), "Conv_0/bias": P("a"), "Dense_0/kernel": P("b")}

def every(key):
    return {name: test_draws.DRAWN[name](key) for name in test_draws.TRACED}

def sharding(path, leaf):
    return NamedSharding(mesh, SPECS[path.partition("/")[2]])

found = []
for partitionable in (True, False):
    with jax.threefry_partitionable(partitionable):
        key = jax.random.key(7)
        shardings = test_draws.trees.map_with_name(sharding, jax.eval_shape(every, key))
        drawn = jax.jit(lambda key: every(key), out_shardings=shardings)(key)
    for tree in drawn.values():
        assert len(tree["Conv_0"]["kernel"].sharding.device_set) == 8
        assert tree["Conv_0"]["kernel"].addressable_shards[0].data.shape == (3, 3, 1, 1)
    found.append({name: test_draws.digest(tree) for name, tree in drawn.items()})
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.usefixtures("quick_processes")
def test_draws_are_the_same_sharded_over_eight_devices():
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count=8 {os.environ['XLA_FLAGS']}",
        "PJRT_NPROC": "32",  # with a thread per core, eight devices on few cores can wait for each other forever
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)]),
    }
    command = [sys.executable, "-c", SHARDED]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert json.loads(ended.stdout) == [{name: golden(name, 7) for name in TRACED}] * 2
