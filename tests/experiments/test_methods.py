"""The table: every method keeps every invariant. A new method is a new row."""

import functools
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import supermask_jax as sm
from experiments.config import presets
from experiments.config.registry import DISTRIBUTIONS, INITIALIZERS, METHODS
from experiments.config.sections import Init, Masks
from experiments.config.settings import changed
from experiments.mnist import Config
from experiments.training.loss import make_loss
from experiments.training.methods import Setup
from experiments.training.network import network
from experiments.training.optimizer import make_optimizer
from supermask_jax.trees import by_path, leaf_key

STEPS = 6
KEY = jax.random.key(4)
LEARNS = {"edge-popup": "scores", "bernoulli": "scores", "threshold": "scores", "dense": "weights"}
LEARNS |= dict.fromkeys(("random", "magnitude", "snip", "grasp", "synflow", "gradual", "set", "rigl"), "weights")
RATES = {"edge-popup": 0.05, "bernoulli": 20.0}  # else 0.05
FIXED = ("random", "magnitude", "snip", "grasp", "synflow")
CHANGED = ("gradual", "set", "rigl")  # masks change while weights learn


def config(method, density=0.3, **more):
    rates = {"learning_rate": RATES.get(method, 0.05), "weight_decay": 1e-3, "momentum": 0.9}
    return changed(Config(), **{"model": "lenet-300-100", "method": method, "density": density, **rates, **more})


def batch():
    images = jax.random.randint(jax.random.key(9), (16, 8, 8, 1), 0, 256).astype(jnp.uint8)
    return {"image": images, "label": jnp.arange(16) % 10, "weight": jnp.ones(16)}


@functools.cache
def drawn(model, init, seed):
    net = network(model, init, 10, (8, 8, 1))
    return net, *net.init(leaf_key(jax.random.key(seed), "weights"))


def setup_of(method, density=0.3, seed=0, steps=STEPS, **more):
    settings, key = config(method, density, **more), jax.random.key(seed)
    net, weights, state = drawn(settings.model, settings.init, seed)
    tx = make_optimizer(settings.optim, optax.constant_schedule(settings.optim.learning_rate))
    loss = functools.partial(make_loss, net, (0.5,), (0.25,))
    setup = Setup(settings.masks, net, weights, state, leaf_key(key, "scores"), tx, loss, lambda n: batch(), steps)
    return setup, leaf_key(key, "train")


@functools.cache
def start(name, density=0.3, seed=0, **more):
    setup, key = setup_of(name, density, seed, **more)
    method = METHODS[name].resolve()(setup)
    state = sm.init_state(method.subnet, setup.tx, key, setup.model_state, learns=method.learns)
    return method, state, step_of(name, method, setup, density, tuple(more.items()))


STEPS_OF = {}  # compiled: what they depend on is in the key, and arrays are their arguments


def step_of(name, method, setup, density, more):
    key = ("fixed", more) if method.mask_fn is sm.identity else (name, density, more)
    if key not in STEPS_OF:
        options = {"learns": method.learns, "product": method.product}
        STEPS_OF[key] = sm.jit(sm.make_train_step(method.mask_fn, setup.make_loss(), setup.tx, **options))
    return STEPS_OF[key]


def params_of(method, subnet, key=None):
    """What the model is given."""
    return method.product(subnet, key) if method.product else sm.subnetwork(method.mask_fn, subnet, key)


def advance(method, state, step, steps):
    """Steps, and between them the changes of the masks."""
    metrics = None
    for _ in range(steps):
        state, metrics = step(state, batch())
        if method.update and int(state.step) % method.update_every == 0:
            state = method.update(int(state.step), state, batch())
    return state, metrics


@functools.cache
def run(name, density=0.3, seed=0, start=start):
    method, state, step = start(name, density, seed)
    first = step(state, batch())[1]["loss"]
    compiled = step._cache_size()
    state, metrics = advance(method, state, step, STEPS)
    return method, state, (first, metrics["loss"]), step._cache_size() - compiled


each_method = pytest.mark.parametrize("name", METHODS)
masked_method = pytest.mark.parametrize("name", [name for name in METHODS if name != "dense"])
counted_method = pytest.mark.parametrize("name", [name for name, entry in METHODS.items() if not entry.free_density])


def test_the_registry_the_command_line_and_the_presets_name_the_same_methods():
    choices = get_args(Masks.__dataclass_fields__["method"].type)
    assert choices == tuple(METHODS) and set(choices) == set(LEARNS)
    for recipes, default in ((presets.MNIST, "best"), (presets.CIFAR, "quick")):
        assert {method for preset, method in recipes if preset == default} == set(METHODS)
    assert {method for _, method in presets.MNIST} == set(METHODS)


@each_method
def test_the_registry_says_what_learns(name):
    assert METHODS[name].learns == LEARNS[name] == run(name)[0].learns


@each_method
def test_loss_goes_down(name):
    _, _, (first, last), _ = run(name)
    assert last < first


@each_method
def test_what_does_not_learn_is_bit_identical(name):
    method, state, *_ = run(name)
    frozen = "weights" if LEARNS[name] == "scores" else "scores"
    if name not in CHANGED:
        jax.tree.map(np.testing.assert_array_equal, getattr(state.subnet, frozen), getattr(method.subnet, frozen))


@each_method
def test_what_learns_changes_in_every_leaf(name):
    method, state, *_ = run(name)
    before, after = by_path(getattr(method.subnet, method.learns)), by_path(getattr(state.subnet, method.learns))
    assert before and all(not np.array_equal(before[path], after[path]) for path in before)


@pytest.mark.filterwarnings("ignore:no weight is kept")  # scores of 0 keep nothing
@masked_method
@pytest.mark.parametrize("key", [None, 5])
def test_masks_are_binary_before_and_after_training(name, key):
    method, state, *_ = run(name)
    key = None if key is None else jax.random.key(key)
    for subnet in (method.subnet, state.subnet):
        for path, mask in by_path(method.mask_fn(subnet.scores, key)).items():
            assert set(np.unique(mask)) <= {0.0, 1.0}
            assert mask.dtype == by_path(subnet.weights)[path].dtype
    last = by_path(method.mask_fn(state.subnet.scores, key)).values()
    assert all(set(np.unique(mask)) == {0.0, 1.0} for mask in last)


@counted_method
@pytest.mark.parametrize("density", [0.3, 0.7])
def test_masks_have_exact_counts_before_and_after_training(name, density):
    method, state, *_ = run(name, density)
    for subnet in (method.subnet, state.subnet)[name == "gradual" :]:  # which keeps everything at first
        for path, mask in by_path(method.mask_fn(subnet.scores, None)).items():
            assert np.count_nonzero(mask) == sm.keep_count(density, mask.size), path


@masked_method
def test_pruned_weights_are_zero_in_the_subnetwork(name):
    method, state, *_ = run(name)
    masks = by_path(method.mask_fn(state.subnet.scores, None))
    for path, param in by_path(params_of(method, state.subnet)).items():
        assert np.all(np.asarray(param)[np.asarray(masks[path]) == 0] == 0)


@each_method
def test_masks_depend_on_the_key_exactly_where_a_method_says_that_it_draws_them(name):
    method, state, *_ = run(name)
    a, b, none = (by_path(method.mask_fn(state.subnet.scores, key)) for key in (*jax.random.split(KEY), None))
    assert method.sampled == any(not np.array_equal(a[path], b[path]) for path in a)
    assert method.sampled == any(not np.array_equal(a[path], none[path]) for path in a)


@pytest.mark.parametrize("name", CHANGED)
def test_masks_that_are_to_change_do_and_gradual_only_ever_loses(name):
    method, state, *_ = run(name)
    before, after = by_path(method.subnet.scores), by_path(state.subnet.scores)
    assert all(not np.array_equal(before[path], after[path]) for path in before)
    came_back = [np.any(np.asarray(after[path]) > np.asarray(before[path])) for path in before]
    assert not any(came_back) if name == "gradual" else all(came_back)


@pytest.mark.parametrize(
    ("steps", "asked", "every", "end"), [(6, 100, 1, 4), (126, 100, 18, 90), (9380, 100, 100, 7000)]
)
def test_masks_may_change_five_times_at_least_and_settle_at_three_quarters(steps, asked, every, end):
    setup, key = setup_of("set", steps=steps, update_every=asked)
    method = METHODS["set"].resolve()(setup)
    assert method.update_every == every
    state = sm.init_state(method.subnet, setup.tx, key, learns="weights")
    last, after = (method.update(step, state, batch()).subnet.scores for step in (end - every, end))
    before = by_path(state.subnet.scores)
    assert any(not np.array_equal(mask, before[path]) for path, mask in by_path(last).items())
    jax.tree.map(np.testing.assert_array_equal, after, state.subnet.scores)


@pytest.mark.parametrize("name", CHANGED)
def test_masks_settle_before_the_end(name):
    _, state, _ = start(name)
    method, _, _, _ = run(name)
    late = method.update(STEPS, state, batch())
    jax.tree.map(np.testing.assert_array_equal, late.subnet, state.subnet)


@pytest.mark.parametrize("name", ["edge-popup", "random", "set"])
def test_layers_of_one_shape_are_drawn_independently(name):
    method, *_ = start(name, model="mlp", width=40, depth=3)
    masks = by_path(method.mask_fn(method.subnet.scores, None))
    same = np.mean(np.asarray(masks["Dense_1/kernel"]) == np.asarray(masks["Dense_2/kernel"]))
    assert abs(same - (0.3**2 + 0.7**2)) < 0.06


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:no weight is kept")
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("name", ["random", "gradual"])
def test_every_distribution_keeps_the_density_of_all_weights(name, distribution):
    method, state, step = start(name, distribution=distribution)
    state, _ = advance(method, state, step, STEPS)
    counts = {path: (int(mask.sum()), mask.size) for path, mask in by_path(state.subnet.scores).items()}
    ones, total = (sum(numbers) for numbers in zip(*counts.values(), strict=True))
    if distribution == "uniform+":  # as published: the first layer, here most of the weights, is left dense
        assert counts["Dense_0/kernel"][0] == counts["Dense_0/kernel"][1]
        assert all(
            ones == sm.keep_count(0.3, size) for path, (ones, size) in counts.items() if path != "Dense_0/kernel"
        )
    else:
        assert abs(ones - 0.3 * total) <= len(counts)  # a layer's count is rounded up
    one_density = len({round(ones / size, 2) for ones, size in counts.values()}) == 1
    assert one_density == (distribution == "uniform")


def test_ratios_of_a_saliency_are_its_counts_at_other_positions():
    snip, *_ = start("snip", distribution="global")
    drawn, *_ = start("random", distribution="snip")
    a, b = by_path(snip.subnet.scores), by_path(drawn.subnet.scores)
    assert {path: int(m.sum()) for path, m in a.items()} == {path: int(m.sum()) for path, m in b.items()}
    assert all(not np.array_equal(a[path], b[path]) for path in a)


def test_neurons_are_kept_whole_and_the_classes_all():
    method, state, step = start("edge-popup", unit="neuron")
    state, _ = advance(method, state, step, STEPS)
    masks = method.mask_fn(state.subnet.scores, None)
    assert masks["Dense_2"]["kernel"] is None
    for name, units in (("Dense_0", 300), ("Dense_1", 100)):
        columns = np.asarray(masks[name]["kernel"])
        assert columns.shape[-1] == units
        np.testing.assert_array_equal(columns, np.broadcast_to(columns[:1], columns.shape))
        assert columns[0].sum() == sm.keep_count(0.3, units)


@pytest.mark.parametrize("rescale", [False, True])
def test_bernoulli_steps_have_the_gradient_of_the_closed_form(rescale):
    """One SGD step from the logits 0: p (1 - p) is a quarter, and rescaling doubles a mask of which half is kept."""
    method, state, step = start("bernoulli", rescale=rescale)
    mask_key, loss_key = jax.random.split(jax.random.fold_in(state.key, 0))
    loss_fn = setup_of("bernoulli")[0].make_loss()
    masks = method.mask_fn(state.subnet.scores, mask_key)
    scaled = jax.tree.map(lambda m: m * (m.size / m.sum()), masks) if rescale else masks
    params = sm.subnetwork(sm.identity, state.subnet._replace(scores=scaled))
    outer = by_path(jax.grad(lambda p: loss_fn(p, None, batch(), loss_key)[0])(params))
    after, _ = step(state, batch())
    for path, score in by_path(after.subnet.scores).items():
        w, m, g = (np.asarray(by_path(tree)[path], np.float64) for tree in (state.subnet.weights, masks, outer))
        factor = m.size / m.sum() if rescale else 1.0
        flow = factor * w * g - rescale * factor / m.sum() * (m * w * g).sum()
        expected = -RATES["bernoulli"] * flow / 4
        np.testing.assert_allclose(score, expected, rtol=0, atol=1e-5 * np.abs(expected).max(), err_msg=path)


def test_the_command_line_names_every_initializer():
    assert get_args(Init.__dataclass_fields__["init"].type) == tuple(INITIALIZERS)


def test_signed_deviation_takes_signs_and_size_from_glorot_normal():
    method, *_ = start("bernoulli", init="signed-deviation")
    drawn, *_ = start("bernoulli", init="glorot-normal")
    for path, weight in by_path(drawn.subnet.weights).items():
        signed = np.asarray(by_path(method.subnet.weights)[path])
        np.testing.assert_allclose(signed, np.sign(weight) * np.std(np.asarray(weight, np.float64)), rtol=1e-6)


@each_method
def test_same_seed_same_bits_other_seed_other_bits(name):
    anew = start.__wrapped__  # not from the cache
    (_, a, *_), (_, b, *_), (_, c, *_) = run(name), run(name, start=anew), run(name, seed=1)
    jax.tree.map(np.testing.assert_array_equal, a.subnet, b.subnet)
    pairs = zip(jax.tree.leaves(a.subnet.weights), jax.tree.leaves(c.subnet.weights), strict=True)
    assert all(not np.array_equal(x, y) for x, y in pairs)


@each_method
def test_resumed_in_the_middle_it_ends_the_same(name):
    method, whole, *_ = run(name)
    _, state, step = start(name)
    state, _ = advance(method, state, step, STEPS // 2)
    state = jax.tree.unflatten(jax.tree.structure(state), [jnp.copy(leaf) for leaf in jax.tree.leaves(state)])
    state, _ = advance(method, state, step, STEPS - STEPS // 2)
    jax.tree.map(np.testing.assert_array_equal, state.subnet, whole.subnet)


@each_method
def test_a_second_step_compiles_nothing_and_neither_does_one_after_an_update(name):
    *_, compiled = run(name)
    assert compiled == 0


@each_method
def test_images_of_weight_zero_change_nothing(name):
    _, state, step = start(name)
    padded = {**batch(), "weight": jnp.ones(16).at[12:].set(0)}
    garbage = {**padded, "image": padded["image"].at[12:].set(255), "label": padded["label"].at[12:].set(3)}
    (a, metrics), (b, _) = step(state, padded), step(state, garbage)
    jax.tree.map(np.testing.assert_array_equal, a.subnet, b.subnet)
    assert metrics["count"] == 12
