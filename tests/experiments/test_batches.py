"""Which images go where: epochs, the evaluation split, samples, batches; and what becomes of them on the device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.data import load as data
from experiments.data.augment import flip_where, normalise, random_cutout, random_flip, random_shift
from experiments.data.batches import alternate_flips, class_sample, epoch_order, hold_out, in_batches
from experiments.data.source import Arrays, Dataset, arrays_dataset
from experiments.run.errors import DataError

KEY = jax.random.key(0)


def pixels(images):
    """A sorted list of images, for comparing sets whatever their order."""
    return sorted(image.tobytes() for image in images)


def numbered(labels):
    """A source in which each image shows its position."""
    n = len(labels)
    return Arrays(np.arange(n).astype(">u2").view(np.uint8).reshape(n, 2, 1, 1), labels)


def positions(images):
    return images.reshape(-1, 2).copy().view(">u2")[:, 0].astype(int)


# The order of an epoch.


def test_an_epoch_sees_every_image_once_and_pads_with_weight_0():
    indices, weights = epoch_order(KEY, 0, examples=103, batch_size=10)
    assert indices.shape == weights.shape == (11, 10)
    assert indices.dtype == np.int32 and weights.dtype == np.float32
    assert sorted(indices[weights == 1]) == list(range(103))
    assert indices[-1, 3:].tolist() == weights[-1, 3:].tolist() == [0] * 7
    assert weights.sum() == 103


def test_the_order_is_the_permutation_of_key_and_epoch():
    expected = jax.random.permutation(jax.random.fold_in(KEY, 3), 103)
    for drop, count in ((False, 103), (True, 100)):
        indices, weights = epoch_order(KEY, 3, 103, 10, drop)
        np.testing.assert_array_equal(indices[weights == 1], expected[:count])


def test_the_order_depends_on_key_and_epoch_only():
    first = epoch_order(KEY, 3, 103, 10)[0]
    np.testing.assert_array_equal(first, epoch_order(KEY, 3, 103, 10)[0])
    assert not np.array_equal(first, epoch_order(KEY, 4, 103, 10)[0])
    assert not np.array_equal(first, epoch_order(jax.random.key(1), 3, 103, 10)[0])


@pytest.mark.parametrize(("examples", "steps"), [(103, 10), (100, 10), (10, 1)])
def test_without_the_remainder_all_batches_are_whole(examples, steps):
    indices, weights = epoch_order(KEY, 0, examples, 10, drop_remainder=True)
    assert indices.shape == (steps, 10) and indices.dtype == np.int32
    np.testing.assert_array_equal(weights, np.ones((steps, 10), np.float32), strict=True)
    assert len(set(indices.ravel().tolist())) == steps * 10


def test_another_remainder_is_left_out_in_each_epoch():
    left_out = {tuple({*range(13)} - {*epoch_order(KEY, epoch, 13, 10, True)[0].ravel()}) for epoch in range(4)}
    assert len(left_out) > 1


def test_a_batch_larger_than_the_set_cannot_be_whole():
    with pytest.raises(DataError, match="a batch of 10 needs as many training images, and there are 9"):
        epoch_order(KEY, 0, 9, 10, drop_remainder=True)
    assert epoch_order(KEY, 0, 9, 10)[1].sum() == 9


def test_padding_fills_the_last_batch_and_nothing_else():
    part = np.arange(1, 302, dtype=np.int32)
    batches = in_batches(part, 250)
    assert batches.shape == (2, 250) and batches.dtype == np.int32
    np.testing.assert_array_equal(batches.ravel(), [*part, *[0] * 199])
    np.testing.assert_array_equal(in_batches(part[:250], 250), part[None, :250])
    assert in_batches(np.zeros((7, 2, 3, 1), np.uint8), 5).shape == (2, 5, 2, 3, 1)


# Holding out.


@pytest.mark.parametrize("count", [1, 10, 400, 401, 3999])
def test_hold_out_is_balanced_fixed_and_disjoint(count):
    whole = data.load("mnist-5k")
    rest, split = hold_out(whole, count)
    assert len(split) == len(split.labels) == count and len(rest.train) == 4000 - count
    assert split.images.shape[1:] == (28, 28, 1)
    assert np.ptp(np.bincount(split.labels, minlength=10)) <= 1
    assert pixels([*split.images, *rest.train.images]) == pixels(whole.train.images)
    assert rest.test is whole.test and (rest.name, rest.fingerprint) == (whole.name, whole.fingerprint)
    assert (rest.mean, rest.std) == (whole.mean, whole.std)
    np.testing.assert_array_equal(split.images, hold_out(whole, count)[1].images)


def spread(n=1000):
    source = numbered(np.random.default_rng(0).permutation(n) % 10)
    return Dataset("x", source, source, 10, (2, 1, 1), (0.0,), (1.0,), "", "")


def test_hold_out_is_spread_over_the_set_and_keeps_labels_with_images():
    whole = spread()
    rest, split = hold_out(whole, 100)
    chosen, kept = positions(split.images), positions(rest.train.images)
    assert (np.diff(chosen) > 0).all() and (np.diff(kept) > 0).all()  # in the order of the set
    np.testing.assert_array_equal(split.labels, whole.train.labels[chosen])
    np.testing.assert_array_equal(rest.train.labels, whole.train.labels[kept])
    assert abs(np.bincount(chosen // 200) - 20).max() <= 4


def test_hold_out_takes_the_same_images_as_ever():
    # As they came out when this was written: a run that is resumed must not train on what it is evaluated on.
    expected = [13, 16, 17, 28, 43, 44, 45]
    labels = np.array([n * n % 7 for n in range(60)])
    source = numbered(labels)
    whole = Dataset("x", source, source, 7, (2, 1, 1), (0.0,), (1.0,), "", "")
    assert positions(hold_out(whole, 7)[1].images).tolist() == expected


def test_hold_out_of_nothing_changes_nothing():
    whole = data.load("mnist-5k")
    rest, split = hold_out(whole, 0)
    assert split.images.shape == (0, 28, 28, 1) and split.labels.shape == (0,)
    np.testing.assert_array_equal(rest.train.images, whole.train.images)


@pytest.mark.parametrize("count", [-1, 4000, 60000])
def test_hold_out_leaves_something_to_train_on(count):
    with pytest.raises(DataError, match="0 to 3999"):
        hold_out(data.load("mnist-5k"), count)


def test_hold_out_takes_no_special_part_of_real_mnist(data_dir):
    split = hold_out(data.load("mnist", data_dir), 10_000)[1]
    assert split.images.mean() / 255 == pytest.approx(0.1307, abs=1e-3)  # 0.123 of every sixth image


# The sample of the training images that saliencies and gradient flow see.


def uneven(counts):
    """A source with so many images of each class, mixed."""
    labels = np.repeat(np.arange(10, dtype=np.int32), counts)
    return numbered(np.random.default_rng(0).permutation(labels))


def test_a_sample_holds_so_many_of_each_class_in_the_order_of_the_classes():
    source = uneven([20, 9, 3, 20, 20, 20, 20, 20, 20, 0])
    batch = class_sample(source, 10, KEY, 9)
    counts = [9, 9, 3, 9, 9, 9, 9, 9, 9, 0]  # all there are, where they are fewer
    np.testing.assert_array_equal(batch["label"], np.repeat(np.arange(10), counts))
    which = positions(batch["image"])
    assert batch["image"].dtype == np.uint8 and batch["image"].shape == (sum(counts), 2, 1, 1)
    np.testing.assert_array_equal(source.labels[which], batch["label"])  # each image with its own label
    assert len(set(which.tolist())) == len(which)  # and none twice
    np.testing.assert_array_equal(batch["weight"], np.ones(sum(counts), np.float32), strict=True)


def test_the_sample_is_the_first_of_each_class_in_the_permutation_of_the_key():
    source = uneven([20] * 10)
    order = np.asarray(jax.random.permutation(KEY, 200)).tolist()
    expected = [n for c in range(10) for n in [n for n in order if source.labels[n] == c][:4]]
    assert positions(class_sample(source, 10, KEY, 4)["image"]).tolist() == expected


def test_the_key_decides_which_images_are_in_a_sample():
    source = uneven([20] * 10)
    one, again, other = (positions(class_sample(source, 10, jax.random.key(s), 5)["image"]) for s in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert set(one.tolist()) != set(other.tolist())
    wider = positions(class_sample(source, 10, jax.random.key(1), 8)["image"])
    assert set(one.tolist()) < set(wider.tolist())


# On the device.


def test_each_image_moves_by_its_own_whole_pixels_and_background_moves_in():
    image = jnp.zeros((9, 9, 1), jnp.uint8).at[3:6, 4:6].set(jnp.arange(1, 7, dtype=jnp.uint8).reshape(3, 2, 1))
    moved = np.asarray(random_shift(jax.random.key(0), jnp.stack([image] * 400), 2))
    assert moved.shape == (400, 9, 9, 1) and moved.dtype == np.uint8
    corners = [tuple(np.argwhere(m[..., 0] == 1)[0]) for m in moved]
    assert set(corners) == {(y, x) for y in range(1, 6) for x in range(2, 7)}  # all 25 moves, and no other
    for m, (y, x) in zip(moved, corners, strict=True):
        np.testing.assert_array_equal(m[y : y + 3, x : x + 2], image[3:6, 4:6])
        assert m.sum() == 21


@pytest.mark.parametrize("white", [255, 1])
def test_one_channel_is_normalised_by_plain_numbers_to_the_last_bit(white):
    images = np.random.default_rng(0).integers(0, 256, (5, 3, 4, 1), np.uint8)

    def plain(images):
        return (images.astype(jnp.float32) / white - 0.1307) / 0.3081

    def by_channel(images):
        return normalise(images, (0.1307,), (0.3081,), white)

    np.testing.assert_array_equal(jax.jit(by_channel)(images), jax.jit(plain)(images), strict=True)
    assert str(jax.make_jaxpr(by_channel)(images)) == str(jax.make_jaxpr(plain)(images))  # the same program


@pytest.mark.parametrize("shape", [(5, 3, 4, 3), (3, 4, 3), (2, 5, 3, 4, 3)])
def test_each_channel_is_normalised_by_its_own_numbers(shape):
    images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    mean, std = (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)
    got = normalise(jnp.asarray(images), mean, std)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, (images / 255 - np.array(mean)) / np.array(std), rtol=1e-5, atol=1e-6)


def test_a_normalised_training_set_has_mean_0_and_deviation_1_in_each_channel():
    images = np.random.default_rng(0).integers(0, 256, (50, 6, 6, 3), np.uint8) // np.array([1, 2, 3], np.uint8)
    whole = arrays_dataset("x", (images, np.zeros(50), images, np.zeros(50)), "made up")
    got = np.asarray(normalise(jnp.asarray(whole.train.images), whole.mean, whole.std))
    np.testing.assert_allclose(got.mean((0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(got.std((0, 1, 2)), 1, rtol=1e-5)


def test_a_mirrored_border_moves_in_where_it_is_asked_for():
    image = jnp.arange(1, 26).reshape(5, 5, 1).astype(jnp.uint8)
    moved = np.asarray(random_shift(jax.random.key(0), jnp.stack([image] * 200), 2, "reflect"))
    assert moved.min() > 0 and len(np.unique(moved, axis=0)) == 25
    wide = np.pad(np.asarray(image[..., 0]), 2, mode="reflect")
    windows = {wide[i : i + 5, j : j + 5].tobytes() for i in range(5) for j in range(5)}
    assert {one[..., 0].tobytes() for one in moved} == windows


def test_half_of_the_images_are_mirrored_and_the_others_are_as_they_were():
    images = jnp.asarray(np.random.default_rng(0).integers(0, 256, (400, 3, 4, 2)), jnp.uint8)
    flipped = np.asarray(random_flip(jax.random.key(0), images))
    same = (flipped == images).all(axis=(1, 2, 3))
    mirrored = (flipped == images[:, :, ::-1]).all(axis=(1, 2, 3))
    assert (same ^ mirrored).all() and 0.4 < mirrored.mean() < 0.6 and flipped.dtype == np.uint8


def test_images_are_mirrored_where_it_is_said():
    images = jnp.arange(24).reshape(3, 2, 4, 1).astype(jnp.uint8)
    got = np.asarray(flip_where(images, jnp.array([True, False, True])))
    np.testing.assert_array_equal(got, [images[0][:, ::-1], images[1], images[2][:, ::-1]], strict=True)


def test_flips_alternate_from_a_random_half_of_the_first_epoch():
    key = jax.random.key(3)
    epochs = [alternate_flips(key, epoch, 1000) for epoch in range(5)]
    assert epochs[0].dtype == bool and 0.45 < epochs[0].mean() < 0.55
    for epoch, flipped in enumerate(epochs):
        np.testing.assert_array_equal(flipped, epochs[0] if epoch % 2 == 0 else ~epochs[0])
    assert (alternate_flips(jax.random.key(4), 0, 1000) != epochs[0]).mean() > 0.4


def test_cutout_sets_a_square_around_any_pixel_to_black():
    images = jnp.full((300, 8, 10, 3), 7, jnp.uint8)
    cut = np.asarray(random_cutout(jax.random.key(0), images, 4)) == 0
    assert (cut.all(axis=3) == cut.any(axis=3)).all()
    rows, columns = cut[..., 0].any(axis=2).sum(axis=1), cut[..., 0].any(axis=1).sum(axis=1)
    assert (cut[..., 0].sum(axis=(1, 2)) == rows * columns).all()
    assert rows.max() == columns.max() == 4 and rows.min() == columns.min() == 2, "part of it may lie outside"
    assert cut[..., 0].any(axis=0).all()
