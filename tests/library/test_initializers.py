"""Random weights: the published sizes, the right distributions, and the same bits on every machine."""

import functools
import hashlib
import json
import math
import statistics
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import supermask_jax as sm
from supermask_jax import initializers, trees

pytestmark = pytest.mark.usefixtures("strict_dtypes")

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "c_init.json").read_text())
OURS = {
    name: getattr(initializers, name)
    for name in ("signed_constant", "unsigned_constant", "kaiming_normal", "kaiming_uniform")
}
KEY = 7  # the seed of every draw here
CONV = {"kernel": np.zeros((3, 3, 2, 4), np.float32)}


def zeros(*shape):
    return {"kernel": np.zeros(shape, np.float32)}


def leaf_key():
    return trees.leaf_key(jax.random.key(KEY), "kernel")


# What each draws before it is scaled, of standard deviation 1: from the leaf's own key, 32 bits a weight.
STANDARD = {
    "signed_constant": lambda shape: 1 - 2 * (np.asarray(jax.random.bits(leaf_key(), shape, jnp.uint32)) < 2**31),
    "unsigned_constant": np.ones,
    "kaiming_normal": lambda shape: initializers.standard_normal(
        np.asarray(jax.random.bits(leaf_key(), shape, jnp.uint32))
    ),
    "kaiming_uniform": lambda shape: math.sqrt(3) * np.asarray(initializers.symmetric_uniform(leaf_key(), shape, 1.0)),
}


def size_of_draws(name, fan, density=None):
    """What an initializer multiplies its standard draw by: the same for all weights, or the test fails."""
    scaled = OURS[name](jax.random.key(KEY), zeros(*SMALL), density, fan_in=lambda path, shape: fan)["kernel"]
    ratio = np.asarray(scaled, np.float64) / STANDARD[name](SMALL)
    np.testing.assert_allclose(ratio, ratio.flat[0], rtol=4e-7)
    return float(np.median(ratio))


MANY = (100, 1000)  # weights of each statistical test
SMALL = (3, 3, 2, 4)  # a size depends on the fan-in alone, so small draws show it as well as large ones


@pytest.mark.parametrize("name", OURS)
def test_sizes_match_hidden_networks_where_its_scaling_and_the_papers_agree(name):
    """Unscaled, and scaled for a half. At other densities the released code deviates from the paper: next test."""
    rows = [row for row in GOLDEN["hidden_networks"] if row["init"] == name and row["prune_rate_arg"] in (None, 0.5)]
    assert rows
    for row in rows:
        ours = size_of_draws(name, row["fan"], row["prune_rate_arg"])
        assert ours == pytest.approx(row["std"], rel=1e-6), row


@pytest.mark.parametrize("name", ("signed_constant", "unsigned_constant", "kaiming_normal"))
def test_sizes_scale_with_the_density_as_in_the_paper_not_as_in_its_released_code(name):
    """The paper divides the fan-in's variance by the fraction kept, k: std = sqrt(2 / (k fan)). The released code
    multiplies the fan by 1 - prune_rate, where its prune_rate *is* the fraction kept, so that its value for k is
    the paper's for 1 - k. We follow the paper. Rows at 0.3 and 0.7, where the two can be told apart."""
    rows = [row for row in GOLDEN["hidden_networks"] if row["init"] == name and row["prune_rate_arg"] in (0.3, 0.7)]
    assert rows
    for row in rows:
        kept = row["prune_rate_arg"]
        ours = size_of_draws(name, row["fan"], kept)
        assert ours == pytest.approx(row["std_paper_if_argument_is_kept_fraction"], rel=1e-6), row
        assert ours != pytest.approx(row["std"], rel=0.1)
        assert size_of_draws(name, row["fan"], 1 - kept) == pytest.approx(row["std"], rel=1e-6), row


@pytest.mark.parametrize("name", ("signed_constant", "unsigned_constant"))
def test_constants_are_the_float32_that_the_released_code_fills_in(name):
    rows = [row for row in GOLDEN["hidden_networks"] if row["init"] == name and row["prune_rate_arg"] in (None, 0.5)]
    for row in rows:
        fan_in = functools.partial(lambda path, shape, fan: fan, fan=row["fan"])
        weights = OURS[name](jax.random.key(KEY), zeros(*SMALL), row["prune_rate_arg"], fan_in=fan_in)["kernel"]
        np.testing.assert_allclose(np.abs(weights), row["value_float32"], rtol=1e-6)


def test_sizes_match_random_pruning_up_to_its_gain_for_a_leaky_relu():
    """Its scaled_kaiming_normal takes the gain of a leaky ReLU with slope 0.01, sqrt(2 / 1.0001): we take ReLU's."""
    names = {
        "kaiming_normal": ("kaiming_normal", 1.0),
        "kaiming_uniform": ("kaiming_uniform", 1.0),
        "scaled_kaiming_normal": ("kaiming_normal", 1.0001),
    }
    rows = [row for row in GOLDEN["random_pruning"] if row["init"] in names]
    assert {row["density"] for row in rows} >= {None, 0.05, 0.2, 0.5}
    for row in rows:
        name, slope = names[row["init"]]
        ours = size_of_draws(name, row["fan_in"], row["density"])
        assert ours / math.sqrt(slope) == pytest.approx(row["std"], rel=1e-6), row


def test_scores_are_uniform_between_the_published_bounds():
    def scores(fan_in, shape):
        drawn = sm.init_scores(jax.random.key(KEY), zeros(*shape), fan_in=lambda path, shape: fan_in)
        return np.asarray(drawn["kernel"], np.float64)

    unit = np.asarray(initializers.symmetric_uniform(leaf_key(), SMALL, 1.0), np.float64)
    many = scores(1, MANY)
    deviation = 4 / math.sqrt(2 * many.size)
    rows = [row for row in GOLDEN["hidden_networks_scores"] if row["what"].startswith("scores")]
    assert len(rows) == 3
    for row in rows:
        np.testing.assert_allclose(scores(math.prod(row["shape_OIHW"][1:]), SMALL) / unit, row["bound"], rtol=1e-6)
        assert np.abs(many).mean() * row["bound"] == pytest.approx(row["abs_score_mean"], rel=deviation)
        assert many.std() * row["bound"] == pytest.approx(row["std"], rel=deviation)
    assert 0.9999 < np.abs(many).max() < 1


STD = math.sqrt(2 / 100)


@pytest.mark.parametrize("density", (None, 0.3, 0.7))
@pytest.mark.parametrize("name", ("signed_constant", "kaiming_normal", "kaiming_uniform"))
def test_draws_have_mean_zero_and_the_deviation_of_he_scaled_by_the_density(name, density):
    weights = np.asarray(OURS[name](jax.random.key(KEY), zeros(*MANY), density)["kernel"], np.float64)
    std = STD / math.sqrt(density or 1)
    assert abs(weights.mean()) < 4 * std / math.sqrt(weights.size)
    assert weights.std() == pytest.approx(std, rel=4 / math.sqrt(2 * weights.size))


def test_signed_constants_take_two_values_and_either_sign_about_half_the_time():
    weights = np.asarray(initializers.signed_constant(jax.random.key(KEY), zeros(*MANY), 0.3)["kernel"])
    constant = np.float32(math.sqrt(2 / 100 / 0.3))
    assert set(np.unique(weights)) == {constant, -constant}
    assert abs(np.mean(weights > 0) - 0.5) < 4 * 0.5 / math.sqrt(weights.size)


def test_unsigned_constants_are_all_the_same_whatever_the_key():
    for seed in (0, 1):
        weights = np.asarray(initializers.unsigned_constant(jax.random.key(seed), zeros(10, 4), 0.7)["kernel"])
        assert set(np.unique(weights)) == {np.float32(math.sqrt(2 / 10 / 0.7))}


def test_kaiming_normal_draws_follow_the_normal_distribution():
    weights = np.sort(np.asarray(initializers.kaiming_normal(jax.random.key(KEY), zeros(*MANY))["kernel"]).ravel())
    inside = statistics.NormalDist(0, STD)
    empirical = np.arange(1, weights.size + 1) / weights.size
    exact = np.array([inside.cdf(w) for w in weights[::50]])
    assert np.abs(exact - empirical[::50]).max() < 1.95 / math.sqrt(weights.size)  # Kolmogorov-Smirnov at 0.1 %


def test_kaiming_uniform_draws_fill_their_interval_evenly():
    weights = np.asarray(initializers.kaiming_uniform(jax.random.key(KEY), zeros(*MANY))["kernel"])
    bound = math.sqrt(6 / 100)
    assert np.abs(weights).max() <= bound * (1 + 1e-7)
    counts, _ = np.histogram(weights, bins=20, range=(-bound, bound))
    assert counts.sum() == weights.size
    assert ((counts - 5000) ** 2 / 5000).sum() < 43.8  # chi-square with 19 degrees of freedom at 0.1 %


def test_symmetric_uniform_is_never_zero_and_odd_in_its_bits():
    draws = np.asarray(initializers.symmetric_uniform(jax.random.key(KEY), MANY, 1.0), np.float64)
    units = draws * 2**24
    assert (units == np.round(units)).all() and (units % 2 == 1).all()
    assert np.abs(draws).max() < 1


def test_standard_normal_inverts_the_distribution_function():
    """Against the standard library, in the centre, on both tails and at either end of the 32 bits."""
    bits = np.concatenate(
        [
            np.random.default_rng(0).integers(0, 2**32, 2000, np.uint32),
            np.array([0, 1, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1], np.uint32),
            np.uint32(0.075 * 2**32) + np.arange(-3, 4).astype(np.uint32),  # where centre and tail meet
            np.logspace(0, 9, 200).astype(np.uint32),
        ]
    )
    inverse = statistics.NormalDist().inv_cdf
    expected = np.array([inverse((int(b) + 0.5) / 2**32) for b in bits])
    drawn = initializers.standard_normal(bits)
    assert drawn.dtype == np.float32
    np.testing.assert_allclose(drawn, expected, rtol=1e-6, atol=1e-9)
    np.testing.assert_array_equal(initializers.standard_normal(~bits), -drawn)  # exactly symmetric


@pytest.mark.parametrize("name", ("signed_constant", "unsigned_constant", "kaiming_uniform"))
def test_bits_are_the_same_under_jit(name):
    weights = {"a": CONV["kernel"], "b": {"kernel": np.zeros((7, 5), np.float32)}}
    eager = OURS[name](jax.random.key(KEY), weights, 0.3)
    jitted = jax.jit(lambda key: OURS[name](key, weights, 0.3))(jax.random.key(KEY))
    chex.assert_trees_all_equal(jitted, eager)


def test_scores_are_the_same_under_jit():
    jitted = jax.jit(lambda key: sm.init_scores(key, CONV))(jax.random.key(KEY))
    chex.assert_trees_all_equal(jitted, sm.init_scores(jax.random.key(KEY), CONV))


# Of two leaves for the key 7: the sha256 of all their bytes (little-endian float32), and the first three values.
# These must never change: a published "seed and mask" means nothing any more when they do.
FROZEN = {
    "signed_constant": (
        "200675533ccc60192235210e0049790d46584d6d0ec1c94ff8dbe31d37eb4f4e",
        [0.3333333432674408, -0.3333333432674408, 0.3333333432674408],
    ),
    "unsigned_constant": (
        "cb93545730e776878bb2eef9ce209370bf5f41d571f61871450327430004b773",
        [0.3333333432674408, 0.3333333432674408, 0.3333333432674408],
    ),
    "kaiming_normal": (
        "1fe661aa03dd7b5ef4b95d6959546bf77d8a194adae4e162a48c8a93f45e2836",
        [0.6187270879745483, -0.29771047830581665, 0.21677826344966888],
    ),
    "kaiming_uniform": (
        "201a634760ccb2db56487e98595e5bb6c351039a54387311519e7aa50d9f7b22",
        [0.5407302379608154, -0.36269906163215637, 0.27974003553390503],
    ),
    "glorot_normal": (
        "16f53445ec16794d80e2788ace9e594fbed42936d405720912f7baaa3a08f3ca",
        [0.3572222590446472, -0.171883225440979, 0.12515698373317719],
    ),
    "init_scores": (
        "f3a35758c29792f646bab797858467feb2f88b3d0b821df72d87bd129d9fd31c",
        [0.22075219452381134, -0.1480712741613388, 0.11420339345932007],
    ),
}


@pytest.mark.parametrize("name", FROZEN)
def test_draws_are_frozen_bit_for_bit_on_every_machine_and_version(name):
    weights = {"Conv_0": CONV, "Dense_0": {"kernel": np.zeros((70, 30), np.float32), "bias": np.zeros(30, np.float32)}}
    draw = sm.init_scores if name == "init_scores" else getattr(initializers, name)
    drawn = draw(jax.random.key(KEY), weights)
    leaves = [np.asarray(drawn[layer]["kernel"], "<f4") for layer in ("Conv_0", "Dense_0")]
    digest = hashlib.sha256(b"".join(leaf.tobytes() for leaf in leaves)).hexdigest()
    assert (digest, leaves[0].flat[:3].tolist()) == FROZEN[name]


ALL = {**OURS, "glorot_normal": initializers.glorot_normal}


@pytest.mark.parametrize("name", ALL)
def test_only_the_chosen_leaves_are_drawn_and_dtypes_are_kept(name):
    weights = {
        "a": {"kernel": jnp.zeros((5, 4), jnp.bfloat16), "bias": jnp.full(4, 3, jnp.float32)},
        "b": {"kernel": jnp.zeros((4, 2), jnp.float32), "scale": jnp.ones((1, 2), jnp.float16)},
    }
    drawn = ALL[name](jax.random.key(KEY), weights)
    chex.assert_trees_all_equal_shapes_and_dtypes(drawn, weights)
    assert drawn["a"]["bias"] is weights["a"]["bias"] and drawn["b"]["scale"] is weights["b"]["scale"]
    wide = ALL[name](jax.random.key(KEY), {"a": {"kernel": jnp.zeros((5, 4), jnp.float32)}})["a"]["kernel"]
    chex.assert_trees_all_equal(drawn["a"]["kernel"], wide.astype(jnp.bfloat16))  # one rounding, from the same draw
    only = ALL[name](jax.random.key(KEY), weights, where=lambda path, leaf: path == "a/bias")
    assert only["a"]["kernel"] is weights["a"]["kernel"] and only["a"]["bias"].shape == (4,)


def test_scores_are_float32_whatever_the_weights_are_and_none_where_nothing_is_prunable():
    scores = sm.init_scores(
        jax.random.key(KEY), {"kernel": jnp.zeros((5, 4), jnp.bfloat16), "bias": jnp.zeros(4, jnp.float32)}
    )
    assert scores["bias"] is None and scores["kernel"].dtype == jnp.float32 and scores["kernel"].shape == (5, 4)


@pytest.mark.parametrize("density", (None, 0.3, 0.7))
@pytest.mark.parametrize(("shape", "fans"), (((300, 100), 400), ((3, 3, 16, 32), 9 * 48), ((5, 16, 32), 5 * 48)))
def test_glorot_normal_is_the_kaiming_draw_scaled_by_both_fans(shape, fans, density):
    """Its variance is 2 / (fan_in + fan_out): 784 inputs and 300 outputs make 2 / 1084."""
    fans_of = {"fan_in": sm.flax_fan_in, "fan_out": sm.flax_fan_out}
    glorot = np.asarray(initializers.glorot_normal(jax.random.key(KEY), zeros(*shape), density, **fans_of)["kernel"])
    bits = np.asarray(jax.random.bits(leaf_key(), shape, jnp.uint32))
    expected = initializers.standard_normal(bits).astype(np.float64) * math.sqrt(2 / fans / (density or 1))
    np.testing.assert_allclose(glorot, expected, rtol=3e-7)
    assert glorot.std() == pytest.approx(math.sqrt(2 / fans / (density or 1)), rel=5 / math.sqrt(2 * glorot.size))


def test_glorot_normal_takes_a_users_own_fans():
    def drawn(**fans):
        return np.asarray(initializers.glorot_normal(jax.random.key(KEY), zeros(4, 3, 2, 2), **fans)["kernel"])

    ratio = drawn(fan_in=lambda path, shape: 1, fan_out=lambda path, shape: 7) / drawn(
        fan_in=sm.equinox_fan_in, fan_out=sm.equinox_fan_out
    )
    np.testing.assert_allclose(ratio, math.sqrt((12 + 16) / (1 + 7)), rtol=1e-6)


def test_signed_deviation_is_the_sign_times_the_deviation_of_the_layers_population():
    """1, 3, -2, 0, 3 have mean 1 and squares from it 0, 4, 9, 1, 4: their mean is 3.6."""
    weights = {"kernel": jnp.array([[1.0, 3, -2, 0, 3]], jnp.float32), "bias": jnp.ones(2)}
    signed = initializers.signed_deviation(weights)
    constant = np.float32(math.sqrt(3.6))
    np.testing.assert_array_equal(signed["kernel"], constant * np.array([[1, 1, -1, 0, 1]], np.float32))
    assert signed["bias"] is weights["bias"]
    with pytest.raises(ValueError, match="matches no leaf"):
        initializers.signed_deviation(weights, where=lambda path, leaf: False)


def test_signed_deviations_are_taken_layer_by_layer_and_keep_their_dtypes():
    shapes = {"a": {"kernel": jnp.zeros((300, 100))}, "b": {"kernel": jnp.zeros((100, 10), jnp.bfloat16)}}
    drawn = initializers.glorot_normal(jax.random.key(KEY), shapes)
    signed = initializers.signed_deviation(drawn)
    chex.assert_trees_all_equal_shapes_and_dtypes(signed, drawn)
    for layer in drawn:
        before, after = (np.asarray(tree[layer]["kernel"], np.float64) for tree in (drawn, signed))
        np.testing.assert_array_equal(np.sign(after), np.sign(before))
        [constant] = np.unique(np.abs(after))
        assert constant == pytest.approx(before.std(), rel=1e-7 if layer == "a" else 2**-8)


@pytest.mark.parametrize(
    ("path", "shape", "flax", "equinox"),
    (
        ("Dense_0/kernel", (784, 300), 300, 784),
        ("Conv_0/kernel", (3, 3, 16, 32), 288, 1536),
        ("Conv_0/kernel", (5, 16, 32), 160, 160),  # one axis of space
        ("attention/query/kernel", (8, 2, 4), 8, 32),
        ("attention/out/kernel", (2, 4, 8), 8, 16),
        ("out/kernel", (16, 10), 10, 16),
        ("kernel", (2, 4, 8), 16, 16),
        ("layers/0/weight", (32, 16, 3, 3), 1536, 288),
        ("layers/0/weight", (300, 784), 784, 300),
    ),
)
def test_fan_out_by_path_and_shape(path, shape, flax, equinox):
    assert sm.flax_fan_out(path, shape) == flax
    assert sm.equinox_fan_out(path, shape) == equinox


@pytest.mark.parametrize(
    ("path", "shape", "flax", "equinox"),
    (
        ("Dense_0/kernel", (784, 300), 784, 300),
        ("Conv_0/kernel", (3, 3, 16, 32), 144, 1536),
        ("Conv_0/kernel", (5, 16, 32), 80, 512),  # one axis of space
        ("attention/query/kernel", (8, 2, 4), 8, 8),
        ("attention/key/kernel", (8, 2, 4), 8, 8),
        ("attention/value/kernel", (8, 2, 4), 8, 8),
        ("attention/out/kernel", (2, 4, 8), 8, 32),
        ("query/kernel", (8, 4), 8, 4),
        ("layers/0/weight", (32, 16, 3, 3), 1536, 144),
        ("layers/0/weight", (300, 784), 300, 784),
        ("kernel", (2, 4, 8), 8, 32),
    ),
)
def test_fan_in_by_path_and_shape(path, shape, flax, equinox):
    assert sm.flax_fan_in(path, shape) == flax
    assert sm.equinox_fan_in(path, shape) == equinox


def test_a_users_own_fan_in_sees_every_path_and_its_shape():
    seen = {}
    weights = {"a": zeros(3, 2), "b": zeros(4, 5)}

    def fan_in(path, shape):
        seen[path] = shape
        return 8

    drawn = initializers.unsigned_constant(jax.random.key(KEY), weights, fan_in=fan_in)
    assert seen == {"a/kernel": (3, 2), "b/kernel": (4, 5)}
    assert all((np.asarray(leaf) == 0.5).all() for leaf in jax.tree.leaves(drawn))


def test_a_density_for_each_path_scales_each_leaf_by_its_own():
    weights = {"a": zeros(4, 2), "b": zeros(4, 2)}
    drawn = initializers.unsigned_constant(jax.random.key(KEY), weights, {"a/kernel": 0.3, "b/kernel": 0.7})
    np.testing.assert_allclose(drawn["a"]["kernel"], math.sqrt(2 / 4 / 0.3), rtol=1e-6)
    np.testing.assert_allclose(drawn["b"]["kernel"], math.sqrt(2 / 4 / 0.7), rtol=1e-6)


@pytest.mark.parametrize("name", ALL)
def test_densities_that_scale_nothing_sensibly_are_refused(name):
    for density, message in (
        (0.0, "density of 0"),
        (1.1, r"density must be a number in \[0, 1\]"),
        ({"Kernel": 0.3}, r"did you mean 'kernel'\?"),
    ):
        with pytest.raises(ValueError, match=message):
            ALL[name](jax.random.key(KEY), CONV, density)
    with pytest.raises(ValueError, match="matches no leaf"):
        ALL[name](jax.random.key(KEY), {"bias": np.zeros(3, np.float32)})


# What cannot be drawn.


@pytest.mark.parametrize("dtype", (jnp.int32, jnp.bool_, jnp.complex64))
@pytest.mark.parametrize("name", initializers.INITIALIZERS)
def test_only_floats_are_drawn(name, dtype):
    weights = {"Dense_0": {"kernel": jnp.zeros((3, 2), dtype)}}
    draw = getattr(initializers, name)
    with pytest.raises(TypeError, match=f"only floats are prunable; 'Dense_0/kernel' has {jnp.dtype(dtype)}"):
        draw(weights) if name == "signed_deviation" else draw(jax.random.key(KEY), weights)


@pytest.mark.parametrize("name", ("signed_constant", "unsigned_constant", "kaiming_uniform"))
def test_constants_and_uniforms_are_drawn_under_jit_bit_for_bit(name):
    draw = getattr(initializers, name)
    compiled = jax.jit(draw)(jax.random.key(KEY), zeros(30, 20))
    np.testing.assert_array_equal(compiled["kernel"], draw(jax.random.key(KEY), zeros(30, 20))["kernel"])


@pytest.mark.parametrize("name", ("kaiming_normal", "glorot_normal"))
def test_normals_under_jit_are_refused_in_one_sentence(name):
    with pytest.raises(TypeError, match="normals are drawn on the host: draw the weights outside of jit"):
        jax.jit(getattr(initializers, name))(jax.random.key(KEY), zeros(3, 2))


def test_leaves_without_entries_have_no_fan_in_to_divide_by():
    weights = {"Dense_0": {"kernel": jnp.zeros((0, 4))}, "Dense_1": {"kernel": jnp.ones((4, 2))}}
    scores = sm.init_scores(jax.random.key(KEY), weights)
    assert scores["Dense_0"]["kernel"].shape == (0, 4)
    assert initializers.signed_constant(jax.random.key(KEY), weights)["Dense_0"]["kernel"].shape == (0, 4)
    masks = sm.edge_popup(0.3)(scores)
    assert sm.layer_densities(masks) == {"Dense_0/kernel": 0.0, "Dense_1/kernel": 3 / 8}
