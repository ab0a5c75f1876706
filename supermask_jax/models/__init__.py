"""Networks to look for subnetworks in."""

from supermask_jax.models.mnist import MLP, ConvNet, LeNet300100, MnistConvNet, max_pool
from supermask_jax.models.resnet import ResNet, ResNet18, ResNet50, WideResNet50

__all__ = [
    "MLP",
    "ConvNet",
    "LeNet300100",
    "MnistConvNet",
    "ResNet",
    "ResNet18",
    "ResNet50",
    "WideResNet50",
    "max_pool",
]
