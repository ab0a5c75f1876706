"""Which task an image belongs to, inferred from the superposition of all masks (Wortsman et al. 2020, section 3.3).

The superposed network has the weights w * sum_k alpha_k * m_k. If the entropy of its outputs falls as alpha_k grows,
the mask m_k makes the network more certain of this image. The task with the steepest fall is the inferred one.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import supermask_jax as sm
from experiments.data.batches import in_batches
from supermask_jax.trees import Tree, by_path, map_with_name

MASKS_AT_ONCE = 50
GROUPS_AT_ONCE = 50
HIGHEST = jax.lax.Precision.HIGHEST

Logits = Callable[[Tree, jax.Array], jax.Array]
"""logits(params, images [n, ...]) -> [n, outputs]."""


def pack(masks: Tree) -> np.ndarray:
    """uint8 [bytes]: the masks of one task, 8 weights a byte, leaf after leaf in the tree's order."""
    return np.packbits(np.concatenate([np.asarray(mask).ravel() != 0 for mask in by_path(masks).values()]))


def unpack(packed: np.ndarray, weights: Tree) -> Tree:
    """uint8 masks for the prunable leaves of `weights`, None at the others: the inverse of `pack`."""
    parts = _split(np.unpackbits(packed), sm.trees.prunable(weights))
    return map_with_name(lambda path, leaf: parts.get(path), weights)


def packed_bytes(weights: Tree) -> int:
    """The bytes of one task's packed masks."""
    return -(-sum(math.prod(shape) for shape in sm.trees.prunable(weights).values()) // 8)


class Superposition:
    """A network under sums of masks, whose coefficients differ from image to image.

    Masks are packed as by `pack`, [tasks, bytes]. Nothing is compiled anew for another number of tasks.

    Args:
      logits: the network, without masks.
      weights: every parameter.
      temperature: what the logits are divided by in the entropy.
      pause: called now and then while it computes; it may raise.
    """

    def __init__(
        self, logits: Logits, weights: Tree, temperature: float = 1.0, pause: Callable[[], None] = lambda: None
    ):
        shapes = sm.trees.prunable(weights)
        self._weights, self._size, self._pause = weights, sum(map(math.prod, shapes.values())), pause

        def bits(packed: jax.Array) -> jax.Array:
            return jnp.unpackbits(packed, axis=1)[:, : self._size].astype(jnp.float32)

        def add(total: jax.Array, alphas: jax.Array, packed: jax.Array) -> jax.Array:
            return total + jnp.dot(alphas, bits(packed), precision=HIGHEST)

        def outputs(total: jax.Array, weights: Tree, images: jax.Array) -> jax.Array:
            parts = _split(total, shapes)
            params = map_with_name(lambda path, w: w * parts[path] if path in parts else w, weights)
            return logits(params, images)

        def entropy(total: jax.Array, weights: Tree, images: jax.Array) -> jax.Array:
            log_p = jax.nn.log_softmax(outputs(total, weights, images) / temperature)
            return -jnp.mean(jnp.sum(jnp.exp(log_p) * log_p, axis=-1))

        def slopes(totals: jax.Array, weights: Tree, images: jax.Array) -> tuple[jax.Array, jax.Array]:
            return jax.vmap(jax.value_and_grad(entropy), in_axes=(0, None, 0))(totals, weights, images)

        def along(slopes: jax.Array, packed: jax.Array) -> jax.Array:
            return jnp.dot(slopes, bits(packed).T, precision=HIGHEST)

        self._bits, self._add, self._along = sm.jit(bits), sm.jit(add, donate_argnums=0), sm.jit(along)
        self._slopes, self._outputs = sm.jit(slopes), sm.jit(jax.vmap(outputs, in_axes=(0, None, 0)))

    def entropies(self, images: np.ndarray, alphas: np.ndarray, packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean entropies in nats [groups], and their gradients with respect to the coefficients [groups, tasks].

        Args:
          images: [groups, n, ...], as `logits` takes them. Images of a group belong together; n may be 1.
          alphas: [groups, tasks], the coefficients of the masks.
          packed: uint8 [tasks, bytes].
        """
        chunks = in_batches(packed, MASKS_AT_ONCE)
        padded = np.zeros((len(alphas), len(chunks) * MASKS_AT_ONCE), np.float32)
        padded[:, : len(packed)] = alphas
        values, gradients = [], []
        for groups, coefficients in zip(*(in_batches(a, GROUPS_AT_ONCE) for a in (images, padded)), strict=True):
            self._pause()
            total = jnp.zeros((GROUPS_AT_ONCE, self._size), jnp.float32)
            for chunk, of_chunk in zip(chunks, np.split(coefficients, len(chunks), axis=1), strict=True):
                total = self._add(total, of_chunk, chunk)
            value, slopes = self._slopes(total, self._weights, groups)
            values.append(np.asarray(value))
            gradients.append(np.concatenate([np.asarray(self._along(slopes, chunk)) for chunk in chunks], axis=1))
        return np.concatenate(values)[: len(images)], np.concatenate(gradients)[: len(images), : len(packed)]

    def logits(self, images: np.ndarray, tasks: np.ndarray, packed: np.ndarray) -> np.ndarray:
        """The outputs [groups, n, outputs] under the masks of one task for each group.

        Args:
          images: [groups, n, ...], as `logits` takes them.
          tasks: int [groups].
          packed: uint8 [tasks, bytes].
        """
        results = []
        for groups, chosen in zip(*(in_batches(a, GROUPS_AT_ONCE) for a in (images, packed[tasks])), strict=True):
            self._pause()
            results.append(np.asarray(self._outputs(self._bits(chosen), self._weights, groups)))
        return np.concatenate(results)[: len(images)]


def infer(superposition: Superposition, images: np.ndarray, packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The tasks inferred by one gradient, and those by binary search: two arrays, int [groups].

    One gradient at equal coefficients infers the task of its steepest descent. Binary search leaves the half of the
    tasks with the steepest descent, and takes the gradient at equal coefficients of those again, until one is left.

    Args:
      superposition: of the network.
      images: [groups, n, ...].
      packed: uint8 [tasks, bytes].
    """
    left, one_shot = np.ones((len(images), len(packed)), bool), np.zeros(len(images), int)
    while (count := int(left[0].sum())) > 1:  # as many in every group
        gradients = superposition.entropies(images, left.astype(np.float32) / count, packed)[1]
        if count == len(packed):
            one_shot = np.argmin(gradients, axis=1)
        order = np.argsort(np.where(left, gradients, np.inf), axis=1, kind="stable")
        left = np.zeros_like(left)
        np.put_along_axis(left, order[:, : (count + 1) // 2], True, axis=1)
    return one_shot, np.argmax(left, axis=1)


def _split(flat: Any, shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """{path: array} of a vector that holds them one after the other."""
    parts, start = {}, 0
    for path, shape in shapes.items():
        size = math.prod(shape)
        parts[path] = flat[start : start + size].reshape(shape)
        start += size
    return parts
