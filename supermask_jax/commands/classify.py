"""`run`: the classes that a network sees in images."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from supermask_jax.backend import jit
from supermask_jax.commands import images as reading
from supermask_jax.commands import networks, opened
from supermask_jax.commands.answers import USAGE, Answer, Failure
from supermask_jax.trees import nested

Variables = dict[str, Any]
BATCH = 250  # images


def run(
    argument: str,
    *,
    images: str,
    labels: str | None,
    top: int,
    quiet: bool,
    base: str | None,
    max_bytes: int | None,
) -> Answer:
    """Returns a line for each image: its name, and the most probable classes with their probabilities.

    Args:
      argument: FILE, or FILE:NAME for one of several masks.
      images: a directory of images, an image file, or an IDX file.
      labels: an IDX file of labels. With it, the last line is the accuracy.
      top: how many classes to name.
      quiet: whether only the accuracy is wanted.
      base: a .safetensors or .npz file of the weights, for masks on somebody else's network.
      max_bytes: what the network may take in memory, or None.

    Raises:
      Failure: a file is damaged; the network is none of the zoo; the images do not fit the network.
      OSError: a file cannot be read.
    """
    if quiet and labels is None:
        raise Failure("--quiet without --labels would print nothing", USAGE)
    file = opened.read(argument, max_bytes)
    loaded = opened.load(file, None if base is None else opened.base_weights(base, file))
    network = networks.build(loaded, file.path)
    if not 1 <= top <= network.classes:
        raise Failure(f"--top must be from 1 to {network.classes}, the number of classes, got {top}", USAGE)
    found = reading.images(images, network.image_shape)
    right = None if labels is None else reading.labels(labels, len(found.names), network.classes)
    variables = {"params": nested(loaded.subnetwork()), **nested(loaded.state)}
    return Answer(_lines(network, variables, found, right, top, quiet))


def _lines(
    network: networks.Network,
    variables: Variables,
    found: reading.Images,
    labels: np.ndarray | None,
    top: int,
    quiet: bool,
) -> Iterator[str]:
    probabilities = _probabilities(network, variables, min(BATCH, len(found.names)))
    seen = correct = 0
    for batch in found.batches(BATCH):
        of_images = probabilities(batch)
        best = np.argsort(-of_images, axis=-1, kind="stable")[:, :top]
        for i, (classes, row) in enumerate(zip(best, of_images, strict=True)):
            if not quiet:
                told = (f"{number}\t{row[number]:.4f}" for number in classes)
                yield "\t".join([found.names[seen + i], *told])
        if labels is not None:
            correct += int(np.count_nonzero(best[:, 0] == labels[seen : seen + len(batch)]))
        seen += len(batch)
    if labels is not None:
        yield f"accuracy {correct / seen:.2%}: {correct} of {seen} images"


def _probabilities(network: networks.Network, variables: Variables, size: int) -> Callable[[np.ndarray], np.ndarray]:
    """uint8 [n, h, w, c], n <= size -> float32 [n, classes]. It is compiled once, for `size` images."""
    mean, std = (np.array(numbers, np.float32).reshape(1, 1, 1, -1) for numbers in (network.mean, network.std))

    @jit
    def compiled(variables: Variables, images: jax.Array) -> jax.Array:
        normalised = (images.astype(jnp.float32) / 255 - mean) / std
        if network.bfloat16:
            params, normalised = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), (variables["params"], normalised))
            variables = variables | {"params": params}
        logits: Any = network.module.apply(variables, normalised)
        return jax.nn.softmax(logits.astype(jnp.float32))

    def probabilities(images: np.ndarray) -> np.ndarray:
        padded = np.zeros((size, *images.shape[1:]), np.uint8)
        padded[: len(images)] = images
        return np.asarray(compiled(variables, jnp.asarray(padded)))[: len(images)]

    return probabilities
