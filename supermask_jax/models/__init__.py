"""Networks to find subnetworks in, as Flax Linen modules. `zoo` has them by name."""

from supermask_jax.models import zoo
from supermask_jax.models.cifar_resnet import CifarResNet, ResNet20, ResNet32, ResNet44, ResNet56, ResNet110
from supermask_jax.models.conv import VGG, ConvN
from supermask_jax.models.mnist import MLP, ConvNet, LeNet300100, MnistConvNet, max_pool
from supermask_jax.models.resnet import ResNet, ResNet18, ResNet34, ResNet50, ResNet101, WideResNet50
from supermask_jax.models.wide_resnet import WideCifarResNet

__all__ = [
    "MLP",
    "VGG",
    "CifarResNet",
    "ConvN",
    "ConvNet",
    "LeNet300100",
    "MnistConvNet",
    "ResNet",
    "ResNet18",
    "ResNet20",
    "ResNet32",
    "ResNet34",
    "ResNet44",
    "ResNet50",
    "ResNet56",
    "ResNet101",
    "ResNet110",
    "WideCifarResNet",
    "WideResNet50",
    "max_pool",
    "zoo",
]
