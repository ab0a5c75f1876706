"""Tasks that differ in the order of the pixels, and a network that reads the pixels of a task in its order."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from experiments.training.network import Network
from supermask_jax.draws import bits
from supermask_jax.trees import Tree, leaf_key


def permutation(key: jax.Array, task: int, pixels: int) -> np.ndarray:
    """int32 [pixels]: where each pixel of a task comes from; a function of key, task and size. Task 0 is unpermuted."""
    if task == 0:
        return np.arange(pixels, dtype=np.int32)
    own = jax.random.fold_in(leaf_key(key, "permutation"), task)
    # Of bits that no setting and no version of JAX moves: masks are of no use with other permutations.
    return np.argsort(np.asarray(bits(own, (pixels,))), kind="stable").astype(np.int32)


def permuted(images: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Images [n, h, w, c] of a task whose permutation is `order`, int32 [h * w * c]."""
    return images.reshape(len(images), -1)[:, order].reshape(images.shape)


class PermutedNetwork(Network):
    """A network whose model state is a permutation of the pixels: a task is an argument, and compiles nothing."""

    def apply(
        self, params: Tree, state: jax.Array, images: jax.Array, *, train: bool = False, key: jax.Array | None = None
    ) -> tuple[jax.Array, Tree]:
        """(logits, state) of normalised images [n, h, w, c], whose pixels are read in the order `state`."""
        pixels = jnp.take(images.reshape(len(images), -1), state, axis=1).reshape(images.shape)
        logits, _ = super().apply(params, None, pixels, train=train, key=key)
        return logits, state


def for_tasks(network: Network) -> PermutedNetwork:
    """The same network as one that takes a permutation as its model state."""
    return PermutedNetwork(**{field.name: getattr(network, field.name) for field in dataclasses.fields(network)})
