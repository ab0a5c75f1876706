"""Images on the device: moved at random, and normalised."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import jax


def random_shift(key: "jax.Array", images: "jax.Array", pixels: int) -> "jax.Array":
    """Images [n, h, w, c], each moved by its own whole number of pixels in [-pixels, pixels] per axis; 0 moves in."""
    import jax
    import jax.numpy as jnp

    padded = jnp.pad(images, ((0, 0), (pixels, pixels), (pixels, pixels), (0, 0)))
    corners = jax.random.randint(key, (len(images), 2), 0, 2 * pixels + 1)
    return jax.vmap(lambda image, at: jax.lax.dynamic_slice(image, (*at, 0), images.shape[1:]))(padded, corners)


def normalise(images: "jax.Array", mean: Sequence[float], std: Sequence[float], white: float = 255) -> "jax.Array":
    """Images [..., c] as float32, scaled from [0, white] to [0, 1], then by the mean and deviation of each channel.

    `mean` and `std` are those of a `Dataset`, with one number for each channel.
    """
    import jax.numpy as jnp

    def of_channels(numbers: Sequence[float]) -> float | np.ndarray:
        if len(numbers) == 1:
            return float(numbers[0])  # a constant of the compiled step, to which no array would add anything
        return np.array(numbers, np.float32).reshape((1,) * (images.ndim - 1) + (-1,))

    return (images.astype(jnp.float32) / white - of_channels(mean)) / of_channels(std)
