"""Leaves by path: their names, which of them are prunable, a key for each, and what masks say of themselves."""

import chex
import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import supermask_jax as sm
from supermask_jax import trees

pytestmark = pytest.mark.usefixtures("strict_dtypes")


def array(*shape):
    return jnp.zeros(shape, jnp.float32)


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2, name="out")(nn.Conv(3, (2, 2))(x))


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(1, 3, (2, 2), rngs=rngs)
        self.stack = nnx.List([nnx.Linear(3, 2, use_bias=False, rngs=rngs)])


@pytest.mark.parametrize(
    ("tree", "paths"),
    (
        ({"Conv_0": {"kernel": array(2), "bias": array(2)}, "a": array(1)}, ["Conv_0/bias", "Conv_0/kernel", "a"]),
        ([array(1), (array(2), {"w": array(3)})], ["0", "1/0", "1/1/w"]),
        (sm.Subnet(weights={"w": array(1)}, scores={"w": None}), ["weights/w"]),
        ({"layer": {"value": array(1)}}, ["layer/value"]),
        ({"value": {"kernel": array(1)}}, ["value/kernel"]),  # attention's own `value` is not a trailing one
        ({"value": array(1)}, ["value"]),
        (array(2), [""]),
    ),
)
def test_a_path_is_the_leafs_keys_joined_by_slashes_without_a_trailing_value(tree, paths):
    assert list(trees.by_path(tree)) == paths


def test_paths_of_a_linen_model_are_the_names_of_its_params():
    params = jax.eval_shape(Linen().init, jax.random.key(0), array(1, 4, 4, 1))["params"]
    assert list(trees.by_path(params)) == ["Conv_0/bias", "Conv_0/kernel", "out/bias", "out/kernel"]


def test_two_leaves_of_one_path_raise_instead_of_sharing_a_mask():
    with pytest.raises(ValueError, match="two leaves have the path 'a/b'"):
        trees.by_path({"a/b": np.ones(2), "a": {"b": np.ones(2)}})


def test_paths_of_an_nnx_model_carry_no_trailing_value():
    _, params = nnx.split(Nnx(nnx.Rngs(0)), nnx.Param)
    assert list(trees.by_path(params)) == ["conv/bias", "conv/kernel", "stack/0/kernel"]


def test_paths_of_an_equinox_model_are_its_attribute_names():
    weights = eqx.filter(eqx.nn.MLP(2, 3, 4, 1, key=jax.random.key(0)), eqx.is_array)
    assert list(trees.by_path(weights)) == [
        "layers/0/weight", "layers/0/bias", "layers/1/weight", "layers/1/bias",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("path", "shape", "kernel"),
    (
        ("Dense_0/kernel", (3, 2), True),
        ("Conv_0/kernel", (3, 3, 1, 2), True),
        ("layers/0/weight", (3, 2), True),
        ("w", (3, 2), True),
        ("bias/kernel", (3, 2), True),  # the last name decides
        ("kernel", (3,), False),
        ("kernel", (), False),
        ("Dense_0/bias", (3,), False),
        ("conv/bias", (3, 1, 1), False),  # Equinox gives the bias of a convolution three axes
        ("attention/query/bias", (2, 4), False),
        ("linear/b", (2, 4), False),
        ("norm/scale", (2, 4), False),
        ("Embed_0/embedding", (20, 4), False),
    ),
)
def test_kernels_have_two_axes_or_more_and_are_not_named_like_something_else(path, shape, kernel):
    assert sm.is_kernel(path, array(*shape)) is kernel


WEIGHTS = {"Dense_0": {"kernel": array(4, 3), "bias": array(3)}, "Dense_1": {"kernel": array(3, 2), "bias": array(2)}}


def test_prunable_gives_the_shapes_of_the_chosen_leaves_in_the_trees_order():
    assert trees.prunable(WEIGHTS) == {"Dense_0/kernel": (4, 3), "Dense_1/kernel": (3, 2)}
    assert trees.prunable(WEIGHTS, lambda path, leaf: path.startswith("Dense_1")) == {
        "Dense_1/bias": (2,),
        "Dense_1/kernel": (3, 2),
    }


def test_a_predicate_that_matches_nothing_is_refused_and_the_leaves_are_listed():
    with pytest.raises(ValueError, match=r"Dense_0/bias, Dense_0/kernel, Dense_1/bias, Dense_1/kernel"):
        trees.prunable(WEIGHTS, lambda path, leaf: "Conv" in path)
    with pytest.raises(ValueError, match=r"\(none\)"):
        trees.prunable({})


def test_a_single_value_stands_for_every_path_and_a_mapping_comes_back_in_the_order_of_the_paths():
    assert trees.per_path(0.3, ["b", "a"]) == {"b": 0.3, "a": 0.3}
    assert list(trees.per_path({"a": 0.3, "b": 0.7}, ["b", "a"]).items()) == [("b", 0.7), ("a", 0.3)]


def test_a_path_that_is_not_there_is_refused_with_the_nearest_name_and_all_names():
    with pytest.raises(ValueError, match=r"'Conv_1/kernal' \(did you mean 'Conv_1/kernel'\?\).*Conv_1/kernel, Dense_0"):
        trees.per_path({"Conv_1/kernal": 0.3}, ["Conv_1/kernel", "Dense_0/kernel"])
    with pytest.raises(ValueError, match=r"'xyz'; there are: Conv_1/kernel"):
        trees.per_path({"xyz": 0.3}, ["Conv_1/kernel"])


def test_a_mapping_that_leaves_paths_out_is_refused_and_they_are_named():
    with pytest.raises(ValueError, match=r"leaves out b, c; it must name every"):
        trees.per_path({"a": 0.3}, ["a", "b", "c"])


def test_a_leafs_key_depends_on_its_path_and_the_key_alone():
    """Adding, removing or renaming one layer leaves every other layer's draw as it was."""
    small = sm.init_scores(jax.random.key(0), WEIGHTS)
    large = sm.init_scores(jax.random.key(0), {"A": {"kernel": array(4, 3)}, **WEIGHTS, "Z": {"kernel": array(3, 2)}})
    chex.assert_trees_all_equal({name: large[name] for name in WEIGHTS}, small)


def test_layers_of_equal_shape_and_other_keys_draw_other_numbers():
    twins = {f"Conv_{i}": {"kernel": array(4, 4)} for i in (1, 2, 10)}
    draws = [
        np.asarray(leaf) for seed in (0, 1) for leaf in jax.tree.leaves(sm.init_scores(jax.random.key(seed), twins))
    ]
    assert len(draws) == 6
    for i, one in enumerate(draws):
        for other in draws[i + 1 :]:
            assert (one != other).all()


def test_leaf_keys_are_the_same_under_jit_and_frozen():
    """The key of a path is part of what "a seed and a mask" means: it must never change."""
    key = trees.leaf_key(jax.random.key(7), "Conv_0/kernel")
    jitted = jax.jit(lambda key: trees.leaf_key(key, "Conv_0/kernel"))(jax.random.key(7))
    chex.assert_trees_all_equal(jax.random.key_data(key), jax.random.key_data(jitted))
    assert jax.random.key_data(key).tolist() == FROZEN_KEY


FROZEN_KEY = [2618934560, 3841193763]


def test_masks_multiply_their_weights_and_leaves_without_a_mask_pass_as_they_are():
    weights = {"kernel": jnp.array([[1.5, -2.0], [3.0, 4.0]], jnp.bfloat16), "bias": jnp.array([5.0], jnp.float32)}
    masks = {"kernel": jnp.array([[0, 1], [1, 0]], jnp.float32), "bias": None}
    masked = trees.apply_masks(weights, masks)
    chex.assert_trees_all_equal_shapes_and_dtypes(masked, weights)
    chex.assert_trees_all_equal(masked["kernel"].astype(jnp.float32), np.array([[0, -2], [3, 0]], np.float32))
    assert masked["bias"] is weights["bias"]


MASKS = {"a": {"kernel": jnp.array([1.0, 0, 0, 1, 0])}, "b": {"kernel": jnp.array([[1, 1, 1, 0, 0]], jnp.bfloat16)}}


def test_density_weighs_layers_by_their_size_and_layer_densities_name_them():
    masks = {**MASKS, "bias": None, "c": jnp.ones(10, bool)}
    assert sm.layer_densities(masks) == {"a/kernel": 0.4, "b/kernel": 0.6, "c": 1.0}
    assert sm.density(masks) == 15 / 20
    assert type(sm.density(masks)) is float and type(sm.layer_densities(masks)["c"]) is float


def test_an_empty_mask_has_density_zero():
    assert sm.density({"a": array(0)}) == 0.0
    assert sm.layer_densities({"a": array(0)}) == {"a": 0.0}


@pytest.mark.parametrize("measure", (sm.density, sm.layer_densities))
@pytest.mark.parametrize("odd", (0.5, -1.0, 2.0, np.nan, 0.99999994, 1e-45))
def test_anything_but_0_and_1_is_no_mask_and_its_path_is_named(measure, odd):
    with pytest.raises(ValueError, match="'b/kernel' holds values other than 0 and 1"):
        measure({**MASKS, "b": {"kernel": np.array([0, 1, odd], np.float32)}})


@pytest.mark.parametrize("measure", (sm.density, sm.layer_densities))
def test_no_mask_at_all_is_refused(measure):
    with pytest.raises(ValueError, match="there is no mask"):
        measure({"a": None, "b": {"kernel": None}})


# What is no tree of arrays.


@pytest.mark.parametrize("select", (lambda s: sm.layerwise_masks(s, 0.5), lambda s: sm.global_masks(s, 0.5)))
def test_lists_of_numbers_and_objects_are_told_apart_from_arrays(select):
    with pytest.raises(TypeError, match=r"scores are arrays; 'w/0' is a float: is a list of numbers meant as one\?"):
        select({"w": [0.1, 0.2]})
    with pytest.raises(TypeError, match="scores must be floats of at most 32 bits; 'w' has object"):
        select({"w": np.array([None, 1.0])})


def test_a_leaf_that_is_no_array_is_named():
    with pytest.raises(TypeError, match="the leaves of weights are arrays; 'w' is a str"):
        sm.init_scores(jax.random.key(0), {"w": "kernel"}, lambda path, leaf: True)
    with pytest.raises(TypeError, match="only floats are prunable; 'w' has object"):
        sm.init_scores(jax.random.key(0), {"w": np.array([[None, 1.0]])})


@pytest.mark.parametrize("count", (float("nan"), float("inf"), 1.5, -1))
def test_a_count_that_is_no_number_of_weights_is_refused(count):
    with pytest.raises(ValueError, match=r"cannot keep .* of the 6 weights to choose from"):
        sm.keep_highest({"w": jnp.ones((2, 3), jnp.float32)}, {"w": count})


def test_shapes_and_counts_of_numpy_are_numbers():
    shape = tuple(np.array([3, 3, 16, 32]))
    assert sm.flax_fan_in("Conv_0/kernel", shape) == 144
    assert sm.densities.erk({"Conv_0/kernel": shape, "head": tuple(np.array([32, 10]))}, 0.3)["head"] == 1.0
    assert int(sm.keep_highest({"w": jnp.ones(5, jnp.float32)}, {"w": np.int64(3)})["w"].sum()) == 3
