"""Residual networks for images of ImageNet's size, as Ramanujan et al. 2020 use them.

By default layers have no biases, and BatchNorm has no learned scale and bias, so that all weights are kernels.
`affine=True` adds both to BatchNorm, `bias=True` a bias to the last layer; with both, the networks are those of
torchvision. Batch statistics are the collection "batch_stats", to be carried as `model_state`.

Two things differ from the released code. The last layer is a dense kernel (in, out) instead of a 1x1 convolution on one
pixel, which has the same weights. Running variances average the variance of the batch as it is; PyTorch first
multiplies it by n / (n - 1).
Source: He et al. 2016, with the stride in the 3x3 convolution of a bottleneck; Zagoruyko and Komodakis 2016 (Wide);
models/resnet.py in the released code of Ramanujan et al. 2020.
"""

from functools import partial
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp


class Block(nn.Module):
    """Convolutions and the shortcut around them; [n, h, w, c] -> [n, h / stride, w / stride, out].

    A basic block is 3x3 (with the stride), 3x3, both `out` wide. A bottleneck is 1x1, 3x3 (with the stride), both
    `inner` wide, then 1x1 to `out`. Where input and output differ in shape, the shortcut is a projection (a 1x1
    convolution with the stride, and BatchNorm), or, with shortcut "pad", it has no weights: every stride-th pixel of
    the input, and zeros in the channels that it lacks.
    """

    out: int
    inner: int | None = None  # None: a basic block
    stride: int = 1
    axis_name: str | None = None
    affine: bool = False  # whether BatchNorm has a learned scale and bias
    shortcut: Literal["projection", "pad"] = "projection"

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        norm = partial(_norm, train, self.axis_name, self.affine)
        shortcut = x
        if x.shape[-1] != self.out or self.stride != 1:
            if self.shortcut == "pad":
                lacking = self.out - x.shape[-1]
                shortcut = jnp.pad(x[:, :: self.stride, :: self.stride], [(0, 0)] * 3 + [(0, lacking)])
            else:
                shortcut = norm("shortcut_norm")(_conv(self.out, 1, self.stride, "shortcut")(x))
        layers = [(self.out, 3, self.stride), (self.out, 3, 1)]
        if self.inner is not None:
            layers = [(self.inner, 1, 1), (self.inner, 3, self.stride), (self.out, 1, 1)]
        for i, (features, size, stride) in enumerate(layers):
            x = nn.relu(x) if i else x
            x = norm(f"norm_{i}")(_conv(features, size, stride, f"conv_{i}")(x))
        return nn.relu(x + shortcut)


class ResNet(nn.Module):
    """ResNet for images of about 224 x 224; [n, h, w, 3] -> [n, classes] logits.

    conv 7x7 with stride 2, max-pool 3x3 with stride 2 (for `small` images, conv 3x3 alone), the stages, mean over all
    pixels, dense `classes`. Stage i has `blocks[i]` blocks `width * 2**i` wide (a bottleneck's output four times that);
    all but the first halve the image.
    With train=True batches are normalised by their own statistics, and "batch_stats" must be mutable; otherwise by the
    running ones.

    Fields:
      classes: of the last layer.
      blocks: how many in each stage.
      bottleneck: whether blocks are bottlenecks.
      width: channels after the first convolution, and of the first stage.
      widen: factor on the inner width of bottlenecks; 2 for the Wide ones.
      axis_name: under pmap, the axis whose devices normalise together (`parallel.AXIS`); None under jit, where a
        batch on a mesh is normalised as a whole anyway.
      affine: whether every BatchNorm has a learned scale, 1 at the start, and a bias, 0 at the start.
      small: whether images are about 32 x 32, as CIFAR's: then the first layers do not shrink them.
      bias: whether the last layer has a bias, 0 at the start.

    Source: He et al. 2016, table 1.
    """

    classes: int = 1000
    blocks: tuple[int, ...] = (2, 2, 2, 2)
    bottleneck: bool = False
    width: int = 64
    widen: int = 1
    axis_name: str | None = None
    affine: bool = False
    small: bool = False
    bias: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        stem = _conv(self.width, 3, 1, "conv") if self.small else _conv(self.width, 7, 2, "conv")
        x = nn.relu(_norm(train, self.axis_name, self.affine, "norm")(stem(x)))
        if not self.small:
            x = nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))
        for stage, blocks in enumerate(self.blocks):
            width = self.width * 2**stage
            out, inner = (4 * width, width * self.widen) if self.bottleneck else (width, None)
            for i in range(blocks):
                stride = 2 if stage and not i else 1
                block = Block(out, inner, stride, self.axis_name, self.affine, name=f"stage_{stage}_block_{i}")
                x = block(x, train)
        return nn.Dense(self.classes, use_bias=self.bias, name="dense")(x.mean(axis=(1, 2)))


class ResNet18(ResNet):
    """ResNet-18: two basic blocks in each of four stages; 11.7 million weights. Source: He et al. 2016."""


class ResNet34(ResNet):
    """ResNet-34: 3, 4, 6 and 3 basic blocks; 21.8 million weights. Source: He et al. 2016."""

    blocks: tuple[int, ...] = (3, 4, 6, 3)


class ResNet50(ResNet):
    """ResNet-50: 3, 4, 6 and 3 bottlenecks; 25.5 million weights. Source: He et al. 2016."""

    blocks: tuple[int, ...] = (3, 4, 6, 3)
    bottleneck: bool = True


class ResNet101(ResNet):
    """ResNet-101: 3, 4, 23 and 3 bottlenecks; 44.4 million weights. Source: He et al. 2016."""

    blocks: tuple[int, ...] = (3, 4, 23, 3)
    bottleneck: bool = True


class WideResNet50(ResNet50):
    """Wide ResNet-50-2: bottlenecks twice as wide inside; 68.8 million weights.

    Source: Zagoruyko and Komodakis 2016.
    """

    widen: int = 2


def _conv(features: int, size: int, stride: int, name: str) -> nn.Conv:
    """Without a bias, padded alike on all sides; SAME would pad a stride of 2 on one side only."""
    edge = (size // 2, size // 2)
    return nn.Conv(features, (size, size), (stride, stride), padding=(edge, edge), use_bias=False, name=name)


def _norm(train: bool, axis_name: str | None, affine: bool, name: str) -> nn.BatchNorm:
    """PyTorch's settings: 0.1 of a running statistic is new, and 1e-5 is added to variances."""
    return nn.BatchNorm(
        not train,
        momentum=0.9,
        epsilon=1e-5,
        use_scale=affine,
        use_bias=affine,
        axis_name=axis_name if train else None,
        name=name,
    )
