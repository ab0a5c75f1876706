"""Networks to look for subnetworks in."""

from supermask_jax.models.mnist import MLP, ConvNet, LeNet300100, MnistConvNet, max_pool

__all__ = ["MLP", "ConvNet", "LeNet300100", "MnistConvNet", "max_pool"]
