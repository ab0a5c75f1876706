"""Networks for images of MNIST's size: two from the literature, and two whose width and depth are fields."""

import flax.linen as nn
import jax
import jax.numpy as jnp


def max_pool(x: jax.Array, window: int = 2) -> jax.Array:
    """Returns the maxima of non-overlapping windows; rows and columns that fill no window are dropped.

    It reshapes, because the gradient of `reduce_window` is several times slower on a CPU. Where inputs tie for the
    maximum, the first of them gets the gradient, which PyTorch and `flax.linen.max_pool` do too.

    Args:
      x: [n, h, w, c].
      window: height and width of a window, in pixels.

    Returns:
      [n, h // window, w // window, c].

    Raises:
      ValueError: the image has no window of that size.
    """
    n, h, w, c = x.shape
    if not 1 <= window <= min(h, w):
        raise ValueError(f"an image of {h} x {w} pixels has no window of {window} x {window}: it is too small")
    h, w = h // window, w // window
    return _max_of_windows(x[:, : h * window, : w * window].reshape(n, h, window, w, window, c))


@jax.custom_jvp
def _max_of_windows(x: jax.Array) -> jax.Array:
    return x.max(axis=(2, 4))


@_max_of_windows.defjvp
def _max_of_windows_jvp(primals, tangents):
    """The derivative of max shares between ties, which costs a count and a division more than choosing the first."""
    (x,), (tangent,) = primals, tangents
    out = _max_of_windows(x)
    window = x.shape[2]
    place = jnp.arange(window**2).reshape(1, 1, window, 1, window, 1)
    first = jnp.where(x == out[:, :, None, :, None, :], place, window**2).min(axis=(2, 4), keepdims=True)
    return out, jnp.where(place == first, tangent, 0).sum(axis=(2, 4))


class MLP(nn.Module):
    """Dense layers with ReLU between them; [n, ...] -> [n, classes] logits.

    Fields:
      classes: the number of logits.
      use_bias: whether the layers have biases.
      dropout: the rate of dropout after each hidden layer, in training.
      hidden: the widths of the hidden layers.
    """

    classes: int = 10
    use_bias: bool = True
    dropout: float = 0.0
    hidden: tuple[int, ...] = (100,)

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = x.reshape(x.shape[0], -1)
        for features in self.hidden:
            x = nn.relu(nn.Dense(features, use_bias=self.use_bias)(x))
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(self.classes, use_bias=self.use_bias)(x)


class LeNet300100(MLP):
    """LeNet-300-100: dense 300, ReLU, dense 100, ReLU, dense `classes`; [n, ...] -> [n, classes] logits.

    `hidden` is a field for the smaller network that is left after whole neurons are pruned.

    Source: LeCun et al. 1998; Frankle & Carbin 2019, figure 2.
    """

    hidden: tuple[int, ...] = (300, 100)


class ConvNet(nn.Module):
    """Convolutions 3x3 with ReLU, then one dense layer on 2 x 2 pixels; [n, h, w, c] -> [n, classes] logits.

    Max-pooling by 2 follows the first two convolutions (SAME), and at the end the image is pooled to 2 x 2. There are
    no biases. Most weights are in convolutions, like in networks for larger images.

    Fields:
      classes: the number of logits.
      channels: the width of each convolution.
    """

    classes: int = 10
    channels: tuple[int, ...] = (16, 16)

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        for i, features in enumerate(self.channels):
            x = nn.relu(nn.Conv(features, (3, 3), use_bias=False)(x))
            x = max_pool(x) if i < 2 else x
        x = max_pool(x, x.shape[1] // 2)
        return nn.Dense(self.classes, use_bias=False)(x.reshape(x.shape[0], -1))


class MnistConvNet(nn.Module):
    """The edge-popup tutorial's convnet; [n, 28, 28, 1] -> [n, classes] logits. No biases.

    conv 3x3x32, ReLU, conv 3x3x64, max-pool 2, channel dropout, flatten, dense 128, ReLU, dropout, dense `classes`;
    convolutions are VALID. As published, there is **no ReLU after the second convolution**.

    Fields:
      classes: the number of logits.
      channel_dropout: the rate at which whole feature maps are dropped in training; published: 0.25.
      dropout: the rate at which dense units are dropped in training; published: 0.5. The published code calls Dropout2d
        there, which on a vector is ordinary dropout.
      features: the widths of the hidden layers, for the smaller network that is left after channels and neurons are
        pruned.

    Source: simple_mnist_example.py in the released code of Ramanujan et al. 2020.
    """

    classes: int = 10
    channel_dropout: float = 0.0
    dropout: float = 0.0
    features: tuple[int, int, int] = (32, 64, 128)

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        first, second, dense = self.features
        x = nn.relu(nn.Conv(first, (3, 3), padding="VALID", use_bias=False)(x))
        x = max_pool(nn.Conv(second, (3, 3), padding="VALID", use_bias=False)(x))
        x = nn.Dropout(self.channel_dropout, broadcast_dims=(1, 2), deterministic=not train)(x)
        x = x.reshape(x.shape[0], -1)
        x = nn.relu(nn.Dense(dense, use_bias=False)(x))
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(self.classes, use_bias=False)(x)
