"""Which examples go where: the order of an epoch, the evaluation split, a sample of each class, batches of a set."""

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

from experiments.data.source import Dataset, Source
from experiments.run.errors import DataError

if TYPE_CHECKING:
    import jax


def epoch_order(
    key: "jax.Array", epoch: int, examples: int, batch_size: int, drop_remainder: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Which examples each step of an epoch sees: int32 [steps, batch] indices and float32 [steps, batch] weights.

    Each epoch has a new permutation, a function of (key, epoch) only. Weights are 1. The last batch is padded with
    index 0 and weight 0 or, with `drop_remainder`, left out if it is incomplete: then each epoch leaves out other
    examples. Raises DataError if that leaves no batch.
    """
    import jax

    if drop_remainder and examples < batch_size:
        raise DataError(f"a batch of {batch_size} needs as many training images, and there are {examples}")
    order = np.asarray(jax.random.permutation(jax.random.fold_in(key, epoch), examples), np.int32)
    if drop_remainder:
        order = order[: examples - examples % batch_size].reshape(-1, batch_size)
        return order, np.ones(order.shape, np.float32)
    return in_batches(order, batch_size), in_batches(np.ones(examples, np.float32), batch_size)


def alternate_flips(key: "jax.Array", epoch: int, examples: int) -> np.ndarray:
    """Whether each example is mirrored in an epoch, bool [examples]: half of them at random in epoch 0, then by turns.

    A function of (key, epoch) only. Source: Jordan 2024, "94% on CIFAR-10 in 3.29 seconds on a single GPU".
    """
    import jax

    first = np.asarray(jax.random.bernoulli(key, shape=(examples,)))
    return first ^ bool(epoch % 2)


def in_batches(array: np.ndarray, size: int) -> np.ndarray:
    """An array [n, ...] as [batches, size, ...], the last batch padded with zeros."""
    rest = np.zeros((-len(array) % size, *array.shape[1:]), array.dtype)
    return np.concatenate([array, rest]).reshape(-1, size, *array.shape[1:])


def hold_out(dataset: Dataset, count: int) -> tuple[Dataset, Source]:
    """(`dataset` without `count` of its training images, these held-out images), for an evaluation split.

    They are always the same images, spread evenly over the classes and within each class over the training set. What
    is known of the whole training set stays as it is: `mean`, `std`, `fingerprint`. Raises DataError unless
    0 <= count < number of training images.
    """
    n = len(dataset.train)
    if not 0 <= count < n:
        raise DataError(f"cannot hold out {count} of {n} training images (--validation); 0 to {n - 1} are possible")
    if not count:  # no labels are needed
        return dataset, dataset.train.take(np.arange(0))
    # Even steps through the images sorted by class. Even steps through the set as it is can hold out something
    # special: one class of mnist-5k, where classes come in turn; in MNIST every second image is drawn fainter.
    steps = (2 * np.arange(count) + 1) * n // (2 * count)
    chosen = np.isin(np.arange(n), np.argsort(dataset.train.labels, kind="stable")[steps])
    rest = dataclasses.replace(dataset, train=dataset.train.take(np.flatnonzero(~chosen)))
    return rest, dataset.train.take(np.flatnonzero(chosen))


def class_sample(
    source: Source, classes: int, key: "jax.Array", per_class: int, most: int | None = None
) -> dict[str, np.ndarray]:
    """A batch {"image", "label", "weight"} of `per_class` random examples of each class, in the order of the classes.

    A class that has fewer examples gives all it has. The weights are 1. Of more than `most` examples, as many at even
    distances are taken.
    """
    import jax

    order = np.asarray(jax.random.permutation(key, len(source)))
    labels = source.labels[order]
    chosen = np.concatenate([order[labels == c][:per_class] for c in range(classes)])
    if most and len(chosen) > most:
        chosen = chosen[np.arange(most) * len(chosen) // most]
    return {**source.read(chosen), "weight": np.ones(len(chosen), np.float32)}
