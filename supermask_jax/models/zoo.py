"""The networks by name: each with the paths of its first and its last kernel, which layer densities treat apart."""

from typing import NamedTuple

import flax.linen as nn

from supermask_jax.models import resnet
from supermask_jax.models.cifar_resnet import CifarResNet
from supermask_jax.models.conv import VGG, ConvN, scaled
from supermask_jax.models.mnist import MLP, ConvNet, LeNet300100, MnistConvNet
from supermask_jax.models.wide_resnet import WideCifarResNet


class Architecture(NamedTuple):
    """A network and its two ends."""

    module: nn.Module
    first: str  # the path of the kernel that reads the input: "Conv_0/kernel"
    last: str  # the path of the kernel that makes the logits


def mnist_convnet(classes: int, *, dropout: bool = False) -> Architecture:
    """The edge-popup tutorial's convnet for [n, 28, 28, 1] images, without biases.

    Args:
      classes: the number of logits.
      dropout: whether to drop a quarter of the feature maps and half of the dense units in training, as published.

    Source: simple_mnist_example.py in the released code of Ramanujan et al. 2020.
    """
    module = MnistConvNet(classes, channel_dropout=0.25, dropout=0.5) if dropout else MnistConvNet(classes)
    return Architecture(module, "Conv_0/kernel", "Dense_1/kernel")


def lenet_300_100(classes: int, *, biases: bool = False, dropout: bool = False) -> Architecture:
    """LeNet-300-100: dense layers of 300, 100 and `classes` units.

    Args:
      classes: the number of logits.
      biases: whether the layers have biases.
      dropout: whether to drop half of the hidden units in training.

    Source: LeCun et al. 1998; Frankle & Carbin 2019, figure 2.
    """
    module = LeNet300100(classes, use_bias=biases, dropout=0.5 if dropout else 0.0)
    return Architecture(module, "Dense_0/kernel", "Dense_2/kernel")


def mlp(classes: int, *, width: int = 100, depth: int = 2) -> Architecture:
    """`depth` hidden dense layers of `width` units, and one of `classes` units, without biases.

    Args:
      classes: the number of logits.
      width: units of each hidden layer.
      depth: the number of hidden layers, >= 1.

    Raises:
      ValueError: width or depth below 1.
    """
    hidden = _sizes(width, depth)
    return Architecture(MLP(classes, use_bias=False, hidden=hidden), "Dense_0/kernel", f"Dense_{depth}/kernel")


def cnn(classes: int, *, width: int = 100, depth: int = 2) -> Architecture:
    """`depth` convolutions 3x3 of `width` channels, and a dense layer of `classes` units, without biases.

    Args:
      classes: the number of logits.
      width: channels of each convolution.
      depth: the number of convolutions, >= 1.

    Raises:
      ValueError: width or depth below 1.
    """
    return Architecture(ConvNet(classes, channels=_sizes(width, depth)), "Conv_0/kernel", "Dense_0/kernel")


def conv_n(classes: int, *, depth: int = 4, widen: float = 1.0) -> Architecture:
    """Conv2, Conv4, Conv6 or Conv8 for images of about 32 x 32, without biases and BatchNorm.

    Args:
      classes: the number of logits.
      depth: of convolutions: 2, 4, 6 or 8.
      widen: factor on the widths of all layers but the last.

    Raises:
      ValueError: when the network is initialised, another depth.

    Source: Frankle & Carbin 2019, figure 2; Ramanujan et al. 2020, section 4.
    """
    return Architecture(ConvN(classes, depth=depth, widen=widen), "Conv_0/kernel", "Dense_2/kernel")


def vgg(classes: int, *, depth: int = 16, widen: float = 1.0, affine: bool = False) -> Architecture:
    """VGG-11, 16 or 19 with BatchNorm for images of 32 x 32, without biases.

    Args:
      classes: the number of logits.
      depth: 11, 16 or 19.
      widen: factor on the widths of all convolutions.
      affine: whether BatchNorm has a learned scale and bias, as published.

    Raises:
      ValueError: when the network is initialised, another depth.

    Source: Simonyan & Zisserman 2015, table 1.
    """
    module = VGG(classes, depth=depth, widen=widen, affine=affine)
    return Architecture(module, "stage_0_conv_0/kernel", "dense/kernel")


def wide_resnet(classes: int, *, depth: int = 22, widen: float = 2.0, affine: bool = False) -> Architecture:
    """A wide ResNet for images of about 32 x 32, without biases.

    Args:
      classes: the number of logits.
      depth: 6 n + 4 layers; 16, 22, 28 and 40 are published.
      widen: factor on the widths of the stages: 2 of WRN-22-2.
      affine: whether BatchNorm has a learned scale and bias, as published.

    Raises:
      ValueError: when the network is initialised, the depth is not 6 n + 4.

    Source: Zagoruyko & Komodakis 2016, table 1.
    """
    return _resnet(WideCifarResNet(classes, depth=depth, widen=widen, affine=affine))


def small_resnet_18(classes: int, *, widen: float = 1.0, affine: bool = False) -> Architecture:
    """ResNet-18 for images of about 32 x 32, whose first layers do not shrink them; without biases.

    Args:
      classes: the number of logits.
      widen: factor on the widths of all layers.
      affine: whether BatchNorm has a learned scale and bias, as published.

    Source: He et al. 2016, table 1; the first layers as in the pruning literature on CIFAR.
    """
    return _resnet(resnet.ResNet18(classes, width=scaled(64, widen), affine=affine, small=True))


def cifar_resnet(classes: int, *, depth: int = 20, widen: float = 1.0, affine: bool = False) -> Architecture:
    """A ResNet for images of about 32 x 32, without biases.

    Args:
      classes: the number of logits.
      depth: 6 n + 2 layers, for n blocks in each of three stages; 20, 32, 44, 56 and 110 are published.
      widen: factor on the published widths of 16, 32 and 64 channels.
      affine: whether BatchNorm has a learned scale and bias, as published.

    Raises:
      ValueError: when the network is initialised, the depth is not 6 n + 2.

    Source: He et al. 2016, section 4.2.
    """
    return _resnet(CifarResNet(classes, depth=depth, width=scaled(16, widen), affine=affine))


def resnet_18(classes: int, *, affine: bool = False, biases: bool = False) -> Architecture:
    """ResNet-18 for images of about 224 x 224.

    Args:
      classes: the number of logits.
      affine: whether BatchNorm has a learned scale and bias, as published.
      biases: whether the last layer has a bias, as published.

    Source: He et al. 2016, table 1.
    """
    return _resnet(resnet.ResNet18(classes, affine=affine, bias=biases))


def resnet_34(classes: int, *, affine: bool = False, biases: bool = False) -> Architecture:
    """ResNet-34 for images of about 224 x 224.

    Args:
      classes: the number of logits.
      affine: whether BatchNorm has a learned scale and bias, as published.
      biases: whether the last layer has a bias, as published.

    Source: He et al. 2016, table 1.
    """
    return _resnet(resnet.ResNet34(classes, affine=affine, bias=biases))


def resnet_50(classes: int, *, affine: bool = False, biases: bool = False) -> Architecture:
    """ResNet-50 for images of about 224 x 224.

    Args:
      classes: the number of logits.
      affine: whether BatchNorm has a learned scale and bias, as published.
      biases: whether the last layer has a bias, as published.

    Source: He et al. 2016, table 1.
    """
    return _resnet(resnet.ResNet50(classes, affine=affine, bias=biases))


def resnet_101(classes: int, *, affine: bool = False, biases: bool = False) -> Architecture:
    """ResNet-101 for images of about 224 x 224.

    Args:
      classes: the number of logits.
      affine: whether BatchNorm has a learned scale and bias, as published.
      biases: whether the last layer has a bias, as published.

    Source: He et al. 2016, table 1.
    """
    return _resnet(resnet.ResNet101(classes, affine=affine, bias=biases))


def wide_resnet_50(classes: int, *, affine: bool = False, biases: bool = False) -> Architecture:
    """Wide ResNet-50-2, whose bottlenecks are twice as wide inside, for images of about 224 x 224.

    Args:
      classes: the number of logits.
      affine: whether BatchNorm has a learned scale and bias, as published.
      biases: whether the last layer has a bias, as published.

    Source: Zagoruyko and Komodakis 2016.
    """
    return _resnet(resnet.WideResNet50(classes, affine=affine, bias=biases))


def _resnet(module: nn.Module) -> Architecture:
    return Architecture(module, "conv/kernel", "dense/kernel")


def _sizes(width: int, depth: int) -> tuple[int, ...]:
    if width < 1 or depth < 1:
        raise ValueError(f"width and depth must be at least 1, got width = {width}, depth = {depth}")
    return (width,) * depth
