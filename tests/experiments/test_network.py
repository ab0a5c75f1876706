"""A network with batch statistics: what enters them, where they start, what they are evaluated with and stored in."""

import functools
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp
from signals import stopped_once_training

import supermask_jax as sm
from experiments.config.presets import DENSE_LAYERS
from experiments.config.registry import INITIALIZERS, METHODS, MODELS, Entry
from experiments.config.sections import Init, Masks, Model
from experiments.config.settings import changed
from experiments.data.batches import epoch_order
from experiments.data.source import arrays_dataset
from experiments.mnist import Config
from experiments.run.errors import DataError, UserError
from experiments.run.interrupt import Interrupted
from experiments.training import fit as fitting
from experiments.training import stored
from experiments.training.evaluation import make_flow
from experiments.training.loss import make_loss
from experiments.training.methods import Setup
from experiments.training.network import Network, network
from experiments.training.optimizer import make_optimizer
from experiments.training.summary import sizes
from supermask_jax.models import CifarResNet, zoo
from supermask_jax.trees import by_path, leaf_key, prunable

KEY = jax.random.key(0)
EXAMPLES, BATCH, CLASSES, SHAPE = 50, 16, 4, (4, 3, 2)
MOMENTUM = 0.9


class Normalised(nn.Module):
    """BatchNorm of the images, and a dense layer: what is in its statistics can be told from the images alone."""

    classes: int
    affine: bool = False
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, train=False):
        norm = nn.BatchNorm(not train, momentum=MOMENTUM, use_scale=self.affine, use_bias=self.affine, name="norm")
        return nn.Dense(self.classes, use_bias=False, name="dense")(norm(x).reshape(len(x), -1))


def normalised(classes, *, affine=False):
    return zoo.Architecture(Normalised(classes, affine), "dense/kernel", "dense/kernel")


@pytest.fixture
def small_model(monkeypatch):
    monkeypatch.setitem(MODELS, "normalised", Entry(f"{__name__}:normalised", reads=("affine",)))


@functools.cache
def dataset():
    rng = np.random.default_rng(0)
    labels = np.arange(EXAMPLES + 20) % CLASSES
    images = (rng.integers(0, 180, (len(labels), *SHAPE)) + 25 * labels[:, None, None, None]).astype(np.uint8)
    parts = (images[:EXAMPLES], labels[:EXAMPLES], images[EXAMPLES:], labels[EXAMPLES:])
    return arrays_dataset("made up", parts, "made up", classes=CLASSES)


def fit(workdir, **settings):
    usual = {"method": "random", "model": "normalised", "batch_size": BATCH, "epochs": 2, "density": 0.3}
    usual |= {"init": "kaiming-normal", "learning_rate": 0.05, "dataset": "made up", "workdir": str(workdir)}
    return fitting.fit(changed(Config(), **usual | settings), dataset(), "mnist", single=False)


def last_state(workdir):
    """What the last checkpoint holds of the state of training."""
    steps = [int(file.name) for file in (workdir / "checkpoints").iterdir() if file.name.isdigit()]
    return ocp.load(workdir / "checkpoints" / str(max(steps)))["state"]


def records(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


TIMES = ("train_seconds", "images_per_second", "compile_seconds")
quiet = pytest.mark.filterwarnings("ignore:(?!cannot read)")  # orbax warns that no layout is given


def pixels(images):
    data = dataset()
    return (images.astype(np.float32) / 255 - np.array(data.mean, np.float32)) / np.array(data.std, np.float32)


def statistics(seed=0, epochs=2):
    """(running mean, running variance) of each channel, after training: slow, and from the images only."""
    mean, variance = np.zeros(SHAPE[-1]), np.ones(SHAPE[-1])
    for epoch in range(epochs):
        order, _ = epoch_order(leaf_key(jax.random.key(seed), "order"), epoch, EXAMPLES, BATCH, drop_remainder=True)
        assert order.shape == (3, BATCH)
        for indices in order:
            batch = pixels(dataset().train.images[indices]).astype(np.float64)
            mean = MOMENTUM * mean + (1 - MOMENTUM) * batch.mean(axis=(0, 1, 2))
            variance = MOMENTUM * variance + (1 - MOMENTUM) * batch.var(axis=(0, 1, 2))
    return mean, variance


# Training.


@quiet
def test_whole_batches_enter_the_statistics_and_padding_does_not(tmp_path, small_model):
    summary = fit(tmp_path)
    assert summary["steps"] == 6 and [record["step"] for record in records(tmp_path)] == [0, 3, 6]
    mean, variance = statistics()
    stored = last_state(tmp_path)["model_state"]["batch_stats"]["norm"]
    np.testing.assert_allclose(stored["mean"], mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(stored["var"], variance, rtol=1e-4)


@quiet
def test_evaluation_normalises_by_the_running_statistics_whatever_is_in_the_batch(tmp_path, small_model):
    summary = fit(tmp_path)
    state, (mean, variance) = last_state(tmp_path), statistics()
    test, kernel = dataset().test, np.asarray(state["subnet"]["weights"]["dense"]["kernel"], np.float64)
    kernel = kernel * np.asarray(state["subnet"]["scores"]["dense"]["kernel"])
    logits = ((pixels(test.images) - mean) / np.sqrt(variance + 1e-5)).reshape(len(test), -1) @ kernel
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(summary["test_loss"], -log_p[np.arange(len(test)), test.labels].mean(), rtol=1e-3)
    assert summary["test_accuracy"] == pytest.approx(np.mean(log_p.argmax(axis=1) == test.labels))
    assert summary["test_accuracy"] > 1 / CLASSES


@quiet
def test_statistics_are_resumed_bit_identical(tmp_path, small_model):
    expected = fit(tmp_path / "whole", checkpoint_every=2)

    with stopped_once_training():
        for step in (2, 3):  # a checkpoint, and the end of an epoch
            with pytest.raises(Interrupted, match=rf"saved at step {step} of 6"):
                fit(tmp_path / "broken", checkpoint_every=2)
    got = fit(tmp_path / "broken", checkpoint_every=2)
    different = {*TIMES, "config"}
    assert {k: v for k, v in got.items() if k not in different} == {
        k: v for k, v in expected.items() if k not in different
    }
    assert records(tmp_path / "broken") == records(tmp_path / "whole")
    a, b = (last_state(tmp_path / name) for name in ("broken", "whole"))
    assert jax.tree.leaves(a["model_state"])
    jax.tree.map(np.testing.assert_array_equal, *({**s, "key": jax.random.key_data(s["key"])} for s in (a, b)))


def test_too_few_images_for_one_batch_are_an_error_that_says_so(tmp_path, small_model):
    with pytest.raises(DataError, match="--batch-size 64 needs as many training images, and there are 50: normalised"):
        fit(tmp_path, batch_size=64)
    with pytest.raises(DataError, match="--batch-size 16 needs as many training images, and there are 12"):
        fit(tmp_path, train_images=12)


# Where it starts.


def names_of(model, **options):
    size = 32 if model.startswith("vgg") else 28  # five times halved, 28 pixels are none
    return network(Model(model=model, **options), Init(), 10, (size, size, 1))


@functools.cache
def residual(affine, init="signed-constant"):
    """A ResNet of eight layers, as small as they come."""
    module = CifarResNet(CLASSES, depth=8, width=2, affine=affine)
    draw = INITIALIZERS[init].resolve()
    return Network(module, "conv/kernel", "dense/kernel", (8, 8, 3), lambda key, weights: draw(key, weights))


NETWORKS = {
    "normalised": lambda: Network(Normalised(CLASSES, affine=True), "dense/kernel", "dense/kernel", SHAPE),
    "residual": lambda: residual(affine=True),
}
each_network = pytest.mark.parametrize("made_by", ["normalised", pytest.param("residual", marks=pytest.mark.slow)])


def test_a_batchnorm_scale_starts_at_1_a_bias_at_0_and_kernels_are_drawn():
    weights, state = residual(affine=True).init(KEY)
    leaves = by_path(weights)
    scales = {path: leaf for path, leaf in leaves.items() if path.endswith("scale")}
    biases = {path: leaf for path, leaf in leaves.items() if path.endswith("bias")}
    kernels = {path: leaf for path, leaf in leaves.items() if sm.is_kernel(path, leaf)}
    assert len(scales) == len(biases) == 7 and len(scales) + len(biases) + len(kernels) == len(leaves)
    assert all(np.all(np.asarray(leaf) == 1) for leaf in scales.values())
    assert all(np.all(np.asarray(leaf) == 0) for leaf in biases.values())
    assert all(len(np.unique(np.abs(leaf))) == 1 and np.all(leaf != 0) for leaf in kernels.values())
    means = {path: leaf for path, leaf in by_path(state["batch_stats"]).items() if path.endswith("mean")}
    assert len(means) == 7 and all(np.all(np.asarray(leaf) == 0) for leaf in means.values())


def test_kernels_are_the_same_with_and_without_scales():
    """Keys are split by path, so that a leaf more reshuffles no other."""
    (with_scales, _), (without, _) = residual(affine=True).init(KEY), residual(affine=False).init(KEY)
    got = by_path(with_scales)
    for path, kernel in by_path(without).items():
        np.testing.assert_array_equal(got[path], kernel, err_msg=path)


def test_only_a_network_that_carries_something_has_state():
    assert residual(affine=False).has_state and not names_of("convnet").has_state
    assert names_of("mlp", width=3).init(KEY)[1] is None
    params, state = names_of("lenet-300-100", biases=True).blank(KEY)
    assert state is None and all(not np.any(leaf) for leaf in jax.tree.leaves(params))


@pytest.mark.slow
@pytest.mark.parametrize("init", INITIALIZERS)
def test_weights_are_a_function_of_the_key(init):
    net = network(Model(model="mlp", width=6), Init(init=init), CLASSES, SHAPE)
    (a, _), (b, _), (c, _) = (net.init(jax.random.key(seed)) for seed in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, a, b)
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(c), strict=True)
    assert all(np.array_equal(x, y) == (init == "unsigned-constant") for x, y in pairs)  # which draws nothing


def test_scaled_weights_are_larger_by_the_square_root_of_the_density():
    plain, scaled = (network(Model(model="mlp", width=6), Init(), CLASSES, SHAPE, density) for density in (None, 0.3))
    (a, _), (b, _) = plain.init(KEY), scaled.init(KEY)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(y, x * (1 / 0.3) ** 0.5, rtol=1e-6), a, b)


@pytest.mark.parametrize("model", [name for name in MODELS if name != "normalised"])
def test_the_first_and_the_last_layer_that_a_model_names_are_there(model):
    net = names_of(model)
    params, state = net._shapes()
    shapes = prunable(params)
    assert {net.first, net.last} <= set(shapes) and shapes[net.last][-1] == 10
    assert (state is not None) == model.startswith(("resnet", "wide-resnet", "vgg", "wrn"))


@each_network
def test_training_uses_the_statistics_of_the_batch_and_returns_new_ones_and_evaluation_does_not(made_by):
    net = NETWORKS[made_by]()
    params, state = net.init(KEY)
    images = np.random.default_rng(1).normal(1, 3, (6, *net.image_shape)).astype(np.float32)
    _, after = net.apply(params, state, images, train=True, key=KEY)
    changed = jax.tree.map(lambda a, b: not np.array_equal(a, b), state, after)
    assert all(jax.tree.leaves(changed))
    logits, same = net.apply(params, state, images)
    assert same is state
    one = net.logits(params, state, images[:1])
    np.testing.assert_allclose(logits[:1], one, rtol=1e-3, atol=1e-5)  # no other image has a part in it


# Methods.


def batch(shape, examples=12):
    images = jax.random.randint(jax.random.key(9), (examples, *shape), 0, 256).astype(jnp.uint8)
    return {"image": images, "label": jnp.arange(examples) % CLASSES, "weight": jnp.ones(examples)}


def loss_of(net):
    numbers = net.image_shape[-1]
    return functools.partial(make_loss, net, (0.5,) * numbers, (0.25,) * numbers)


def made(name, net, weights, state):
    masks = Masks(method=name, density=0.3, distribution="erk" if name == "rigl" else "global", rounds=2)
    optim = changed(Config(), learning_rate=0.05).optim
    tx = make_optimizer(optim, lambda step: 0.05)
    seen = batch(net.image_shape)
    setup = Setup(masks, net, weights, state, jax.random.key(1), tx, loss_of(net), lambda n: seen, steps=8)
    return setup, METHODS[name].resolve()(setup)


@pytest.mark.slow
@each_network
@pytest.mark.parametrize("name", ["snip", "grasp", "synflow", "rigl"])
def test_methods_that_look_at_the_network_take_its_statistics_and_leave_its_scales_alone(name, made_by):
    net = NETWORKS[made_by]()
    weights, state = net.init(KEY)
    setup, method = made(name, net, weights, state)
    masks, shapes = by_path(method.subnet.scores), prunable(weights)
    assert set(masks) == set(shapes) and not any("norm" in path for path in masks)
    kept, total = (sum(int(mask.sum()) for mask in masks.values()), sum(mask.size for mask in masks.values()))
    assert kept == sm.keep_count(0.3, total) or (name == "rigl" and 0 <= kept - 0.3 * total <= len(masks))
    training = sm.init_state(method.subnet, setup.tx, KEY, state, learns="weights")
    if method.update:
        changed = method.update(method.update_every, training, batch(net.image_shape))
        after = by_path(changed.subnet.scores)
        assert {path: int(m.sum()) for path, m in after.items()} == {path: int(m.sum()) for path, m in masks.items()}
        assert any(not np.array_equal(after[path], masks[path]) for path in masks)
        jax.tree.map(np.testing.assert_array_equal, changed.model_state, state)


@each_network
def test_gradient_flow_takes_the_statistics_of_the_network(made_by):
    net = NETWORKS[made_by]()
    weights, state = net.init(KEY)
    masks = sm.random_masks(jax.random.key(1), weights, 0.3)
    params = jax.tree.map(lambda w, m: w if m is None else w * m, weights, masks)
    flow = make_flow(loss_of(net)(), batch(net.image_shape))
    assert 0 < flow(params, state, masks) < flow(params, state, sm.lottery.full_masks(weights)) < np.inf


@each_network
def test_sizes_and_flops_are_those_of_the_kept_weights_of_a_network_with_statistics(made_by):
    net = NETWORKS[made_by]()
    weights, state = net.init(KEY)
    masks = sm.random_masks(jax.random.key(1), weights, 0.3)
    some, whole = (sizes(net, weights, state, tree) for tree in (masks, sm.lottery.full_masks(weights)))
    scales = sum(leaf.size for path, leaf in by_path(weights).items() if not sm.is_kernel(path, leaf))
    assert whole["parameters"] == sum(leaf.size for leaf in jax.tree.leaves(weights)) and whole["density"] == 1
    assert some["parameters"] - scales == sum(layer["kept"] for layer in some["layers"].values())
    # Each weight of a convolution is used at most once for every pixel of what it makes: 8 x 8, 4 x 4 or 2 x 2.
    uses = {path: 16 if "stage_1" in path else 4 if "stage_2" in path else 64 for path in some["layers"]}
    uses["dense/kernel"] = 1
    for figures in (some, whole):
        most = 2 * sum(layer["kept"] * uses[path] for path, layer in figures["layers"].items())
        assert 0.7 * most < figures["flops"] <= most


def test_bfloat16_is_what_the_network_computes_in_and_nothing_else_is(small_model):
    """Weights, scores, gradients, batch statistics and logits are float32, and the masks are those of the scores."""
    usual, narrow = (
        network(Model("normalised", affine=True, bfloat16=narrow), Init(), CLASSES, SHAPE) for narrow in (False, True)
    )
    weights, state = usual.init(KEY)
    images = jax.random.normal(KEY, (BATCH, *SHAPE))
    logits, after = narrow.apply(weights, state, images, train=True, key=KEY)
    expected, _ = usual.apply(weights, state, images, train=True, key=KEY)
    assert {leaf.dtype for leaf in jax.tree.leaves((logits, after, narrow.init(KEY)))} == {np.dtype("float32")}
    assert 0 < float(jnp.abs(logits - expected).max()) < 0.02 * float(jnp.abs(expected).max())
    np.testing.assert_array_equal(logits, logits.astype(jnp.bfloat16), "they were computed in bfloat16")
    method = METHODS["edge-popup"].resolve()(Setup(Masks(), narrow, weights, state, KEY, None))
    loss = make_loss(narrow, (0.5, 0.5), (0.2, 0.2))
    batch = {"image": np.full((BATCH, *SHAPE), 90, np.uint8), "label": np.zeros(BATCH, np.int32)}
    batch |= {"weight": np.ones(BATCH, np.float32)}
    step = sm.make_train_step(method.mask_fn, loss, make_optimizer(Config().optim, lambda step: 0.1), learns="scores")
    begun = sm.init_state(method.subnet, make_optimizer(Config().optim, lambda step: 0.1), KEY, state, learns="scores")
    done, _ = step(begun, batch)
    floats = [leaf for leaf in jax.tree.leaves((done.subnet, done.opt_state, done.model_state)) if leaf.dtype != int]
    assert {leaf.dtype for leaf in floats if jnp.issubdtype(leaf.dtype, jnp.floating)} == {np.dtype("float32")}
    assert by_path(done.subnet.scores)["dense/kernel"].std() > 0


def test_a_run_in_bfloat16_is_evaluated_in_it_and_has_a_name_of_its_own(tmp_path):
    options = {"model": "lenet-300-100", "init": "signed-constant", "method": "edge-popup", "bfloat16": True}
    summary = fit(tmp_path / "run", **options)
    *_, about = sm.load_subnetwork(tmp_path / "run" / "subnetwork.safetensors")
    assert about["bfloat16"] is True and summary["config"]["bfloat16"] is True
    assert stored._network_of(about, dataset(), tmp_path).dtype == jnp.bfloat16
    assert stored._network_of({**about, "bfloat16": False}, dataset(), tmp_path).dtype == jnp.float32
    with pytest.raises(UserError, match=r"bfloat16 \(was True, now False\)"):
        fit(tmp_path / "run", **options | {"bfloat16": False})


@pytest.mark.parametrize("name", MODELS)
def test_what_the_recipes_take_for_granted_of_a_network(name):
    """One with the option affine has BatchNorm, and no other; those of dense layers have no convolution."""
    net = network(Model(name), Init(), 10, (28, 28, 1) if name == "convnet" else (32, 32, 3))
    assert ("affine" in MODELS[name].reads) == net.has_state
    assert (name in DENSE_LAYERS) == all(len(shape) == 2 for shape in net.prunable.values())
