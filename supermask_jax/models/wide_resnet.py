"""Wide residual networks for images of CIFAR's size: WRN-22-2, WRN-28-10 and the like. No biases."""

import flax.linen as nn
import jax

from supermask_jax.models.conv import scaled
from supermask_jax.models.resnet import _conv, _norm

STAGES = 3


class PreactivationBlock(nn.Module):
    """BatchNorm, ReLU, 3x3 (with the stride), BatchNorm, ReLU, 3x3, and the shortcut around them.

    [n, h, w, c] -> [n, h / stride, w / stride, out]. Where the shape changes, the shortcut is a 1x1 convolution of what
    the first ReLU leaves.
    """

    out: int
    stride: int = 1
    affine: bool = False
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        def active(x: jax.Array, name: str) -> jax.Array:
            return nn.relu(_norm(train, self.axis_name, self.affine, name)(x))

        y = active(x, "norm_0")
        changed = x.shape[-1] != self.out or self.stride != 1
        shortcut = _conv(self.out, 1, self.stride, "shortcut")(y) if changed else x
        y = active(_conv(self.out, 3, self.stride, "conv_0")(y), "norm_1")
        return shortcut + _conv(self.out, 3, 1, "conv_1")(y)


class WideCifarResNet(nn.Module):
    """WRN-`depth`-`widen` for images of about 32 x 32; [n, h, w, c] -> [n, classes] logits.

    conv 3x3 of 16 channels, three stages of (depth - 4) / 6 pre-activation blocks of 16, 32 and 64 times `widen`
    channels (the second and third halve the image), BatchNorm, ReLU, mean over all pixels, dense `classes`.

    With train=True batches are normalised by their own statistics, and "batch_stats" must be mutable; otherwise by the
    running ones.

    Fields:
      classes: of the last layer.
      depth: 6 n + 4, the number of layers with weights; ValueError otherwise.
      widen: factor on the widths of the stages.
      affine: whether every BatchNorm has a learned scale, 1 at the start, and a bias, 0 at the start.
      axis_name: under pmap, the axis whose devices normalise together (`parallel.AXIS`); None under jit.

    Source: Zagoruyko & Komodakis 2016, table 1; without dropout.
    """

    classes: int = 10
    depth: int = 22
    widen: float = 2.0
    affine: bool = False
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        blocks, rest = divmod(self.depth - 4, 2 * STAGES)
        if rest or blocks < 1:
            raise ValueError(f"depth must be 6 n + 4 with n >= 1 (16, 22, 28, 40), got {self.depth}")
        x = _conv(16, 3, 1, "conv")(x)
        for stage in range(STAGES):
            for i in range(blocks):
                block = PreactivationBlock(
                    out=scaled(16 * 2**stage, self.widen),
                    stride=2 if stage and not i else 1,
                    affine=self.affine,
                    axis_name=self.axis_name,
                    name=f"stage_{stage}_block_{i}",
                )
                x = block(x, train)
        x = nn.relu(_norm(train, self.axis_name, self.affine, "norm")(x))
        return nn.Dense(self.classes, use_bias=False, name="dense")(x.mean(axis=(1, 2)))
