"""Lottery tickets: what is pruned by hand, exact counts, nesting; rewinding; networks that physically shrink."""

from functools import partial

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import supermask_jax as sm
from supermask_jax import lottery, models
from supermask_jax.trees import apply_masks, by_path

TINY = {
    "first": {"kernel": jnp.array([[1.0, -4.0], [3.0, 2.0]]), "bias": jnp.ones(2)},
    "last": jnp.array([[-8.0, 0.5]]),
}


def flat(masks):
    return {path: mask.astype(int).tolist() for path, mask in by_path(masks).items()}


def ones(masks):
    return {path: int(mask.sum()) for path, mask in by_path(masks).items()}


def test_full_masks_keep_all_that_is_prunable():
    masks = lottery.full_masks(TINY)
    assert masks["first"]["bias"] is None
    assert flat(masks) == {"first/kernel": [[1, 1], [1, 1]], "last": [[1, 1]]}
    with pytest.raises(ValueError, match="matches no leaf"):
        lottery.full_masks({"bias": jnp.ones(2)})


def test_the_least_magnitudes_of_all_layers_go_and_of_each_layer():
    masks = lottery.full_masks(TINY)
    assert flat(lottery.prune(TINY, masks, 0.5)) == {"first/kernel": [[0, 1], [1, 0]], "last": [[1, 0]]}
    each = lottery.prune(TINY, masks, 0.3, scope="layer")  # 0.7 of 4 and of 2, rounded up
    assert flat(each) == {"first/kernel": [[0, 1], [1, 1]], "last": [[1, 1]]}
    each = lottery.prune(TINY, masks, {"first/kernel": 0.75, "last": 0.0}, scope="layer")
    assert flat(each) == {"first/kernel": [[0, 1], [0, 0]], "last": [[1, 1]]}


def test_a_fraction_is_of_what_is_left_and_nothing_pruned_comes_back():
    masks = {"first": {"kernel": jnp.array([[1.0, 0], [1, 1]]), "bias": None}, "last": jnp.array([[0.0, 1]])}
    with pytest.warns(UserWarning, match="no weight is kept in last; minimum=1"):
        halved = lottery.prune(TINY, masks, 0.5)
    assert flat(halved) == {"first/kernel": [[0, 0], [1, 1]], "last": [[0, 0]]}
    assert ones(lottery.prune(TINY, masks, 0.5, minimum=1)) == {"first/kernel": 1, "last": 1}
    assert flat(lottery.prune(TINY, masks, 0.0)) == flat(masks)
    assert sum(ones(lottery.prune(TINY, masks, 1.0)).values()) == 0


def test_whole_neurons_go_by_the_mean_of_what_each_has_left():
    weights = {"a": jnp.array([[9.0, 1, 2], [1, 1, 2]]), "c": jnp.array([[4.0, 0], [4, 0]])}
    masks = {"a": jnp.array([[0.0, 1, 1], [1, 1, 0]]), "c": jnp.ones((2, 2))}  # means: 1, 1, 2; 4, 0
    a_unit_each = lottery.prune(weights, masks, 0.5, scope="layer", unit="neuron")  # of 1 and 1 the first goes
    assert flat(a_unit_each) == {"a": [[0, 1, 1], [0, 1, 0]], "c": [[1, 0], [1, 0]]}
    two_of_all = lottery.prune(weights, masks, 0.4, unit="neuron")
    assert flat(two_of_all) == {"a": [[0, 1, 1], [0, 1, 0]], "c": [[1, 0], [1, 0]]}
    masks["a"] = jnp.array([[0.0, 1, 1], [0, 1, 0]])  # the first unit is out: it is neither counted nor brought back
    assert flat(lottery.prune(weights, masks, 0.25, unit="neuron"))["a"] == [[0, 1, 1], [0, 1, 0]]
    assert flat(lottery.prune(weights, masks, 0.5, unit="neuron"))["a"] == [[0, 0, 1], [0, 0, 0]]


SHAPES = {"a": (30, 20), "c": (3, 3, 2, 12), "d": (20, 10)}


@pytest.mark.slow
@pytest.mark.parametrize("unit", ("weight", "neuron"))
@pytest.mark.parametrize("scope", ("global", "layer"))
def test_each_rounds_masks_lie_within_the_last_and_keep_their_exact_count(scope, unit):
    rng = np.random.default_rng(0)
    masks = {path: jnp.ones(shape) for path, shape in SHAPES.items()}
    sizes = {path: shape[-1] if unit == "neuron" else int(np.prod(shape)) for path, shape in SHAPES.items()}
    left = sizes if scope == "layer" else {"": sum(sizes.values())}
    for _ in range(5):
        weights = {path: rng.normal(size=shape).astype(np.float32) for path, shape in SHAPES.items()}
        pruned = lottery.prune(weights, masks, 0.3, scope, unit)
        for path in SHAPES:
            assert np.all(pruned[path] <= masks[path])
        masks, left = pruned, {path: sm.keep_count(0.7, number) for path, number in left.items()}
        kept = {path: int((mask.any(tuple(range(mask.ndim - 1))) if unit == "neuron" else mask).sum())
                for path, mask in masks.items()}  # fmt: skip
        assert kept == left if scope == "layer" else sum(kept.values()) == left[""]


@pytest.mark.slow
def test_twenty_rounds_on_lenet_give_the_published_densities():
    """Hidden layers at a fifth a round, the output layer at a tenth: Frankle & Carbin 2019, section 2."""
    model = models.LeNet300100(use_bias=False)
    weights = model.init(jax.random.key(0), jnp.zeros((1, 784)))["params"]
    hidden, output = {"Dense_0/kernel": 0.2, "Dense_1/kernel": 0.2}, {"Dense_2/kernel": 0.1}
    counts = {"Dense_0/kernel": 235_200, "Dense_1/kernel": 30_000, "Dense_2/kernel": 1_000}
    size, masks, percent = sum(counts.values()), lottery.full_masks(weights), []
    for _ in range(21):
        percent.append(round(100 * sm.density(masks), 1))
        assert ones(masks) == counts
        counts = {path: -(-counts[path] * (10 - int(10 * part)) // 10) for path, part in {**hidden, **output}.items()}
        masks = lottery.prune(weights, masks, hidden | output, scope="layer")
    assert size == 266_200
    assert percent[:11] == [100, 80, 64.1, 51.3, 41.1, 32.9, 26.3, 21.1, 16.9, 13.5, 10.8]
    assert percent[-1] == 1.2


def test_round_fraction_reaches_the_density_without_a_floating_point_slip():
    assert lottery.round_fraction(0.64, 2) == 0.2
    assert lottery.round_fraction(0.3, 1) == 0.7
    assert 1000 * (1 - lottery.round_fraction(0.1, 7)) ** 7 == pytest.approx(100)
    assert (lottery.round_fraction(0, 3), lottery.round_fraction(1, 3)) == (1, 0)
    with pytest.raises(ValueError, match="one round or more, got 0"):
        lottery.round_fraction(0.3, 0)
    with pytest.raises(ValueError, match="density must be"):
        lottery.round_fraction(1.3, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fraction": 1.1}, r"fraction must be a number in \[0, 1\] .*, got 1.1"),
        ({"fraction": float("nan")}, "fraction must be"),
        ({"fraction": 0.3, "scope": "everywhere"}, "scope must be one of global, layer, got 'everywhere'"),
        ({"fraction": 0.3, "unit": "channel"}, "unit must be one of weight, neuron, got 'channel'"),
        ({"fraction": {"first/kernel": 0.3, "last": 0.3}}, "needs scope='layer'"),
        ({"fraction": {"first/kernl": 0.3, "last": 0.3}, "scope": "layer"}, "did you mean 'first/kernel'"),
        ({"fraction": {"last": 0.3}, "scope": "layer"}, "leaves out first/kernel"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(value),
)
def test_what_cannot_be_pruned_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        lottery.prune(TINY, lottery.full_masks(TINY), **arguments)


def test_scores_that_are_nan_and_masks_that_are_not_0_or_1_are_refused():
    masks = lottery.full_masks(TINY)
    with pytest.raises(ValueError, match=r"'last' hold NaN"):
        lottery.prune(TINY | {"last": jnp.array([[jnp.nan, 1.0]])}, masks, 0.3)
    with pytest.raises(ValueError, match=r"'last' holds values other than 0 and 1"):
        lottery.prune(TINY, masks | {"last": jnp.array([[0.5, 1.0]])}, 0.3)


def test_every_round_starts_from_the_same_weights_and_prunes_what_was_trained_in_the_last():
    calls = []

    def train(weights, masks, number):
        calls.append(("train", number, flat(masks)))
        assert weights is TINY
        return jax.tree.map(lambda w: w * (-1) ** number / (number + 1), apply_masks(weights, masks))

    def prune(trained, masks):
        calls.append(("prune", trained))
        return lottery.prune(trained, masks, 0.5, scope="layer")

    full = lottery.full_masks(TINY)
    rounds = list(lottery.iterative_pruning(train, TINY, full, 2, prune))
    assert [call[0] for call in calls] == ["train", "prune", "train", "prune", "train"]
    assert [result.number for result in rounds] == [0, 1, 2]
    assert flat(rounds[0].masks) == flat(full)
    assert flat(rounds[1].masks) == {"first/kernel": [[0, 1], [1, 0]], "last": [[1, 0]]}
    assert flat(rounds[2].masks) == {"first/kernel": [[0, 1], [0, 0]], "last": [[1, 0]]}
    for i, result in enumerate(rounds):
        assert calls[2 * i][2] == flat(result.masks)
    assert calls[1][1] is rounds[0].trained and calls[3][1] is rounds[1].trained


def test_rounds_are_trained_one_by_one_as_they_are_asked_for():
    trained = []
    rounds = lottery.iterative_pruning(
        lambda weights, masks, number: trained.append(number) or weights,
        TINY, lottery.full_masks(TINY), 3, partial(lottery.prune, fraction=0.3),
    )  # fmt: skip
    assert trained == []
    assert next(rounds).number == 0 and trained == [0]
    with pytest.raises(ValueError, match="must not be negative, got -1"):
        next(lottery.iterative_pruning(None, TINY, None, -1, None))


def drawn_masks(shapes, density, seed=0):
    rng = np.random.default_rng(seed)
    return {path: jnp.asarray(rng.random(shape) < density, jnp.float32) for path, shape in shapes.items()}


def test_random_like_has_the_ones_of_each_layer_elsewhere():
    masks = drawn_masks(SHAPES, 0.3)
    drawn = lottery.random_like(jax.random.key(0), masks | {"bias": None})
    assert drawn.pop("bias") is None
    assert ones(drawn) == ones(masks)
    chex.assert_trees_all_equal(lottery.random_like(jax.random.key(0), {"d": masks["d"]})["d"], drawn["d"])
    for other in (masks, lottery.random_like(jax.random.key(1), masks)):
        assert all(np.any(drawn[path] != other[path]) for path in SHAPES)


@pytest.mark.slow
def test_reshuffled_permutes_the_kept_weights_among_their_places_in_each_layer():
    rng = np.random.default_rng(0)
    weights = {path: rng.normal(size=shape).astype(np.float32) for path, shape in SHAPES.items()}
    masks = drawn_masks(SHAPES, 0.3) | {"d": None}
    shuffled = lottery.reshuffled(jax.random.key(0), weights, masks)
    np.testing.assert_array_equal(shuffled["d"], weights["d"])
    for path in ("a", "c"):
        kept, before, after = np.asarray(masks[path]).astype(bool), weights[path], np.asarray(shuffled[path])
        np.testing.assert_array_equal(after[~kept], before[~kept])
        np.testing.assert_array_equal(np.sort(after[kept]), np.sort(before[kept]))
        assert np.mean(after[kept] == before[kept]) < 0.1
    alone = lottery.reshuffled(jax.random.key(0), {"c": weights["c"]}, {"c": masks["c"]})
    chex.assert_trees_all_equal(alone["c"], shuffled["c"])
    twins = lottery.reshuffled(jax.random.key(0), dict.fromkeys("ae", weights["a"]), dict.fromkeys("ae", masks["a"]))
    assert np.any(twins["a"] != twins["e"])


def test_frozen_leaves_pruned_weights_bit_identical_and_other_masks_compile_nothing_new():
    model = models.LeNet300100(hidden=(7, 5))
    x, labels = jax.random.normal(jax.random.key(1), (16, 20)), jnp.arange(16) % 10
    weights = model.init(jax.random.key(0), x)["params"]

    def loss_fn(params, model_state, batch, key):
        logits = model.apply({"params": params}, batch[0])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean(), (model_state, {})

    def tx(masks):
        return optax.chain(optax.adamw(0.01, weight_decay=0.1), lottery.frozen(masks))

    kernels = {layer: leaves["kernel"].shape for layer, leaves in weights.items()}
    first, second = (
        {layer: {"kernel": mask, "bias": None} for layer, mask in drawn_masks(kernels, 0.3, seed).items()}
        for seed in (1, 2)
    )
    subnet = sm.Subnet(weights, jax.tree.map(lambda _: None, weights))
    step = sm.make_train_step(sm.identity, loss_fn, tx(first), learns="weights")
    step = jax.jit(chex.assert_max_traces(step, n=1), donate_argnums=0)
    for masks in (first, second):
        state = sm.init_state(jax.tree.map(jnp.copy, subnet), tx(masks), jax.random.key(4), learns="weights")
        for _ in range(3):
            state, _ = step(state, (x, labels))
        for path, weight in by_path(weights).items():
            trained, mask = by_path(state.subnet.weights)[path], by_path(masks).get(path, np.ones(weight.shape))
            np.testing.assert_array_equal(np.asarray(weight == trained), np.asarray(mask) == 0)
    assert step._cache_size() == 1
    chex.assert_tree_all_finite(second)  # the caller's masks were not given away with the donated state


def pruned_network(model, shape, fraction):
    """(weights, masks with half the weights and then a fraction of the neurons of each layer but the last, ...)."""
    x = jax.random.normal(jax.random.key(1), shape)
    weights = jax.jit(model.init)(jax.random.key(0), x)["params"]
    masks = jax.tree.map(lambda mask: drawn_masks({"": mask.shape}, 0.5)[""], lottery.full_masks(weights))
    layers = list(by_path(masks))
    fractions = dict.fromkeys(layers, fraction) | {layers[-1]: 0.0}
    return weights, lottery.prune(weights, masks, fractions, scope="layer", unit="neuron"), layers, x


def same_function(model, weights, masks, smaller, small, x):
    assert {path: leaf.shape for path, leaf in by_path(small).items()} == {
        path: leaf.shape for path, leaf in by_path(jax.eval_shape(smaller.init, jax.random.key(0), x)["params"]).items()
    }
    ours = jax.jit(smaller.apply)({"params": small}, x)
    theirs = jax.jit(model.apply)({"params": apply_masks(weights, masks)}, x)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("use_bias", (False, True))
def test_lenet_without_its_pruned_neurons_is_a_smaller_lenet(use_bias):
    model = models.LeNet300100(use_bias=use_bias)
    weights, masks, layers, x = pruned_network(model, (8, 49), 0.7)
    if use_bias:  # those of the units that stay take part
        for path, scale in zip(layers[:-1], (1.0, -1.0), strict=True):
            units = np.asarray(by_path(masks)[path]).any(axis=0)
            weights[path.split("/")[0]]["bias"] = scale * jnp.asarray(units, jnp.float32)
    smaller = models.LeNet300100(use_bias=use_bias, hidden=(90, 30))
    small = lottery.shrink(weights, masks, layers)
    same_function(model, weights, masks, smaller, small, x)


@pytest.mark.slow
def test_the_convnet_without_its_pruned_channels_is_a_smaller_convnet_across_the_flatten():
    model = models.MnistConvNet(features=(8, 10, 20))
    weights, masks, layers, x = pruned_network(model, (4, 12, 12, 1), 0.3)
    smaller = models.MnistConvNet(features=(6, 7, 14))
    small = lottery.shrink(weights, masks, layers)
    same_function(model, weights, masks, smaller, small, x)


CHAIN = {
    "a": {"kernel": jnp.array([[1.0, 2, 3]]), "bias": jnp.array([1.0, 0, 5])},
    "c": {"kernel": jnp.array([[1.0, 2], [3, 4], [5, 6]]), "bias": jnp.array([7.0, 8])},
}
CHAIN_MASKS = {
    "a": {"kernel": jnp.array([[1.0, 0, 1]]), "bias": None},
    "c": {"kernel": jnp.array([[0.0, 1], [1, 1], [1, 1]]), "bias": None},
}
CHAIN_LAYERS = ["a/kernel", "c/kernel"]


def test_shrinking_by_hand():
    small = lottery.shrink(CHAIN, CHAIN_MASKS, CHAIN_LAYERS)
    assert small["a"]["kernel"].tolist() == [[1, 3]] and small["a"]["bias"].tolist() == [1, 5]
    assert small["c"]["kernel"].tolist() == [[0, 2], [5, 6]] and small["c"]["bias"].tolist() == [7, 8]


def test_a_channel_is_read_at_every_position_of_a_flattened_picture():
    weights = {"conv": {"kernel": jnp.ones((1, 1, 1, 2))}, "dense": {"kernel": jnp.arange(6.0).reshape(6, 1)}}
    masks = {"conv": {"kernel": jnp.array([0.0, 1]).reshape(1, 1, 1, 2)}, "dense": {"kernel": None}}
    small = lottery.shrink(weights, masks, ["conv/kernel", "dense/kernel"])
    assert small["conv"]["kernel"].shape == (1, 1, 1, 1)
    assert small["dense"]["kernel"].ravel().tolist() == [1, 3, 5]


def test_what_cannot_shrink_is_refused():
    def masks(first):
        return CHAIN_MASKS | {"a": {"kernel": jnp.array([first]), "bias": None}}

    with pytest.raises(ValueError, match=r"unit 2 of 'a/kernel' is pruned, but its bias is 5.0, not 0"):
        lottery.shrink(CHAIN, masks([1.0, 0, 0]), CHAIN_LAYERS)
    with pytest.raises(ValueError, match=r"all units of 'a/kernel' are pruned"):
        lottery.shrink(CHAIN, masks([0.0, 0, 0]), CHAIN_LAYERS)
    for layers in (["a/kernel"], ["a/kernel", "d/kernel"], ["a/kernel", "c/kernel", "c/kernel"]):
        with pytest.raises(
            ValueError, match=f"every kernel once, .* got {', '.join(layers)} of a/bias, a/kernel, c/bias"
        ):
            lottery.shrink(CHAIN, CHAIN_MASKS, layers)
    with pytest.raises(ValueError, match=r"'a/kernel' \(1, 3\) cannot read the 2 units of 'c/kernel'"):
        lottery.shrink(CHAIN, CHAIN_MASKS, CHAIN_LAYERS[::-1])


def test_leaves_that_no_kernel_owns_are_refused():
    """Statistics and scales of the units between would keep their size."""
    weights = nn.BatchNorm(use_running_average=True).init(jax.random.key(0), jnp.ones((2, 3)))["params"]
    with pytest.raises(ValueError, match="norm/scale"):
        lottery.shrink(CHAIN | {"norm": weights}, CHAIN_MASKS | {"norm": {"bias": None, "scale": None}}, CHAIN_LAYERS)
