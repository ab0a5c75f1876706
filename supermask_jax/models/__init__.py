"""Networks to look for subnetworks in. Plain Flax modules: none knows that it may be masked."""

from supermask_jax.models.mnist import LeNet300100, MnistConvNet, max_pool

__all__ = ["LeNet300100", "MnistConvNet", "max_pool"]
