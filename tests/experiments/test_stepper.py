"""Steppers: the order of the data is theirs, one call does many steps, and where images lie changes no bit."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import PIL.Image
import pytest

import supermask_jax as sm
from experiments.config.sections import Augment, Init, Model
from experiments.data.batches import alternate_flips, epoch_order
from experiments.data.folder import folder
from experiments.data.source import Arrays
from experiments.run.placement import Placement
from experiments.training import stepper
from experiments.training.loss import augmented, make_loss
from experiments.training.network import network
from experiments.training.stepper import Epochs, OnDevice, Order, Pmapped, Streamed, make_stepper, over, zero_totals
from experiments.training.summary import count_flips
from supermask_jax import methods, parallel
from supermask_jax.trees import leaf_key

KEY = jax.random.key(0)
SHAPE, CLASSES = (6, 5, 3), 4
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


@dataclasses.dataclass
class Progress:
    state: sm.TrainState
    totals: dict
    seconds: float = 0.0

    def _replace(self, **changes):
        return dataclasses.replace(self, **changes)


def images(examples, seed=0):
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (examples, *SHAPE)).astype(np.uint8)
    return Arrays(pixels, np.arange(examples, dtype=np.int32) % CLASSES)


@functools.cache
def drawn():
    net = network(Model(model="mlp", width=8), Init(), CLASSES, SHAPE)
    return net, net.init(KEY)[0]


@functools.cache
def method_of(name):
    _, weights = drawn()
    if name == "edge-popup":
        return methods.edge_popup(jax.random.key(1), weights, 0.3)
    return methods.fixed(weights, sm.jit(lambda key: sm.random_masks(key, weights, 0.3))(jax.random.key(1)))


def made(name="fixed", learning_rate=0.1, axis_name=None):
    """(the method, a train step, the state before it) of a small network: fixed masks, or edge-popup."""
    net, method = drawn()[0], method_of(name)
    loss_fn, tx = make_loss(net, MEAN, STD, Augment(shift=1), axis_name=axis_name), optax.sgd(learning_rate, 0.9)
    if axis_name:
        step = parallel.pmap_step(method.mask_fn, loss_fn, tx, devices=1, donate=True, learns=method.learns)
    else:
        step = sm.make_train_step(method.mask_fn, loss_fn, tx, learns=method.learns)
    subnet = jax.tree.map(jnp.copy, method.subnet)  # a stepper gives the state away
    return method, step, sm.init_state(subnet, tx, jax.random.key(2), learns=method.learns)


def assert_equal(a, b):
    jax.tree.map(
        np.testing.assert_array_equal, *(state._replace(key=jax.random.key_data(state.key)) for state in (a, b))
    )


# Epochs.


def test_epochs_count_the_steps_and_the_examples_that_they_see():
    assert [Epochs(n, 16).steps for n in (1, 16, 17, 50)] == [1, 1, 2, 4] and Epochs(50, 16).seen == 50
    whole = Epochs(50, 16, drop_remainder=True)
    assert (whole.steps, whole.seen, Epochs(15, 16, drop_remainder=True).steps) == (3, 48, 0)


@pytest.mark.parametrize("drop_remainder", [False, True])
def test_the_order_of_an_epoch_is_that_of_the_batches(drop_remainder):
    epochs = Epochs(50, 16, drop_remainder)
    got, expected = epochs.order(KEY, 3), epoch_order(KEY, 3, 50, 16, drop_remainder)
    assert len(got[0]) == epochs.steps and got[1].sum() == epochs.seen
    jax.tree.map(np.testing.assert_array_equal, got, Order(*expected))


# Steps.


@pytest.mark.slow
@pytest.mark.parametrize("steps_per_call", (4, 25))
def test_many_steps_per_call_do_what_single_calls_do(steps_per_call):
    source, order = images(320), epoch_order(KEY, 0, 320, 32)

    def after(steps):
        method, step, state = made("edge-popup")
        advance = OnDevice(step, "scores", source, steps_per_call=steps)
        state, totals, seconds, batch = advance(state, zero_totals(), order, 0, 10)
        assert seconds > 0 and advance.compile_seconds > 0
        np.testing.assert_array_equal(batch["image"], source.images[order[0][9]])
        return method, state, totals, advance

    (method, one, totals_one, _), (_, many, totals_many, advance) = after(1), after(steps_per_call)
    assert int(one.step) == int(many.step) == 10
    assert len(advance._compiled) == (2 if steps_per_call == 4 else 1)
    assert totals_one["count"] == totals_many["count"] == 320
    np.testing.assert_allclose(totals_one["loss"], totals_many["loss"], rtol=1e-5)
    masks = [method.mask_fn(state.subnet.scores, None) for state in (one, many)]
    assert sum(count_flips(*masks).values()) <= 5


def test_the_backend_says_how_many_steps_a_call_does_but_for_networks_without_convolutions(monkeypatch):
    _, step, _ = made()
    assert OnDevice(step, "weights", images(8)).steps_per_call == stepper.STEPS_PER_CALL.get(jax.default_backend(), 100)
    monkeypatch.setitem(stepper.STEPS_PER_CALL, jax.default_backend(), 7)
    assert OnDevice(step, "weights", images(8)).steps_per_call == 7
    assert stepper.steps_per_call({"a": {"kernel": jnp.ones((3, 3))}}) == stepper.STEPS_PER_CALL_DENSE
    assert stepper.steps_per_call({"a": {"kernel": jnp.ones((3, 3, 1, 2))}, "b": {"kernel": jnp.ones((3, 3))}}) is None


@pytest.mark.parametrize("steps_per_call", [1, 3])
def test_two_epochs_in_parts_are_two_epochs_at_once_and_compile_nothing_new(steps_per_call):
    source, epochs = images(70), Epochs(70, 16)  # the last batch of an epoch is padded

    def after(*stops):
        _, step, state = made()
        run = OnDevice(step, "weights", source, steps_per_call=steps_per_call)
        progress, advance, batches = Progress(state, zero_totals()), over(run, epochs, KEY), []
        for start, stop in zip((0, *stops), stops, strict=False):
            progress, batch = advance(progress, start, stop)
            batches.append(batch)
        return progress, batches, run

    whole, [batch], _ = after(10)
    parts, batches, run = after(1, 3, 5, 8, 10)
    assert_equal(whole.state, parts.state)
    assert whole.totals["count"] == 140 and len(run._compiled) <= 2  # lengths of a call
    for step, got in zip((0, 2, 4, 7, 9), batches, strict=True):
        indices, weights = (part[step % 5] for part in epochs.order(KEY, step // 5)[:2])
        expected = {"image": source.images[indices], "label": source.labels[indices], "weight": weights}
        jax.tree.map(np.testing.assert_array_equal, got, expected)  # the very batch that the last step used
    assert batches[2]["weight"].tolist() == [1] * 6 + [0] * 10
    jax.tree.map(np.testing.assert_array_equal, batch, batches[-1])


# Flips that alternate.


def flipping(axis_name=None):
    """A step that counts, in "correct", the images that its loss sees mirrored; of images that grow from left to right.

    What learns has a gradient that depends on every pixel.
    """
    augment, tx = Augment(flip_alternately=True, shift=1, flip=True), optax.sgd(0.1)

    def loss_fn(params, model_state, batch, key):
        seen = augmented(key, batch, augment).astype(jnp.float32)
        mirrored = jnp.sum(seen[:, :, 1] > seen[:, :, -2], axis=(1, 2)) > 0
        loss = parallel.weighted_mean(jnp.mean(seen, axis=(1, 2, 3)) * params["w"][0], batch["weight"], axis_name)
        sums = {"correct": jnp.sum(mirrored * batch["weight"]), "count": jnp.sum(batch["weight"])}
        return loss, (model_state, sums)

    weights = {"w": jnp.ones(1)}
    subnet = sm.Subnet(weights, {"w": jnp.ones(1)})
    state = sm.init_state(subnet, tx, jax.random.key(2), learns="weights")
    if axis_name:
        return parallel.pmap_step(sm.identity, loss_fn, tx, devices=1, donate=True, learns="weights"), state
    return sm.make_train_step(sm.identity, loss_fn, tx, learns="weights"), state


class Growing(Arrays):
    """Arrays whose pixels grow from left to right."""

    def __init__(self, examples):
        row = np.arange(1, SHAPE[1] + 1, dtype=np.uint8)[:, None]
        super().__init__(np.broadcast_to(row, (examples, *SHAPE)).copy(), np.zeros(examples, np.int32))


def mirrored_in_epochs(run, state, placement, epochs, count):
    """How many images were seen mirrored, in each epoch."""
    progress = Progress(placement.place(state), placement.replicate(zero_totals()))
    advance, seen = over(run, epochs, KEY), [0]
    for epoch in range(count):
        progress, batch = advance(progress, epoch * epochs.steps, (epoch + 1) * epochs.steps)
        assert batch["flipped"].dtype == bool
        seen.append(int(progress.totals["correct"]))
    return np.diff(seen).tolist()


@pytest.mark.parametrize("kind", ["on device", "3 steps a call", "streamed", "pmap"])
def test_flips_alternate_wherever_images_lie(kind):
    source, epochs, placement = Growing(44), Epochs(44, 8, alternate=True), Placement()
    step, state = flipping(parallel.AXIS if kind == "pmap" else None)
    runs = {"streamed": Streamed, "pmap": Pmapped}
    if kind in runs:
        run = runs[kind](step, "weights", source, placement)
    else:
        run = OnDevice(step, "weights", source, placement, 3 if kind.startswith("3") else 1)
    first = int(alternate_flips(leaf_key(KEY, "flipped"), 0, 44).sum())
    assert 0 < first < 44
    assert mirrored_in_epochs(run, state, placement, epochs, 3) == [first, 44 - first, first]


def test_every_image_has_its_own_flip_whatever_the_order_and_resuming_changes_nothing():
    epochs = Epochs(50, 16, alternate=True)
    flips = []
    for epoch in range(3):
        indices, weights, flipped, draws = epochs.order(KEY, epoch)
        assert draws is None
        of = {
            int(index): bool(flip)
            for index, weight, flip in zip(*map(np.ravel, (indices, weights, flipped)), strict=True)
            if weight
        }
        flips.append([of[index] for index in range(50)])
    assert flips[0] == flips[2] == [not flip for flip in flips[1]]
    plain = Epochs(50, 16).order(KEY, 1)[:2]
    jax.tree.map(np.testing.assert_array_equal, epochs.order(KEY, 1)[:2], plain)  # the order is what it was without

    def after(*stops):
        step, state = flipping()
        run = OnDevice(step, "weights", Growing(50), steps_per_call=1)
        progress, advance = Progress(state, zero_totals()), None
        for start, stop in zip((0, *stops), stops, strict=False):
            advance = over(run, epochs, KEY)  # as a run that resumes makes it anew
            progress, _ = advance(progress, start, stop)
        return progress

    whole, parts = after(8), after(1, 5, 6, 8)
    assert_equal(whole.state, parts.state)
    assert whole.totals["correct"] == parts.totals["correct"]


def test_an_order_has_flips_only_where_they_are_asked_for():
    assert Epochs(50, 16).order(KEY, 0)[2:] == (None, None)
    assert set(stepper._read(images(50), Epochs(50, 16).order(KEY, 0), 0)) == {"image", "label", "weight"}


# Where the images lie.


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A directory of images in class folders: 44 to train on, 8 to test on."""
    root = tmp_path_factory.mktemp("pictures")
    for split, examples in (("train", 44), ("test", 8)):
        source = images(examples, seed=len(split))
        for n, (pixels, label) in enumerate(zip(source.images, source.labels, strict=True)):
            file = root / split / f"class {label}" / f"{n:02}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            PIL.Image.fromarray(pixels).save(file)
    return root


def test_streamed_images_and_images_on_the_device_give_the_same_bits(pictures):
    epochs, ends = Epochs(44, 8), []
    for stream in (False, True):
        source = folder(pictures, stream=stream).train
        _, step, state = made()
        run = make_stepper(step, "weights", source, Placement(), steps_per_call=1)
        assert type(run) is (Streamed if stream else OnDevice)
        advance, progress = over(run, epochs, KEY), Progress(state, zero_totals())
        for start, stop in ((0, 1), (1, 9), (9, 12)):
            progress, batch = advance(progress, start, stop)
        assert progress.seconds > 0 and run.compile_seconds > 0
        ends.append((progress, batch))
    (on_device, batch), (streamed, same) = ends
    assert_equal(on_device.state, streamed.state)
    jax.tree.map(np.testing.assert_array_equal, (on_device.totals, batch), (streamed.totals, same))
    assert int(streamed.state.step) == 12 and streamed.totals["count"] == 88


def test_under_pmap_images_are_read_ahead_from_disk_with_the_same_bits(pictures):
    epochs, ends = Epochs(44, 8), []
    for stream in (False, True):
        _, step, state = made(axis_name=parallel.AXIS)
        placement = Placement()
        run = Pmapped(step, "weights", folder(pictures, stream=stream).train, placement)
        progress = Progress(placement.place(state), placement.replicate(zero_totals()))
        advance = over(run, epochs, KEY)
        for start, stop in ((0, 1), (1, 9)):
            progress, batch = advance(progress, start, stop)
        assert (run._shares._batches is not None) is stream
        ends.append((progress.totals, batch))
        assert int(progress.state.step) == 9
    jax.tree.map(np.testing.assert_array_equal, *ends)


def test_a_streamed_source_is_read_once_for_every_step_in_order_and_ahead():
    class Noting(Arrays):
        read_at = ()

        def read(self, indices, draws=None):
            self.read_at = (*self.read_at, tuple(indices))
            return super().read(indices)

    plain = images(40)
    source, order = Noting(plain.images, plain.labels), epoch_order(KEY, 0, 40, 4)
    _, step, state = made()
    run = Streamed(step, "weights", source, Placement())
    state, totals, *_ = run(state, zero_totals(), order, 2, 4)
    run(state, totals, order, 4, 8)
    expected = tuple(tuple(indices) for indices in order[0][2:10])
    assert len(source.read_at) >= 6 and source.read_at == expected[: len(source.read_at)]
    assert run._compiled is not None and 0 < stepper.Shares.AHEAD < 9


def test_reading_ahead_ends_with_the_epoch(monkeypatch):
    ended, ahead = [], stepper.batches_ahead

    def noting(*arguments):
        try:
            yield from ahead(*arguments)
        finally:
            ended.append(len(arguments))

    monkeypatch.setattr(stepper, "batches_ahead", noting)
    shares = stepper.Shares(images(12))
    for epoch in (1, 2):
        order = epoch_order(KEY, epoch, 12, 4)
        for at in range(3):
            assert len(ended) == epoch - 1
            shares.read(order, at)
    assert len(ended) == 2


def test_what_fails_to_be_read_is_raised_where_the_steps_are_asked_for():
    class Broken(Arrays):
        def read(self, indices, draws=None):
            raise OSError("this file is gone")

    plain = images(8)
    _, step, state = made()
    with pytest.raises(OSError, match="this file is gone"):
        Streamed(step, "weights", Broken(plain.images, plain.labels), Placement())(
            state, zero_totals(), epoch_order(KEY, 0, 8, 4), 0, 2
        )


@pytest.mark.slow
def test_under_pmap_one_device_takes_the_same_steps():
    source, order, placement = images(70), epoch_order(KEY, 0, 70, 16), Placement()
    _, step, state = made()
    expected, totals, *_ = OnDevice(step, "weights", source, placement, 1)(state, zero_totals(), order, 0, 5)
    _, step, state = made(axis_name=parallel.AXIS)
    run = Pmapped(step, "weights", source, placement)
    state = placement.place(state)
    got, sums, seconds, batch = run(state, placement.replicate(zero_totals()), order, 0, 5)
    assert sums["count"] == totals["count"] == 70 and seconds > 0 and run.compile_seconds > 0
    np.testing.assert_array_equal(batch["weight"], order[1][4])
    # Other draws: the key of the shifts is that of the device.
    np.testing.assert_allclose(sums["loss"], totals["loss"], rtol=0.1)
    assert int(got.step) == int(expected.step) == 5


# What is not finite.


def test_the_first_step_that_is_not_finite_is_the_one_that_is_named():
    _, step, state = made(learning_rate=lambda step: jnp.where(step == 6, jnp.inf, 0.1))
    order = epoch_order(KEY, 0, 160, 16)
    _, totals, *_ = OnDevice(step, "weights", images(160))(state, zero_totals(), order, 0, 10)
    assert int(totals["bad_step"]) == 6


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf, -jnp.inf])
def test_finite_means_every_number(value):
    tree = {"a": jnp.ones((3, 3)), "b": None, "c": jnp.zeros(4)}
    assert stepper.first_not_finite(tree) == -1
    assert stepper.first_not_finite({**tree, "c": jnp.zeros(4).at[2].set(value)}) == 1
    assert stepper.first_not_finite({**tree, "a": jnp.full((3, 3), value), "c": jnp.full(4, value)}) == 0


def test_totals_are_sums_over_the_examples_of_all_steps():
    totals, learner = zero_totals(), {"a": jnp.ones(2)}
    for at, (loss, correct, count) in enumerate([(2.0, 3.0, 8.0), (1.0, 4.0, 4.0)]):
        totals = stepper.add_to_totals(totals, {"loss": loss, "correct": correct, "count": count}, learner, at)
    got = {name: float(value) for name, value in totals.items()}
    assert got == {"loss": 20.0, "correct": 7.0, "count": 12.0, "bad_step": -1.0, "bad_leaf": -1.0}
