"""Images on the device: moved at random, and normalised."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import jax


def random_shift(key: "jax.Array", images: "jax.Array", pixels: int, border: str = "zero") -> "jax.Array":
    """Images [n, h, w, c], each moved by its own whole number of pixels in [-pixels, pixels] per axis.

    What moves in is 0, or with border "reflect" the image, mirrored at its border.
    """
    import jax
    import jax.numpy as jnp

    mode = "reflect" if border == "reflect" else "constant"
    padded = jnp.pad(images, ((0, 0), (pixels, pixels), (pixels, pixels), (0, 0)), mode=mode)
    corners = jax.random.randint(key, (len(images), 2), 0, 2 * pixels + 1)
    return jax.vmap(lambda image, at: jax.lax.dynamic_slice(image, (*at, 0), images.shape[1:]))(padded, corners)


def random_flip(key: "jax.Array", images: "jax.Array") -> "jax.Array":
    """Images [n, h, w, c], each mirrored left to right with probability 1/2."""
    import jax
    import jax.numpy as jnp

    flipped = jax.random.bernoulli(key, shape=(len(images), 1, 1, 1))
    return jnp.where(flipped, images[:, :, ::-1], images)


def flip_where(images: "jax.Array", flipped: "jax.Array") -> "jax.Array":
    """Images [n, h, w, c], mirrored left to right where `flipped`, bool [n], is true."""
    import jax.numpy as jnp

    return jnp.where(flipped[:, None, None, None], images[:, :, ::-1], images)


def random_cutout(key: "jax.Array", images: "jax.Array", size: int) -> "jax.Array":
    """Images [n, h, w, c], each with a square of `size` pixels set to 0. Its middle is any pixel, so that part of it
    may lie outside. Source: DeVries & Taylor 2017."""
    import jax
    import jax.numpy as jnp

    n, h, w, _ = images.shape
    middles = jax.random.randint(key, (n, 2), 0, jnp.array([[h, w]]))
    rows, columns = (jnp.arange(length)[None] - (middles[:, i, None] - size // 2) for i, length in enumerate((h, w)))
    inside = ((rows >= 0) & (rows < size))[:, :, None] & ((columns >= 0) & (columns < size))[:, None, :]
    return jnp.where(inside[..., None], jnp.zeros((), images.dtype), images)


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
