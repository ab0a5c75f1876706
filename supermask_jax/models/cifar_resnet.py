"""Residual networks for images of CIFAR's size: ResNet-20, 32, 44, 56 and 110.

Layers have no biases. By default BatchNorm has no learned scale and bias either, so that all weights are kernels;
`affine=True` adds both, as published. The published last layer has a bias; here it has none.
Batch statistics are the collection "batch_stats", to be carried as `model_state`.

Source: He et al. 2016, section 4.2.
"""

import flax.linen as nn
import jax

from supermask_jax.models.resnet import Block, _conv, _norm

STAGES = 3


class CifarResNet(nn.Module):
    """ResNet of `depth` layers for images of about 32 x 32; [n, h, w, c] -> [n, classes] logits.

    conv 3x3, three stages of (depth - 2) / 6 basic blocks (`width`, twice and four times that wide; the second and
    third halve the image), mean over all pixels, dense `classes`. Where a block changes the shape, its shortcut has no
    weights (option A, as published for CIFAR): every second pixel, and zeros as the added channels, which are the last.

    With train=True batches are normalised by their own statistics, and "batch_stats" must be mutable; otherwise by the
    running ones.

    Fields:
      classes: of the last layer.
      depth: 6 n + 2, the number of layers with weights; ValueError otherwise.
      width: channels after the first convolution, and of the first stage.
      affine: whether every BatchNorm has a learned scale, 1 at the start, and a bias, 0 at the start.
      axis_name: under pmap, the axis whose devices normalise together (`parallel.AXIS`); None under jit, where a
        batch on a mesh is normalised as a whole anyway.

    Source: He et al. 2016, section 4.2.
    """

    classes: int = 10
    depth: int = 20
    width: int = 16
    affine: bool = False
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        blocks, rest = divmod(self.depth - 2, 2 * STAGES)
        if rest or blocks < 1:
            raise ValueError(f"depth must be 6 n + 2 with n >= 1 (20, 32, 44, 56, 110), got {self.depth}")
        x = nn.relu(_norm(train, self.axis_name, self.affine, "norm")(_conv(self.width, 3, 1, "conv")(x)))
        for stage in range(STAGES):
            for i in range(blocks):
                block = Block(
                    out=self.width * 2**stage,
                    stride=2 if stage and not i else 1,
                    axis_name=self.axis_name,
                    affine=self.affine,
                    shortcut="pad",
                    name=f"stage_{stage}_block_{i}",
                )
                x = block(x, train)
        return nn.Dense(self.classes, use_bias=False, name="dense")(x.mean(axis=(1, 2)))


class ResNet20(CifarResNet):
    """ResNet-20 for CIFAR: three basic blocks in each of three stages; 0.27 million weights. Source: He et al. 2016."""


class ResNet32(CifarResNet):
    """ResNet-32 for CIFAR: five basic blocks in each of three stages; 0.46 million weights. Source: He et al. 2016."""

    depth: int = 32


class ResNet44(CifarResNet):
    """ResNet-44 for CIFAR: seven basic blocks in each of three stages; 0.66 million weights. Source: He et al. 2016."""

    depth: int = 44


class ResNet56(CifarResNet):
    """ResNet-56 for CIFAR: nine basic blocks in each of three stages; 0.85 million weights. Source: He et al. 2016."""

    depth: int = 56


class ResNet110(CifarResNet):
    """ResNet-110 for CIFAR: 18 basic blocks in each of three stages; 1.7 million weights. Source: He et al. 2016."""

    depth: int = 110
