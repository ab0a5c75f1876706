"""Convolutional networks for images of CIFAR's size: Conv2, 4, 6 and 8, and VGG with BatchNorm. No biases."""

import flax.linen as nn
import jax

from supermask_jax.models.mnist import max_pool
from supermask_jax.models.resnet import _conv, _norm

CONV_STAGES = (64, 128, 256, 512)  # channels of each pair of convolutions, each of which ends in max-pooling by 2
VGG_STAGES = {  # convolutions of each of the five stages, by depth
    11: (1, 1, 2, 2, 2),
    16: (2, 2, 3, 3, 3),
    19: (2, 2, 4, 4, 4),
}
VGG_CHANNELS = (64, 128, 256, 512, 512)


def scaled(width: int, factor: float) -> int:
    """Returns a width times a factor, at least 1; a half is rounded to the even number."""
    return max(round(width * factor), 1)


class ConvN(nn.Module):
    """Conv2, Conv4, Conv6 or Conv8; [n, h, w, c] -> [n, classes] logits. No biases and no BatchNorm.

    `depth` / 2 pairs of convolutions 3x3 (SAME) of 64, 128, 256 and 512 channels, each with ReLU, max-pooling by 2
    after each pair, then dense layers of 256, 256 and `classes` units. For images of 32 x 32 x 3, Conv2 has 4,300,992
    weights, Conv4 2,425,024, Conv6 2,261,184 and Conv8 5,275,840.

    Fields:
      classes: the number of logits.
      depth: of convolutions: 2, 4, 6 or 8; ValueError otherwise.
      widen: factor on the widths of all layers but the last.

    Source: Frankle & Carbin 2019, figure 2 (Conv2, 4, 6); Ramanujan et al. 2020, section 4 (Conv8, and the widths).
    """

    classes: int = 10
    depth: int = 4
    widen: float = 1.0

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        stages, odd = divmod(self.depth, 2)
        if odd or not 1 <= stages <= len(CONV_STAGES):
            raise ValueError(f"depth must be 2, 4, 6 or 8, got {self.depth}")
        for channels in CONV_STAGES[:stages]:
            for _ in range(2):
                x = nn.relu(nn.Conv(scaled(channels, self.widen), (3, 3), use_bias=False)(x))
            x = max_pool(x)
        x = x.reshape(x.shape[0], -1)
        for _ in range(2):
            x = nn.relu(nn.Dense(scaled(256, self.widen), use_bias=False)(x))
        return nn.Dense(self.classes, use_bias=False)(x)


class VGG(nn.Module):
    """VGG-11, VGG-16 or VGG-19 with BatchNorm for images of 32 x 32; [n, h, w, c] -> [n, classes] logits.

    Five stages of convolutions 3x3 with BatchNorm and ReLU, of 64, 128, 256, 512 and 512 channels, max-pooling by 2
    after each, the mean over what pixels are left (one, for 32 x 32), and one dense layer of `classes` units, as in the
    CIFAR versions of the network that pruning is studied on. VGG-16 has 14.7 million weights.

    With train=True batches are normalised by their own statistics, and "batch_stats" must be mutable; otherwise by the
    running ones.

    Fields:
      classes: the number of logits.
      depth: 11, 16 or 19; ValueError otherwise.
      widen: factor on the widths of all convolutions.
      affine: whether every BatchNorm has a learned scale, 1 at the start, and a bias, 0 at the start.
      axis_name: under pmap, the axis whose devices normalise together (`parallel.AXIS`); None under jit.

    Source: Simonyan & Zisserman 2015, table 1; for CIFAR as in Tanaka et al. 2020 and Frankle et al. 2020.
    """

    classes: int = 10
    depth: int = 16
    widen: float = 1.0
    affine: bool = False
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        if self.depth not in VGG_STAGES:
            raise ValueError(f"depth must be one of {', '.join(map(str, VGG_STAGES))}, got {self.depth}")
        for stage, (layers, channels) in enumerate(zip(VGG_STAGES[self.depth], VGG_CHANNELS, strict=True)):
            for i in range(layers):
                name = f"stage_{stage}_conv_{i}"
                x = _conv(scaled(channels, self.widen), 3, 1, name)(x)
                x = nn.relu(_norm(train, self.axis_name, self.affine, f"{name}_norm")(x))
            x = max_pool(x)
        return nn.Dense(self.classes, use_bias=False, name="dense")(x.mean(axis=(1, 2)))
