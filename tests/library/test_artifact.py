"""A network as a file: what is loaded is what was saved, in few bytes, or an error that names the file and the leaf."""

import builtins
import errno
import itertools
import json
import math
import os
import re
import sys
import tracemalloc
import zlib
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as np_st

import supermask_jax as sm
from supermask_jax import artifact, codes, container, contents, initializers
from supermask_jax.artifact import Base, Drawn, Stored
from supermask_jax.origins import arrays_of

KEY = networks.KEY


@pytest.fixture
def file(tmp_path):
    return tmp_path / "net.safetensors"


def same(left, right):
    """Whether two trees have the same leaves at the same paths, of one dtype, shape and bytes."""
    left, right = arrays_of(left), arrays_of(right)
    assert left.keys() == right.keys()
    for path, leaf in left.items():
        other = right[path]
        assert (leaf.dtype, leaf.shape, leaf.tobytes()) == (other.dtype, other.shape, other.tobytes()), path


def of_subnet(one):
    """(weights, masks, what the model is given) of a Subnet or a Method."""
    if isinstance(one, sm.Subnet):
        return one.weights, one.scores, sm.subnetwork(sm.identity, one)
    mask_fn = one.mask_fn
    product = one.product or (lambda subnet, key: sm.subnetwork(mask_fn, subnet, key))
    return one.subnet.weights, mask_fn(one.subnet.scores, None), product(one.subnet, None)


def small():
    """(weights, masks) of one dense layer and its bias."""
    weights = initializers.kaiming_normal(KEY, {"Dense_0": {"kernel": jnp.zeros((45, 10)), "bias": jnp.zeros(10)}})
    return weights, networks.masks(weights)


# Round trips.


@pytest.mark.float32
@pytest.mark.parametrize("kind", networks.KINDS)
def test_a_network_is_loaded_as_it_was_saved(kind, file):
    network = networks.network(kind)
    assert network.save(file) == file.stat().st_size
    loaded = sm.load_subnetwork(file, base=network.base)
    saved = network.saved if isinstance(network.saved, dict) else {None: network.saved}
    for name, one in saved.items():
        weights, masks, product = of_subnet(one)
        found = loaded.masks if name is None else loaded.masks[name]
        multiplied = sm.subnetwork(sm.identity, sm.Subnet(loaded.weights, found))
        if not isinstance(network.origin, Stored):
            same(loaded.weights, weights)
        if not isinstance(network.origin, Stored) or network.origin.dtype is None:
            same(jax.tree.map(jnp.abs, multiplied), jax.tree.map(jnp.abs, product))  # a pruned 0 has either sign
        assert arrays_of(found).keys() == arrays_of(masks).keys()
        if "gain" not in kind:
            same(found, masks)
    same(loaded.model_state, network.model_state)
    assert (loaded.model_state is None) == (network.model_state is None)
    assert loaded.about == network.about


@pytest.mark.parametrize("kind", ("kaiming_normal 0.3", "seed", "redraws 3", "partition", "levels", "names"))
def test_a_file_holds_no_weights_that_a_seed_gives_back(kind, file):
    networks.network(kind).save(file)
    _, arrays, _ = container.read(file)
    assert all(array.dtype == np.uint8 for array in arrays.values())


def test_the_same_network_is_the_same_file(file):
    weights, masks = small()
    written = set()
    for _ in range(8):  # safetensors has no order of its own
        sm.save_subnetwork(file, sm.Subnet(weights, masks), Drawn("kaiming_normal", KEY), about={"b": 1, "a": 2})
        written.add(file.read_bytes())
    assert len(written) == 1


def test_keys_seeds_and_streams_are_one_origin_in_three_ways(file):
    for seed in (0, 7, 2**32 - 1):
        for stream in ("", "weights"):
            key = jax.random.key(seed)
            key = sm.trees.leaf_key(key, stream) if stream else key
            weights = initializers.kaiming_uniform(key, small()[0])
            for origin in (Drawn("kaiming_uniform", key), Drawn("kaiming_uniform", np.uint32(seed), stream)):
                sm.save_subnetwork(file, sm.Subnet(weights, networks.masks(weights)), origin)
                same(sm.load_subnetwork(file).weights, weights)


def test_a_key_of_rbg_draws_the_same_and_is_stored_as_threefrys(file):
    weights, masks = small()
    key = jax.random.key(7, impl="rbg")
    same(initializers.kaiming_normal(key, weights), weights)
    sm.save_subnetwork(file, sm.Subnet(weights, masks), Drawn("kaiming_normal", key))
    assert container.read(file)[0]["origin"]["key"] == [0, 7]
    same(sm.load_subnetwork(file).weights, weights)


def test_redraws_of_every_number_up_to_255(file):
    weights = {"kernel": jnp.zeros((16, 32))}
    often = np.random.default_rng(0).integers(0, 256, (16, 32))
    key = sm.trees.leaf_key(KEY, "kernel")
    drawn = [initializers.signed_constant(KEY, weights)["kernel"]]
    scale = np.abs(drawn[0]).max()
    drawn += [sm.draws.DRAWS["sign"](jax.random.fold_in(key, n), (16, 32), scale) for n in range(1, 256)]
    weights = {"kernel": jnp.asarray(np.take_along_axis(np.stack(drawn), often[None], 0)[0])}
    origin = Drawn("signed_constant", KEY, redraws={"kernel": often})
    sm.save_subnetwork(file, sm.Subnet(weights, {"kernel": jnp.ones((16, 32))}), origin)
    same(sm.load_subnetwork(file).weights, weights)


def test_pruned_weights_of_trained_networks_come_back_as_zero(file):
    for kind in ("stored None of float32", "stored int8 of bfloat16"):
        networks.network(kind).save(file)
        weights, masks, _, _ = sm.load_subnetwork(file)
        for path, mask in arrays_of(masks).items():
            assert not np.asarray(arrays_of(weights)[path])[mask == 0].any()


def test_narrow_weights_are_off_by_half_a_unit_at_most(file):
    """Of bfloat16, 8 bits count, of float16 11; int8 divides the largest of an output into 127 units, int4 into 7."""
    for dtype in ("float32", "bfloat16", "float16", "int8", "int4"):
        for own in ("float32", "bfloat16"):
            network = networks.network(f"stored {dtype} of {own}")
            network.save(file)
            loaded, (weights, masks, _) = arrays_of(sm.load_subnetwork(file).weights), of_subnet(network.saved)
            for path, mask in arrays_of(masks).items():
                kept = mask != 0
                was, now = (tree[path].astype(np.float64) for tree in (arrays_of(weights), loaded))
                largest = np.abs(np.where(kept, was, 0)).max(axis=tuple(range(mask.ndim - 1)))
                own_unit = np.abs(was) * 2.0**-8 if own == "bfloat16" and dtype != "bfloat16" else 0
                unit = {
                    "float32": 0,
                    "bfloat16": np.abs(was) * 2.0**-7,
                    "float16": np.maximum(np.abs(was) * 2.0**-10, 2.0**-24),
                    "int8": np.broadcast_to(largest / 127 * (1 + 1e-6), was.shape),
                    "int4": np.broadcast_to(largest / 7 * (1 + 1e-6), was.shape),
                }[dtype]
                assert (np.abs(now - was) <= unit / 2 + own_unit)[kept].all(), (dtype, own, path)
            same({"bias": loaded["Dense_0/bias"]}, {"bias": arrays_of(weights)["Dense_0/bias"]})


def test_trained_weights_keep_their_bits_also_where_they_are_no_numbers(file):
    weights = {"kernel": jnp.array([[np.nan, np.inf], [-0.0, 1e-40]], jnp.float32)}
    sm.save_subnetwork(file, sm.Subnet(weights, {"kernel": jnp.ones((2, 2))}), Stored())
    same(sm.load_subnetwork(file).weights, weights)


@pytest.mark.float32
def test_wide_numbers_are_loaded_where_64_bits_are_on_and_refused_elsewhere(file):
    with jax.enable_x64(True):
        weights = initializers.kaiming_normal(KEY, {"kernel": jnp.zeros((5, 4), jnp.float64)})
        subnet, state = sm.Subnet(weights, networks.masks(weights)), {"steps": jnp.array(2**40)}
        assert weights["kernel"].dtype == jnp.float64
        sm.save_subnetwork(file, subnet, Drawn("kaiming_normal", KEY), model_state=state)
        loaded = sm.load_subnetwork(file)
        same(loaded.weights, weights)
        same(loaded.masks, subnet.scores)
        same(loaded.model_state, state)
    with pytest.raises(ValueError, match=f"{file}: it holds float64 numbers: switch jax_enable_x64 on"):
        sm.load_subnetwork(file)
    weights, masks = small()
    sm.save_subnetwork(file, sm.Subnet(weights, masks), Drawn("kaiming_normal", KEY))
    with jax.enable_x64(True):
        same(sm.load_subnetwork(file).weights, weights)


def test_the_file_of_a_method_holds_its_evaluation_masks_and_gains(file):
    networks.network("gain float32").save(file)
    entries = container.read(file)[0]["masks"]["default"]
    assert len({entry["gain"] for entry in entries.values()}) == 2
    _, masks, product = of_subnet(networks.network("gain float32").saved)
    for path, mask in arrays_of(masks).items():
        assert entries[path]["gain"] == np.float32(mask.size) / np.float32(mask.sum())
    same(sm.trees.apply_masks(*sm.load_subnetwork(file)[:2]), product)


def test_leaves_of_many_shapes_are_drawn_with_few_compilations(file):
    """A file of a few thousand bytes must not keep its reader busy with the compilation of each shape."""
    networks.network("kaiming_normal 0.3").save(file)

    def many(header, arrays):
        entry = header["leaves"]["Dense_0/kernel"]
        header["leaves"] |= {f"{size}": entry | {"shape": [size, 3]} for size in range(2000, 2100)}

    rewritten(file, many)
    compiled = []

    def listen(event, seconds, **_):
        compiled.append(event) if event == "/jax/core/compile/backend_compile_duration" else None

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        with pytest.raises(ValueError, match="its weights are not those that it was saved with: their hash differs"):
            sm.load_subnetwork(file)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert len(compiled) < 20


# Trees of other kinds.


def test_an_equinox_module_and_a_tuple_come_back_in_their_structure(file):
    mlp = eqx.filter(eqx.nn.MLP(4, 3, 8, 1, key=jax.random.key(0)), eqx.is_array)
    masks = jax.tree.map(lambda leaf: jnp.ones_like(leaf) if leaf.ndim > 1 else None, mlp)
    pair = (mlp, [jnp.arange(3.0)])
    sm.save_subnetwork(file, sm.Subnet(mlp, masks), Stored(), model_state=pair)
    loaded = sm.load_subnetwork(file, like=mlp, state_like=pair)
    assert jax.tree.structure(loaded.weights) == jax.tree.structure(mlp)
    assert jax.tree.structure(loaded.masks) == jax.tree.structure(masks)
    assert jax.tree.structure(loaded.model_state) == jax.tree.structure(pair)
    same(loaded.weights, mlp)
    same(loaded.masks, masks)
    same(loaded.model_state, pair)
    assert sm.load_subnetwork(file).weights["layers"]["0"]["weight"].shape == (8, 4)
    with pytest.raises(ValueError, match=f"{file}: its leaves are not those of the given tree.*layers/0/bias"):
        sm.load_subnetwork(file, like={"other": 0})


# Size.

LENET = {"Dense_0": (784, 300), "Dense_1": (300, 100), "Dense_2": (100, 10)}
CONVNET = {"Conv_0": (3, 3, 1, 32), "Conv_1": (3, 3, 32, 64), "Dense_0": (9216, 128), "Dense_1": (128, 10)}


def entropy(density):
    """Bits."""
    return -sum(p * math.log2(p) for p in (density, 1 - density))


def random_kernels(shapes, density, seed=0):
    rng = np.random.default_rng(seed)
    return {layer: {"kernel": jnp.asarray(rng.random(shape) < density, jnp.float32)} for layer, shape in shapes.items()}


@pytest.mark.parametrize("density", (0.5, 0.3, 0.1, 0.02))
@pytest.mark.parametrize("shapes", (LENET, CONVNET), ids=("LeNet-300-100", "convnet"))
def test_random_masks_take_at_most_three_percent_more_than_their_entropy(shapes, density, file):
    weights = {layer: {"kernel": jnp.full(shape, 0.5)} for layer, shape in shapes.items()}
    masks = random_kernels(shapes, density)
    size = sm.save_subnetwork(file, sm.Subnet(weights, masks), Base("nowhere"))
    coded = container.read(file)[1]["masks/default"].size
    least = sum(math.prod(shape) for shape in shapes.values()) * entropy(density) / 8
    assert 0.99 * least < coded < 1.03 * least  # random ones may be a little fewer
    assert size < coded + 900


@pytest.mark.float32
def test_a_supermask_network_takes_a_bit_a_weight_and_a_thousand_bytes(file):
    """LeNet-300-100 has 266,200 weights: 33,275 bytes of bits, 1,064,800 of float32."""
    shapes = {layer: {"kernel": jnp.zeros(shape), "bias": jnp.zeros(shape[-1])} for layer, shape in LENET.items()}
    weights = initializers.signed_constant(KEY, shapes)
    masks = jax.tree.map(lambda leaf: None, shapes) | {
        layer: {"kernel": mask["kernel"], "bias": None} for layer, mask in random_kernels(LENET, 0.5).items()
    }
    drawn = sm.save_subnetwork(file, sm.Subnet(weights, masks), Drawn("signed_constant", KEY))
    assert 33_275 <= drawn < 33_275 * 1.03 + 1000
    stored = sm.save_subnetwork(file, sm.Subnet(weights, masks), Stored("int8"))
    kept = sum(int(mask.sum()) for mask in arrays_of(masks).values())
    assert kept + drawn < stored < kept + drawn + 4 * 2 * (300 + 100 + 10) + 1000  # scales and biases


# The codes.

QUICK = settings(max_examples=60, derandomize=True, database=None, deadline=None)
SHAPES = np_st.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=20)


def spread(values):
    """Arrays of these values, at first in runs, so that some codes are short."""
    return SHAPES.flatmap(lambda shape: np_st.arrays(np.int16, shape, elements=values, fill=st.just(0)))


@QUICK
@given(spread(st.integers(0, 1)) | spread(st.integers(-1, 1)) | spread(st.integers(0, 255)))
def test_a_code_is_decoded_to_what_was_encoded(values):
    kind, planes, payload = codes.encode(values)
    found = codes.decode(kind, planes, payload, values.shape)
    np.testing.assert_array_equal(found, values)
    assert found.dtype == (np.int8 if kind == "signs" else np.uint8) and found.shape == values.shape
    assert kind == ("signs" if (values < 0).any() else "levels" if (values > 1).any() else "bits")
    assert sum(plane[1] for plane in planes) == len(payload)
    rows = (
        math.prod(values.shape[:-1]) * -(-values.shape[-1] // 8)
        if values.ndim and values.size
        else -(-values.size // 8)
    )
    assert planes[0][1] <= rows  # never longer than its bits


@QUICK
@given(st.integers(1, 4000), st.floats(0, 1), st.integers(0, 2**32 - 1))
def test_codes_of_random_ones_at_any_density(size, density, seed):
    ones = np.random.default_rng(seed).random(size) < density
    kind, planes, payload = codes.encode(ones)
    assert kind == "bits" and (codes.decode(kind, planes, payload, ones.shape) == ones).all()


@pytest.mark.parametrize("values", ([-1, 2], [256], [-2], [0.5], [np.nan], [2**40], [2**16]))
def test_other_values_have_no_code(values):
    with pytest.raises(ValueError, match="values must be 0 and 1, or -1, 0 and 1, or whole numbers from 0 to 255"):
        codes.encode(np.array(values))


# What cannot be saved.


def refusals():
    weights, masks = small()
    kernel, bias = masks["Dense_0"]["kernel"], weights["Dense_0"]["bias"]

    def subnet(mask):
        return sm.Subnet(weights, {"Dense_0": {"kernel": mask, "bias": None}})

    def drawn(**options):
        return Drawn("kaiming_normal", **({"key": KEY} | options))

    good, often = subnet(kernel), np.zeros((45, 10), np.int32)
    changed = sm.Subnet({"Dense_0": weights["Dense_0"] | {"bias": bias + 1}}, good.scores)
    float8 = {"kernel": jnp.ones((2, 2), jnp.float8_e4m3fn)}
    method = sm.methods.bernoulli(weights)
    biased = method._replace(product=lambda subnet, key: jax.tree.map(lambda w: w + 1, subnet.weights))
    shifted = method._replace(product=lambda s, key: {"Dense_0": s.weights["Dense_0"] | {"bias": bias + 1}})
    kernel_path = "'Dense_0/kernel'"
    return {
        "another key": (good, drawn(key=jax.random.key(8)), f"draws other weights at {kernel_path}"),
        "another initializer": (good, Drawn("kaiming_uniform", KEY), f"draws other weights at {kernel_path}"),
        "no initializer": (good, Drawn("foo", KEY), "no initializer 'foo'"),
        "another density": (good, drawn(density=0.3), f"draws other weights at {kernel_path}"),
        "a seed too large": (good, drawn(key=2**32), r"whole number in \[0, 2\*\*32\), got 4294967296"),
        "a seed below 0": (good, drawn(key=-1), r"whole number in \[0, 2\*\*32\), got -1"),
        "several keys": (good, drawn(key=jax.random.split(KEY)), "the key must be a seed, or one jax.random.key"),
        "no key": (good, drawn(key=7.0), "the key must be a seed, or one jax.random.key"),
        "a raw key": (good, drawn(key=jax.random.key_data(KEY)), "the key must be a seed, or one jax.random.key"),
        "unsafe rbg": (good, drawn(key=jax.random.key(7, impl="unsafe_rbg")), "only rbg draws the same"),
        "a source that is no text": (good, Base(3), "does not fit the format: the origin"),
        "scores": (subnet(kernel * 0.5), Stored(), f"the mask of {kernel_path} holds other values.*Are they scores"),
        "NaN": (subnet(kernel * np.nan), Stored(), f"the mask of {kernel_path} holds other values"),
        "300 levels": (subnet(kernel * 300), Stored(), f"the mask of {kernel_path} holds other values"),
        "-2": (subnet(kernel * -2), Stored(), f"the mask of {kernel_path} holds other values"),
        "signed levels": (subnet(kernel * 2 - 1 + kernel), Stored(), f"the mask of {kernel_path} holds other values"),
        "a mask of another shape": (subnet(kernel.T), Stored(), f"the mask of {kernel_path} has shape \\(10, 45\\)"),
        "a mask without a weight": (sm.Subnet(weights, {"foo": kernel}), Stored(), "the mask of 'foo' has shape"),
        "redraws of a bias": (good, drawn(redraws={"Dense_0": {"bias": np.zeros(10)}}), "the redraws of .Dense_0/"),
        "redraws below 0": (good, drawn(redraws={"Dense_0": {"kernel": often - 1}}), f"the redraws of {kernel_path}"),
        "redraws of another shape": (good, drawn(redraws={"Dense_0": {"kernel": often.T}}), "the redraws of .Dense_0/"),
        "redraws that were not": (good, drawn(redraws={"Dense_0": {"kernel": often + 1}}), "draws other weights"),
        "a partition of no mask": (good, drawn(partition={"foo": (1, 1)}), "no mask has the path 'foo'"),
        "a partition too large": (good, drawn(partition={"Dense_0/kernel": (450, 1)}), "has 450 positions"),
        "a partition that is not": (good, drawn(partition={"Dense_0/kernel": (0, 400)}), "drops a locked one"),
        "another product": (biased, drawn(), "the method's product at 'Dense_0/bias' is not its weights"),
        "a product of a bias": (shifted, drawn(), "the method's product at 'Dense_0/bias' is not its weights"),
        "float8": (sm.Subnet(float8, {"kernel": None}), Stored(), "'kernel' has float8_e4m3fn numbers"),
        "a dtype that is none": (good, Stored("float64"), "dtype must be None or one of float32, bfloat16"),
        "too large for float16": (sm.Subnet({"kernel": jnp.full((2, 2), 1e5)}, {"kernel": jnp.ones((2, 2))}),
                                  Stored("float16"), "'kernel' holds weights that are too large for float16"),
        "not finite": (sm.Subnet({"kernel": jnp.full((2, 2), np.inf)}, {"kernel": jnp.ones((2, 2))}),
                       Stored("int8"), "'kernel' holds weights that are too large for int8, or not finite"),
        "two networks": ({"a": good, "b": changed}, Stored(), "the weights under 'b' are not those of the first masks"),
        "an empty name": ({"": good}, Stored(), "masks cannot have the name ''"),
        "a slash": ({"a/b": good}, Stored(), "masks cannot have the name 'a/b'"),
        "the name of masks without one": ({"default": good}, Stored(), "masks cannot have the name 'default'"),
    }  # fmt: skip


@pytest.mark.filterwarnings("ignore:no weight is kept")  # scores of 0 keep nothing
def test_what_cannot_be_saved_is_refused_by_name_and_leaves_no_file(file):
    for what, (saved, origin, message) in refusals().items():
        with pytest.raises(ValueError) as refused:
            sm.save_subnetwork(file, saved, origin)
        assert re.search(message, str(refused.value), re.DOTALL), (what, str(refused.value))
        assert not list(file.parent.iterdir()), what


@pytest.mark.parametrize(
    "about",
    (
        {"x": np.float32(1)},
        {"x": float("nan")},
        {"x": float("-inf")},
        {"x": object()},
        {1: "a", "1": "b"},
        {"x": {None: 1, "null": 2}},
        {(1, 2): 3},
        {"x": list(itertools.accumulate(range(3000), lambda inside, _: [inside], initial=[]))[-1]},
        {"x": list(itertools.accumulate(range(container.DEEPEST), lambda inside, _: [inside], initial=[1]))[-1]},
        {"x": "a" * 2**22},
    ),
)
def test_what_json_cannot_tell_is_refused(about, file):
    weights, masks = small()
    with pytest.raises(ValueError, match=r"what JSON cannot|bytes of text, more than"):
        sm.save_subnetwork(file, sm.Subnet(weights, masks), Stored(), about=about)
    assert not list(file.parent.iterdir())


def test_arguments_of_other_types_are_type_errors(file):
    subnet = sm.Subnet(*small())
    for saved, origin in ((subnet.weights, Stored()), ({}, Stored()), ({"a": 3}, Stored()), (subnet, "stored")):
        with pytest.raises(TypeError, match=r"save_subnetwork takes a Subnet|origin must be artifact\.Drawn"):
            sm.save_subnetwork(file, saved, origin)


# What cannot be loaded.


def test_base_weights_must_be_those_that_were_masked(file):
    network = networks.network("base")
    network.save(file)
    same(sm.load_subnetwork(file, base=network.base).weights, network.base)
    with pytest.raises(ValueError, match=f"{file}: it holds masks on weights from 'https://example.org.*base="):
        sm.load_subnetwork(file)
    other = jax.tree.map(jnp.array, network.base)
    other["Dense_0"]["bias"] = other["Dense_0"]["bias"].at[3].add(1)
    for base in (
        other,
        {"Dense_0": network.base["Dense_0"]},
        jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), other),
    ):
        with pytest.raises(ValueError, match=f"{file}: the base weights are not those that it was saved with"):
            sm.load_subnetwork(file, base=base)


def rewritten(file, change):
    """Changes a file's header and arrays, as somebody could who knows the format."""
    header, arrays, _ = container.read(file)
    change(header, arrays)
    container.write(file, arrays, header)


def test_a_network_that_claims_more_memory_than_allowed_is_refused_before_it_is_made(file):
    networks.network("base").save(file)
    with pytest.raises(ValueError, match=f"{file}: its network takes .*, more than the bound of 100 for") as refused:
        sm.load_subnetwork(file, max_bytes=100)
    needed = int(re.search(r"say max_bytes=(\d+)$", str(refused.value))[1])
    same(
        sm.load_subnetwork(file, base=networks.network("base").base, max_bytes=needed).weights,
        networks.network("base").base,
    )
    with pytest.raises(ValueError, match=f"takes {needed} bytes, more than the bound of {needed - 1}"):
        sm.load_subnetwork(file, max_bytes=needed - 1)
    networks.network("signed_constant None").save(file)

    def huge(header, arrays):
        header["leaves"]["Dense_0/bias"]["shape"] = [2**31, 2**8]

    rewritten(file, huge)
    tracemalloc.start()
    with (
        networks.limited_memory(),
        pytest.raises(ValueError, match=f"{file}: its network takes .*more than the bound of {2**24} for a file of"),
    ):
        sm.load_subnetwork(file)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()
    assert file.stat().st_size * contents.BOUND < contents.SMALLEST_BOUND


def test_a_header_that_unpacks_to_more_than_its_limit_is_refused(file):
    with open(file, "wb") as stream:
        packed = zlib.compress(b"{}" + b" " * container.LARGEST_HEADER)
        arrays = {"header": np.frombuffer(packed, np.uint8)}
        stream.write(container.safetensors.numpy.save(arrays, {"format": "supermask", "version": "1"}))
    with pytest.raises(ValueError, match=f"{file} is damaged: its header cannot be read"):
        sm.load_subnetwork(file)


def test_other_files_are_refused_by_name(file):
    with pytest.raises(FileNotFoundError):
        sm.load_subnetwork(file)
    for content in (b"", b"x" * 100, (2**63).to_bytes(8, "little") + b"{}", b"\2\0\0\0\0\0\0\0{}"):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=f"{file} (is no whole|holds no supermask)"):
            sm.load_subnetwork(file)
    container.safetensors.numpy.save_file({"a": np.ones(3)}, file)
    with pytest.raises(ValueError, match=f"{file} holds no supermask network, but other .safetensors data"):
        sm.load_subnetwork(file)
    container.safetensors.numpy.save_file({"a": np.ones(3)}, file, {"format": "supermask", "version": "2"})
    with pytest.raises(ValueError, match=f"{file} has version '2' of the format, and this library reads '1'"):
        sm.load_subnetwork(file)


def test_arrays_that_no_entry_names_are_refused(file):
    networks.network("method").save(file)
    for name in ("weights/foo", "state/foo", "foo", "scales/Dense_0/kernel", "masks/foo", "redraws"):
        whole = file.read_bytes()
        rewritten(file, lambda header, arrays, name=name: arrays.update({name: np.ones(3, np.uint8)}))
        with pytest.raises(ValueError, match=f"{file}: .*(does not name|its state are not|the codes take)"):
            sm.load_subnetwork(file)
        file.write_bytes(whole)


@pytest.mark.parametrize("text", (b'{"a": 1e400}', '{"a": 1}'.encode("utf-16")), ids=("infinity", "UTF-16"))
def test_a_header_of_other_text_or_with_an_infinity_is_refused(file, text):
    networks.network("method").save(file)
    _, arrays, _ = container.read(file)
    whole = {container.HEADER: np.frombuffer(zlib.compress(text), np.uint8), **arrays}
    container.safetensors.numpy.save_file(whole, file, dict(container.METADATA))
    with pytest.raises(ValueError, match=f"{file} is damaged: its header cannot be read"):
        sm.load_subnetwork(file)


def test_stored_weights_that_one_network_keeps_whole_and_another_in_part_are_refused(file):
    weights, masks = small()
    whole = jax.tree.map(lambda _: None, masks)
    named = {"part": sm.Subnet(weights, masks), "whole": sm.Subnet(weights, whole)}
    with pytest.raises(
        ValueError, match=r"masks 'whole' have none of Dense_0/kernel, and other masks do: .* mask of ones"
    ):
        sm.save_subnetwork(file, named, Stored())
    ones = jax.tree.map(jnp.ones_like, masks)
    sm.save_subnetwork(file, {**named, "whole": sm.Subnet(weights, ones)}, Stored())
    same(sm.load_subnetwork(file).weights, weights)


def test_loading_executes_imports_and_opens_nothing_else(file):
    """After a first load, which imports what JAX puts off."""
    networks.network("method").save(file)
    sm.load_subnetwork(file)
    seen, listening = [], [True]
    sys.addaudithook(lambda event, arguments: seen.append((event, arguments)) if listening else None)
    sm.load_subnetwork(file)
    listening.clear()
    opened = [arguments[0] for event, arguments in seen if event == "open"]
    assert opened == [str(file)] or opened == [file]
    forbidden = (
        "exec",
        "compile",
        "import",
        "pickle.",
        "marshal.",
        "subprocess.",
        "os.",
        "socket.",
        "shutil.",
        "ctypes.",
    )
    assert not [event for event, _ in seen if event.startswith(forbidden)]


# Writing.


def test_a_full_disk_or_an_interrupt_leaves_the_older_file_and_nothing_else(file, monkeypatch):
    networks.network("signs").save(file)
    before = file.read_bytes()

    def fails(error):
        def fail(*arguments):
            raise error

        return fail

    for name, error in (
        ("fsync", OSError(errno.ENOSPC, "No space left on device")),
        ("replace", KeyboardInterrupt()),
        ("fsync", KeyboardInterrupt()),
        ("replace", PermissionError()),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, fails(error))
            with pytest.raises(type(error)):
                networks.network("levels").save(file)
        assert file.read_bytes() == before
        assert list(file.parent.iterdir()) == [file]
    networks.network("levels").save(file)
    assert file.read_bytes() != before and list(file.parent.iterdir()) == [file]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no full device")
def test_a_write_that_the_disk_refuses_is_an_os_error(file, monkeypatch):
    networks.network("signs").save(file)
    before, opened = file.read_bytes(), builtins.open
    monkeypatch.setattr(container, "open", lambda handle, mode: opened("/dev/full", mode), raising=False)
    with pytest.raises(OSError, match="No space left on device"):
        networks.network("levels").save(file)
    assert file.read_bytes() == before and list(file.parent.iterdir()) == [file]


def test_a_directory_that_is_missing_or_a_file_in_the_way_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        networks.network("signs").save(tmp_path / "missing" / "net")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError):
        networks.network("signs").save(tmp_path / "folder")
    assert list(tmp_path.iterdir()) == [tmp_path / "folder"] and not list((tmp_path / "folder").iterdir())


def test_a_path_in_the_home_directory_is_meant(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    weights, masks = small()
    sm.save_subnetwork("~/net.safetensors", sm.Subnet(weights, masks), Stored())
    assert (tmp_path / "net.safetensors").is_file()
    same(sm.load_subnetwork("~/net.safetensors").masks, masks)


def test_a_file_may_be_read_by_whom_the_umask_allows(file):
    old = os.umask(0o027)
    try:
        networks.network("signs").save(file)
    finally:
        os.umask(old)
    assert file.stat().st_mode & 0o777 == 0o640


def test_a_run_is_loaded_with_its_settings(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no subnetwork\.safetensors: the run is not finished"):
        sm.load_run(tmp_path)
    networks.network("method").save(tmp_path / artifact.FILE)
    (tmp_path / artifact.SETTINGS).write_text(json.dumps({"seed": 3}))
    found = sm.load_run(str(tmp_path))
    assert found.about == {"seed": 3}
    same(found.weights, sm.load_subnetwork(tmp_path / artifact.FILE).weights)
    (tmp_path / artifact.SETTINGS).write_text("{")
    with pytest.raises(ValueError, match=r"config.json is damaged"):
        sm.load_run(tmp_path)


def test_weights_that_learned_beside_the_scores_are_stored_and_the_rest_is_a_seed(tmp_path):
    weights = {
        "blocks": {"Dense_0": {"kernel": jnp.zeros((3, 40, 50)), "bias": jnp.zeros((3, 50))}},
        "head": {"w1": jnp.zeros((2, 25, 10)), "scale": jnp.zeros(10)},
    }
    layout = sm.describe(None, weights, axes={"head/w1": "in in out"})
    key = jax.random.key(0)
    weights = sm.initializers.kaiming_uniform(key, weights, sm.densities.erk(layout, 0.3), layout)
    weights["blocks"]["Dense_0"]["bias"] = jax.random.normal(jax.random.key(1), (3, 50))
    weights["head"]["scale"] = jnp.arange(10.0)
    masks = sm.random_masks(jax.random.key(2), weights, 0.3, layout)
    origin = artifact.Drawn("kaiming_uniform", key, density=sm.densities.erk(layout, 0.3), where=layout)
    size = sm.save_subnetwork(tmp_path / "net.safetensors", sm.Subnet(weights, masks), origin)
    assert size < 6500 * 0.9 / 8 + 4 * 160 + 1500
    loaded, kept, *_ = sm.load_subnetwork(tmp_path / "net.safetensors")
    for (path, was), (_, now) in zip(sm.trees.by_path(weights).items(), sm.trees.by_path(loaded).items(), strict=True):
        np.testing.assert_array_equal(now, was, err_msg=path)
    assert all(
        (np.asarray(sm.trees.by_path(kept)[path]) == mask).all() for path, mask in sm.trees.by_path(masks).items()
    )
